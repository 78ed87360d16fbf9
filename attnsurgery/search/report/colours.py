"""Colours of Okabe and Ito, which people with any kind of colour vision tell apart, and those of the paper."""

from __future__ import annotations

BLUE, RED, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
FAMILIES = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY)
"""Of blocks, in the order of their names."""
LIGHT, LIGHT_ORANGE = "#b3d3e6", "#f3d28f"

INK, GREY, AXIS, LINE, PAPER = "#1f2430", "#6b7280", "#b6bcc6", "#e3e6eb", "#fcfcfb"
