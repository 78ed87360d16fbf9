"""The checks of the coverage run for one architecture with one family of blocks."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import torch as safetensors
from torch import nn

import attnsurgery
from attnsurgery.blocks import BLOCKS
from attnsurgery.errors import UsageError
from attnsurgery.surgery.operate import grafted_blocks
from attnsurgery.timm_plugin.architectures import weightless
from scripts.coverage_hosts import Base, Tensors, describe, equal, flat, forward, gradients, wrap
from scripts.coverage_weights import Noise, calibrate_norms, fan_in, skip_initial_values, weights_at_load

SUFFIXES = tuple(BLOCKS[name].model_suffix for name in BLOCKS if BLOCKS[name].model_suffix)

TRUE_REFUSALS = ("positions do not lie as in the image",)
"""Parts of the messages by which a pair is refused rightly. Any other error is a failure."""


class CheckFailure(Exception):
    """A check has failed."""


class TimeLimit(BaseException):
    """A pair exceeded its time limit. It is no Exception, so that no `except Exception` catches it."""


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise CheckFailure(message)


class Subject:
    """One base after surgery, built by name; the checks change it in the order of CHECKS."""

    def __init__(self, base: Base, suffix: str, by_default: bool = True) -> None:
        self.base = base
        self.by_default = by_default
        self.name = f"{base.arch}_{suffix}"
        self.model: nn.Module
        self.kinds: dict[str, nn.Module] = {}
        self.output: Tensors = []

    def build(self, **arguments: Any) -> nn.Module:
        with skip_initial_values() as counter:
            model = self.base.build(self.name, **arguments)
        # blocks that are built elsewhere would have no initial values
        expect(counter.blocks >= len(grafted_blocks(model)), "blocks were built without their initial values")
        return model

    @property
    def blocks(self) -> dict[str, nn.Module]:
        return dict(grafted_blocks(self.model))


def plan(subject: Subject) -> None:
    """The name is a model of timm, at its default size of images too, and the model has a block."""
    if subject.by_default:
        expect(len(grafted_blocks(weightless(subject.name))) > 0, "no block was put in")
    subject.model = subject.build()
    expect(len(subject.blocks) > 0, "no block was put in")


def keys(subject: Subject) -> None:
    """The base's state dict loads strictly; new keys are those of blocks alone; a part of a block is an error."""
    base, model = subject.base, subject.model
    base_shapes = {key: value.shape for key, value in base.state.items()}
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    missing = [key for key in base_shapes if shapes.get(key) != base_shapes[key]]
    expect(not missing, f"{len(missing)} keys of the base are missing or have another shape, as {missing[:2]}")
    prefixes = tuple(f"{path}." for path in subject.blocks)
    unexpected = [key for key in shapes if key not in base_shapes and not key.startswith(prefixes)]
    expect(not unexpected, f"{len(unexpected)} keys are neither the base's nor a block's, as {unexpected[:2]}")
    model.load_state_dict(base.state, strict=True)
    dropped_key = next(
        (
            block_keys[0]
            for prefix in prefixes
            if len(
                block_keys := [
                    key for key in shapes if key.startswith(prefix) and not key.endswith("num_batches_tracked")
                ]
            )
            > 1
        ),
        None,
    )
    if dropped_key is None:
        return
    state = model.state_dict()
    del state[dropped_key]
    try:
        model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        expect(dropped_key in str(error), f"a checkpoint without {dropped_key!r} raises something else: {error}")
    else:
        raise CheckFailure(f"a checkpoint without {dropped_key!r} loads")


def identity(subject: Subject) -> None:
    """The outputs equal the base's bit for bit, and every block runs exactly once."""
    calls: dict[str, int] = {}
    with torch.no_grad(), count_runs(subject.model, calls):
        output, inner = forward(subject.model, subject.base.images)
    # if forward does not call forward_features, both were run
    repeated = {path: count for path, count in calls.items() if count != 1}
    all_twice = set(repeated.values()) == {2} and len(repeated) == len(subject.blocks)
    expect(
        not repeated or (all_twice and not _calls_features(subject.base)),
        f"runs of blocks in one forward: {_listed(repeated)}",
    )
    expect(equal(output, subject.base.output), "outputs differ at the identity start")
    expect(equal(inner, subject.base.features), "forward_features differs at the identity start")


def features_only(subject: Subject) -> None:
    """`features_only=True` gives the base's features; some block runs, and none twice; they depend on the blocks."""
    base = subject.base
    if base.features_only is None:
        return
    with weights_at_load(base.state):
        model = subject.build(features_only=True, pretrained=True)
    same_features(model, base.images, base.features_only, "default")
    move(model)
    moved_features(model, base.images, base.features_only, "default")


