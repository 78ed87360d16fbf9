"""Where two matrix products beat the fused attention kernel on CUDA: measured, and written by a script.

    python scripts/bench/blocks.py --crossover --out ROWS.jsonl
    python scripts/bench/blocks.py --table ROWS.jsonl

Each rule says (precision, direction, B, E, D, product_above, product_up_to, in_heads): for a batch of about B and
widths near E and D, the product form wins at N * M above product_above and up to product_up_to; elsewhere the fused
kernel takes the value in heads of width E if in_heads, else in one head. A form that wins at the largest size that was
measured is taken to win beyond it. `cuda_attention.py` reads the table. Without an entry the fused kernel always runs.
"""

from __future__ import annotations

Rule = tuple[str, str, int, int, int, int, int, bool]

CARDS: dict[str, tuple[tuple[int, int], tuple[Rule, ...]]] = {
    "nvidia-h100-80gb-hbm3": (
        (9, 0),
        (
            ("full", "both", 1, 64, 512, 0, 67108864, True),
            ("full", "both", 1, 512, 512, 0, 67108864, True),
            ("full", "forward", 1, 64, 512, 0, 67108864, True),
            ("full", "forward", 1, 512, 512, 0, 67108864, True),
            ("half", "both", 1, 32, 256, 9604, 67108864, False),
            ("half", "both", 1, 64, 64, 38416, 2458624, True),
            ("half", "both", 1, 64, 512, 38416, 67108864, True),
            ("half", "both", 1, 128, 128, 38416, 67108864, True),
            ("half", "both", 1, 256, 256, 9604, 67108864, True),
            ("half", "both", 1, 512, 512, 0, 67108864, True),
            ("half", "both", 64, 32, 256, 0, 0, False),
            ("half", "both", 64, 64, 64, 0, 0, True),
            ("half", "both", 64, 64, 512, 0, 67108864, True),
            ("half", "both", 64, 128, 128, 0, 0, True),
            ("half", "both", 64, 256, 256, 0, 0, True),
            ("half", "both", 64, 512, 512, 0, 67108864, True),
            ("half", "forward", 1, 32, 256, 153664, 67108864, True),
            ("half", "forward", 1, 64, 64, 153664, 614656, True),
            ("half", "forward", 1, 64, 512, 9604, 67108864, False),
            ("half", "forward", 1, 128, 128, 153664, 2458624, True),
            ("half", "forward", 1, 256, 256, 153664, 67108864, True),
            ("half", "forward", 1, 512, 512, 9604, 67108864, True),
            ("half", "forward", 64, 32, 256, 0, 441, False),
            ("half", "forward", 64, 64, 64, 0, 0, True),
            ("half", "forward", 64, 64, 512, 153664, 67108864, False),
            ("half", "forward", 64, 128, 128, 0, 0, True),
            ("half", "forward", 64, 256, 256, 0, 0, True),
            ("half", "forward", 64, 512, 512, 9604, 67108864, True),
        ),
    ),
}
"""Compute capability and rules of each card that was measured, by the name that `card_name` gives it."""
