"""The few statistics of a search, as plain functions of plain numbers."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri, stdtr, stdtrit  # scipy.stats takes a second to import

from attnsurgery.search.result.record import Record
from attnsurgery.search.space import NONE

_Z = float(ndtri(0.975))
_ADDED = (1, -1, 0, 0)
"""Gains of images that an interval counts besides those that there are."""


def best_so_far(scores: Sequence[float]) -> list[float]:
    """The best of the first one, two, three ... of them."""
    return list(itertools.accumulate(scores, max))


def expected_best(scores: Sequence[float]) -> list[float]:
    """The expected best of one, two, three ... of them, drawn without putting back; over all subsets, exactly.

    The k-th lowest of m is the best of n drawn if it is among them, and all others are of the k - 1 below it: so in
    C(k - 1, n - 1) of the C(m, n) subsets.
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
    """How far two scores of the same things order them alike: 1 the same, 0 unrelated, -1 reversed; ties count half.

    None where either gives the same to all, so that there is no order.
    """
    one_N, other_N = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    one_NN, other_NN = np.sign(one_N[:, None] - one_N), np.sign(other_N[:, None] - other_N)
    pairs = float((one_NN**2).sum() * (other_NN**2).sum())
    return float((one_NN * other_NN).sum()) / pairs**0.5 if pairs else None


def gains(records: Iterable[Record], base: float) -> dict[tuple[str, str], list[float]]:
    """By place and block: how much better than the base each candidate is that has that block there."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for record in records:
        for place, label in record.assignment.items():
            if label != NONE and record.top1 is not None:
                found[place, label].append(record.top1 - base)
    return dict(found)


def without_outliers(values: Sequence[float]) -> list[float]:
    """Those that a picture can show side by side: within three times the middle half's width from that half."""
    low, high = np.quantile(values, (0.25, 0.75)) if values else (0.0, 0.0)
    reach = 3 * (high - low)
    if not reach:
        return list(values)
    return [value for value in values if low - reach <= value <= high + reach]


@dataclass(frozen=True, slots=True)
class Gain:
    """By how much one model is more often right than another, and how far that can be relied on."""

    mean: float
    """Shares of right answers, first less second, the mean over their trainings."""
    low: float
    high: float
    """95 % interval: of other images of the kind, and of other trainings of both."""
    p_value: float
    """Two-sided."""


def gain_of(first_SN: npt.NDArray[np.bool_], second_SN: npt.NDArray[np.bool_]) -> Gain:
    """Compare two models by what each of S trainings of theirs gets right of the same N images.

    Trainings of one model differ in accuracy, by half a point on ten thousand images as easily as not; so a test that
    counts images alone takes the luck of a training for a better model. This is the analysis of variance of readers
    and cases: trainings read, images are the cases, and each model has its own readers (Hillis, Berbaum and Metz,
    "Recent developments in the Dorfman-Berbaum-Metz procedure for multireader ROC study analysis", 2008, with readers
    nested in tests). One training a model tells nothing of others: then images are all that the interval speaks of,
    and the p-value is McNemar's exact one.

    The interval also holds for few images, of which none may tell the models apart: it is that of four images more, one
    for each way in which two models can be right or wrong (as Agresti and Min add to pairs of proportions, "Simple
    improved confidence intervals for comparing matched proportions", 2005). And it is never narrower than what images
    alone would make it, however alike the trainings came out.
    """
    first, second = (np.asarray(some, dtype=float) for some in (first_SN, second_SN))
    trainings, images = first.shape
    gain_N = first.mean(0) - second.mean(0)
    mean = float(gain_N.mean())
    by_image = trainings / 2 * float(gain_N.var(ddof=1))
    exact = sign_test(int((gain_N > 0).sum()), int((gain_N < 0).sum()))
    more = images + len(_ADDED)
    middle = float(gain_N.sum()) / more
    of_images = trainings / 2 * ((float((gain_N**2).sum()) + sum(map(abs, _ADDED))) / more - middle**2)

    def gain(p_value: float, variance: float, freedom: float) -> Gain:
        half = float(stdtrit(freedom, 0.975)) * math.sqrt(2 / (trainings * more) * variance)
        return Gain(mean, max(-1.0, min(mean, middle - half)), min(1.0, max(mean, middle + half)), p_value)

    if trainings == 1:
        return gain(exact, of_images, images - 1)
    freedom = 2 * (trainings - 1)
    by_training = rest = 0.0
    for some in (first, second):
        share_S1 = some.mean(1, keepdims=True)
        by_training += images * float(share_S1.var(ddof=1)) / 2
        rest += float(((some - share_S1 - some.mean(0) + some.mean()) ** 2).sum()) / (freedom * (images - 1))
    wide = max(by_training, rest) + max(of_images - rest, 0.0)
    variance = by_training + max(by_image - rest, 0.0)

    def freedom_of(variance: float) -> float:
        return float(min(images - 1, freedom * (variance / by_training) ** 2) if by_training else images - 1)

    if variance == 0.0:
        return gain(exact, wide, images - 1)
    error = math.sqrt(2 / (trainings * images) * variance)
    p_value = float(2 * stdtr(freedom_of(variance), -abs(mean) / error))
    return gain(p_value, wide, freedom_of(wide))


def pooled(values: Sequence[float], halves: Sequence[float]) -> tuple[float, float]:
    """One value out of several, and half its 95 % interval, which is wider where they differ by more than chance.

    DerSimonian and Laird, "Meta-analysis in clinical trials", 1986: what the values differ by beyond their own
    intervals is a variance between them, which each of them has besides its own.

    Args:
        halves: of the 95 % intervals of the values.
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


def sign_test(first: int, second: int) -> float:
    """Two-sided exact p-value that so uneven a split of votes comes from a fair coin (McNemar's exact test)."""
    count = first + second
    tail = sum(math.comb(count, k) for k in range(min(first, second) + 1))
    return float(min(1.0, 2 * tail / 2**count))
