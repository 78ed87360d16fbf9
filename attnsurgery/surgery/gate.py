"""The gate of a span, on its way: an attribute of the very tensor that the modules hand on."""

from __future__ import annotations

import torch

from attnsurgery.errors import SurgeryError


def carry(x: torch.Tensor, name: str, gate: torch.Tensor) -> None:
    """Send the gate along with a tensor through a span.

    Also on the tensor's memory: where checkpoints are nested, the inner one recomputes from a detached tensor.
    """
    setattr(x, name, gate)
    if isinstance(x, torch.Tensor) and not torch.compiler.is_compiling():
        setattr(x.untyped_storage(), name, gate)


def carried(x: torch.Tensor, name: str) -> torch.Tensor:
    """The gate that travels with a tensor through a span.

    Raises:
        SurgeryError: something between the modules of the span made a new tensor, or cut it off from its gradient.
    """
    gate: torch.Tensor | None = getattr(x, name, None)
    if gate is None and isinstance(x, torch.Tensor) and not torch.compiler.is_compiling():
        gate = getattr(x.untyped_storage(), name, None)
        if gate is not None and torch.is_grad_enabled() and not gate.requires_grad:
            gate = None  # computed where no gradient was asked for, and one is asked for here
    if gate is None:
        raise SurgeryError(
            f"the gate {name.removeprefix('_attnsurgery_').replace('__', '.')!r} was lost inside its span: between two "
            "modules of it something made a new tensor, as reentrant checkpointing and sharding wrappers do. Use "
            "use_reentrant=False, or a span of one module."
        )
    return gate
