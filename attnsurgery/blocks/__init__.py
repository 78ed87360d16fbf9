"""Attention blocks, which map (B, C, H, W) to the same shape and are independent of any model."""

from attnsurgery.blocks._base import BLOCKS, Block, Cost, Start

__all__ = ["BLOCKS", "Block", "Cost", "Start"]
