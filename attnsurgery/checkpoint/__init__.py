"""Weights on the disk: reading what people have, timm directories, differences, deltas, stock forms."""
