"""Sequential comparison: trainings are added one by one until the gain is decided, with the false alarms in control.

Whoever tests after every training, and stops as soon as the difference is significant, finds a difference too often.
So each look at the results has its own significance level, and the probability that any of them is crossed by chance
is 5 % in all. The levels follow the spending function of Lan and DeMets ("Discrete sequential boundaries for clinical
trials", 1983) of the O'Brien-Fleming type: almost nothing is spent on the first looks, and nearly all is left for the
last one. How far a comparison has come is measured by its information, the inverse of the variance of the gain (Mehta
and Tsiatis, "Flexible sample size considerations using information-based interim monitoring", 2001). More trainings
narrow only the part of the variance that comes from trainings. Where test images are few, the first look may have
nearly all the information there will ever be, and is then the last one.

Levels are computed for normal deviates and applied to the p-values of Student's t ("significance level approach",
Jennison and Turnbull, "Group sequential methods", 2000, section 11.2). The intervals are repeated confidence intervals
(Jennison and Turnbull, "Interim analyses: the repeated confidence interval approach", 1989): all of them together hold
with 95 % probability, so the last one does wherever the comparison stops.

Shape letters: S trainings, N images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, ndtri

from attnsurgery.search.result.answers import Values
from attnsurgery.search.result.statistics import Gain, gain_of

SIGNIFICANT = 0.05
"""The significance level of the verdict, over all looks."""
_ENOUGH = 0.9
"""Share of the attainable information from which on further trainings are not worth their time: all of them would
narrow the interval by 5 %."""
_REACH, _POINTS = 8.0, 601
"""Range and number of points of the numerical integration, for a deviate whose final standard deviation is 1."""


@dataclass(frozen=True, slots=True)
class Design:
    """When a comparison is looked at, and when it is decided."""

    begin: int
    """Number of trainings of each model at the first look; each further training is another look."""
    most: int
    """Number of trainings at the last look."""
    difference: float = 0.0
    """The smallest gain that matters, 0 to 1."""
    paired: bool = False
    """Whether trainings from the same seed are compared in pairs, as in `gain_of`."""


@dataclass(frozen=True, slots=True)
class Look:
    """The comparison of two models after some trainings of each."""

    gain: Gain
    """The gain, whose interval holds for all looks together."""
    limit: float
    """The significance level of this look: a p-value below it is significant."""
    trainings: int
    """Number of trainings of each model."""
    number: int
    """Number of looks so far."""
    decided: bool
    """Whether the comparison is over: the interval is on one side of the difference that matters, or more trainings
    would not narrow it."""

    @property
    def significant(self) -> bool:
        """Whether the models differ."""
        return self.gain.p_value < self.limit


def look_at(
    first_SN: Values,
    second_SN: Values,
    design: Design,
    level: float = SIGNIFICANT,
) -> Look:
    """Compare two models after trainings of each.

    Later trainings than those that decided the comparison are not used, nor those that only one model has.

    Args:
        first_SN: the values of the images after each training of the first model, whose mean is the metric; booleans
            where each image is right or wrong.
        second_SN: the same for the second model, of which there may be more or fewer trainings.
        design: when it is looked at, and when it is decided.
        level: the significance level of all looks together.

    Returns:
        The look that decided, or else the last one.

    Example: with one look the limit is 5 %
        >>> right, wrong = np.ones((2, 50), dtype=bool), np.zeros((2, 50), dtype=bool)
        >>> look = look_at(right, wrong, Design(begin=2, most=2))
        >>> look.limit, look.significant, look.decided
        (0.05, True, True)
    """
    most, paired = design.most, design.paired
    fractions: list[float] = []
    for count in range(design.begin, min(len(first_SN), len(second_SN)) + 1):
        first, second = first_SN[:count], second_SN[:count]
        reached = _information(gain_of(first, second, paired=paired), count, most)
        if fractions:  # an estimate may fall, and information never does
            reached = max(reached, fractions[-1] + (1 - fractions[-1]) / (2 * (most - count + 1)))
        fractions.append(1.0 if count >= most or reached >= _ENOUGH else reached)
        limit = significance_levels(fractions, level)[-1]
        gain = gain_of(first, second, paired=paired, level=limit)
        decided = fractions[-1] == 1.0 or gain.low >= design.difference or gain.high < design.difference
        if decided:
            break
    return Look(gain, limit, count, len(fractions), decided)


def _information(gain: Gain, trainings: int, most: int) -> float:
    """The information of a look, as a share of that of the last one."""
    if not gain.by_trainings:
        return 1.0
    least = gain.by_trainings * trainings / most + gain.by_images
    return least / (gain.by_trainings + gain.by_images)


def significance_levels(fractions: Sequence[float], level: float) -> list[float]:
    """The two-sided significance level of each look, so that under no difference one is crossed with `level`.

    Args:
        fractions: information at each look as a share of that at the last one, in ascending order up to 1.
        level: probability that any look finds a difference where there is none; it is reached at the share 1.

    Example: looks after one, two, three and four quarters of the trainings
        >>> [round(limit, 4) for limit in significance_levels((0.25, 0.5, 0.75, 1.0), 0.05)]
        [0.0, 0.0031, 0.0183, 0.044]
    """
    if fractions[0] >= 1.0:
        return [level]
    grid_P, step = np.linspace(-_REACH, _REACH, _POINTS, retstep=True)
    density_P: npt.NDArray[np.float64] | None = None
    levels: list[float] = []
    spent = before = 0.0
    for fraction in fractions:
        if density_P is None:
            density_P = _normal(grid_P, fraction)
        else:  # the score moves on by independent increments from where no look has ended it
            density_P = step * (_normal(grid_P[:, None] - grid_P, fraction - before) @ density_P)
        outside = 2 * np.cumsum(density_P[::-1])[: _POINTS // 2] * step  # by symmetry, beyond each point on both sides
        share = _spent(fraction, level) - spent
        boundary = float(np.interp(share, outside, grid_P[::-1][: _POINTS // 2] - step / 2))
        density_P = np.where(abs(grid_P) < boundary, density_P, 0.0)
        levels.append(float(2 * ndtr(-boundary / math.sqrt(fraction))))
        spent, before = spent + share, fraction
    return levels


def _spent(fraction: float, level: float) -> float:
    """What is spent of the significance level up to a share of the information, in the manner of O'Brien-Fleming."""
    return float(4 * ndtr(ndtri(level / 4) / math.sqrt(fraction)))


