"""How reliable the ranking of candidates is, from the scores of some that were trained from two seeds.

All trials have the same seed, so what a seed does to every candidate alike does not change their order. What is left
is the share of the variance of one score that is between candidates: the intraclass correlation ICC(3,1) of Shrout and
Fleiss, "Intraclass correlations: uses in assessing rater reliability", Psychological Bulletin 86, 1979, with the seeds
as raters. Unlike their ICC(1,1) it does not take a shift of all scores for noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import fdtri, ndtri  # scipy.stats takes a second to import

from attnsurgery.settings import RankBy

RELIABLE, BY_CHANCE = 0.7, 0.3
"""Intraclass correlations from which on a ranking is reliable, and below which it is mostly chance."""
FEWEST = 2
"""Candidates that a correlation needs at least."""
_LEVEL = 0.05
_RIGHT = 0.8
"""Probability with which the smallest visible difference is ranked in the right order: 4 of 5 cases."""
_FINEST = 1e-9
"""Resolution of a loss, so that equal losses are no division by zero."""


@dataclass(frozen=True, slots=True)
class Reliability:
    """How reliable one score of a candidate is."""

    candidates: int
    """Number of candidates with scores from two seeds."""
    correlation: float
    """The intraclass correlation, -1 to 1: 1 without noise, 0 on average if candidates do not differ."""
    low: float
    """Lower end of its 95 % interval."""
    high: float
    """Upper end of its 95 % interval."""
    std: float
    """Standard deviation of one candidate's score over seeds, without what a seed does to all candidates alike."""
    by: RankBy = "metric"
    """The score: the metric, 0 to 1, or the loss."""

    @classmethod
    def of_scores(
        cls, first_N: Sequence[float], second_N: Sequence[float], by: RankBy = "metric", resolution: float = _FINEST
    ) -> Reliability:
        """The reliability of the scores of N candidates.

        Args:
            first_N: scores from one seed.
            second_N: scores of the same candidates from another seed.
            by: what the scores are.
            resolution: smallest difference that two scores can have. Rounding to it is counted as noise, so that an
                interval has a width also if all scores agree.
        """
        scores_2N = np.asarray([first_N, second_N], dtype=float)
        freedom = scores_2N.shape[1] - 1
        rounding = resolution**2 / 12
        between = max(2 * float(scores_2N.mean(0).var(ddof=1)), rounding)
        within = max(float((scores_2N[0] - scores_2N[1]).var(ddof=1)) / 2, rounding)
        ratio, quantile = between / within, float(fdtri(freedom, freedom, 1 - _LEVEL / 2))
        return cls(
            candidates=freedom + 1,
            correlation=_correlation(ratio),
            low=_correlation(ratio / quantile),
            high=_correlation(ratio * quantile),
            std=math.sqrt(within),
            by=by,
        )

    @classmethod
    def of(cls, repeats: Mapping[str, Mapping[str, Any]], by: RankBy, images: int) -> Reliability | None:
        """The reliability that a study has measured; None if fewer than two candidates have scores from two seeds.

        Args:
            repeats: by digest of the candidate, its scores `first` and `second`, as the study has them.
            by: the score that candidates are ranked by.
            images: number of validation images.
        """
        pairs = [(entry["first"][by], entry["second"][by]) for entry in repeats.values() if by in entry["second"]]
        if len(pairs) < FEWEST:
            return None
        first_N, second_N = zip(*pairs, strict=True)
        return cls.of_scores(first_N, second_N, by, 1 / images if by == "metric" else _FINEST)

    @property
    def smallest_difference(self) -> float:
        """The true difference between two candidates whose scores are in the right order in 4 of 5 cases."""
        return float(ndtri(_RIGHT)) * math.sqrt(2) * self.std

    @property
    def grade(self) -> str:
        """What follows for the search, in words."""
        if self.correlation >= RELIABLE:
            return "reliable"
        if self.correlation >= BY_CHANCE:
            return "moderately reliable"
        return "mostly by chance: train fewer candidates for longer, or use more validation images"

    def words(self) -> str:
        """Grade, correlation with its interval, and the smallest visible difference, in words."""
        low, high = max(0.0, self.low), max(0.0, self.high)
        return (
            f"the ranking of candidates is {self.grade} (intraclass correlation {max(0.0, self.correlation):.2f}, 95 % "
            f"interval {low:.2f} to {high:.2f}, from {self.candidates} candidates trained from two seeds); of two "
            f"candidates, the better one has the better score in 4 of 5 cases if they truly differ by "
            f"{self.in_units(self.smallest_difference)}"
        )

    def in_units(self, difference: float) -> str:
        """A difference of two scores with its unit."""
        return f"{100 * difference:.2f} points" if self.by == "metric" else f"{difference:.4f} in the loss"


def _correlation(ratio: float) -> float:
    """ICC(3,1) of two ratings, from the ratio F of the mean squares between and within candidates."""
    return (ratio - 1) / (ratio + 1)
