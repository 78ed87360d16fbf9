"""Verify a surgical model: compare it with its base, and check that each block runs, has an effect and can learn."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from attnsurgery.blocks import Block
from attnsurgery.errors import SurgeryError
from attnsurgery.graph.find import input_size_of
from attnsurgery.graph.forward_run import example
from attnsurgery.graph.twin import meta_twin, weighted_twin, without_side_effects
from attnsurgery.graph.wrappers import unwrapped, walk
from attnsurgery.surgery.effects import Effects, measured_effects
from attnsurgery.surgery.outputs import flattened
from attnsurgery.surgery.owners import PATHS, grafted_blocks, joined, operated
from attnsurgery.surgery.remove import remove
from attnsurgery.surgery.replaced import put_back_all, replaced_modules


@dataclass(frozen=True, slots=True)
class BlockReport:
    """What one inserted block does in a forward and a backward pass."""

    path: str
    """Path of the block in the model."""
    block: str
    """Name of the block in the catalog."""
    calls: int
    """How often it ran in one forward; any number but 1 is a fault."""
    params: int
    """Number of its parameters."""
    reaches: Literal["output", "features", "nothing"]
    """What depends on its result. 'features': only the result of forward_features or forward_intermediates, as after
    the last attention of a ViT whose head reads the class token alone. 'nothing': the result is unused, or an in-place
    operation overwrites it."""
    input_kept: bool
    """False if the host writes in place to the tensor that the block has read, so that the write is lost after it."""
    learns: bool
    """False if none of its parameters gets a gradient, because batch norms were frozen after surgery, which fixes a
    gate at 0, or because the model runs the block without gradients."""

    @property
    def fault(self) -> str | None:
        """What is wrong with the block; None if nothing is."""
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
    """A surgical model compared with its base."""

    max_abs_diff: float
    """Largest difference between the two models' outputs on random images; 0 right after an identity start."""
    keys_added: tuple[str, ...]
    """Keys of the surgical model's state dict that the base does not have."""
    keys_missing: tuple[str, ...]
    """Keys of the base's state dict that the surgical model does not have; surgery itself removes none."""
    params_before: int
    """Number of parameters of the base."""
    params_after: int
    """Number of parameters of the surgical model."""
    macs_before: int
    """Multiply-accumulates of the base for one image, in convolutions, matrix products and attention."""
    macs_after: int
    """Multiply-accumulates of the surgical model."""
    attention_bytes: int
    """Bytes of the largest N x M attention map that a naive form of each block would hold, for one image in fp32,
    summed over the blocks."""
    input_size: tuple[int, int, int]
    """(C, H, W) of the images."""
    blocks: tuple[BlockReport, ...]
    """The inserted blocks, in the model's order."""
    replaced: tuple[str, ...] = ()
    """The base's own attention modules that were taken out, with their classes. `max_abs_diff` and `keys_missing`
    compare with the base without them; parameters and multiply-accumulates are those of the whole base."""

    @property
    def faults(self) -> tuple[str, ...]:
        """All faults of the surgery, in words; empty if there are none."""
        faults = [f"{len(self.keys_missing)} keys of the base are missing"] if self.keys_missing else []
        if not math.isfinite(self.max_abs_diff):
            faults.append("the outputs are not finite, so that nothing can be compared")
        return (*faults, *(block.fault for block in self.blocks if block.fault))

    @property
    def alive(self) -> bool:
        """True if there are no faults: each block runs once, has an effect and can learn, and no key is lost."""
        return not self.faults

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON data."""
        return asdict(self) | {"alive": self.alive, "faults": self.faults}


def verify(model: nn.Module, input_size: tuple[int, int, int] | None = None) -> Report:
    """Compare the model with its base, on random images, in eval mode.

    Args:
        model: a surgical model on any device, in a wrapper or not. A copy without the user's hooks is run, and the
            model is not changed.
        input_size: (C, H, W) of one image; by default the size that the model is built for.

    Raises:
        SurgeryError: an inserted block is missing, or weights are not finite.
        UsageError: the model cannot be compared in its present form; the message says what to do.
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
    watch = _BlockWatch()
    with watch.on(twin):
        surgical_output = _output(twin, images)
    names = {
        joined(path, graft.child): graft.block
        for path, _, grafts in operated(twin)
        for graft in grafts
        if graft.owns_block
    }
    params = {path: sum(p.numel() for p in block.parameters()) for path, block in grafted_blocks(twin).items()}
    surgical_keys = list(twin.state_dict())
    # where the host overwrites a block's input, backward fails; that fault is reported already
    effects = measured_effects(twin, images) if not watch.overwritten else Effects(set(), set(), set())
    _copy_values(twin, model)
    taken_out = [(path, stand_in.extra_repr()) for path, stand_in in replaced_modules(twin)]
    base = remove(twin, put_back=False)
    base_output = _output(base, images)
    base_keys = list(base.state_dict())
    put_back_all(base)
    return Report(
        max_abs_diff=float((surgical_output - base_output).abs().max()) if surgical_output.numel() else 0.0,
        keys_added=tuple(key for key in surgical_keys if key not in set(base_keys)),
        keys_missing=tuple(key for key in base_keys if key not in set(surgical_keys)),
        params_before=sum(p.numel() for p in base.parameters()),
        params_after=sum(p.numel() for p in model.parameters()),
        macs_before=count_macs(base, size),
        macs_after=count_macs(model, size),
        attention_bytes=sum(watch.attention_bytes.values()),
        input_size=size,
        replaced=tuple(f"{path} ({kind})" for path, kind in taken_out),
        blocks=tuple(
            BlockReport(
                path=path,
                block=names[path],
                calls=watch.calls.get(path, 0),
                params=params[path],
                reaches=effects.reach(path),
                input_kept=path not in watch.overwritten,
                learns=path not in effects.stuck,
            )
            for path in params
        ),
    )


