"""The protocol of all measurements: warm up, alternate, stop when the ratio is known precisely enough.

Calls are timed in blocks that are long enough for the clock. A round of two subjects is A B B A B A A B or, as in the
sequence of Thue and Morse, B A A B A B B A. So a drift of the machine favours neither subject, and each follows itself
as often as the other one does: a block after one of the other model is slower, since its weights have left the cache. A
round in which either subject took far longer than usual is left out for both. The ratio is the median of the rounds'
own ratios, since the two times of a round were measured on the machine in the same state.

The places of its tensors in memory can make one copy of a model some percent slower than another for its whole life,
and more rounds on the same copies do not reveal it. So the rounds are distributed over several *placements*, which are
new copies of all subjects. The confidence interval counts a placement as one observation, and not each of its rounds,
unless rounds differ by more. A bootstrap of rounds, or of few placements, gives too narrow intervals.

The order in which the subjects are copied matters too. The weights of the last one are still in the cache, and in ONNX
Runtime it is 10 % faster for dozens of calls. So a placement empties the caches, all subjects warm up alternately, and
they are copied in both orders; the remaining effect of the order is subtracted.

Shape letters in this file:  R rounds, S subjects, V values, G groups of values (placements).
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit

Call = Callable[[], Any]
TimeBlock = Callable[[Call, int], float]
Placement = Callable[[bool], AbstractContextManager[Sequence[Call]]]
"""Makes new copies of the subjects, in reverse order if the argument is True, and returns a call for each subject."""
Array = np.ndarray[Any, np.dtype[Any]]
Numbers = Sequence[float] | Array

_Z = 1.96
"""Standard normal quantile of a 95 % confidence interval."""
_LONG_MS = 20.0
"""Duration of a block from which on single blocks are compared during the warm-up, and not groups of them."""
_SETTLED = 0.05
"""Relative difference of successive groups of blocks below which the warm-up ends."""
_COPY_WARM_UP_MS = 40.0
"""Duration of the warm-up of each copy of a new placement."""
_MAX_PASSES = 40
"""Largest number of passes over all copies in that warm-up."""
_THROTTLED = 1.5
"""A round this many times slower than the median was disturbed, and does not count."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How long a measurement takes."""

    tolerance: float = 0.002
    """The measurement ends when half the width of the 95 % confidence interval is within this share of the value ..."""
    max_seconds: float = 5.0
    """... or after this time, without the first warm-up."""
    block_ms: float = 2.0
    """The shortest time between two readings of the clock."""
    min_rounds: int = 6
    """Smallest number of rounds."""
    max_warmup_seconds: float = 3.0
    """Longest duration of the first warm-up."""
    placements: int = 6
    """Smallest number of placements; a model that takes seconds to compile has only one."""
    rounds: int = 2
    """Largest number of rounds on the same copies."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """The times of several subjects that were measured alternately."""

    times: list[list[float]]
    """By subject, the time of a call in each round, in ms."""
    placement: list[int]
    """By round, the index of its placement."""
    reverse: list[bool]
    """By round, whether the subjects were copied in reverse order."""
    runs: list[int]
    """By subject, the number of calls that were timed."""
    left_out: float
    """Share of the rounds that were disturbed."""
    drift: float
    """Relative increase of the first subject's time from the first third of the rounds to the last one."""


