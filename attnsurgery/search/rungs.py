"""Rungs of fidelity and successive halving: all candidates are trained cheaply, the best of them again, dearer.

The lowest rung is what the study is told, for every trained candidate has been on it; so the sampler compares like with
like. When all trials are done, the best third of a rung (`--halving 3`) is trained on the next one, up to the top rung,
which alone decides who wins.

A rung trains from the base's starting weights, not on from the rung below: a learning rate that has fallen to nothing
is no place to go on from, a score depends on candidate and rung alone, and what is done again costs a fraction of the
rung that it is done for.

A supernet may be the lowest rung (`--rungs supernet:8`): it is trained once, and scores all candidates with the weights
that they share. Whether it orders them as training by themselves does is not known beforehand, so each search asks: a
few candidates that were drawn at random go on to the next rung whatever the supernet says of them, and unless it rather
agrees with what these come to there, the others go on in the order they were asked for, not in the supernet's.

Successive halving is Jamieson and Talwalkar's ("Non-stochastic best arm identification and hyperparameter
optimization", AISTATS 2016). ASHA promotes while results come in; with a fixed number of trials, promoting at the end
trains as many on each rung, and chooses them from all.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from attnsurgery.errors import UnknownNameError, UsageError, did_you_mean
from attnsurgery.evaluate import EVALUATORS
from attnsurgery.search.config import SearchConfig
from attnsurgery.search.numbers import kendall_tau_b
from attnsurgery.search.record import RankBy, Record, trained

SUPERNET = "supernet"
CHECKED = 6
"""So many candidates drawn at random tell whether the supernet is to be believed."""
_ROUNDS = 4
"""A supernet that no epochs are given for is trained so many times as long as a candidate by itself."""


@dataclass(frozen=True, slots=True)
class Rung:
    """One way to train: how, and how long."""

    evaluator: str
    epochs: int

    @classmethod
    def read(cls, text: str) -> Rung:
        """From 'blocks:1'.

        Raises:
            UsageError: that is no evaluator, a colon and epochs.
            UnknownNameError: there is no such evaluator.
        """
        evaluator, colon, epochs = text.partition(":")
        if not (colon and epochs.isdecimal() and int(epochs)):
            raise UsageError(f"--rungs: {text!r} is no evaluator with epochs, such as blocks:1 or finetune:2.")
        return cls(_known(evaluator, "--rungs"), int(epochs))

    def __str__(self) -> str:
        length = f"{self.epochs} epoch{'s' if self.epochs > 1 else ''}"
        return f"{self.evaluator}, {length}{' for all candidates together' if self.evaluator == SUPERNET else ''}"


def rungs_of(config: SearchConfig) -> tuple[Rung, ...]:
    """From the lowest to the top, which is the configuration's own evaluator and epochs.

    The evaluator `supernet` is short for a supernet below a fine-tuning.

    Raises:
        UsageError, UnknownNameError: as `Rung.read`; or a supernet is above another rung.
    """
    lower = [*map(Rung.read, config.rungs.split())]
    top = Rung(_known(config.evaluator, "--evaluator"), config.epochs)
    if config.evaluator == SUPERNET:
        lower.append(Rung(SUPERNET, _ROUNDS * config.epochs))
        top = Rung("finetune", config.epochs)
    if any(rung.evaluator == SUPERNET for rung in lower[1:]):
        raise UsageError("a supernet is the lowest rung: it scores all candidates at once. Put it first in --rungs.")
    return (*lower, top)


def _known(evaluator: str, option: str) -> str:
    known = sorted([*EVALUATORS, SUPERNET])
    if evaluator not in known:
        raise UnknownNameError(
            f"{option}: there is no evaluator {evaluator!r}.{did_you_mean(evaluator, known)} Known: {', '.join(known)}."
        )
    return evaluator


def shares(config: SearchConfig) -> bool:
    """True if the lowest rung is a supernet."""
    return rungs_of(config)[0].evaluator == SUPERNET


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
            return f"{found}; the best by the supernet went on"
        return f"{found}: its order was not followed, and those asked for first went on"


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
