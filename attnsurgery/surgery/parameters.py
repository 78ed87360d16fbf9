"""What a surgical model has that is new: the parameters of its blocks, and everything else frozen."""

from __future__ import annotations

from torch import nn

from attnsurgery.errors import SurgeryError
from attnsurgery.graph.wrappers import unwrapped
from attnsurgery.surgery.owners import grafted_blocks


def block_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of all inserted blocks by their names in `model.named_parameters()`; empty without surgery.

    Nothing is run. An optimizer for the blocks alone: `torch.optim.AdamW(block_parameters(model).values())`.
    """
    own = {id(parameter) for block in grafted_blocks(model).values() for parameter in block.parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in own}


def freeze_base(model: nn.Module) -> int:
    """Train the inserted blocks alone: no other parameter of the model asks for a gradient any more.

    Buffers are no parameters: the running statistics of the base's batch norms still move while those are in train
    mode. Call `eval()` on them after `model.train()` if they shall stay.

    Returns:
        How many parameters (tensors) of the base are frozen now.

    Raises:
        SurgeryError: the model has no blocks, and all of it would be frozen.
        UsageError: a wrapper that has taken note of what is trained; says what to do.
    """
    unwrapped(model, "freeze")
    own = {id(parameter) for parameter in block_parameters(model).values()}
    if not own:
        raise SurgeryError(
            "this model has no block with parameters, so all of it would be frozen: operate on it first, or use "
            "model.requires_grad_(False)."
        )
    base = [parameter for parameter in model.parameters() if id(parameter) not in own]
    for parameter in base:
        parameter.requires_grad_(False)
    return len(base)
