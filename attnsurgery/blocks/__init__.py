"""What can go in: attention blocks that map (B, C, H, W) to the same shape and know no model."""

from attnsurgery.blocks._base import BLOCKS, Block, Cost, Start

__all__ = ["BLOCKS", "Block", "Cost", "Start"]
