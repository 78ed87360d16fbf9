"""Successive halving: who goes on to the next rung, and whether the ranking of a supernet is used."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from attnsurgery.search.result.record import Record, trained
from attnsurgery.search.result.statistics import kendall_tau_b
from attnsurgery.settings import RankBy

CHECKED = 6
"""So many candidates drawn at random tell whether the supernet's ranking is used."""


def places_on(rungs: int, candidates: int, halving: int) -> list[int]:
    """How many of so many candidates each rung trains, from the lowest: all, a third, a ninth ..., at least one."""
    counts = [candidates]
    while len(counts) < rungs:
        counts.append(math.ceil(counts[-1] / halving))
    return counts


@dataclass(frozen=True, slots=True)
class Trust:
    """How the supernet orders a few candidates drawn at random, against training each by itself."""

    tau: float | None
    """Kendall's tau-b; None where either gives the same to all."""
    candidates: int

    @property
    def holds(self) -> bool:
        """The supernet's order is worth following: it rather agrees than not.

        Of so few candidates that is weak evidence, and enough: to follow an order that means nothing is no worse than
        to follow none, only one that is reversed does harm.
        """
        return self.tau is not None and self.tau > 0

    def sentence(self) -> str:
        """What was found, and what follows from it."""
        tau = "undefined" if self.tau is None else f"{self.tau:.2f}"
        found = f"on {self.candidates} candidates drawn at random, supernet and training alone agree with tau-b {tau}"
        if self.holds:
            return f"{found}, so its ranking was used"
        return f"{found}, so its ranking was not used, and those asked for first went on"


def checked(records: Sequence[Record]) -> list[Record]:
    """The candidates by which a supernet is judged: the first that were drawn at random."""
    return [record for record in trained(records) if record.drawn][:CHECKED]


def trust(records: Sequence[Record], by: RankBy) -> Trust | None:
    """Of a supernet on the lowest rung; None before those that tell were on the next one."""
    there = [record for record in checked(records) if record.reached]
    if len(there) < 2 or any(_may_rise(record, 0) for record in checked(records)):
        return None
    lower, upper = ([_score(record, rung, by) for record in there] for rung in (0, 1))
    return Trust(kendall_tau_b(lower, upper), len(there))


def next_promotion(
    records: Sequence[Record],
    rungs: int,
    halving: int,
    supernet: bool = False,
    by: RankBy = "top1",
    going: Collection[int] = (),
) -> Record | None:
    """Who is to be trained on the rung above its own: the best not promoted yet on the lowest rung with room above.

    Args:
        supernet: the lowest rung is one; those that it is judged by go first.
        going: numbers of those that are on their way up. Who follows them is asked again when they are there.
    """
    blind = False
    if supernet:
        tests = [record for record in checked(records) if _may_rise(record, 0)]
        if tests:
            return next((record for record in tests if record.number not in going), None)
        found = trust(records, by)
        blind = found is None or not found.holds
    for rung, room in enumerate(places_on(rungs, len(trained(records)), halving)[1:]):
        there = [record for record in trained(records) if record.reached > rung or _may_rise(record, rung)]
        if blind and rung == 0:
            there.sort(key=lambda record: record.number)
        else:
            there.sort(key=lambda record: (_score(record, rung, by), -record.number), reverse=True)
        rising = [record for record in there[:room] if record.reached == rung]
        if rising:
            return next((record for record in rising if record.number not in going), None)
    return None


def _score(record: Record, rung: int, by: RankBy) -> float:
    score = record.score_on(rung, by)
    assert score is not None, "whoever was on a rung has a score there"
    return score


def _may_rise(record: Record, rung: int) -> bool:
    return record.reached == rung and record.halted is None
