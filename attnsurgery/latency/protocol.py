"""The one way in which anything here is timed: warm up, alternate, stop when the ratio is known well enough.

Calls are timed in blocks long enough for the clock. A round of two subjects is A B B A B A A B, and every second one,
in the order of Thue and Morse, is B A A B A B B A. So a drift of the machine favours neither, and each follows itself
as often as the other does: a block that follows the other model's is slower, for the weights have left the cache. A
round in which either was slowed far beyond its usual time is left out for both. The ratio is the median over the
rounds of each round's own ratio, for the two times of a round met the same machine: a ratio of the two medians throws
that away.

Where its tensors happen to lie in memory can make one copy of a model some percent slower than its twin for as long as
it lives, and more rounds on the same copy never show it. So the rounds are spread over several *placements*, fresh
copies of all subjects, and the interval takes a placement for one observation, not each of its rounds, unless rounds
differ by more. A bootstrap of rounds, or of few placements, is too narrow.

Which subject was made first matters too. The last one's weights are still in the cache, and in ONNX Runtime it is 10 %
faster for dozens of calls. So whoever makes a placement empties the caches, all subjects warm up in turns, and they are
made in turn forwards and backwards; what being made first is still worth is taken off.
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
Place = Callable[[bool], AbstractContextManager[Sequence[Call]]]
"""Makes fresh copies of the subjects, of the last one first if told so, and a call for each in the usual order."""
Array = np.ndarray[Any, np.dtype[Any]]
Numbers = Sequence[float] | Array

_Z = 1.96
"""Of a 95 % interval."""
_LONG_MS = 20.0
"""A block that takes so long warms up by itself: two are enough to see whether it has settled."""
_SETTLED = 0.05
"""Successive groups of blocks that differ by less are warm."""
_WARM_AGAIN_MS = 40.0
"""Of each subject of a fresh placement, in no more passes than `_MOST_PASSES`."""
_MOST_PASSES = 40
_THROTTLED = 1.5
"""A block this many times slower than the median was interrupted; it says nothing about the model."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to go on measuring."""

    tolerance: float = 0.002
    """Stop when half the 95 % interval is within this share of the value ..."""
    max_seconds: float = 5.0
    """... or after this long, the first warm-up not counted."""
    block_ms: float = 2.0
    """The shortest time between two readings of the clock."""
    min_rounds: int = 6
    max_warmup_seconds: float = 3.0
    placements: int = 6
    """Fresh copies of the models in memory, at least; a model that is compiled for seconds keeps its first."""
    rounds: int = 2
    """On the same copies, at most."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """What was timed of several calls, side by side."""

    times: list[list[float]]
    """Of each call in ms, one number a round."""
    placement: list[int]
    """Of each round."""
    reverse: list[bool]
    """Of each round: whether the last subject was made before the first one."""
    runs: list[int]
    """How many times each call was timed."""
    left_out: float
    """Share of the rounds that something disturbed."""
    drift: float
    """By how much the first call was slower in the last third than in the first, as a share; below 0: faster."""


def sample(
    time_block: TimeBlock,
    place: Place,
    effort: Effort,
    *,
    again: Callable[[], bool] = lambda: True,
    overlap: bool = True,
) -> Sampled:
    """Time the calls until what is asked about them is known well enough, or time is up.

    All calls are timed in every round: A A, or A B B A B A A B.

    Args:
        place: the same number of calls each time.
        again: asked whether the next placement is to be of fresh copies; otherwise rounds that follow each other count
            as one.
        overlap: a placement is made while the one before it still holds its memory, so that it lies elsewhere; False
            where memory is short.
    """
    rounds: list[list[float]] = []
    placement: list[int] = []
    reverse: list[bool] = []
    made = 0
    repeats: list[int] = []
    calls: Sequence[Call] = ()
    least = -(-effort.min_rounds // effort.placements)
    with ExitStack() as stack:
        for number in itertools.count():
            fresh = not number or again()
            if fresh:
                stack.close()
                if not overlap:
                    calls = ()
                made += 1  # the last ones still hold their memory, so these lie elsewhere
                calls = stack.enter_context(place(made % 2 == 0))
            if not number:
                # as many for each: the first call after another subject's is slower, and has to weigh the same in all
                repeats = [max(warm_up(time_block, call, effort) for call in calls)] * len(calls)
                _warm_again(time_block, calls, repeats)
                begun = time.perf_counter()
            elif fresh:
                _warm_again(time_block, calls, repeats)
            due = begun + effort.max_seconds * min(1.0, (number + 1) / effort.placements)
            for turn in range(effort.rounds):
                if turn >= least and time.perf_counter() > due:
                    break
                rounds.append(_round(time_block, calls, repeats, len(rounds).bit_count() % 2 == 1))
                placement.append(number)
                reverse.append(made % 2 == 0)
            enough = number + 1 >= effort.placements and len(rounds) >= effort.min_rounds
            if enough and (
                time.perf_counter() > due
                or _known(np.array(rounds), np.array(placement), np.array(reverse), effort.tolerance)
            ):
                break
    kept = _undisturbed(np.array(rounds))
    kept_RS = np.array(rounds)[kept]
    third = max(1, len(kept_RS) // 3)
    return Sampled(
        times=[list(column) for column in kept_RS.T.tolist()],
        placement=np.array(placement)[kept].tolist(),
        reverse=np.array(reverse)[kept].tolist(),
        runs=[len(rounds) * (4 if len(repeats) > 1 else 2) * count for count in repeats],
        left_out=1.0 - len(kept_RS) / len(rounds),
        drift=float(np.median(kept_RS[-third:, 0]) / np.median(kept_RS[:third, 0])) - 1.0,
    )


def median(times: Numbers) -> float:
    """The middle of the times."""
    return float(np.median(np.asarray(times)))


def quantile(times: Numbers, share: float) -> float:
    """The time that this share of the runs stays under."""
    return float(np.quantile(np.asarray(times), share))


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times as long as the base a variant takes, with a 95 % interval."""

    value: float
    low: float
    high: float


