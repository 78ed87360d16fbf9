"""Operations that depend on sizes and strides.

Decisions put no guard on a size that torch does not know while it compiles or exports, and pooling fits every map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.jit import is_scripting  # type: ignore[attr-defined]

__all__ = ["DYNAMO_ASKS", "Pool", "at_most", "mix", "pooled"]

# Before torch 2.8, torch.compile could not query a size without a guard, which only causes one more compilation.
DYNAMO_ASKS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)


def at_most(number: int, limit: int) -> bool:
    """number <= limit; False, without a guard, if a compiler does not know the number."""
    if is_scripting():
        return number <= limit
    elif torch.compiler.is_compiling() and (DYNAMO_ASKS or not torch.compiler.is_dynamo_compiling()):
        return _statically_at_most(number, limit)
    else:
        return number <= limit


def _statically_at_most(number: int, limit: int) -> bool:
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(number <= limit)


def mix(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """weights (B, N, M) times values (B, M, D); the result has the memory layout of the values."""
    if at_most(values.stride(2), 1):
        return torch.bmm(weights, values)
    return torch.bmm(values.transpose(1, 2), weights.transpose(1, 2)).transpose(1, 2)


def pooled(x: torch.Tensor, window: int, average: bool) -> torch.Tensor:
    """Pool (B, C, H, W) to (B, C, H // window, W // window), by the maximum or the mean of each window.

    If the map is smaller than the window, the window is as large as the map.
    """
    rows = x.shape[2] if at_most(x.shape[2], window - 1) else window
    columns = x.shape[3] if at_most(x.shape[3], window - 1) else window
    return F.avg_pool2d(x, [rows, columns]) if average else F.max_pool2d(x, [rows, columns])


fx.wrap("pooled")  # a symbolic trace keeps it as one call


class Pool(nn.Module):
    """`pooled` as a module.

    Args:
        window: side of the window.
        average: True for the mean, False for the maximum.
    """

    def __init__(self, window: int, average: bool = False) -> None:
        super().__init__()
        self.window = window
        self.average = average

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return pooled(x, self.window, self.average)

    def extra_repr(self) -> str:
        return f"{self.window}, {'average' if self.average else 'maximum'}"
