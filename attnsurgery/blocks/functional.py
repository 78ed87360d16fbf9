"""The pairwise sums of attention blocks, in fast and exact forms that store no N x M matrix.

Papers: Wang, Girshick, Gupta, He, "Non-local Neural Networks", CVPR 2018, arXiv:1711.07971, equations 1 to 6; Fu et
al., "Dual Attention Network for Scene Segmentation", CVPR 2019, arXiv:1809.02983, equations 1 to 4.

Each sum has a *product* form, which is the formula with its N x M matrix, and a form without that matrix. On small maps
the product form is the fastest, and its matrix fits into the cache. The limits `SOFTMAX_PRODUCT` and
`CONCATENATION_PRODUCT` were measured by `scripts/bench/blocks.py --crossover`. When torch compiles or exports for
unknown sizes, the form without the matrix is chosen.

Shape letters in this file:  B batch, N positions, M positions that a sum runs over, E width of queries and keys, D
width of values, C channels. Positions come first, (B, N, E), in any memory layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.jit import is_scripting  # type: ignore[attr-defined]

from attnsurgery.blocks import cuda_attention
from attnsurgery.blocks.sizes import at_most, mix

__all__ = ["attend", "attend_channels", "channel_weights", "concatenate", "dot_product"]

SOFTMAX_PRODUCT = 1 << 20
"""Largest N * M at which a softmax runs in its product form, on CPU.

On two cores in fp32, the time of the other forms divided by that of the product form is 1.0 to 2.2 at 196 x 196, 0.8
to 1.4 at 784 x 784 (where the matrix takes no more memory than the copies that the fused kernel needs), 0.4 to 1.1 at
3136 x 784 and 0.4 to 0.9 at 3136 x 3136. The lower values are those of small widths.
"""

CONCATENATION_PRODUCT = 1 << 18
"""Largest N * M at which a concatenation runs in its product form, on CPU.

