"""Rungs of fidelity and successive halving: all candidates are trained cheaply, the best of them again, dearer.

The lowest rung is what the study is told, for every trained candidate has been on it; so the sampler compares like with
like. When all trials are done, the best third of a rung (`--halving 3`) is trained on the next one, up to the top rung,
which alone decides who wins.

A rung trains from the base's starting weights, not on from the rung below: a learning rate that has fallen to nothing
is no place to go on from, a score depends on candidate and rung alone, and what is done again costs a fraction of the
rung that it is done for.

Successive halving is Jamieson and Talwalkar's ("Non-stochastic best arm identification and hyperparameter
optimization", AISTATS 2016). ASHA promotes while results come in; with a fixed number of trials, promoting at the end
trains as many on each rung, and chooses them from all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from attnsurgery.errors import UsageError
from attnsurgery.evaluate import EVALUATORS
from attnsurgery.search.config import SearchConfig
from attnsurgery.search.record import Record, trained


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
        EVALUATORS[evaluator]
        return cls(evaluator, int(epochs))

    def __str__(self) -> str:
        return f"{self.evaluator}, {self.epochs} epoch{'s' if self.epochs > 1 else ''}"


def rungs_of(config: SearchConfig) -> tuple[Rung, ...]:
    """From the lowest to the top, which is the configuration's own evaluator and epochs.

    Raises:
        UsageError, UnknownNameError: as `Rung.read`.
    """
    return (*map(Rung.read, config.rungs.split()), Rung(config.evaluator, config.epochs))


def places_on(rungs: int, candidates: int, halving: int) -> list[int]:
    """How many of so many candidates each rung trains, from the lowest: all, a third, a ninth ..., at least one."""
    counts = [candidates]
    while len(counts) < rungs:
        counts.append(math.ceil(counts[-1] / halving))
    return counts


def next_promotion(records: Sequence[Record], rungs: int, halving: int) -> Record | None:
    """Who is to be trained on the rung above its own: the best not promoted yet on the lowest rung with room above."""
    for rung, room in enumerate(places_on(rungs, len(trained(records)), halving)[1:]):
        there = [record for record in trained(records) if record.reached > rung or _may_rise(record, rung)]
        there.sort(key=lambda record: (record.top1_on(rung) or 0.0, -record.number), reverse=True)
        for record in there[:room]:
            if record.reached == rung:
                return record
    return None


def _may_rise(record: Record, rung: int) -> bool:
    return record.reached == rung and record.halted is None
