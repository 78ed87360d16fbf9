"""The few statistics of a search, as plain functions of plain numbers."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri, stdtr, stdtrit  # scipy.stats takes a second to import

from attnsurgery.search.result.answers import Values
from attnsurgery.search.result.record import Record
from attnsurgery.search.space import NONE

_Z = float(ndtri(0.975))
_Z_POWER = float(ndtri(0.8))
_ADDED = (1, -1, 0, 0)
"""Gains of four additional images that intervals count, so that they hold for few images."""


def best_so_far(scores: Sequence[float]) -> list[float]:
    """The running maximum of the scores."""
    return list(itertools.accumulate(scores, max))


def expected_best(scores: Sequence[float]) -> list[float]:
    """The expected maximum of one, two, three ... scores drawn without replacement, exactly.

    The k-th lowest of m scores is the maximum of n drawn ones in C(k - 1, n - 1) of the C(m, n) subsets: it is drawn,
    and all others are among the k - 1 below it.
    """
    ascending_M = np.sort(np.asarray(scores, dtype=float))
    rank_M = np.arange(1, len(ascending_M) + 1)
    share_M = np.full(len(ascending_M), 1.0 / max(1, len(ascending_M)))
    expected = []
    for drawn in rank_M:
        expected.append(float(share_M @ ascending_M))
        # C(k - 1, n) / C(m, n + 1) from C(k - 1, n - 1) / C(m, n)
        share_M = share_M * (rank_M - drawn).clip(0) / drawn * (drawn + 1) / max(1, len(ascending_M) - drawn)
    return expected


def kendall_tau_b(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Kendall's rank correlation tau-b, which corrects for ties: 1 equal order, -1 reversed order.

    None if all values of one series are equal.
    """
    from scipy.stats import kendalltau

    tau = float(kendalltau(first, second).statistic) if len(first) > 1 else math.nan
    return None if math.isnan(tau) else tau


def gains(records: Iterable[Record], base: float) -> dict[tuple[str, str], list[float]]:
    """For each place and block, the gains over the base in the metric of all candidates with that block there.

    Args:
        records: of candidates.
        base: metric of the base, 0 to 1.
    """
    gains_by_choice: dict[tuple[str, str], list[float]] = defaultdict(list)
    for record in records:
        for place, label in record.assignment.items():
            if label != NONE and record.metric is not None:
                gains_by_choice[place, label].append(record.metric - base)
    return dict(gains_by_choice)


def without_outliers(values: Sequence[float]) -> list[float]:
    """The values within three interquartile ranges of the quartiles, which a figure can show on one scale."""
    low, high = np.quantile(values, (0.25, 0.75)) if values else (0.0, 0.0)
    reach = 3 * (high - low)
    if not reach:
        return list(values)
    return [value for value in values if low - reach <= value <= high + reach]


@dataclass(frozen=True, slots=True)
class Gain:
    """The difference in the metric of two models, with its uncertainty."""

    mean: float
    """Metric of the first minus that of the second, the mean over their trainings."""
    low: float
    """Lower end of the 95 % interval, over images of the same kind and over trainings of both models."""
    high: float
    """Upper end of that interval."""
    p_value: float
    """Two-sided p-value."""
    by_trainings: float = 0.0
    """The part of the variance of the mean that comes from trainings, and falls with their number."""
    by_images: float = 0.0
    """The part of the variance of the mean that comes from the choice of images."""


