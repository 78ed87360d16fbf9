"""The parameters of inserted blocks, and freezing of all other parameters."""

from __future__ import annotations

from torch import nn

from attnsurgery.errors import SurgeryError
from attnsurgery.graph.wrappers import unwrapped
from attnsurgery.surgery.owners import grafted_blocks


def block_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of all inserted blocks, by their names in `model.named_parameters()`; empty without surgery.

    The model is not run. An optimizer for the blocks alone is `torch.optim.AdamW(block_parameters(model).values())`.
    """
    block_ids = {id(parameter) for block in grafted_blocks(model).values() for parameter in block.parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in block_ids}


def freeze_base(model: nn.Module) -> int:
    """Freeze all parameters except those of the inserted blocks, by `requires_grad_(False)`.

    Buffers are not parameters: the running statistics of the base's batch norms still change in train mode. To keep
    them, call `eval()` on those modules after `model.train()`.

    Returns:
        The number of parameter tensors of the base, which are frozen now.

    Raises:
        SurgeryError: the model has no blocks, so all of it would be frozen.
        UsageError: a wrapper has recorded which parameters are trained; the message says what to do.
    """
    unwrapped(model, "freeze")
    block_ids = {id(parameter) for parameter in block_parameters(model).values()}
    if not block_ids:
        raise SurgeryError(
            "this model has no block with parameters, so all of it would be frozen: operate on it first, or use "
            "model.requires_grad_(False)."
        )
    base = [parameter for parameter in model.parameters() if id(parameter) not in block_ids]
    for parameter in base:
        parameter.requires_grad_(False)
    return len(base)