def _normal(x: npt.NDArray[np.float64], variance: float) -> npt.NDArray[np.float64]:
    return np.exp(-(x**2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)


def not_beaten(values: Sequence[Values], design: Design) -> list[bool]:
    """Which of several models may be the best: those that no other one beats.

    This is a comparison with the best (Hsu, "Constrained simultaneous confidence intervals for multiple comparisons
    with the best", 1984): each model is compared with all others, each time at the level SIGNIFICANT divided by their
    number. The truly best model is in the result with a probability of at least 95 %, and so is the base where nothing
    is better.

    Args:
        values: of each model, (S, N), as in `look_at`. Numbers of trainings may differ; two models are compared by
            those from the same seeds.
        design: when each pair is looked at; its difference does not count.
    """
    design = replace(design, difference=0.0)
    level = SIGNIFICANT / max(1, len(values) - 1)

    def beats(first: Values, second: Values) -> bool:
        look = look_at(first, second, design, level)
        return look.significant and look.gain.mean > 0

    return [
        not any(beats(other, own) for place, other in enumerate(values) if place != at) for at, own in enumerate(values)
    ]


def seeds_move_together(scores_FS: npt.NDArray[np.float64]) -> bool:
    """Whether a seed moves the scores of all models alike, so that comparing models seed by seed is more precise.

    This is the F test of the seeds in a two-way analysis of variance without replication (Fisher), at the level
    `SIGNIFICANT`. It must be made on other trainings than those that are compared, since choosing the narrower of two
    intervals would raise the false alarms.

    Args:
        scores_FS: scores of F models, each trained from the same S seeds; with fewer than two models or seeds, the
            answer is no.
    """
    from scipy.special import fdtrc

    scores_FS = np.asarray(scores_FS, dtype=float)
    if scores_FS.ndim < 2 or min(scores_FS.shape) < 2:
        return False
    models, seeds = scores_FS.shape
    seed_S = scores_FS.mean(0)
    of_seeds = models * float(seed_S.var(ddof=1))
    rest_FS = scores_FS - scores_FS.mean(1, keepdims=True) - seed_S + scores_FS.mean()
    freedom = (models - 1) * (seeds - 1)
    residual = float((rest_FS**2).sum()) / freedom
    if residual == 0.0:
        return bool(of_seeds > 0.0)
    return bool(fdtrc(seeds - 1, freedom, of_seeds / residual) < SIGNIFICANT)