def feature_classes(subject: Subject) -> None:
    """The same for every feature class that supports the base, with all of its indices."""
    base = subject.base
    failures = []
    for kind, expected in base.kinds.items():
        try:
            model = wrap(subject.model, kind)
            same_features(model, base.images, expected, kind)
            subject.kinds[kind] = model
        except TimeLimit:
            raise
        except Exception as error:
            failures.append(error_text(error) if isinstance(error, CheckFailure) else f"{kind}: {error_text(error)}")
    expect(not failures, "; ".join(failures))


def moved(subject: Subject) -> None:
    """Perturbing the blocks' parameters changes the output or, if no block affects it, forward_features."""
    base = subject.base
    move(subject.model)
    with torch.no_grad():
        subject.output, inner = forward(subject.model, base.images)
    if base.meta:
        return
    expect(all(bool(torch.isfinite(tensor).all()) for tensor in subject.output), "outputs are not finite once moved")
    changed = not equal(subject.output, base.output) or not equal(inner, base.features)
    expect(changed, "nothing differs once the blocks' parameters are moved")
    while subject.kinds:
        kind, model = subject.kinds.popitem()
        moved_features(model, base.images, base.kinds[kind], kind)


def backward(subject: Subject) -> None:
    """All parameters of blocks get a gradient, all blocks affect an output, and the base keeps its gradients."""
    base, model = subject.base, subject.model
    prefixes = [f"{path}." for path in subject.blocks]
    block_parameters = {name for name, _ in model.named_parameters() if name.startswith(tuple(prefixes))}
    state = {name: buffer.clone() for name, buffer in model.named_buffers()}
    if not base.meta:
        # with perturbed gates the norms need new statistics, otherwise activations of deep networks would explode
        with torch.no_grad(), calibrate_norms(model):
            model(base.images)
    reached, nonzero = gradients(model, base.images, lambda model, images: forward(model, images)[0])
    missing = sorted(base.reached - reached)
    expect(not missing, f"{len(missing)} base parameters get no gradient any more, as {missing[:2]}")
    # a head may read the class token alone: then the features, or the intermediates, depend on the last blocks
    other_outputs = [lambda model, images: forward(model, images)[1]]
    if hasattr(model, "forward_intermediates"):
        other_outputs.append(lambda model, images: flat(model.forward_intermediates(images)))
    for outputs_of in other_outputs:
        if not block_parameters <= reached or not all(
            any(name.startswith(prefix) for name in nonzero) for prefix in prefixes
        ):
            more_reached, more_nonzero = gradients(model, base.images, outputs_of)
            reached, nonzero = reached | more_reached, nonzero | more_nonzero
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(state[name])
    if not all(any(name.startswith(prefix) for name in nonzero) for prefix in prefixes):
        # perturbed blocks may saturate a gate of the base, which then has no gradient: repeat with the initial values
        initial = subject.build().state_dict()
        with torch.no_grad():
            moved_state = {
                name: value.clone() for name, value in model.state_dict().items() if name.startswith(tuple(prefixes))
            }
            model.load_state_dict({name: initial[name] for name in moved_state}, strict=False)
            nonzero = nonzero | gradients(model, base.images, lambda model, images: forward(model, images)[0])[1]
            model.load_state_dict(moved_state, strict=False)
    without_gradient = sorted(block_parameters - reached)
    expect(
        not without_gradient, f"{len(without_gradient)} parameters of blocks get no gradient, as {without_gradient[:2]}"
    )
    unused = [prefix for prefix in prefixes if not any(name.startswith(prefix) for name in nonzero)]
    expect(not unused, f"{len(unused)} of {len(prefixes)} blocks affect no output, as {unused[:2]}")


def round_trip(subject: Subject) -> None:
    """A safetensors checkpoint, loaded strictly by a new surgical model, gives the same outputs."""
    state = subject.model.state_dict()
    if subject.base.meta:
        rebuilt = subject.build()
        shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (subject.model, rebuilt)]
        expect(shapes[0] == shapes[1], "a second model has other keys or shapes")
        return
    data = safetensors.save(_without_sharing(state))
    del state
    subject.model = nn.Identity()  # its memory is needed
    loaded = safetensors.load(data)
    del data
    rebuilt = subject.build()
    rebuilt.load_state_dict(loaded, strict=True, assign=True)
    with torch.no_grad():
        expect(equal(forward(rebuilt, subject.base.images)[0], subject.output), "outputs differ after save and load")
    subject.model = rebuilt


def removal(subject: Subject) -> None:
    """attnsurgery.remove restores the base: class, keys, bits."""
    model, base = attnsurgery.remove(subject.model), subject.base
    expect(type(model) is type(base.model), f"the class is {type(model).__name__} and not {type(base.model).__name__}")
    expect(list(model.state_dict()) == list(base.state), "the keys, or their order, are not the base's")
    expect(
        [type(m) for m in model.modules()] == [type(m) for m in base.model.modules()], "some class is not the base's"
    )
    with torch.no_grad():
        expect(equal(forward(model, base.images)[0], base.output), "outputs differ from the base's")


