"""Successive halving: which candidate is promoted next, and whether the ranking of a supernet is used."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from attnsurgery.search.result.record import Record, trained
from attnsurgery.search.result.statistics import kendall_tau_b
from attnsurgery.settings import RankBy

CHECKED = 6
"""Number of candidates, drawn at random, that decide whether the supernet's ranking is used."""


def places_on(rungs: int, candidates: int, halving: int) -> list[int]:
    """The number of candidates that each rung trains, from the lowest: all, a third, a ninth ..., at least one.

    Args:
        rungs: number of rungs.
        candidates: number of candidates on the lowest rung.
        halving: reduction factor (eta) of successive halving.
    """
    counts = [candidates]
    while len(counts) < rungs:
        counts.append(math.ceil(counts[-1] / halving))
    return counts


@dataclass(frozen=True, slots=True)
class Trust:
    """The rank correlation of supernet scores and separate trainings, on a few candidates drawn at random."""

    tau: float | None
    """Kendall's tau-b; None if all scores of one kind are equal."""
    candidates: int
    """Number of candidates."""

    @property
    def holds(self) -> bool:
        """Whether the supernet's ranking is used, which needs tau > 0.

        Few candidates are weak evidence, but enough: a ranking without meaning does no more harm than none, and only a
        reversed one does.
        """
        return self.tau is not None and self.tau > 0

    def sentence(self) -> str:
        """The result and its consequence as a sentence."""
        tau = "undefined" if self.tau is None else f"{self.tau:.2f}"
        statement = (
            f"on {self.candidates} candidates drawn at random, supernet and training alone agree with tau-b {tau}"
        )
        if self.holds:
            return f"{statement}, so its ranking was used"
        return f"{statement}, so its ranking was not used, and the candidates that were proposed first were promoted"


def check_sample(records: Sequence[Record]) -> list[Record]:
    """The candidates that a supernet is checked by: the first that were drawn at random."""
    return [record for record in trained(records) if record.drawn][:CHECKED]


def trust(records: Sequence[Record], by: RankBy) -> Trust | None:
    """The check of a supernet on the lowest rung; None until its candidates were trained on the next rung."""
    promoted = [record for record in check_sample(records) if record.reached]
    if len(promoted) < 2 or any(_may_rise(record, 0) for record in check_sample(records)):
        return None
    lower, upper = ([_score(record, rung, by) for record in promoted] for rung in (0, 1))
    return Trust(kendall_tau_b(lower, upper), len(promoted))


def next_promotion(
    records: Sequence[Record],
    rungs: int,
    halving: int,
    supernet: bool = False,
    by: RankBy = "metric",
    going: Collection[int] = (),
) -> Record | None:
    """The next candidate to train on a higher rung: the best one on the lowest rung whose next rung has room.

    Args:
        records: of finished trials.
        rungs: number of rungs.
        halving: reduction factor (eta) of successive halving.
        supernet: whether the lowest rung is a supernet; the candidates that it is checked by are promoted first.
        by: the score that candidates are ranked by.
        going: numbers of the trials that are being promoted.

    Returns:
        None if there is no such candidate, or if it is being promoted already.
    """
    blind = False
    if supernet:
        tests = [record for record in check_sample(records) if _may_rise(record, 0)]
        if tests:
            return next((record for record in tests if record.number not in going), None)
        check = trust(records, by)
        blind = check is None or not check.holds
    for rung, room in enumerate(places_on(rungs, len(trained(records)), halving)[1:]):
        candidates = [record for record in trained(records) if record.reached > rung or _may_rise(record, rung)]
        if blind and rung == 0:
            candidates.sort(key=lambda record: record.number)
        else:
            candidates.sort(key=lambda record: (_score(record, rung, by), -record.number), reverse=True)
        rising = [record for record in candidates[:room] if record.reached == rung]
        if rising:
            return next((record for record in rising if record.number not in going), None)
    return None


def _score(record: Record, rung: int, by: RankBy) -> float:
    score = record.score_on(rung, by)
    assert score is not None, "a candidate has a score on each rung that it was trained on"
    return score


def _may_rise(record: Record, rung: int) -> bool:
    return record.reached == rung and record.halted is None
