"""Sequential comparison: significance levels, false alarms over all looks, pairs of seeds, where it stops."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from attnsurgery.search.result.sequential import (
    Design,
    Look,
    look_at,
    not_beaten,
    seeds_move_together,
    significance_levels,
)
from attnsurgery.search.result.statistics import gain_of

Right = npt.NDArray[np.bool_]


def trainings(rng: np.random.Generator, seeds: int, images: int, own: float, shared: float, gain: float) -> list[Right]:
    """The answers of two models whose images have their own ease, and whose trainings have their own luck.

    Args:
        rng: draws everything.
        seeds: trainings of each model.
        images: number of images.
        own: standard deviation of a training, in units of the noise of an answer.
        shared: standard deviation of what a seed does to both models.
        gain: what the first model is better by.
    """
    ease_N, seed_S1 = rng.normal(0.5, 3.0, images), rng.normal(0.0, shared, (seeds, 1))
    models = []
    for better in (gain, 0.0):
        luck_S1 = rng.normal(0.0, own, (seeds, 1))
        models.append(ease_N + better + seed_S1 + luck_S1 + rng.normal(0.0, 1.0, (seeds, images)) > 0)
    return models


def until_decided(first: Right, second: Right) -> Look:
    return look_at(first, second, Design(3, len(first), 0.005))


def test_significance_levels_are_published_ones() -> None:
    """The boundaries of four equal steps are 4.333, 2.963, 2.359 and 2.014 (Reboussin et al., 2000)."""
    levels = significance_levels((0.25, 0.5, 0.75, 1.0), 0.05)
    boundaries = stats.norm.isf(np.array(levels) / 2)
    assert boundaries == pytest.approx([4.333, 2.963, 2.359, 2.014], abs=0.004)


@pytest.mark.parametrize("fractions", [(0.3, 0.5, 0.6, 1.0), (0.9, 0.95, 1.0), (0.4, 0.41, 0.42, 1.0)])
def test_significance_levels_sum_to_level(fractions: tuple[float, ...]) -> None:
    """A random walk without drift crosses one of the boundaries in 5 % of all cases."""
    rng = np.random.default_rng(0)
    boundaries_K = stats.norm.isf(np.array(significance_levels(fractions, 0.05)) / 2)
    steps_RK = rng.normal(0.0, np.sqrt(np.diff([0.0, *fractions])), (100_000, len(fractions)))
    scores_RK = steps_RK.cumsum(1) / np.sqrt(fractions)
    crossed = float((abs(scores_RK) > boundaries_K).any(1).mean())
    assert crossed == pytest.approx(0.05, abs=0.003)


def test_single_look_has_whole_level() -> None:
    """Where the number of trainings is given, there is one look, and it is the usual test."""
    first, second = trainings(np.random.default_rng(0), 3, 200, 0.1, 0.0, 0.3)
    look = look_at(first, second, Design(3, 3, 0.005))
    assert (look.limit, look.trainings, look.number, look.decided) == (0.05, 3, 1, True)
    assert look.gain == gain_of(first, second)


@pytest.mark.slow
def test_false_alarms_over_all_looks() -> None:
    """Equal models differ in about 5 % of sequential comparisons, and much more often without the levels."""
    rng = np.random.default_rng(1)
    alarms = uncorrected = 0
    repeats = 200
    for _ in range(repeats):
        first, second = trainings(rng, 8, 400, 0.3, 0.0, 0.0)
        alarms += until_decided(first, second).significant
        uncorrected += any(gain_of(first[:count], second[:count]).p_value < 0.05 for count in range(3, 9))
    assert alarms / repeats < 0.09
    assert uncorrected / repeats > 0.09


def test_large_gain_is_decided_early() -> None:
    """A large gain needs few trainings, and its interval lies above the difference that matters."""
    first, second = trainings(np.random.default_rng(2), 8, 500, 0.05, 0.0, 2.0)
    look = until_decided(first, second)
    assert look.significant
    assert look.number == look.trainings - 2 <= 3
    assert look.gain.low > 0.005
    assert look.gain == gain_of(first[: look.trainings], second[: look.trainings], level=look.limit)


def test_few_images_end_comparison_at_once() -> None:
    """Where images alone make the interval, more trainings do not narrow it, and the first look is the last."""
    rng = np.random.default_rng(3)
    first, second = (np.repeat(rng.random((1, 40)) < 0.7, 8, 0) for _ in range(2))
    first[1, 0] ^= True
    look = until_decided(first, second)
    assert (look.number, look.limit) == (1, 0.05)


def test_repeated_interval_agrees_with_test() -> None:
    """The interval of a look is wider than that of a single look, because other looks come."""
    first, second = trainings(np.random.default_rng(4), 8, 2000, 0.5, 0.0, 0.0)
    early = look_at(first[:3], second[:3], Design(3, 8))
    usual = gain_of(first[:3], second[:3])
    assert early.limit < 0.05
    assert early.gain.high - early.gain.low > 1.3 * (usual.high - usual.low)


def test_pairs_cancel_what_seeds_share() -> None:
    """Where a seed moves both models alike, pairs narrow the interval; where it does not, they widen it."""
    rng = np.random.default_rng(5)
    widths: dict[tuple[float, bool], float] = {}
    for shared in (0.0, 1.0):
        for _ in range(10):
            first, second = trainings(rng, 4, 500, 0.05, shared, 0.1)
            for paired in (False, True):
                gain = gain_of(first, second, paired=paired)
                widths[shared, paired] = widths.get((shared, paired), 0.0) + gain.high - gain.low
    assert widths[1.0, True] < 0.6 * widths[1.0, False]
    assert widths[0.0, True] > widths[0.0, False]


def test_paired_gain_is_test_of_differences() -> None:
    """It is Student's test of the differences between trainings, to whose variance that of images is added."""
    first, second = trainings(np.random.default_rng(6), 4, 800, 0.2, 0.0, 0.2)
    gain = gain_of(first, second, paired=True)
    difference_S = first.mean(1) - second.mean(1)
    assert gain.by_trainings == pytest.approx(difference_S.var(ddof=1) / 4)
    deviate = gain.mean / np.sqrt(gain.by_trainings + gain.by_images)
    assert gain.p_value == pytest.approx(2 * stats.t.sf(deviate, 3))
    assert gain.by_images > 0


