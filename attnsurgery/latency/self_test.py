"""A model against itself: what the meter says where there is nothing to say.

Every comparison is of two fresh copies of one model, so each ratio that differs from 1 is the machine's doing, and of
100 intervals that are said to hold the ratio with 95 % certainty about 95 have to hold 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import nn

from attnsurgery.latency._base import Comparison, LatencyBackend

ENOUGH = 0.93
"""Of the intervals that have to hold 1."""


@dataclass(frozen=True)
class SelfTest:
    """What came out of comparing a model with itself."""

    ratios: tuple[float, ...]
    held: int
    """Intervals that hold 1."""
    half_width: float
    """Of an interval, the median."""
    unsteady: int
    """Comparisons during which the machine was not steady."""

    @classmethod
    def of(cls, found: list[Comparison]) -> SelfTest:
        return cls(
            ratios=tuple(one.ratio for one in found),
            held=sum(one.ratio_low <= 1.0 <= one.ratio_high for one in found),
            half_width=float(np.median([(one.ratio_high - one.ratio_low) / 2 for one in found])),
            unsteady=sum(not one.base.steady for one in found),
        )

    @property
    def coverage(self) -> float:
        """Share of the intervals that hold 1."""
        return self.held / len(self.ratios)

    @property
    def worst(self) -> float:
        """The largest difference that was seen where there is none."""
        return max(abs(ratio - 1.0) for ratio in self.ratios)

    @property
    def passed(self) -> bool:
        """False if so few intervals hold 1 that they cannot be those that hold it in 93 %: a chance below 5 %."""
        count = len(self.ratios)
        as_rare = (
            math.comb(count, held) * ENOUGH**held * (1 - ENOUGH) ** (count - held) for held in range(self.held + 1)
        )
        return sum(as_rare) >= 0.05

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"coverage": self.coverage, "worst": self.worst, "passed": self.passed}


def self_test(
    backend: LatencyBackend, model: nn.Module, repeats: int, on_done: Callable[[int], None] | None = None
) -> SelfTest:
    """Compare the model with itself so many times.

    Raises:
        UsageError: the model cannot take an input of these conditions.
    """
    found = []
    for number in range(repeats):
        found.append(backend.compare(model, model))
        if on_done:
            on_done(number + 1)
    return SelfTest.of(found)
