"""The palette of Okabe and Ito, which is distinguishable with any colour vision, and neutral colours."""

from __future__ import annotations

BLUE, RED, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
FAMILIES = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY)
"""Colours of the kinds of blocks, in the order of their names."""
LIGHT, LIGHT_ORANGE = "#b3d3e6", "#f3d28f"

INK, GREY, AXIS, LINE, PAPER = "#1f2430", "#6b7280", "#b6bcc6", "#e3e6eb", "#fcfcfb"
