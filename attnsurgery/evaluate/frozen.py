"""Training a part of a model, the rest held as it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn


@contextmanager
def only(learning: Sequence[nn.Parameter], model: nn.Module) -> Iterator[None]:
    """Nothing else of the model requires a gradient for as long as this lasts."""
    wanted = {id(parameter) for parameter in learning}
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(id(parameter) in wanted)
    try:
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
