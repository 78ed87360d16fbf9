"""What the coverage run asks of one architecture with one family of blocks; each question is one check of CHECKS."""

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
from scripts.coverage_hosts import Base, Tensors, describe, equal, flat, forward, gradients, wrapped
from scripts.coverage_weights import Noise, fan_in, settling, swift, weights_at_load

SUFFIXES = tuple(BLOCKS[name].model_suffix for name in BLOCKS if BLOCKS[name].model_suffix)

TRUE_REFUSALS = ("positions do not lie as in the image",)
"""Parts of the messages by which a pair is refused for what it is. Any other error is a failure, ours or not."""


class Wrong(Exception):
    """A check found something else than it should."""


class TimeLimit(BaseException):
    """A pair took longer than it may. No `except Exception` on the way shall swallow that."""


def expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Wrong(otherwise)


class Subject:
    """One base under surgery: built by name, and changed by the checks in the order in which they stand in CHECKS."""

    def __init__(self, base: Base, suffix: str, by_default: bool = True) -> None:
        self.base = base
        self.by_default = by_default
        self.name = f"{base.arch}_{suffix}"
        self.model: nn.Module
        self.kinds: dict[str, nn.Module] = {}
        self.output: Tensors = []

    def build(self, **more: Any) -> nn.Module:
        with swift() as built:
            model = self.base.build(self.name, **more)
        # were blocks built elsewhere one day, they would come without their initial values
        expect(built.blocks >= len(grafted_blocks(model)), "blocks were built past the eyes of this script")
        return model

    @property
    def blocks(self) -> dict[str, nn.Module]:
        return dict(grafted_blocks(self.model))


def plan(subject: Subject) -> None:
    """The name is a model of timm's, at the size of images that it has by default too, and there is a block in it."""
    if subject.by_default:
        expect(len(grafted_blocks(weightless(subject.name))) > 0, "no block was put in")
    subject.model = subject.build()
    expect(len(subject.blocks) > 0, "no block was put in")


def keys(subject: Subject) -> None:
    """The base's state dict loads strictly; its keys are all there, what is new is the blocks'; half a block raises."""
    base, model = subject.base, subject.model
    theirs = {key: value.shape for key, value in base.state.items()}
    ours = {key: value.shape for key, value in model.state_dict().items()}
    lost = [key for key in theirs if ours.get(key) != theirs[key]]
    expect(not lost, f"{len(lost)} keys of the base are missing or have another shape, as {lost[:2]}")
    prefixes = tuple(f"{path}." for path in subject.blocks)
    strange = [key for key in ours if key not in theirs and not key.startswith(prefixes)]
    expect(not strange, f"{len(strange)} keys are neither the base's nor a block's, as {strange[:2]}")
    model.load_state_dict(base.state, strict=True)
    half = next(
        (
            own[0]
            for prefix in prefixes
            if len(own := [key for key in ours if key.startswith(prefix) and not key.endswith("num_batches_tracked")])
            > 1
        ),
        None,
    )
    if half is None:
        return
    state = model.state_dict()
    del state[half]
    try:
        model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        expect(half in str(error), f"a checkpoint without {half!r} raises something else: {error}")
    else:
        raise Wrong(f"a checkpoint without {half!r} loads")


def identity(subject: Subject) -> None:
    """The base's outputs, bit for bit, with every block run exactly once."""
    calls: dict[str, int] = {}
    with torch.no_grad(), counted(subject.model, calls):
        output, inner = forward(subject.model, subject.base.images)
    # forward may not call forward_features, and then both were run
    often = {path: count for path, count in calls.items() if count != 1}
    twice = set(often.values()) == {2} and len(often) == len(subject.blocks)
    expect(not often or (twice and not _calls_features(subject.base)), f"runs of blocks in one forward: {_some(often)}")
    expect(equal(output, subject.base.output), "outputs differ at the identity start")
    expect(equal(inner, subject.base.features), "forward_features differs at the identity start")


def features_only(subject: Subject) -> None:
    """`features_only=True` gives what it gives of the base, some block at work and none twice, and moves with them."""
    base = subject.base
    if base.features_only is None:
        return
    with weights_at_load(base.state):
        model = subject.build(features_only=True, pretrained=True)
    same_features(model, base.images, base.features_only, "default")
    move(model)
    moved_features(model, base.images, base.features_only, "default")


def feature_classes(subject: Subject) -> None:
    """The same of every feature class that takes the base, with all of its indices; the next check moves them."""
    base = subject.base
    wrong = []
    for kind, expected in base.kinds.items():
        try:
            model = wrapped(subject.model, kind)
            same_features(model, base.images, expected, kind)
            subject.kinds[kind] = model
        except TimeLimit:
            raise
        except Exception as error:
            wrong.append(in_words(error) if isinstance(error, Wrong) else f"{kind}: {in_words(error)}")
    expect(not wrong, "; ".join(wrong))


