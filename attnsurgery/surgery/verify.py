"""Report: the proof that goes with a cut."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from attnsurgery.blocks import Block
from attnsurgery.errors import SurgeryError
from attnsurgery.graph.find import input_size_of
from attnsurgery.graph.record import example, meta_twin
from attnsurgery.surgery.operate import PATHS, grafted_blocks, operated, remove


@dataclass(frozen=True, slots=True)
class BlockReport:
    """One grafted block."""

    path: str
    block: str
    calls: int
    """How often it ran in one forward; anything but 1 is a mistake."""
    params: int


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
    def alive(self) -> bool:
        """True if every block ran exactly once and no base key is gone."""
        return not self.keys_missing and all(block.calls == 1 for block in self.blocks)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"alive": self.alive}


def verify(model: nn.Module, input_size: tuple[int, int, int] | None = None) -> Report:
    """Compare the model with its base, on random images, in eval mode.

    Args:
        model: a surgical model on any device; it is left as it was.
        input_size: (C, H, W) of one image; by default what the model is built for.

    Raises:
        SurgeryError: a record of surgery is there, but its block is gone.
    """
    size = input_size or input_size_of(model)
    _check_records(model)
    base = remove(copy.deepcopy(model))
    device = next(model.parameters()).device
    images = example(model, size, device)
    ours, calls, costs = _watched(model, images)
    theirs = _output(base, images)
    records = {
        f"{path}.{graft.child}": graft.block for path, _, grafts in operated(model) for graft in grafts if graft.held
    }
    added = [key for key in model.state_dict() if key not in set(base.state_dict())]
    return Report(
        max_abs_diff=float((ours - theirs).abs().max()),
        keys_added=tuple(added),
        keys_missing=tuple(key for key in base.state_dict() if key not in set(model.state_dict())),
        params_before=sum(p.numel() for p in base.parameters()),
        params_after=sum(p.numel() for p in model.parameters()),
        macs_before=count_macs(base, size),
        macs_after=count_macs(model, size),
        attention_bytes=sum(costs.values()),
        input_size=size,
        blocks=tuple(
            BlockReport(path, records[path], calls.get(path, 0), sum(p.numel() for p in block.parameters()))
            for path, block in grafted_blocks(model).items()
        ),
    )


def count_macs(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Multiply-accumulates of one image of (C, H, W), counted on a weightless twin."""
    twin = meta_twin(model)
    images = example(twin, input_size, "meta")
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        twin(images)
    return int(counter.get_total_flops()) // (2 * len(images))


def _check_records(model: nn.Module) -> None:
    """A module swapped after surgery can take a block with it; then say so, rather than report on what is left."""
    there = grafted_blocks(model)
    lost = [path for path in model.__dict__.get(PATHS, ()) if path not in there]
    if lost:
        raise SurgeryError(f"the block {lost[0]!r} is gone: something replaced what it was in after surgery.")
    for path, owner, grafts in operated(model):
        for graft in grafts:
            if graft.held and not isinstance(getattr(owner, graft.child, None), Block):
                raise SurgeryError(
                    f"the block {graft.child!r} of {path!r} is gone: something replaced it after surgery."
                )


def _output(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            output = model(images)
    finally:
        for module, training in modes.items():  # one by one: frozen norms of a model in training stay frozen
            module.training = training
    return torch.cat([tensor.float().flatten() for tensor in _tensors(output)])


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor of an output, which is a list or dictionary for feature models."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def _watched(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, dict[str, int], dict[str, int]]:
    """The model's output, and for every block how often it ran and what its attention would weigh."""
    calls: dict[str, int] = {}
    costs: dict[str, int] = {}

    def watch(path: str) -> Any:
        def hook(block: Block, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            calls[path] = calls.get(path, 0) + 1
            costs[path] = block.cost(output.shape[2], output.shape[3]).attention_bytes

        return hook

    handles = [block.register_forward_hook(watch(path)) for path, block in grafted_blocks(model).items()]
    try:
        return _output(model, images), calls, costs
    finally:
        for handle in handles:
            handle.remove()
