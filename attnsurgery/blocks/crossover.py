"""Where two matrix products beat the fused attention kernel on CUDA: measured, and written by a script.

    python scripts/bench/blocks.py --crossover --out ROWS.jsonl
    python scripts/bench/blocks.py --table ROWS.jsonl

Each rule says (precision, direction, B, E, D, product_up_to, in_heads): for a batch of about B and widths near E and D,
the product form wins up to N * M = product_up_to; beyond, the fused kernel takes the value in heads of width E if
in_heads, else in one head. `cuda_attention.py` reads the table. Without an entry the fused kernel always runs.
"""

from __future__ import annotations

Rule = tuple[str, str, int, int, int, int, bool]

CARDS: dict[str, tuple[tuple[int, int], tuple[Rule, ...]]] = {}
"""Compute capability and rules of each card that was measured, by the name that `card_name` gives it."""