def moved(subject: Subject) -> None:
    """Once the blocks' parameters are moved the output is another, or, where it hears no block, forward_features is."""
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
    """Every parameter of every block gets a gradient, each block is heard, and no base parameter loses its own."""
    base, model = subject.base, subject.model
    prefixes = [f"{path}." for path in subject.blocks]
    own = {name for name, _ in model.named_parameters() if name.startswith(tuple(prefixes))}
    state = {name: buffer.clone() for name, buffer in model.named_buffers()}
    if not base.meta:
        # deep nets go wild once gates have moved, since their norms know the base's statistics, and wild ones are deaf
        with torch.no_grad(), settling(model):
            model(base.images)
    reached, heard = gradients(model, base.images, lambda model, images: forward(model, images)[0])
    lost = sorted(base.reached - reached)
    expect(not lost, f"{len(lost)} base parameters get no gradient any more, as {lost[:2]}")
    # behind the last attention a head may read the class token alone: then the features tell, or the intermediates
    further = [lambda model, images: forward(model, images)[1]]
    if hasattr(model, "forward_intermediates"):
        further.append(lambda model, images: flat(model.forward_intermediates(images)))
    for of in further:
        if not own <= reached or not all(any(name.startswith(prefix) for name in heard) for prefix in prefixes):
            more, louder = gradients(model, base.images, of)
            reached, heard = reached | more, heard | louder
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(state[name])
    if not all(any(name.startswith(prefix) for name in heard) for prefix in prefixes):
        # moved blocks may drive a gate of the host's own to its end, where it hears nothing: as they were at the start
        first = subject.build().state_dict()
        with torch.no_grad():
            moved = {
                name: value.clone() for name, value in model.state_dict().items() if name.startswith(tuple(prefixes))
            }
            model.load_state_dict({name: first[name] for name in moved}, strict=False)
            heard = heard | gradients(model, base.images, lambda model, images: forward(model, images)[0])[1]
            model.load_state_dict(moved, strict=False)
    silent = sorted(own - reached)
    expect(not silent, f"{len(silent)} parameters of blocks get no gradient, as {silent[:2]}")
    unheard = [prefix for prefix in prefixes if not any(name.startswith(prefix) for name in heard)]
    expect(not unheard, f"{len(unheard)} of {len(prefixes)} blocks are not heard at all, as {unheard[:2]}")


def round_trip(subject: Subject) -> None:
    """A checkpoint as safetensors, read strictly by a new surgical model, gives the same outputs."""
    state = subject.model.state_dict()
    if subject.base.meta:
        fresh = subject.build()
        shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (subject.model, fresh)]
        expect(shapes[0] == shapes[1], "a second model has other keys or shapes")
        return
    data = safetensors.save(_apart(state))
    del state
    subject.model = nn.Identity()  # its memory is needed
    read = safetensors.load(data)
    del data
    fresh = subject.build()
    fresh.load_state_dict(read, strict=True, assign=True)
    with torch.no_grad():
        expect(equal(forward(fresh, subject.base.images)[0], subject.output), "outputs differ after save and load")
    subject.model = fresh


def removal(subject: Subject) -> None:
    """attnsurgery.remove gives the base back: class, keys, bits."""
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
def limited(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeLimit(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def examine(base: Base, suffix: str, limit: float = 600, by_default: bool = True) -> dict[str, Any]:
    """One row of the results: what each check found. After a check that fails, those it leads to are not made.

    Args:
        limit: seconds that it may take.
        by_default: plan the model at its default size of images as well.
    """
    began = time.perf_counter(), time.process_time()
    subject = Subject(base, suffix, by_default)
    row: dict[str, Any] = {"block": suffix, "outcome": "passed", **describe(base), "blocks": 0, "checks": {}}
    fatal = {"plan", "keys"}
    try:
        with limited(limit):
            for name, check in CHECKS.items():
                try:
                    check(subject)
                    row["checks"][name] = "passed"
                except TimeLimit:
                    raise
                except Exception as error:
                    row["checks"][name] = in_words(error)
                    row["outcome"] = "refused" if name == "plan" and is_refusal(error) else "failed"
                    if name in fatal:
                        break
                if name == "plan":
                    row["blocks"] = len(subject.blocks)
    except TimeLimit as error:
        row["outcome"], row["checks"]["time"] = "failed", in_words(error)
    row["seconds"] = round(time.perf_counter() - began[0], 2)
    row["cpu_seconds"] = round(time.process_time() - began[1], 2)
    return row


def is_refusal(error: Exception) -> bool:
    return isinstance(error, UsageError) and any(part in str(error) for part in TRUE_REFUSALS)


def in_words(error: Exception) -> str:
    said = " ".join(str(error).split())[:400]
    return said if isinstance(error, Wrong) else f"{type(error).__name__}: {said}"


@torch.no_grad()
def move(model: nn.Module) -> None:
    """Every parameter of every block off its start, by as much as shows and saturates no gate."""
    noise = Noise(5, 65537)
    for block in grafted_blocks(model).values():
        for parameter in block.parameters():
            if not parameter.is_meta:
                change = torch.empty(parameter.shape)
                noise.fill(change, 0.2 if parameter.ndim < 2 else 0.3 / math.sqrt(fan_in(parameter)))
                parameter += change


@contextmanager
def counted(model: nn.Module, calls: dict[str, int]) -> Iterator[None]:
    """Count in `calls` how often each block runs."""

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
    with counted(model, calls):
        found = flat(model(images))
    shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (found, expected)]
    expect(shapes[0] == shapes[1], f"{kind}: shapes {shapes[0]} and not {shapes[1]}")
    expect(equal(found, expected), f"{kind}: features differ at the identity start")
    if not calls and kind == "fx":
        return  # a graph takes modules apart; that the blocks are in it shows when they are moved
    often = {path: count for path, count in calls.items() if count > 1}
    expect(not often, f"{kind}: runs of blocks: {_some(often)}")
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


def _apart(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors that share memory, as tied weights do, are written twice: the format has no word for it."""
    seen: set[int] = set()
    apart: dict[str, torch.Tensor] = {}
    for key, tensor in state.items():
        address = tensor.untyped_storage().data_ptr()
        apart[key] = tensor.clone() if address in seen else tensor.contiguous()
        seen.add(address)
    return apart


def _some(counts: dict[str, int]) -> str:
    return ", ".join(f"{path} {count}" for path, count in list(counts.items())[:3]) or "none"