def ratio_of(base: Numbers, variant: Numbers, placement: Numbers, reverse: Sequence[bool] | Array) -> Ratio:
    """Median over the rounds of the variant's time by the base's, without what being made first is worth.

    That is half the difference between the placements made forwards and those made backwards. It costs the interval a
    degree of freedom. All is done on logarithms, for twice as long is as far from equal as half as long.

    Args:
        base, variant: times, of each round.
        placement, reverse: of each round, as in `Sampled`.
    """
    logs_R = np.log(np.asarray(variant, float) / np.asarray(base, float))
    placement_R, reverse_R = np.asarray(placement), np.asarray(reverse, bool)
    ways = [
        [np.median(logs_R[placement_R == group]) for group in np.unique(placement_R[reverse_R == way])]
        for way in (False, True)
    ]
    taken = 0
    if ways[0] and ways[1] and len(ways[0]) + len(ways[1]) > 2:
        first, taken = (np.mean(ways[0]) - np.mean(ways[1])) / 2, 1
        logs_R = logs_R - np.where(reverse_R, -first, first)
    low, high = interval_of_median(logs_R, placement, taken)
    return Ratio(math.exp(median(logs_R)), math.exp(low), math.exp(high))


def interval_of_median(values: Numbers, placement: Numbers, taken: int = 0) -> tuple[float, float]:
    """95 % interval of the median of values of which those of one placement may have much in common.

    It holds the medians that a sign test of all values does not reject, and reaches as far as Student's t says of the
    placements' own medians. With fewer than three placements every value counts by itself.

    Args:
        taken: degrees of freedom that something else was estimated with.
    """
    sorted_V, middle, reach = np.sort(np.asarray(values)), median(values), 0.0
    outside = max(0, int((len(sorted_V) - _Z * len(sorted_V) ** 0.5) / 2))
    groups = np.unique(np.asarray(placement))
    if (count := len(groups)) > 2:
        own_G = [median(np.asarray(values)[np.asarray(placement) == group]) for group in groups]
        left = count - 1 - taken
        reach = float(stdtrit(left, 0.975) * np.std(own_G, ddof=1 + taken)) / count**0.5
    return min(middle - reach, float(sorted_V[outside])), max(middle + reach, float(sorted_V[-1 - outside]))


def relative_noise(times: Numbers, placement: Numbers) -> float:
    """Half the 95 % interval of the median, as a share of the median."""
    low, high = interval_of_median(times, placement)
    return (high - low) / 2 / median(times)


def _warm_again(time_block: TimeBlock, calls: Sequence[Call], repeats: list[int]) -> None:
    """The first blocks of fresh copies are slow, of those made first the most."""
    spent = 0.0
    for passes in range(_MOST_PASSES):
        if passes >= 2 and spent >= _WARM_AGAIN_MS * len(calls):
            break
        pairs = list(zip(calls, repeats, strict=True))
        for call, count in pairs[:: 1 if passes % 2 == 0 else -1]:
            spent += time_block(call, count)


def _round(time_block: TimeBlock, calls: Sequence[Call], repeats: list[int], backwards: bool) -> list[float]:
    """The time of one call of each, in ms."""
    forwards = list(range(len(calls)))[:: -1 if backwards else 1]
    order = [*forwards, *forwards[::-1], *forwards[::-1], *forwards] if len(calls) > 1 else [0, 0]
    times = [0.0] * len(calls)
    for index in order:
        times[index] += time_block(calls[index], repeats[index]) / repeats[index]
    return [total * len(calls) / len(order) for total in times]


def _known(rounds_RS: Array, placement_R: Array, reverse_R: Array, tolerance: float) -> bool:
    kept = _undisturbed(rounds_RS)
    times_RS, placement_R = rounds_RS[kept], placement_R[kept]
    if times_RS.shape[1] == 1:
        return relative_noise(times_RS[:, 0], placement_R) <= tolerance
    ratio = ratio_of(times_RS[:, 0], times_RS[:, 1], placement_R, reverse_R[kept])
    return (ratio.high - ratio.low) / 2 <= tolerance


def _undisturbed(rounds_RS: Array) -> Array:
    """Which rounds no subject was slowed down in by something else; never fewer than half of them."""
    slowest = (rounds_RS / np.median(rounds_RS, axis=0)).max(axis=1)
    kept: Array = slowest <= _THROTTLED
    if kept.sum() * 2 < len(rounds_RS):
        kept = slowest <= np.median(slowest)
    return kept


def warm_up(time_block: TimeBlock, call: Call, effort: Effort) -> int:
    """Calls until the medians of successive groups of blocks agree; says how many calls fill a block."""
    deadline = time.perf_counter() + effort.max_warmup_seconds
    repeats = 1
    while (spent := time_block(call, repeats)) < effort.block_ms and repeats < 1_000_000:
        repeats = max(repeats + 1, int(repeats * min(4.0, 1.2 * effort.block_ms / max(spent, 1e-6))))
    before, group = (0.0, 5) if spent < _LONG_MS else (spent / repeats, 1)
    while time.perf_counter() < deadline:
        now = median([time_block(call, repeats) / repeats for _ in range(group)])
        if before and abs(now / before - 1) < _SETTLED:
            break
        before = now
    return repeats
