"""Training of a part of a model while the rest is frozen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn


@contextmanager
def train_only(learning: Sequence[nn.Parameter], model: nn.Module) -> Iterator[None]:
    """A context in which only these parameters of the model require a gradient."""
    learning_ids = {id(parameter) for parameter in learning}
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(id(parameter) in learning_ids)
    try:
        yield
    finally:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)
