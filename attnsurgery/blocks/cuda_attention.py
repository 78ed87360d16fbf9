"""softmax(scale * query key^T) value on CUDA: two matrix products or a fused kernel, chosen by measured times.

The fused kernels distribute the work over batch, heads and blocks of queries. A map of 14 x 14 with one head and a
batch of 1 has only a few such blocks, on a card with more than a hundred multiprocessors, so two matrix products can be
faster. Which form is faster was measured (`crossover.py`). In half precision the product form rounds the scores to half
precision before its softmax, as a block written with two matrix products does; the fused kernels keep them in fp32.

Shape letters in this file:  B batch, N positions, M positions that a sum runs over, E width of queries and keys, D
width of values.
"""

from __future__ import annotations

import math
import re
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.jit import is_scripting  # type: ignore[attr-defined]

from attnsurgery.blocks.crossover import CARDS, Rule
from attnsurgery.blocks.sizes import at_most, mix

__all__ = ["attend", "card_name", "fused", "over_channels", "product"]

WIDEST = 256
"""Largest E = D of the flash kernel."""

LARGEST_MATRIX = 1 << 26
"""Largest B * N * M that the product form stores at a time, even where it is faster: 128 MiB in half precision."""

_WIDTHS = (32, 64, 128, 256, 512)
_SMALL_BATCH, _LARGE_BATCH = 1, 64
_SMALL_UP_TO = 8
_SMALL_ROWS = 8192
"""With up to this many queries, B * N, and up to `_SMALL_UP_TO` images, a fused kernel leaves multiprocessors idle, as
at a batch of 1. On an H100, which has 132, it takes 0.43 of the product's time for 8 x 3136 queries at E = D = 256, and
1.2 of it for 1 x 3136."""


class Choice(NamedTuple):
    """Which form runs, for one class of batch, widths and direction."""

    product_above: int
    """The product form runs for N * M above this ..."""
    product_up_to: int
    """... and up to this."""
    in_heads: bool
    """Whether the fused kernel splits the value into heads of width E where possible."""


