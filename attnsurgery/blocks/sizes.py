"""Choices by size and stride that put no guard on a size that torch does not know while it compiles or exports."""

from __future__ import annotations

import torch
from torch.jit import is_scripting  # type: ignore[attr-defined]

__all__ = ["DYNAMO_ASKS", "at_most", "mix"]

# Before, torch.compile could not ask what is known without guarding on it, and only compiled once more.
DYNAMO_ASKS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)


def at_most(number: int, limit: int) -> bool:
    """number <= limit; False, without a guard on it, where a compiler does not know the number."""
    if is_scripting():
        return number <= limit
    elif torch.compiler.is_compiling() and (DYNAMO_ASKS or not torch.compiler.is_dynamo_compiling()):
        return _known_at_most(number, limit)
    else:
        return number <= limit


def _known_at_most(number: int, limit: int) -> bool:
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(number <= limit)


def mix(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """weights (B, N, M) times values (B, M, D), which lies in memory as the values do."""
    if at_most(values.stride(2), 1):
        return torch.bmm(weights, values)
    return torch.bmm(values.transpose(1, 2), weights.transpose(1, 2)).transpose(1, 2)