CHECKS: dict[str, Callable[[Subject], None]] = {
    check.__name__: check
    for check in (
        plan,
        keys,
        identity,
        features_only,
        feature_classes,
        moved,
        backward,
        round_trip,
        removal,
    )
}


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeLimit(f"stopped after {seconds:.0f} s")

    handler = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def examine(base: Base, suffix: str, limit: float = 600, by_default: bool = True) -> dict[str, Any]:
    """One row of the results, with the result of each check; after a fatal failure the other checks are skipped.

    Args:
        base: the base.
        suffix: the family of blocks.
        limit: time limit in seconds.
        by_default: also plan the model at its default size of images.
    """
    start = time.perf_counter(), time.process_time()
    subject = Subject(base, suffix, by_default)
    row: dict[str, Any] = {"block": suffix, "outcome": "passed", **describe(base), "blocks": 0, "checks": {}}
    fatal = {"plan", "keys"}
    try:
        with time_limit(limit):
            for name, check in CHECKS.items():
                try:
                    check(subject)
                    row["checks"][name] = "passed"
                except TimeLimit:
                    raise
                except Exception as error:
                    row["checks"][name] = error_text(error)
                    row["outcome"] = "refused" if name == "plan" and is_refusal(error) else "failed"
                    if name in fatal:
                        break
                if name == "plan":
                    row["blocks"] = len(subject.blocks)
    except TimeLimit as error:
        row["outcome"], row["checks"]["time"] = "failed", error_text(error)
    row["seconds"] = round(time.perf_counter() - start[0], 2)
    row["cpu_seconds"] = round(time.process_time() - start[1], 2)
    return row


def is_refusal(error: Exception) -> bool:
    return isinstance(error, UsageError) and any(part in str(error) for part in TRUE_REFUSALS)


def base_failure(block: str, error: Exception) -> dict[str, Any]:
    """The row of a pair whose base failed, so that no check ran."""
    return {"block": block, "outcome": "failed", "blocks": 0, "checks": {"base": error_text(error)}, "seconds": 0}


def error_text(error: Exception) -> str:
    text = " ".join(str(error).split())[:400]
    return text if isinstance(error, CheckFailure) else f"{type(error).__name__}: {text}"


@torch.no_grad()
def move(model: nn.Module) -> None:
    """Perturb every parameter of every block, enough to change outputs without saturating gates."""
    noise = Noise(5, 65537)
    for block in grafted_blocks(model).values():
        for parameter in block.parameters():
            if not parameter.is_meta:
                change = torch.empty(parameter.shape)
                noise.fill(change, 0.2 if parameter.ndim < 2 else 0.3 / math.sqrt(fan_in(parameter)))
                parameter += change


@contextmanager
def count_runs(model: nn.Module, calls: dict[str, int]) -> Iterator[None]:
    """A context that counts in `calls` how often each block runs."""

    def count(path: str) -> Any:
        calls[path] = 0

        def hook(*_: Any) -> None:
            calls[path] += 1

        return hook

    handles = [block.register_forward_hook(count(path)) for path, block in grafted_blocks(model).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def same_features(model: nn.Module, images: torch.Tensor, expected: Tensors, kind: str) -> None:
    calls: dict[str, int] = {}
    with count_runs(model, calls):
        features = flat(model(images))
    shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (features, expected)]
    expect(shapes[0] == shapes[1], f"{kind}: shapes {shapes[0]} and not {shapes[1]}")
    expect(equal(features, expected), f"{kind}: features differ at the identity start")
    if not calls and kind == "fx":
        return  # a graph has no modules; that the blocks are in it shows once they are perturbed
    repeated = {path: count for path, count in calls.items() if count > 1}
    expect(not repeated, f"{kind}: runs of blocks: {_listed(repeated)}")
    expect(sum(calls.values()) > 0, f"{kind}: none of {len(calls)} blocks runs")


@torch.no_grad()
def moved_features(model: nn.Module, images: torch.Tensor, before: Tensors, kind: str) -> None:
    if not images.is_meta:
        expect(not equal(flat(model(images)), before), f"{kind}: no feature differs once the blocks are moved")


def _calls_features(base: Base) -> bool:
    calls: list[int] = []
    inner = base.model.forward_features
    base.model.forward_features = lambda *args, **kwargs: (calls.append(1), inner(*args, **kwargs))[1]
    try:
        with torch.no_grad():
            base.model(base.images)
    finally:
        del base.model.forward_features
    return bool(calls)


def _without_sharing(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict with copies of tensors that share memory, such as tied weights, which the format cannot store."""
    addresses: set[int] = set()
    tensors: dict[str, torch.Tensor] = {}
    for key, tensor in state.items():
        address = tensor.untyped_storage().data_ptr()
        tensors[key] = tensor.clone() if address in addresses else tensor.contiguous()
        addresses.add(address)
    return tensors


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{path} {count}" for path, count in list(counts.items())[:3]) or "none"
