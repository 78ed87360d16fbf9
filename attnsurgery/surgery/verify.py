"""Report: the proof that goes with a cut."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from attnsurgery.blocks import Block
from attnsurgery.errors import SurgeryError, UsageError
from attnsurgery.graph.find import input_size_of
from attnsurgery.graph.forward_run import example
from attnsurgery.graph.submodels import described_models
from attnsurgery.graph.twin import meta_twin, weighted_twin, without_side_effects
from attnsurgery.graph.wrappers import unwrapped, walk
from attnsurgery.surgery.owners import PATHS, grafted_blocks, joined, operated
from attnsurgery.surgery.remove import remove


@dataclass(frozen=True, slots=True)
class BlockReport:
    """One grafted block."""

    path: str
    block: str
    calls: int
    """How often it ran in one forward; anything but 1 is a mistake."""
    params: int
    reaches: Literal["output", "features", "nothing"]
    """How far what it returns is heard. 'features': no further than forward_features or forward_intermediates, as
    behind the last attention of a ViT whose head reads the class token alone. 'nothing': it is not used, or an in-place
    operation overwrites it."""
    input_kept: bool
    """False if the host writes in place to the tensor the block has read, so that the write is lost behind it."""
    learns: bool
    """False if nothing in it gets a gradient: freezing batch norms after surgery freezes a gate at 0 for ever, and a
    model may run the block without gradients."""

    @property
    def fault(self) -> str | None:
        """What is wrong with it, in words."""
        if self.calls != 1:
            return f"{self.path} ran {self.calls} times"
        if self.reaches == "nothing":
            return f"what {self.path} returns never reaches the output"
        if not self.input_kept:
            return f"the host writes in place to what {self.path} has read, and that write is lost"
        if not self.learns:
            return (
                f"nothing in {self.path} gets a gradient: its gate is frozen (freeze norms before surgery), or the "
                "model cuts it off, by torch.no_grad, detach or reentrant checkpointing"
            )
        return None


@dataclass(frozen=True, slots=True)
class Report:
    """A surgical model against the base it was made from."""

    max_abs_diff: float
    """Largest difference between the two models' outputs on random images; 0 right after an identity start."""
    keys_added: tuple[str, ...]
    keys_missing: tuple[str, ...]
    """Base keys that the surgical model lost; surgery never loses one."""
    params_before: int
    params_after: int
    macs_before: int
    """Multiply-accumulates of one image through convolutions, matrix products and attention."""
    macs_after: int
    attention_bytes: int
    """Bytes of the largest N x M attention maps, fp32, one image, that naive forms would hold; summed over blocks."""
    input_size: tuple[int, int, int]
    blocks: tuple[BlockReport, ...]

    @property
    def faults(self) -> tuple[str, ...]:
        """All that is wrong with the surgery, in words."""
        found = [f"{len(self.keys_missing)} keys of the base are gone"] if self.keys_missing else []
        if not math.isfinite(self.max_abs_diff):
            found.append("the outputs are not finite, so that nothing can be compared")
        return (*found, *(block.fault for block in self.blocks if block.fault))

    @property
    def alive(self) -> bool:
        """True if every block ran exactly once, on a tensor nobody writes to afterwards, and is heard at the output,
        and no base key is gone."""
        return not self.faults

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"alive": self.alive, "faults": self.faults}


def verify(model: nn.Module, input_size: tuple[int, int, int] | None = None) -> Report:
    """Compare the model with its base, on random images, in eval mode.

    Args:
        model: a surgical model on any device, in a wrapper or not; it is not run, but a copy of it without the user's
            hooks, and it is left as it was.
        input_size: (C, H, W) of one image; by default what the model is built for.

    Raises:
        SurgeryError: a record of surgery is there, but its block is gone; or weights that are not finite.
        UsageError: a model that cannot be compared as it is; says what to do.
    """
    model = unwrapped(model, "verify")
    size = input_size or input_size_of(model)
    _check_records(model)
    _check_finite(model)
    with without_side_effects():
        return _compared(model, weighted_twin(model), size)


