"""Carry the gate of a span from its first to its last module, as an attribute of the tensor that passes through."""

from __future__ import annotations

import torch

from attnsurgery.errors import SurgeryError


def carry(x: torch.Tensor, name: str, gate: torch.Tensor) -> None:
    """Attach the gate to a tensor.

    It is attached to the tensor's storage too, because nested checkpoints recompute from a detached tensor.
    """
    setattr(x, name, gate)
    if isinstance(x, torch.Tensor) and not torch.compiler.is_compiling():
        setattr(x.untyped_storage(), name, gate)


def carried(x: torch.Tensor, name: str) -> torch.Tensor:
    """The gate that is attached to a tensor.

    Raises:
        SurgeryError: an operation between the modules of the span made a new tensor, or detached the gradient.
    """
    gate: torch.Tensor | None = getattr(x, name, None)
    if gate is None and isinstance(x, torch.Tensor) and not torch.compiler.is_compiling():
        gate = getattr(x.untyped_storage(), name, None)
        if gate is not None and torch.is_grad_enabled() and not gate.requires_grad:
            gate = None  # the gate was computed without gradients, and a gradient is needed here
    if gate is None:
        raise SurgeryError(
            f"the gate {name.removeprefix('_attnsurgery_').replace('__', '.')!r} was lost inside its span: between two "
            "modules of it something made a new tensor, as reentrant checkpointing and sharding wrappers do. Use "
            "use_reentrant=False, or a span of one module."
        )
    return gate