def sample(
    time_block: TimeBlock,
    place: Placement,
    effort: Effort,
    *,
    may_copy: Callable[[], bool] = lambda: True,
    overlap: bool = True,
) -> Sampled:
    """Time one or two subjects until the time, or the ratio, is known precisely enough, or the time is up.

    A round is A A for one subject, and A B B A B A A B for two.

    Args:
        time_block: returns the time of several calls in ms.
        place: makes a placement.
        effort: when to stop.
        may_copy: says whether the next placement may be made of new copies; otherwise the old ones are used, and
            successive rounds count as a placement.
        overlap: whether a placement is made before the previous one is freed, so that it is elsewhere in memory; False
            where memory is short.
    """
    rounds: list[list[float]] = []
    placement: list[int] = []
    reverse: list[bool] = []
    placements = 0
    repeats: list[int] = []
    calls: Sequence[Call] = ()
    min_repeats = -(-effort.min_rounds // effort.placements)
    with ExitStack() as stack:
        for number in itertools.count():
            fresh = not number or may_copy()
            if fresh:
                stack.close()
                if not overlap:
                    calls = ()
                placements += 1  # the previous copies still occupy their memory, so the new ones are elsewhere
                calls = stack.enter_context(place(placements % 2 == 0))
            if not number:
                # the same number for all: the first call after another subject's is slower, and must have equal weight
                repeats = [max(warm_up(time_block, call, effort) for call in calls)] * len(calls)
                _warm_up_copies(time_block, calls, repeats)
                start = time.perf_counter()
            elif fresh:
                _warm_up_copies(time_block, calls, repeats)
            due = start + effort.max_seconds * min(1.0, (number + 1) / effort.placements)
            for repeat in range(effort.rounds):
                if repeat >= min_repeats and time.perf_counter() > due:
                    break
                rounds.append(_time_round(time_block, calls, repeats, len(rounds).bit_count() % 2 == 1))
                placement.append(number)
                reverse.append(placements % 2 == 0)
            complete = number + 1 >= effort.placements and len(rounds) >= effort.min_rounds
            if complete and (
                time.perf_counter() > due
                or _is_precise(np.array(rounds), np.array(placement), np.array(reverse), effort.tolerance)
            ):
                break
    undisturbed = _undisturbed_rounds(np.array(rounds))
    times_RS = np.array(rounds)[undisturbed]
    third = max(1, len(times_RS) // 3)
    return Sampled(
        times=[list(column) for column in times_RS.T.tolist()],
        placement=np.array(placement)[undisturbed].tolist(),
        reverse=np.array(reverse)[undisturbed].tolist(),
        runs=[len(rounds) * (4 if len(repeats) > 1 else 2) * count for count in repeats],
        left_out=1.0 - len(times_RS) / len(rounds),
        drift=float(np.median(times_RS[-third:, 0]) / np.median(times_RS[:third, 0])) - 1.0,
    )


def median(times: Numbers) -> float:
    """The median of times."""
    return float(np.median(np.asarray(times)))


def quantile(times: Numbers, share: float) -> float:
    """The quantile of times for a share between 0 and 1."""
    return float(np.quantile(np.asarray(times), share))


@dataclass(frozen=True, slots=True)
class Ratio:
    """The time of a variant divided by that of the base, with its 95 % confidence interval."""

    value: float
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""


def ratio_of(base: Numbers, variant: Numbers, placement: Numbers, reverse: Sequence[bool] | Array) -> Ratio:
    """Median over the rounds of the variant's time divided by the base's, without the effect of the copying order.

    This effect is half the difference between the placements in both orders; its estimation costs the interval a
    degree of freedom. Everything is computed with logarithms, so that base and variant are exchangeable.

    Args:
        base, variant: times, by round.
        placement, reverse: by round, as in `Sampled`.
    """
    logs_R = np.log(np.asarray(variant, float) / np.asarray(base, float))
    placement_R, reverse_R = np.asarray(placement), np.asarray(reverse, bool)
    medians = [
        [np.median(logs_R[placement_R == group]) for group in np.unique(placement_R[reverse_R == backwards])]
        for backwards in (False, True)
    ]
    lost_freedom = 0
    if medians[0] and medians[1] and len(medians[0]) + len(medians[1]) > 2:
        order_effect, lost_freedom = (np.mean(medians[0]) - np.mean(medians[1])) / 2, 1
        logs_R = logs_R - np.where(reverse_R, -order_effect, order_effect)
    low, high = interval_of_median(logs_R, placement, lost_freedom)
    return Ratio(math.exp(median(logs_R)), math.exp(low), math.exp(high))


def interval_of_median(values: Numbers, placement: Numbers, lost_freedom: int = 0) -> tuple[float, float]:
    """95 % confidence interval of the median of values that may be correlated within a placement.

    It is the union of two intervals: that of a sign test on all values, and that of Student's t on the medians of the
    placements. With fewer than three placements it is the first one alone.

    Args:
        values: numbers.
        placement: by value, the index of its placement.
        lost_freedom: degrees of freedom that other estimates have used.
    """
    sorted_V, middle, reach = np.sort(np.asarray(values)), median(values), 0.0
    rejected = max(0, int((len(sorted_V) - _Z * len(sorted_V) ** 0.5) / 2))
    groups = np.unique(np.asarray(placement))
    if (count := len(groups)) > 2:
        median_G = [median(np.asarray(values)[np.asarray(placement) == group]) for group in groups]
        freedom = count - 1 - lost_freedom
        reach = float(stdtrit(freedom, 0.975) * np.std(median_G, ddof=1 + lost_freedom)) / count**0.5
    return min(middle - reach, float(sorted_V[rejected])), max(middle + reach, float(sorted_V[-1 - rejected]))


def relative_noise(times: Numbers, placement: Numbers) -> float:
    """Half the width of the 95 % confidence interval of the median, as a share of the median."""
    low, high = interval_of_median(times, placement)
    return (high - low) / 2 / median(times)


def _warm_up_copies(time_block: TimeBlock, calls: Sequence[Call], repeats: list[int]) -> None:
    """Run the slow first blocks of new copies; those of the copies that were made first are the slowest."""
    elapsed_ms = 0.0
    for passes in range(_MAX_PASSES):
        if passes >= 2 and elapsed_ms >= _COPY_WARM_UP_MS * len(calls):
            break
        pairs = list(zip(calls, repeats, strict=True))
        for call, count in pairs[:: 1 if passes % 2 == 0 else -1]:
            elapsed_ms += time_block(call, count)


def _time_round(time_block: TimeBlock, calls: Sequence[Call], repeats: list[int], backwards: bool) -> list[float]:
    """The mean time of one call of each subject in one round, in ms."""
    forwards = list(range(len(calls)))[:: -1 if backwards else 1]
    order = [*forwards, *forwards[::-1], *forwards[::-1], *forwards] if len(calls) > 1 else [0, 0]
    times = [0.0] * len(calls)
    for index in order:
        times[index] += time_block(calls[index], repeats[index]) / repeats[index]
    return [total * len(calls) / len(order) for total in times]


def _is_precise(rounds_RS: Array, placement_R: Array, reverse_R: Array, tolerance: float) -> bool:
    """Whether half the width of the confidence interval is within the tolerance."""
    undisturbed = _undisturbed_rounds(rounds_RS)
    times_RS, placement_R = rounds_RS[undisturbed], placement_R[undisturbed]
    if times_RS.shape[1] == 1:
        return relative_noise(times_RS[:, 0], placement_R) <= tolerance
    ratio = ratio_of(times_RS[:, 0], times_RS[:, 1], placement_R, reverse_R[undisturbed])
    return (ratio.high - ratio.low) / 2 <= tolerance


def _undisturbed_rounds(rounds_RS: Array) -> Array:
    """Which rounds were not disturbed, (R,): in which no subject took far longer than usual; at least half of them."""
    slowest = (rounds_RS / np.median(rounds_RS, axis=0)).max(axis=1)
    undisturbed: Array = slowest <= _THROTTLED
    if undisturbed.sum() * 2 < len(rounds_RS):
        undisturbed = slowest <= np.median(slowest)
    return undisturbed


def warm_up(time_block: TimeBlock, call: Call, effort: Effort) -> int:
    """Run a call until the medians of successive groups of blocks agree; returns the number of calls in a block."""
    deadline = time.perf_counter() + effort.max_warmup_seconds
    repeats = 1
    while (elapsed_ms := time_block(call, repeats)) < effort.block_ms and repeats < 1_000_000:
        repeats = max(repeats + 1, int(repeats * min(4.0, 1.2 * effort.block_ms / max(elapsed_ms, 1e-6))))
    previous_ms, group = (0.0, 5) if elapsed_ms < _LONG_MS else (elapsed_ms / repeats, 1)
    while time.perf_counter() < deadline:
        current_ms = median([time_block(call, repeats) / repeats for _ in range(group)])
        if previous_ms and abs(current_ms / previous_ms - 1) < _SETTLED:
            break
        previous_ms = current_ms
    return repeats
