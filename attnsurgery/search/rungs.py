"""Rungs of fidelity for successive halving: all candidates are trained cheaply, the best of them again at higher cost.

The study gets the scores of the lowest rung, on which every trained candidate is scored, so the sampler compares equal
fidelities. When all trials are done, the best third of a rung (`--halving 3`) is trained on the next one, up to the top
rung, which alone decides the winner.

A rung trains from the base's starting weights and does not continue the rung below. A learning rate that has decayed to
0 is no start for further training, a score then depends only on candidate and rung, and the repeated epochs cost a
fraction of the higher rung.

A supernet may be the lowest rung (`--rungs supernet:8`). It is trained once, and scores all candidates with shared
weights. Whether its ranking agrees with separate trainings is not known beforehand, so each search tests it: a few
candidates drawn at random are promoted whatever their supernet scores. The supernet's ranking is used only if it
correlates (Kendall tau > 0) with their scores on the next rung; otherwise candidates are promoted in trial order.

Successive halving is by Jamieson and Talwalkar ("Non-stochastic best arm identification and hyperparameter
optimization", AISTATS 2016). ASHA promotes while results come in; with a fixed number of trials, promotion at the end
trains as many candidates on each rung, and chooses them among all.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnsurgery.errors import UnknownNameError, UsageError, did_you_mean
from attnsurgery.evaluate import EVALUATORS
from attnsurgery.search.config import SearchConfig

SUPERNET = "supernet"
_ROUNDS = 4
"""Epochs of a supernet, relative to those of one candidate, if they are not given."""
_USUAL_EPOCHS = 3
"""Epochs of one candidate for this purpose, where the search chooses them."""


@dataclass(frozen=True, slots=True)
class Rung:
    """One fidelity: an evaluator and a length of training."""

    evaluator: str
    """A name of EVALUATORS, or SUPERNET."""
    epochs: int | None
    """Epochs of the training; None if the search chooses them."""

    @classmethod
    def parse(cls, text: str) -> Rung:
        """Parse a rung such as 'blocks:1'.

        Raises:
            UsageError: the text is not an evaluator, a colon and epochs.
            UnknownNameError: there is no such evaluator.
        """
        evaluator, colon, epochs = text.partition(":")
        if not (colon and epochs.isdecimal() and int(epochs)):
            raise UsageError(f"--rungs: {text!r} is no evaluator with epochs, such as blocks:1 or finetune:2.")
        return cls(_check_evaluator(evaluator, "--rungs"), int(epochs))

    def __str__(self) -> str:
        if self.epochs is None:
            return f"{self.evaluator}, as many epochs as the base gains from"
        length = f"{self.epochs} epoch{'s' if self.epochs > 1 else ''}"
        return f"{self.evaluator}, {length}{' for all candidates together' if self.evaluator == SUPERNET else ''}"


def rungs_of(config: SearchConfig) -> tuple[Rung, ...]:
    """The rungs of a search from the lowest to the top, which has the evaluator and epochs of the settings.

    The evaluator `supernet` stands for a supernet rung below a fine-tuning rung.

    Raises:
        UsageError, UnknownNameError: as `Rung.parse`; or a supernet is above another rung.
    """
    lower = [*map(Rung.parse, config.rungs.split())]
    epochs = None if isinstance(config.epochs, str) else config.epochs
    top = Rung(_check_evaluator(config.evaluator, "--evaluator"), epochs)
    if config.evaluator == SUPERNET:
        lower.append(Rung(SUPERNET, _ROUNDS * (epochs or _USUAL_EPOCHS)))
        top = Rung("finetune", epochs)
    if any(rung.evaluator == SUPERNET for rung in lower[1:]):
        raise UsageError("a supernet is the lowest rung: it scores all candidates at once. Put it first in --rungs.")
    return (*lower, top)


FEWEST_REPEATS = 4
"""Fewest candidates from which the reliability of a ranking is estimated, unless the settings want fewer."""


def _check_evaluator(evaluator: str, option: str) -> str:
    names = sorted([*EVALUATORS, SUPERNET])
    if ":" in evaluator:
        EVALUATORS[evaluator]  # raises where it cannot be imported
    elif evaluator not in names:
        raise UnknownNameError(
            f"{option}: there is no evaluator {evaluator!r}.{did_you_mean(evaluator, names)} Known: {', '.join(names)}."
        )
    return evaluator


def repeats_wanted(config: SearchConfig) -> int:
    """Number of candidates that are trained from a second seed on the lowest rung: at most half of the trials.

    0 if that is fewer than both `FEWEST_REPEATS` and the setting, or if a second seed changes no score there: a
    supernet scores all candidates with the same weights, and some evaluators train nothing.
    """
    lowest = rungs_of(config)[0].evaluator
    if lowest == SUPERNET or not EVALUATORS[lowest].trains:
        return 0
    wanted = min(config.reliability, config.trials // 2)
    return wanted if wanted >= min(FEWEST_REPEATS, config.reliability) else 0


def shares(config: SearchConfig) -> bool:
    """Whether the lowest rung is a supernet, in which candidates share weights."""
    return rungs_of(config)[0].evaluator == SUPERNET
