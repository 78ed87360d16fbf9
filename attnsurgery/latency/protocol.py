"""The one way in which anything here is timed: warm up, alternate, stop when the ratio is known well enough.

Calls are timed in blocks long enough for the clock. Two subjects alternate A B B A, so that a drift of the machine in
one round cancels; a round in which either was slowed down far beyond its usual time is left out for both. The interval
of the ratio of medians comes from resampling whole rounds, which keeps the two times of a round together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Call = Callable[[], Any]
TimeBlock = Callable[[Call, int], float]

_RESAMPLES = 1000
_THROTTLED = 1.5
"""A block this many times slower than the median was interrupted; it says nothing about the model."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to go on measuring."""

    tolerance: float = 0.002
    """Stop when half the 95 % interval is within this share of the value ..."""
    max_seconds: float = 5.0
    """... or after this long, warm-up not counted."""
    block_ms: float = 2.0
    """The shortest time between two readings of the clock."""
    min_rounds: int = 8
    max_warmup_seconds: float = 3.0
    placements: int = 3
    """Fresh copies of the models in memory; the time is shared out between them."""

    def share(self, parts: int) -> Effort:
        """The same effort for one of so many parts: a part alone need not reach the tolerance."""
        return replace(
            self,
            tolerance=self.tolerance * parts**0.5,
            max_seconds=self.max_seconds / parts,
            max_warmup_seconds=self.max_warmup_seconds / parts,
        )


@dataclass(frozen=True, slots=True)
class Sampled:
    """What was timed of several calls, side by side."""

    times: list[list[float]]
    """Of each call in ms, one number a round."""
    runs: list[int]
    """How many times each call was timed."""
    left_out: float
    """Share of the rounds that something disturbed."""
    drift: float
    """By how much the first call was slower in the last third than in the first, as a share; below 0: faster."""


def sample(time_block: TimeBlock, calls: Sequence[Call], effort: Effort) -> Sampled:
    """Time the calls until what is asked about them is known well enough, or time is up.

    All calls are timed in every round, forwards and then backwards: A, or A B B A.
    """
    repeats = [_warm_up(time_block, call, effort) for call in calls]
    order = [*range(len(calls)), *reversed(range(len(calls)))] if len(calls) > 1 else [0]
    rounds: list[list[float]] = []
    deadline = time.perf_counter() + effort.max_seconds
    while True:
        times = [0.0] * len(calls)
        for index in order:
            times[index] += time_block(calls[index], repeats[index]) / repeats[index]
        rounds.append([total * len(calls) / len(order) for total in times])
        if len(rounds) < effort.min_rounds:
            continue
        over = time.perf_counter() > deadline
        if over or (len(rounds) % effort.min_rounds == 0 and _known(rounds, effort.tolerance)):
            break
    kept = _undisturbed(np.array(rounds))
    share = len(order) // len(calls)
    third = max(1, len(kept) // 3)
    return Sampled(
        times=[list(column) for column in kept.T.tolist()],
        runs=[len(rounds) * share * count for count in repeats],
        left_out=1.0 - len(kept) / len(rounds),
        drift=float(np.median(kept[-third:, 0]) / np.median(kept[:third, 0])) - 1.0,
    )


def median(times: Sequence[float]) -> float:
    """The middle of the times."""
    return float(np.median(np.asarray(times)))


def quantile(times: Sequence[float], share: float) -> float:
    """The time that this share of the runs stays under."""
    return float(np.quantile(np.asarray(times), share))


def relative_noise(times: Sequence[float]) -> float:
    """Half the 95 % bootstrap interval of the median, as a share of the median."""
    medians = np.median(_resampled(np.asarray(times)[:, None]), axis=1)[:, 0]
    low, high = np.quantile(medians, (0.025, 0.975))
    return float((high - low) / 2 / np.median(np.asarray(times)))


def interval_of_ratio(base: Sequence[float], variant: Sequence[float]) -> tuple[float, float]:
    """95 % bootstrap interval of median(variant) / median(base); the rounds stay paired."""
    medians = np.median(_resampled(np.stack([base, variant], axis=1)), axis=1)
    low, high = np.quantile(medians[:, 1] / medians[:, 0], (0.025, 0.975))
    return float(low), float(high)


def _resampled(rounds_RS: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(resamples, rounds, subjects), drawn with a fixed seed: the same times give the same interval."""
    count = len(rounds_RS)
    picks = np.random.default_rng(0).integers(0, count, size=(_RESAMPLES, count))
    resampled: np.ndarray[Any, np.dtype[np.float64]] = rounds_RS[picks]
    return resampled


def _known(rounds: list[list[float]], tolerance: float) -> bool:
    kept = _undisturbed(np.array(rounds))
    if kept.shape[1] == 1:
        return relative_noise(kept[:, 0].tolist()) <= tolerance
    low, high = interval_of_ratio(kept[:, 0].tolist(), kept[:, 1].tolist())
    return (high - low) / 2 <= tolerance


def _undisturbed(rounds_RS: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The rounds in which no subject was slowed down by something else; never fewer than half of them."""
    slowest = (rounds_RS / np.median(rounds_RS, axis=0)).max(axis=1)
    kept = slowest <= _THROTTLED
    if kept.sum() * 2 < len(rounds_RS):
        kept = slowest <= np.median(slowest)
    undisturbed: np.ndarray[Any, np.dtype[np.float64]] = rounds_RS[kept]
    return undisturbed


def _warm_up(time_block: TimeBlock, call: Call, effort: Effort) -> int:
    """Calls until the medians of successive groups of blocks agree; says how many calls fill a block."""
    deadline = time.perf_counter() + effort.max_warmup_seconds
    repeats = 1
    while (spent := time_block(call, repeats)) < effort.block_ms and repeats < 1_000_000:
        repeats = max(repeats + 1, int(repeats * min(4.0, 1.2 * effort.block_ms / max(spent, 1e-6))))
    before = 0.0
    while time.perf_counter() < deadline:
        now = median([time_block(call, repeats) for _ in range(5)])
        if before and abs(now / before - 1) < 0.02:
            break
        before = now
    return repeats
