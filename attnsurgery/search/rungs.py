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

from dataclasses import dataclass

from attnsurgery.errors import UnknownNameError, UsageError, did_you_mean
from attnsurgery.evaluate import EVALUATORS
from attnsurgery.search.config import SearchConfig

SUPERNET = "supernet"
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