def count_macs(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Multiply-accumulates of one image of (C, H, W), counted on a twin without weights."""
    twin = meta_twin(model).requires_grad_(False)  # the counter's gradient hooks fail for parameters as module inputs
    image = example(twin, input_size, "meta")[
        :1
    ]  # work that is done once a batch, such as folding weights, counts fully
    counter = FlopCounterMode(display=False)
    with without_side_effects(), counter, torch.no_grad():
        twin(image)
    return int(counter.get_total_flops()) // 2


def _check_records(model: nn.Module) -> None:
    """
    Raises:
        SurgeryError: a block is missing, because a module was replaced after surgery.
    """
    blocks = grafted_blocks(model)
    missing = [path for path in model.__dict__.get(PATHS, ()) if path not in blocks]
    if missing:
        raise SurgeryError(f"the block {missing[0]!r} is missing: a module that held it was replaced after surgery.")
    intact = {name for name, block in blocks.items() if isinstance(block, Block)}
    for path, _, grafts in operated(model):
        for graft in grafts:
            if graft.owns_block and joined(path, graft.child) not in intact:
                raise SurgeryError(f"the block {graft.child!r} of {path!r} is missing: it was replaced after surgery.")


def _check_finite(model: nn.Module) -> None:
    """
    Raises:
        SurgeryError: a weight is NaN or infinite, so the outputs would be too and could not be compared.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not parameter.is_meta and not bool(torch.isfinite(parameter).all()):
            bad = int((~torch.isfinite(parameter)).sum())
            raise SurgeryError(
                f"{bad} of the {parameter.numel()} numbers of {name!r} are NaN or infinite, so that no output can be "
                "compared: the checkpoint was saved after a training that diverged, or is damaged. Take another."
            )


def _copy_values(twin: nn.Module, model: nn.Module) -> None:
    """Copy the model's weights into its twin."""
    with torch.no_grad():
        for (_, target), (_, source) in zip(walk(twin), walk(model), strict=True):
            tables = (target._parameters, source._parameters), (target._buffers, source._buffers)
            for table, values in tables:
                for name, tensor in table.items():
                    value = values[name]
                    if tensor is not None and value is not None:
                        tensor.copy_(value)


def _output(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            return flattened(model(images))
    finally:
        for module, training in modes.items():  # one by one, because a model in train mode may have norms in eval mode
            module.training = training


class _BlockWatch:
    """Observes the inserted blocks of a model in one forward; all attributes are by path of the block."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}
        self.attention_bytes: dict[str, int] = {}
        self.overwritten: set[str] = set()
        """Blocks whose input was written to after they had read it."""

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Observe the forward that runs inside the `with` statement."""
        inputs: dict[str, tuple[torch.Tensor, int]] = {}
        replacing = {
            joined(path, graft.child)
            for path, _, grafts in operated(model)
            for graft in grafts
            # on one side of an addition, or before a span, the host still uses the input itself
            if graft.part == "place" and not graft.users
        }

        def watch(path: str) -> Any:
            def hook(block: Block, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
                self.calls[path] = self.calls.get(path, 0) + 1
                self.attention_bytes[path] = block.cost(output.shape[2], output.shape[3]).attention_bytes
                if path in replacing:
                    inputs[path] = args[0], args[0]._version

            return hook

        handles = [block.register_forward_hook(watch(path)) for path, block in grafted_blocks(model).items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self.overwritten = {path for path, (tensor, version) in inputs.items() if tensor._version != version}