def gain_of(
    first_SN: Values,
    second_SN: Values,
    *,
    paired: bool = False,
    level: float = 0.05,
) -> Gain:
    """Compare two models by the values of the same N images after S trainings of each.

    Trainings of one model easily differ in accuracy by half a point on ten thousand images, so a test that counts
    images only takes a lucky training for a better model. This is the analysis of variance for readers and cases:
    trainings are the readers, images are the cases, and each model has its own readers (Hillis, Berbaum and Metz,
    "Recent developments in the Dorfman-Berbaum-Metz procedure for multireader ROC study analysis", 2008, with readers
    nested in tests). A single training of each model says nothing about other trainings. Then the interval is about
    images only, and the p-value is that of McNemar's exact test, or of Student's t where values are numbers.

    Where a seed moves all models alike, trainings of both models from the same seed are `paired`: the readers are
    crossed with tests, and what the seed does to both cancels. The S differences leave only S - 1 degrees of freedom,
    so elsewhere this is less precise.

    The interval also holds for few images and for equal answers: it counts four additional images, one for each way in
    which two models can be right or wrong (as Agresti and Min do for pairs of proportions, "Simple improved confidence
    intervals for comparing matched proportions", 2005). Where values are numbers, two of these differ by a standard
    deviation of the values. It is never narrower than the interval of images only.

    Args:
        first_SN: the values of the images after each training of the first model, whose mean is the metric; booleans
            where each image is right or wrong.
        second_SN: the same for the second model.
        paired: whether the trainings of both models are from the same seeds, in the same order, and compared in pairs.
        level: the interval holds with a probability of 1 - level.
    """
    binary = np.asarray(first_SN).dtype == np.asarray(second_SN).dtype == np.bool_
    first, second = (np.asarray(values, dtype=float) for values in (first_SN, second_SN))
    trainings, images = first.shape
    samples = 1 if paired else 2
    gain_N = first.mean(0) - second.mean(0)
    mean = float(gain_N.mean())
    by_image = trainings / samples * float(gain_N.var(ddof=1))
    unit = 1.0 if binary else math.sqrt(float(first.var(1).mean() + second.var(1).mean()) / 2)
    more = images + len(_ADDED)
    middle = float(gain_N.sum()) / more
    of_images = trainings / samples * ((float((gain_N**2).sum()) + unit**2 * sum(map(abs, _ADDED))) / more - middle**2)
    share = samples / (trainings * images)

    def gain(p_value: float, variance: float, freedom: float, by_training: float, of_image: float) -> Gain:
        half = float(stdtrit(freedom, 1 - level / 2)) * math.sqrt(samples / (trainings * more) * variance)
        low, high = min(mean, middle - half), max(mean, middle + half)
        if binary:
            low, high = max(-1.0, low), min(1.0, high)
        return Gain(mean, low, high, p_value, share * by_training, share * of_image)

    def by_images_only() -> float:
        if binary:
            return sign_test(int((gain_N > 0).sum()), int((gain_N < 0).sum()))
        error = math.sqrt(float(gain_N.var(ddof=1)) / images)
        return float(2 * stdtr(images - 1, -abs(mean) / error)) if error else 1.0

    if trainings == 1:
        return gain(by_images_only(), of_images, images - 1, 0.0, by_image)
    freedom = samples * (trainings - 1)
    by_training = residual = 0.0
    for values in [first - second] if paired else [first, second]:
        mean_S1 = values.mean(1, keepdims=True)
        by_training += images * float(mean_S1.var(ddof=1)) / samples
        residual += float(((values - mean_S1 - values.mean(0) + values.mean()) ** 2).sum()) / (freedom * (images - 1))
    wide = max(by_training, residual) + max(of_images - residual, 0.0)
    of_image = max(by_image - residual, 0.0)
    variance = by_training + of_image

    def freedom_of(variance: float) -> float:
        if paired:  # few differences: a share of images in their variance is too uncertain to count on
            return float(freedom)
        return float(min(images - 1, freedom * (variance / by_training) ** 2) if by_training else images - 1)

    if variance == 0.0:
        return gain(by_images_only(), wide, images - 1, 0.0, 0.0)
    p_value = float(2 * stdtr(freedom_of(variance), -abs(mean) / math.sqrt(share * variance)))
    return gain(p_value, wide, freedom_of(wide), by_training, of_image)


def pool_estimates(values: Sequence[float], halves: Sequence[float]) -> tuple[float, float]:
    """The random-effects mean of several estimates, and half its 95 % interval.

    DerSimonian and Laird, "Meta-analysis in clinical trials", 1986: differences beyond the estimates' own intervals are
    a variance between them, which is added to the variance of each.

    Args:
        values: the estimates.
        halves: half the 95 % interval of each.
    """
    value_K = np.asarray(values, dtype=float)
    own_K = np.maximum((np.asarray(halves, dtype=float) / _Z) ** 2, (1e-9 * value_K) ** 2 + 1e-300)
    weight_K = 1 / own_K
    mean = float((weight_K * value_K).sum() / weight_K.sum())
    excess = float((weight_K * (value_K - mean) ** 2).sum()) - (len(value_K) - 1)
    scale = float(weight_K.sum() - (weight_K**2).sum() / weight_K.sum())
    between = excess / scale if excess > 0 and scale > 0 else 0.0
    weight_K = 1 / (own_K + between)
    return float((weight_K * value_K).sum() / weight_K.sum()), _Z / math.sqrt(float(weight_K.sum()))


def smallest_visible_gain(metric: float, images: int, seeds: int) -> float:
    """The gain that the verdict finds in four of five searches, at best, 0 to 1.

    Two trainings of one model disagree on about as many images as each gets wrong. So the mean gain over S trainings of
    each model on N images has a variance of at least (1 - metric) / (S N). The result is that standard deviation times
    the sum of two quantiles, for a significance level of 5 % (two-sided) and a power of 80 %: of Student's t with the
    2 (S - 1) degrees of freedom that S trainings of each model leave, or normal ones for one training, whose test is
    about images only. Trainings that differ in their accuracy as a whole add to this.

    Args:
        metric: accuracy of the base, 0 to 1.
        images: number N of test images.
        seeds: number S of trainings of each model.
    """
    # as in the intervals, a few images more, one of them wrong, so that it also holds for a base without errors
    wrong = ((1 - metric) * images + 1) / (images + len(_ADDED))
    freedom = 2 * (seeds - 1)
    quantiles = float(stdtrit(freedom, 0.975) + stdtrit(freedom, 0.8)) if freedom else _Z + _Z_POWER
    return quantiles * math.sqrt(wrong / (seeds * images))


def sign_test(first: int, second: int) -> float:
    """Two-sided p-value of the exact sign test, which is McNemar's exact test for pairs of answers.

    Args:
        first: number of images that only the first model classified correctly.
        second: number of images that only the second model classified correctly.
    """
    from scipy.stats import binomtest

    return float(binomtest(first, first + second).pvalue) if first + second else 1.0
