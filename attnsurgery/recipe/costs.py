"""The cost of a block at a site: parameters, multiply-accumulates and attention, from a block without weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from attnsurgery.blocks import Start
from attnsurgery.blocks._base import build_block
from attnsurgery.catalog import NO_BLOCK
from attnsurgery.surgery.insertion import Insertion


@dataclass(frozen=True, slots=True)
class BlockCost:
    """What one block adds to a model, less what it takes the place of: both numbers can be negative."""

    params: int
    """Number of parameters."""
    macs: int
    """Multiply-accumulates of one image."""
    attention_bytes: int
    """Bytes of the largest attention-like activation that the naive formula would hold, for one image in fp32."""


def cost_of(insertion: Insertion) -> BlockCost:
    """The cost of an insertion.

    Raises:
        OptionError: no block with these options exists for the number of channels of the site.
    """
    cost, replaced = own_cost_of(insertion), insertion.replaced
    if replaced is None:
        return cost
    return replace(cost, params=cost.params - replaced.params, macs=cost.macs - replaced.macs)


def own_cost_of(insertion: Insertion) -> BlockCost:
    """The cost of the block alone, whatever it takes the place of.

    Raises:
        OptionError: as `cost_of`.
    """
    if insertion.block == NO_BLOCK:
        return BlockCost(0, 0, 0)
    site, options = insertion.site, tuple(sorted(insertion.options.items()))
    return _cost(insertion.block, site.channels, options, insertion.start, site.map_size)


@lru_cache(maxsize=4096)
def _cost(
    block: str, channels: int, options: tuple[tuple[str, Any], ...], start: Start, size: tuple[int, int]
) -> BlockCost:
    instance = build_block(block, channels, dict(options), start, torch.device("meta"))
    cost = instance.cost(*size)
    params = sum(parameter.numel() for parameter in instance.parameters())
    return BlockCost(params, cost.macs, cost.attention_bytes)