On two cores in fp32, the time of the sorted form divided by that of the product form is 1.3 at 784 x 196 and 0.3 to
0.5 at 784 x 784.
"""

# Rows of the weight matrix in memory at a time: as many as make a tile of this many numbers, within the two limits.
_TILE = 1 << 20
_FEWEST_ROWS, _MOST_ROWS = 64, 256

# Queries of which a copy is in memory at a time, if the fused kernel runs in slices.
_SLICE = 512

_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


def softmax_by_matrix(positions: int, summed: int, product_up_to: int = SOFTMAX_PRODUCT) -> bool:
    """True if `attend` uses its product form on CPU; otherwise it copies keys and values that are not contiguous."""
    return at_most(positions * summed, product_up_to)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float = 1.0,
    product_up_to: int = SOFTMAX_PRODUCT,
) -> torch.Tensor:
    """softmax(scale * query key^T) value: from (B, N, E), (B, M, E) and (B, M, D) to (B, N, D).

    It serves the Gaussian modes of a non-local block and position attention, with N * M * (E + D)
    multiply-accumulates. Its forms are:

    * Product, up to N * M = `product_up_to` in full precision on CPU.
    * Fused: `F.scaled_dot_product_attention`. That kernel silently falls back to the formula unless the last dimensions
      are contiguous and, on CPU, E = D, so both are ensured. Without gradients, the queries are copied in slices.
    * Tiles, for E != D on CPU: some rows of the matrix at a time, which backward recomputes. At N = M = 3136, E = 64,
      D = 512, forward takes 0.6 of the time of padding for the fused kernel, and forward with backward 0.5 to 0.7.
    * Padded with zeros to E = D, then fused, where tiles cannot run: in half precision, scripted, compiled or exported.

    On CUDA it is the product or the fused kernel, depending on measured times; see `cuda_attention.py`.
    """
    full = query.dtype == torch.float32 or query.dtype == torch.float64
    if full and (
        query.device.type == "cpu" or query.device.type == "meta"
    ):  # on meta, operations are counted as on a CPU
        if at_most(query.shape[1] * key.shape[1], product_up_to):
            scaled = query * scale if scale != 1.0 else query
            return mix(torch.softmax(torch.bmm(scaled, key.transpose(1, 2)), dim=-1), value)
        if is_scripting() or torch.compiler.is_compiling():
            pass
        elif query.shape[2] != value.shape[2]:
            tiled: torch.Tensor = _Tiles.apply(query, key, value, scale)
            return tiled
        elif not torch.is_grad_enabled() and not query.is_contiguous():
            return _fused_in_slices(query, key, value, scale)
    if query.device.type == "cuda":
        return cuda_attention.attend(query, key, value, scale)
    return _fused(query, key, value, scale)


def _fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """The fused kernel, with zeros as padding to E = D."""
    width, value_width = query.shape[2], value.shape[2]
    if width < value_width:
        query, key = F.pad(query, (0, value_width - width)), F.pad(key, (0, value_width - width))
    elif width > value_width:
        value = F.pad(value, (0, width - value_width))
    # (B, 1, N, E) with one head, and contiguous, because otherwise the kernel is not used
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    mixed = F.scaled_dot_product_attention(query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1), scale=scale)
    return mixed.squeeze(1)[:, :, :value_width]


def _fused_in_slices(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """The fused kernel for slices of the queries, so that their contiguous copy is small."""
    key, value = key.contiguous(), value.contiguous()
    mixed = value.new_empty(query.shape[0], query.shape[1], value.shape[2])
    for start in range(0, query.shape[1], _SLICE):
        rows = slice(start, start + _SLICE)
        mixed[:, rows] = _fused(query[:, rows], key, value, scale)
    return mixed


class _Tiles(torch.autograd.Function):
    """softmax(scale * query key^T) value, with some rows of the weight matrix at a time, forward and backward."""

    @staticmethod
    def _height(query: torch.Tensor, key: torch.Tensor) -> int:
        rows = min(max(_TILE // max(1, key.shape[0] * key.shape[1]), _FEWEST_ROWS), _MOST_ROWS)
        return min(rows, query.shape[1])

    @staticmethod
    def _rows(query: torch.Tensor, key: torch.Tensor) -> Iterator[slice]:
        rows = _Tiles._height(query, key)
        return (slice(start, start + rows) for start in range(0, query.shape[1], rows))

    @staticmethod
    def _weights(query: torch.Tensor, key: torch.Tensor, rows: slice, tile: torch.Tensor) -> torch.Tensor:
        """softmax(query key^T) of these rows, in the memory of `tile`."""
        query = query[:, rows]
        weights = tile[:, : query.shape[1]]
        torch.bmm(query, key.transpose(1, 2), out=weights)
        return torch.softmax(weights, dim=-1, out=weights)

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        if scale != 1.0:
            query = query * scale
        batch, positions, width = query.shape[0], query.shape[1], value.shape[2]
        tile = value.new_empty(batch, _Tiles._height(query, key), key.shape[1])
        if value.stride(2) == 1:
            mixed = value.new_empty(batch, positions, width)
        else:
            mixed = value.new_empty(batch, width, positions).transpose(1, 2)
        for rows in _Tiles._rows(query, key):
            mixed[:, rows] = mix(_Tiles._weights(query, key, rows, tile), value)
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        grad_query, grad_key, grad_value = (
            torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (query, key, value)
        )
        tile = value.new_empty(key.shape[0], _Tiles._height(query, key), key.shape[1])
        grad_tile = torch.empty_like(tile)
        for rows in _Tiles._rows(query, key):
            weights, grad_rows = _Tiles._weights(query, key, rows, tile), grad[:, rows]
            grad_value.baddbmm_(weights.transpose(1, 2), grad_rows)
            out = grad_tile[:, : grad_rows.shape[1]]
            grad_scores = torch.bmm(grad_rows, value.transpose(1, 2), out=out).mul_(weights)
            grad_scores.sub_(weights.mul_(grad_scores.sum(dim=-1, keepdim=True)))
            grad_key.baddbmm_(grad_scores.transpose(1, 2), query[:, rows])
            grad_query[:, rows] = torch.bmm(grad_scores, key)
        return grad_query.mul_(ctx.scale), grad_key, grad_value, None


def dot_product_by_matrix(positions: int, summed: int, width: int, value_width: int) -> bool:
    """True if (theta phi^T) g takes no more multiply-accumulates than theta (phi^T g), so that it is faster.

    Measured on CPU, the ratio of the times is 0.9 to 1.05 of the ratio of the counts, forward and backward, from 49 to
    3136 positions at widths of 64 to 512.
    """
    by_matrix = positions * summed * (width + value_width)
    return at_most(by_matrix - (positions + summed) * width * value_width, 0)


def dot_product(theta: torch.Tensor, phi: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """theta phi^T g / M: from (B, N, E), (B, M, E) and (B, M, D) to (B, N, D). Mode `dot_product`, section 3.2.

    The cheaper order of the two products runs, so the N x M matrix is built only if it is small. In half precision,
    both phi and g are divided by the square root of M before the sums, to avoid overflow and underflow.
    """
    summed = phi.shape[1]
    half = theta.dtype == torch.float16 or theta.dtype == torch.bfloat16
    if half:
        phi, g = phi / summed**0.5, g / summed**0.5
    if dot_product_by_matrix(theta.shape[1], summed, theta.shape[2], g.shape[2]):
        weights = torch.bmm(theta, phi.transpose(1, 2))
        return mix(weights if half else weights / summed, g)
    context = torch.bmm(phi.transpose(1, 2), g)
    return _mix_rows(theta, context if half else context / summed)


def _mix_rows(theta: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """theta (B, N, E) times context (B, E, D); the result has the memory layout of theta."""
    if at_most(theta.stride(2), 1):
        return torch.bmm(theta, context)
    return torch.bmm(context.transpose(1, 2), theta.transpose(1, 2)).transpose(1, 2)


def concatenate(
    a: torch.Tensor, b: torch.Tensor, g: torch.Tensor, product_up_to: int = CONCATENATION_PRODUCT
) -> torch.Tensor:
    """sum over j of relu(a_i + b_j) g_j / M: from (B, N), (B, M) and (B, M, D) to (B, N, D). Mode `concatenation`.

    With the b_j in falling order, those with a_i + b_j > 0 come first, so for each i the sum is a_i times a prefix sum
    of g plus a prefix sum of b g. That takes O((N + M) (log M + D)) operations and no tensor larger than N x D or M x
    D. Pairs with a_i + b_j = 0 give 0 and get no gradient, as with relu.

    The product form runs in full precision on CPU up to N * M = `product_up_to`, and on CUDA if its matrix is within
    the limit there. On an H100 with B = 8 in bfloat16, in eager mode, it takes a quarter of the sorted form's time at
    196 x 196 and 784 x 784. Half precision is summed in fp32.

    The gradient is the same sum with a and b exchanged. In scripted or compiled code autograd computes it, and an
    exported graph finds the prefixes by sorting, for which ONNX has operators.
    """
    dtype = g.dtype
    on_cuda = g.device.type == "cuda"
    if on_cuda and at_most(a.shape[0] * a.shape[1] * b.shape[1], cuda_attention.LARGEST_MATRIX):
        if dtype == torch.float16 or dtype == torch.bfloat16:
            a, b = a.float(), b.float()
        return mix((torch.relu(a.unsqueeze(2) + b.unsqueeze(1)) / b.shape[1]).to(dtype), g)
    elif dtype == torch.float16 or dtype == torch.bfloat16:
        a, b, g = a.float(), b.float(), g.float()
    elif (g.device.type == "cpu" or g.device.type == "meta") and at_most(a.shape[1] * b.shape[1], product_up_to):
        return mix(torch.relu(a.unsqueeze(2) + b.unsqueeze(1)) / b.shape[1], g)
    if is_scripting() or torch.compiler.is_compiling():
        return _concatenate(a, b, g).to(dtype)
    else:
        mixed: torch.Tensor = _SortedSums.apply(a, b, g)
        return mixed.to(dtype)


def _count_above(a: torch.Tensor, b: torch.Tensor, falling: torch.Tensor) -> torch.Tensor:
    """The number of b_j above -a_i, (B, N); `falling` is b in falling order."""
    if is_scripting():
        return torch.searchsorted((-falling).contiguous(), a.contiguous())
    elif _is_exporting():
        return _count_by_sorting(a, b)
    else:
        return torch.searchsorted((-falling).contiguous(), a.contiguous())


def _count_by_sorting(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The same, from the rank of each -a_i among the b_j; b_j = -a_i may count or not, since its weight is 0."""
    order = torch.sort(torch.cat([-a, b], dim=1), dim=1, descending=True)[1]
    passed = torch.cumsum((order >= a.shape[1]).to(torch.int64), dim=1)
    place = torch.sort(order, dim=1)[1]
    return torch.gather(passed, 1, place[:, : a.shape[1]])


