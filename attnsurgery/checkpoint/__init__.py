"""Weights in files: reading them in any format, timm directories, deltas, and exports to timm's own models."""