FUSED = Choice(0, 0, True)
"""The choice without measurements."""


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(scale * query key^T) value: from (B, N, E), (B, M, E) and (B, M, D) to (B, N, D)."""
    if is_scripting():
        return fused(query, key, value, scale, True)
    else:
        if query.dtype == torch.float16:  # its scores may overflow; the fused kernels keep them in fp32
            return fused(query, key, value, scale, True)
        choice = _choice_for(query, value)
        pairs = query.shape[1] * key.shape[1]
        if not at_most(pairs, choice.product_up_to) or at_most(pairs, choice.product_above):
            return fused(query, key, value, scale, choice.in_heads)
        if at_most(query.shape[0] * pairs, LARGEST_MATRIX):
            return product(query, key, value, scale)
        if at_most(query.shape[2], WIDEST) or torch.compiler.is_compiling():
            return fused(query, key, value, scale, True)
        if torch.is_autocast_enabled("cuda"):  # backward runs outside of autocast and must use the same dtype
            dtype = torch.get_autocast_dtype("cuda")
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        sliced: torch.Tensor = _Slices.apply(query, key, value, scale)
        return sliced


def product(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """The product form, in three kernels."""
    if scale == 1.0:
        scores = torch.bmm(query, key.transpose(1, 2))
    else:  # beta = 0: the first argument is never read
        scores = torch.baddbmm(query.new_empty([1]), query, key.transpose(1, 2), beta=0, alpha=scale)
    return mix(torch.softmax(scores, dim=-1), value)


class _Slices(torch.autograd.Function):
    """The product form in groups of images, so that their matrices are within the limit; backward recomputes them.

    It is used for widths that no flash kernel supports. On an H100 with B = 8, N = M = 3136 and E = 512, D = 256 the
    memory-efficient kernel takes 8 times as long as the product, forward and backward.
    """

    @staticmethod
    def _images(query: torch.Tensor, key: torch.Tensor) -> int:
        return max(1, LARGEST_MATRIX // (query.shape[1] * key.shape[1]))

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        images = _Slices._images(query, key)
        slices = zip(*(torch.split(t, images) for t in (query, key, value)), strict=True)
        return torch.cat([product(few_q, few_k, few_v, scale) for few_q, few_k, few_v in slices])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        images = _Slices._images(*ctx.saved_tensors[:2])
        gradients = []
        for *inputs, grad_slice in zip(*(torch.split(t, images) for t in (*ctx.saved_tensors, grad)), strict=True):
            with torch.enable_grad():
                few_q, few_k, few_v = (t.detach().requires_grad_() for t in inputs)
                mixed = product(few_q, few_k, few_v, ctx.scale)
            gradients.append(torch.autograd.grad(mixed, (few_q, few_k, few_v), grad_slice))
        return (*(torch.cat(parts) for parts in zip(*gradients, strict=True)), None)


def fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, in_heads: bool) -> torch.Tensor:
    """The fused kernels of CUDA, with widths padded to multiples of 8.

    Flash supports half precision and E = D up to 256; otherwise the memory-efficient kernel runs. A wider value can be
    split into heads of width E for flash, which computes the scores once per head.
    """
    value_width = value.shape[2]
    query, key, value = _multiple_of_8(query), _multiple_of_8(key), _multiple_of_8(value)
    width, heads = query.shape[2], 1
    half = query.dtype == torch.float16 or query.dtype == torch.bfloat16
    if in_heads and half and width <= 256 and value.shape[2] % width == 0:
        heads = value.shape[2] // width
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    if heads == 1:  # fewer views, because in eager mode each costs about as much as a kernel
        query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
        mixed = F.scaled_dot_product_attention(query, key, value, scale=scale).squeeze(1)
        return mixed if mixed.shape[2] == value_width else mixed[:, :, :value_width]
    values = value.reshape(value.shape[0], value.shape[1], heads, value.shape[2] // heads).transpose(1, 2)
    query, key = query.unsqueeze(1).expand(-1, heads, -1, -1), key.unsqueeze(1).expand(-1, heads, -1, -1)
    mixed = F.scaled_dot_product_attention(query, key, values, scale=scale).transpose(1, 2).flatten(2)
    return mixed if mixed.shape[2] == value_width else mixed[:, :, :value_width]


def over_channels(x: torch.Tensor, paper: bool) -> torch.Tensor:
    """Channel attention, (B, C, N) -> (B, C, N), by the fused kernel with channels as its positions and N as its width.

    The C x C matrix, with B * C * C numbers in fp32 and several passes over them, is never built. The kernel keeps its
    energies in fp32. It is for half precision and N up to `WIDEST`.

    Args:
        x: the maps, (B, C, N).
        paper: True for softmax(E), False for softmax(-E), which is softmax(max(E) - E).
    """
    return fused(x if paper else -x, x, x, 1.0, False)


def _multiple_of_8(rows: torch.Tensor) -> torch.Tensor:
    """Pad the last dimension with zeros to a multiple of 8, without a copy if it is one already."""
    missing = -rows.shape[2] % 8
    return F.pad(rows, (0, missing)) if missing > 0 else rows


def card_name(device: torch.device | str | int | None = None) -> str:
    """The name of a card in files and tables, such as "nvidia-h100-80gb-hbm3"."""
    return re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def _choice_for(query: torch.Tensor, value: torch.Tensor) -> Choice:
    half = query.dtype == torch.float16 or query.dtype == torch.bfloat16
    choice = _looked_up(
        query.device,
        "half" if half else "full",
        "both" if torch.is_grad_enabled() else "forward",
        _SMALL_BATCH if _is_small(query) else _LARGE_BATCH,
        _class_of(query.shape[2]),
        _class_of(value.shape[2]),
    )
    return Choice(choice[0], choice[1], choice[2])


def _is_small(query: torch.Tensor) -> bool:
    return at_most(query.shape[0], _SMALL_UP_TO) and at_most(query.shape[0] * query.shape[1], _SMALL_ROWS)


def _class_of(width: int) -> int:
    """The nearest measured width; the largest if a compiler does not know the width."""
    for measured in _WIDTHS[:-1]:
        if at_most(width, measured * 3 // 2):
            return measured
    return _WIDTHS[-1]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _looked_up(
    device: torch.device, precision: str, direction: str, batch: int, width: int, value_width: int
) -> tuple[int, int, bool]:
    """The choice as a plain tuple, which a compiler treats as a constant."""
    return tuple(_choice(*_card(device), precision, direction, batch, width, value_width))  # type: ignore[return-value]


@cache
def _card(device: torch.device) -> tuple[str, tuple[int, int]]:
    return card_name(device), torch.cuda.get_device_capability(device)


@cache
def _choice(
    card: str, capability: tuple[int, int], precision: str, direction: str, batch: int, width: int, value_width: int
) -> Choice:
    """The table's choice for the nearest card, batch and widths; `FUSED` if the table has none."""

    def distance(rule: Rule) -> float:
        _, _, rule_batch, rule_width, rule_value_width, *_ = rule
        widths = abs(math.log2(width / rule_width)) + abs(math.log2(value_width / rule_value_width))
        return 100 * abs(math.log2(batch / rule_batch)) + widths

    rules = [rule for rule in _rules(card, capability) if rule[:2] == (precision, direction)]
    if not rules:
        return FUSED
    nearest = min(rules, key=distance)
    return Choice(*nearest[5:])


def _rules(card: str, capability: tuple[int, int]) -> tuple[Rule, ...]:
    """The rules of this card, or of the measured card with the nearest compute capability."""
    if card in CARDS:
        return CARDS[card][1]

    def distance(name: str) -> int:
        major, minor = CARDS[name][0]
        return abs(10 * (capability[0] - major) + capability[1] - minor)

    return CARDS[min(CARDS, key=distance)][1] if CARDS else ()