def _compared(model: nn.Module, twin: nn.Module, size: tuple[int, int, int]) -> Report:
    device = next((parameter.device for parameter in twin.parameters()), torch.device("cpu"))
    images = example(twin, size, device)
    seen = _Watch()
    with seen.on(twin):
        ours = _output(twin, images)
    records = {
        joined(path, graft.child): graft.block for path, _, grafts in operated(twin) for graft in grafts if graft.held
    }
    params = {path: sum(p.numel() for p in block.parameters()) for path, block in grafted_blocks(twin).items()}
    our_keys = list(twin.state_dict())
    # where the host writes behind a block, backward fails, and that is said already
    heard = _probed(twin, images) if not seen.written else _Heard(set(), set(), set())
    _take_values(twin, model)
    base = remove(twin)
    theirs = _output(base, images)
    base_keys = list(base.state_dict())
    return Report(
        max_abs_diff=float((ours - theirs).abs().max()) if ours.numel() else 0.0,
        keys_added=tuple(key for key in our_keys if key not in set(base_keys)),
        keys_missing=tuple(key for key in base_keys if key not in set(our_keys)),
        params_before=sum(p.numel() for p in base.parameters()),
        params_after=sum(p.numel() for p in model.parameters()),
        macs_before=count_macs(base, size),
        macs_after=count_macs(model, size),
        attention_bytes=sum(seen.costs.values()),
        input_size=size,
        blocks=tuple(
            BlockReport(
                path=path,
                block=records[path],
                calls=seen.calls.get(path, 0),
                params=params[path],
                reaches="nothing" if path in heard.nowhere else "features" if path in heard.inside else "output",
                input_kept=path not in seen.written,
                learns=path not in heard.stuck,
            )
            for path in params
        ),
    )


