"""What a block costs at a place: parameters, multiply-accumulates and attention, of a block without weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from attnsurgery.blocks import Start
from attnsurgery.blocks._base import build_block
from attnsurgery.surgery.insertion import Insertion


@dataclass(frozen=True, slots=True)
class BlockCost:
    """What one block adds to a model."""

    params: int
    macs: int
    """Multiply-accumulates of one image."""
    attention_bytes: int
    """Size of the largest attention-like activation that the naive formula would hold, one image, fp32."""


def cost_of(insertion: Insertion) -> BlockCost:
    """What an insertion would add.

    Raises:
        OptionError: its options say what no block of that width can be.
    """
    site, options = insertion.site, tuple(sorted(insertion.options.items()))
    return _cost(insertion.block, site.channels, options, insertion.start, site.map_size)


@lru_cache(maxsize=4096)
def _cost(
    block: str, channels: int, options: tuple[tuple[str, Any], ...], start: Start, size: tuple[int, int]
) -> BlockCost:
    built = build_block(block, channels, dict(options), start, torch.device("meta"))
    cost = built.cost(*size)
    params = sum(parameter.numel() for parameter in built.parameters())
    return BlockCost(params, cost.macs, cost.attention_bytes)