@pytest.mark.slow
def test_paired_false_alarms_are_bounded() -> None:
    """Pairs of equal models differ in at most about 5 % of comparisons, whether or not a seed moves both."""
    rng = np.random.default_rng(7)
    for shared in (0.0, 0.5):
        alarms = 0
        for _ in range(150):
            first, second = trainings(rng, 5, 300, 0.3, shared, 0.0)
            alarms += gain_of(first, second, paired=True).p_value < 0.05
        assert alarms / 150 < 0.1


def test_not_beaten_keeps_what_may_be_best() -> None:
    """Models that are clearly worse than another are out; those that cannot be told from the best are not."""
    rng = np.random.default_rng(9)
    ease_N = rng.normal(0.5, 3.0, 2000)
    rights = [
        ease_N + better + rng.normal(0.0, 0.02, (4, 1)) + rng.normal(0.0, 1.0, (4, 2000)) > 0
        for better in (0.0, 0.8, 0.82, 0.4)
    ]
    assert not_beaten(rights, Design(3, 4)) == [False, True, True, False]
    assert not_beaten(rights[:1], Design(3, 4)) == [True]


@pytest.mark.slow
def test_not_beaten_rarely_drops_an_equal() -> None:
    """Of four equal models, the first is beaten by any other in at most 5 % of cases."""
    rng = np.random.default_rng(10)
    beaten = 0
    for _ in range(100):
        models = [side for _ in range(2) for side in trainings(rng, 3, 200, 0.3, 0.0, 0.0)]
        beaten += not not_beaten(models, Design(3, 3))[0]
    assert beaten / 100 <= 0.1


def test_seeds_move_together_by_f_test() -> None:
    """Seeds that move all models alike are found, and independent ones pass in 5 % of cases."""
    rng = np.random.default_rng(8)
    seed_S = rng.normal(0.0, 1.0, 3)
    assert seeds_move_together(seed_S + rng.normal(0.0, 0.05, (3, 3)))
    found = np.mean([seeds_move_together(rng.normal(0.0, 1.0, (3, 3))) for _ in range(2000)])
    assert found == pytest.approx(0.05, abs=0.015)
    assert not seeds_move_together(np.zeros((3, 3)))
    assert not seeds_move_together(rng.normal(0.0, 1.0, (1, 5)))
