"""A test of the measurement: the ratio of a model to itself is 1, so its confidence intervals should contain 1.

Every comparison is of two new copies of one model. The nominal coverage is 95 %: about 95 of 100 intervals should
contain 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import nn

from attnsurgery.latency._base import LatencyBackend
from attnsurgery.latency.result import Comparison

MIN_COVERAGE = 0.93
"""The smallest coverage that the test accepts."""


@dataclass(frozen=True)
class SelfTest:
    """The results of comparing a model with itself."""

    ratios: tuple[float, ...]
    """The ratio of each comparison."""
    held: int
    """Number of intervals that contain 1."""
    half_width: float
    """Median of half the widths of the intervals."""
    unsteady: int
    """Number of comparisons during which the machine was not steady."""

    @classmethod
    def of(cls, comparisons: list[Comparison]) -> SelfTest:
        """The summary of comparisons of a model with itself."""
        return cls(
            ratios=tuple(comparison.ratio for comparison in comparisons),
            held=sum(comparison.ratio_low <= 1.0 <= comparison.ratio_high for comparison in comparisons),
            half_width=float(np.median([(pair.ratio_high - pair.ratio_low) / 2 for pair in comparisons])),
            unsteady=sum(not comparison.base.steady for comparison in comparisons),
        )

    @property
    def coverage(self) -> float:
        """Share of the intervals that contain 1."""
        return self.held / len(self.ratios)

    @property
    def worst(self) -> float:
        """The largest difference of a ratio from 1."""
        return max(abs(ratio - 1.0) for ratio in self.ratios)

    @property
    def passed(self) -> bool:
        """False if a coverage of 93 % is rejected: so few intervals contain 1 with a probability below 5 %."""
        count = len(self.ratios)
        probabilities = (
            math.comb(count, number) * MIN_COVERAGE**number * (1 - MIN_COVERAGE) ** (count - number)
            for number in range(self.held + 1)
        )
        return sum(probabilities) >= 0.05

    def as_dict(self) -> dict[str, Any]:
        """All results as plain data."""
        return asdict(self) | {"coverage": self.coverage, "worst": self.worst, "passed": self.passed}


def self_test(
    backend: LatencyBackend, model: nn.Module, repeats: int, on_done: Callable[[int], None] | None = None
) -> SelfTest:
    """Compare a model with itself.

    Args:
        backend: measures it.
        model: the model.
        repeats: the number of comparisons.
        on_done: called with the number of comparisons after each of them.

    Raises:
        UsageError: the model cannot take an input of these conditions.
    """
    comparisons = []
    for number in range(repeats):
        comparisons.append(backend.compare(model, model))
        if on_done:
            on_done(number + 1)
    return SelfTest.of(comparisons)