def _columns(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """values (B, D, M) at index (B, N): (B, D, N)."""
    return torch.gather(values, 2, index.unsqueeze(1).expand(-1, values.shape[1], -1))


def _concatenate(a: torch.Tensor, b: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """The sorted form in plain torch operations."""
    summed = b.shape[1]
    falling, order = torch.sort(b, dim=1, descending=True)
    count = _count_above(a.detach(), b.detach(), falling.detach())
    ordered = _columns(g.transpose(1, 2), order)
    plain = F.pad(torch.cumsum(ordered, dim=2), (1, 0))
    weighted = F.pad(torch.cumsum(ordered * (falling / summed).unsqueeze(1), dim=2), (1, 0))
    mixed = torch.addcmul(_columns(weighted, count), _columns(plain, count), (a / summed).unsqueeze(1))
    return mixed.transpose(1, 2)


class _SortedSums(torch.autograd.Function):
    """The sorted form with fewer copies and with a gradient by the same prefix sums."""

    @staticmethod
    def _sums(a: torch.Tensor, b: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For each i, over the j with a_i + b_j > 0: sums of values_j, and of values_j b_j / M. values is (B, D, M)."""
        falling, order = torch.sort(b, dim=1, descending=True)
        count = _count_above(a, b, falling)
        ordered = _columns(values.contiguous(), order)
        prefix = ordered.new_zeros(*ordered.shape[:2], ordered.shape[2] + 1)
        torch.cumsum(ordered, dim=2, out=prefix[..., 1:])
        plain = _columns(prefix, count)
        torch.cumsum(ordered.mul_((falling / b.shape[1]).unsqueeze(1)), dim=2, out=prefix[..., 1:])
        return plain, _columns(prefix, count)

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        plain, weighted = _SortedSums._sums(a, b, g.transpose(1, 2))
        ctx.save_for_backward(a, b, g, plain)
        return weighted.addcmul_(plain, (a / b.shape[1]).unsqueeze(1)).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a, b, g, plain = ctx.saved_tensors
        positions, summed = a.shape[1], b.shape[1]
        grad = grad.transpose(1, 2)
        grad_a = (grad * plain).sum(dim=1).div_(summed)
        plain, weighted = _SortedSums._sums(b, a, grad)  # its weights are a_i / N
        grad_b = (g.transpose(1, 2) * plain).sum(dim=1).div_(summed)
        grad_g = weighted.mul_(positions / summed).addcmul_(plain, (b / summed).unsqueeze(1))
        return grad_a, grad_b, grad_g.transpose(1, 2)


def attend_channels(x: torch.Tensor, paper: bool = False) -> torch.Tensor:
    """For each channel of (B, C, N), the mean of all channels with the weights of `channel_weights`: (B, C, N).

    It takes C * C * 2 N multiply-accumulates. In half precision on CUDA, maps of up to 256 positions use a fused
    kernel, which builds no C x C matrix.
    """
    half = x.dtype == torch.float16 or x.dtype == torch.bfloat16
    if half and x.device.type == "cuda" and at_most(x.shape[2], cuda_attention.WIDEST):
        return cuda_attention.over_channels(x, paper)
    return torch.bmm(channel_weights(x, paper).to(x.dtype), x)


def channel_weights(x: torch.Tensor, paper: bool = False) -> torch.Tensor:
    """The weights of all channels in the mean of each channel of (B, C, N): (B, C, C) in fp32 or float64.

    Each row sums to 1. They are softmax(max(E) - E) with E = x x^T as in the authors' code, which equals softmax(-E),
    or softmax(E), the paper's equation 3. E is computed in fp32 even under autocast, because a sum of N squares
    overflows fp16.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    if x.device.type == "cuda":
        with torch.autocast("cuda", enabled=False):
            energy = torch.bmm(wide, wide.transpose(1, 2))
    else:
        with torch.autocast("cpu", enabled=False):
            energy = torch.bmm(wide, wide.transpose(1, 2))
    return torch.softmax(energy if paper else -energy, dim=-1)