def count_macs(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Multiply-accumulates of one image of (C, H, W), counted on a weightless twin."""
    twin = meta_twin(model).requires_grad_(False)  # the counter hooks into gradients, which parameters as inputs lack
    image = example(twin, input_size, "meta")[:1]  # what is done once a batch, such as folding weights, counts in full
    counter = FlopCounterMode(display=False)
    with without_side_effects(), counter, torch.no_grad():
        twin(image)
    return int(counter.get_total_flops()) // 2


def _check_records(model: nn.Module) -> None:
    """A module swapped after surgery can take a block with it; then say so, rather than report on what is left."""
    there = grafted_blocks(model)
    lost = [path for path in model.__dict__.get(PATHS, ()) if path not in there]
    if lost:
        raise SurgeryError(f"the block {lost[0]!r} is gone: something replaced what it was in after surgery.")
    alive = {name for name, block in there.items() if isinstance(block, Block)}
    for path, _, grafts in operated(model):
        for graft in grafts:
            if graft.held and joined(path, graft.child) not in alive:
                raise SurgeryError(
                    f"the block {graft.child!r} of {path!r} is gone: something replaced it after surgery."
                )


def _check_finite(model: nn.Module) -> None:
    """Numbers that are none spread over the whole output, where no difference shows any more."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not parameter.is_meta and not bool(torch.isfinite(parameter).all()):
            bad = int((~torch.isfinite(parameter)).sum())
            raise SurgeryError(
                f"{bad} of the {parameter.numel()} numbers of {name!r} are NaN or infinite, so that no output can be "
                "compared: the checkpoint was saved after a training that diverged, or is damaged. Take another."
            )


def _take_values(twin: nn.Module, model: nn.Module) -> None:
    """Give a twin the model's weights again."""
    with torch.no_grad():
        for (_, mine), (_, theirs) in zip(walk(twin), walk(model), strict=True):
            for table, other in ((mine._parameters, theirs._parameters), (mine._buffers, theirs._buffers)):
                for name, tensor in table.items():
                    value = other[name]
                    if tensor is not None and value is not None:
                        tensor.copy_(value)


def _output(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            return _flat(model(images))
    finally:
        for module, training in modes.items():  # one by one: frozen norms of a model in training stay frozen
            module.training = training


def _flat(output: Any) -> torch.Tensor:
    """All numbers of an output in a row.

    Raises:
        UsageError: it has none, or none that says how sure the model is.
    """
    tensors = list(tensors_of(output))
    if not any(tensor.is_floating_point() or tensor.is_complex() for tensor in tensors):
        what = "tensors of whole numbers alone" if tensors else f"no tensor but {type(output).__name__}"
        raise UsageError(
            f"the model returns {what}, in which small differences do not show. Give the model inside that returns "
            "scores or features."
        )
    parts = [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors]
    return torch.cat([part.float().flatten() for part in parts])


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor of an output, which is a list, a dictionary or a dataclass for some models."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple, Mapping)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_of(part)
    elif is_dataclass(value) and not isinstance(value, type):
        for held in fields(value):
            yield from tensors_of(getattr(value, held.name, None))


class _Watch:
    """What the grafted blocks of a model do in one forward."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}
        self.costs: dict[str, int] = {}
        self.written: set[str] = set()
        """Blocks whose input was written to after they had read it."""

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        reads: dict[str, tuple[torch.Tensor, int]] = {}
        whole = {
            joined(path, graft.child)
            for path, _, grafts in operated(model)
            for graft in grafts
            # on one side of an addition, or before a trunk, the host goes on with the tensor itself
            if graft.part == "place" and not graft.users
        }

        def watch(path: str) -> Any:
            def hook(block: Block, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
                self.calls[path] = self.calls.get(path, 0) + 1
                self.costs[path] = block.cost(output.shape[2], output.shape[3]).attention_bytes
                if path in whole:
                    reads[path] = args[0], args[0]._version

            return hook

        handles = [block.register_forward_hook(watch(path)) for path, block in grafted_blocks(model).items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self.written = {path for path, (tensor, version) in reads.items() if tensor._version != version}


class _Heard(NamedTuple):
    """Paths of the blocks that the output does not depend on: not even the features, or those alone; and of the blocks
    that can never leave the identity."""

    nowhere: set[str]
    inside: set[str]
    stuck: set[str]


def _probed(model: nn.Module, images: torch.Tensor) -> _Heard:
    """Which blocks count, by one backward. Changes the model's parameters.

    They are moved first: where a norm starts at 0, as timm's last norms of residual branches do, nothing is heard.
    """
    generator = torch.Generator().manual_seed(0)
    frozen = {id(p) for block in grafted_blocks(model).values() for p in block.parameters() if not p.requires_grad}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and id(parameter) not in frozen:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
                scale = float(parameter.float().square().mean().sqrt()) + 0.1
                parameter.add_(noise.to(parameter.dtype), alpha=0.05 * scale)
    model.eval()
    unheard, stuck = _one_backward(model, model, images, generator)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        stuck = set()  # all of it is frozen: nobody means to train it
    nowhere = unheard
    for part in described_models(model):
        for name in ("forward_features", "forward_intermediates"):  # pit's features are its class tokens alone
            features = getattr(part, name, None)
            if nowhere and features is not None:
                run = functools.partial(_of_part, model, part, features)
                nowhere = nowhere & _one_backward(model, run, images, generator)[0]
    return _Heard(nowhere, unheard - nowhere, stuck)


def _of_part(model: nn.Module, part: nn.Module, features: Callable[[Any], Any], images: torch.Tensor) -> Any:
    """What a model in a larger whole gives as its features, for what the whole hands to it."""
    if part is model:
        return features(images)
    handed: list[Any] = []
    handle = part.register_forward_pre_hook(lambda _, args: handed.extend(args[:1]))
    try:
        with torch.no_grad():
            model(images)
    finally:
        handle.remove()
    return features(handed[0]) if handed else images


def _one_backward(
    model: nn.Module, run: Callable[[torch.Tensor], Any], images: torch.Tensor, generator: torch.Generator
) -> tuple[set[str], set[str]]:
    """The blocks that what `run` gives does not depend on, and those that can never learn: they are the identity and
    get no gradient, or the model cuts them off from any."""
    probes: dict[str, torch.Tensor] = {}
    directions: dict[str, torch.Tensor] = {}
    idle: set[str] = set()

    def add(path: str) -> Any:
        def hook(block: Block, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            if torch.equal(output, torch.ones_like(output) if block.gates else args[0]):
                idle.add(path)  # although all of its parameters have moved
            if path not in probes:  # a checkpoint runs its blocks again in backward, through the same probe
                probes[path] = torch.zeros((), device=output.device, dtype=output.dtype, requires_grad=True)
                # one number for all would be lost in a layer norm
                direction = torch.randn(output.shape, generator=generator)
                directions[path] = direction.to(output.device, output.dtype)
            return output + probes[path] * directions[path]

        return hook

    blocks = grafted_blocks(model)
    handles = [block.register_forward_hook(add(path)) for path, block in blocks.items()]
    model.zero_grad(set_to_none=True)
    try:
        with torch.enable_grad():
            output = _flat(run(images))
            weights = torch.randn(output.shape, generator=generator).to(output.device)
            if output.requires_grad:
                (output * weights).sum().backward()  # type: ignore[no-untyped-call]
        silent = [path for path, probe in probes.items() if _is_zero(probe.grad)]
        cut_off = _changing(silent, probes, run, images)
    except RuntimeError as error:
        if "inplace" in str(error) or "in-place" in str(error):
            raise SurgeryError(f"an in-place operation of the host corrupts a block, backward fails: {error}") from None
        raise
    finally:
        for handle in handles:
            handle.remove()
    still = {path for path in probes if all(_is_zero(p.grad) for p in blocks[path].parameters() if p.requires_grad)}
    return set(silent) - cut_off, (still & idle) | cut_off


def _changing(
    paths: list[str], probes: dict[str, torch.Tensor], run: Callable[[torch.Tensor], Any], images: torch.Tensor
) -> set[str]:
    """Of these blocks those that the output depends on all the same: no_grad, detach or a reentrant checkpoint stands
    between."""
    found = set()
    with torch.no_grad():
        before = _flat(run(images)) if paths else torch.empty(0)
        for path in paths:
            probes[path].fill_(1.0)
            if not torch.equal(torch.nan_to_num(_flat(run(images))), torch.nan_to_num(before)):
                found.add(path)
            probes[path].fill_(0.0)
    return found


def _is_zero(slope: torch.Tensor | None) -> bool:
    return slope is None or not bool((slope != 0).any())
