"""Measures rivals, and chooses their learning rates as the base's were chosen, so that they can be compared with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from attnsurgery.latency import Latency
from attnsurgery.search.config import SearchConfig
from attnsurgery.search.result.limits import Budgets
from attnsurgery.search.result.options import Option
from attnsurgery.search.result.record import Record, Timing
from attnsurgery.search.rivals import PROPOSED, Rival, rivals_of
from attnsurgery.search.tuning import Training, Tuned, Tuning

_MOST_MEASURED = 6
"""Largest number of models that are measured to find those to propose."""
Results = list[dict[str, Any]]


class Work(Protocol):
    """Does jobs of one kind, one for each payload, and returns their results in the same order."""

    def __call__(self, kind: str, *payloads: Mapping[str, Any]) -> Results: ...


@dataclass(frozen=True, slots=True)
class Entrant:
    """A rival that fits the budget, and how it is trained."""

    rival: Rival
    """The model and its input size."""
    option: Option
    """What is known of it before its trainings for the verdict."""
    training: Training | None
    """Its own settings; None for those of the configuration."""


def meet_rivals(
    config: SearchConfig, budgets: Budgets, reference: Latency, work: Work, tuned: Tuned | None, pilot: int
) -> tuple[list[Entrant], list[Option]]:
    """Measure the rivals, and choose learning rate and length of training for each that fits, as for the base.

    Args:
        config: settings of the search.
        budgets: limits of the search.
        reference: the base's latency.
        work: does jobs.
        tuned: how the base is trained; None if the configuration says all.
        pilot: epochs of the shortest training, by which rates are chosen.

    Returns:
        Those that fit the budget, and what is known of the others.

    Raises:
        StopRequested: the user asked for an end.
    """
    entrants: list[Entrant] = []
    others: list[Option] = []
    proposed = config.against is None and config.pretrained
    rivals: Sequence[Rival] = rivals_of(config)
    if proposed:
        (result,) = work("rival proposals", {"record": None, "reference": reference})
        rivals = [Rival(name) for name in result["names"][:_MOST_MEASURED]]
    for rival in rivals:
        if proposed and len(entrants) == PROPOSED:
            break
        option = _measured(rival, budgets, reference, work)
        if option.left_out:
            others += [] if proposed else [option]  # a proposal that does not fit is none
            continue
        training, failed = _training(config, rival, work, tuned, pilot)
        if failed:
            others.append(replace(option, left_out=failed))
        else:
            option = replace(option, training=asdict(training) if training else None)
            entrants.append(Entrant(rival, option, training))
    return entrants, others


def _measured(rival: Rival, budgets: Budgets, reference: Latency, work: Work) -> Option:
    """The rival's latency, and why it is left out if it is."""
    (facts,) = work("rival costs", {"record": None, "rival": rival.key, "reference": reference})
    if "failed" in facts:
        return Option("rival", rival.words, left_out=facts["failed"])
    timing = Timing(**facts["costs"].pop("timing"))
    check = budgets.check(Record(-1, "pending", timing=timing, **facts["costs"]), "high")
    over = "" if check.within else f"{check.words}, over the budget of {budgets.describe()}"
    return Option("rival", rival.words, timing, left_out=over)


def _training(
    config: SearchConfig, rival: Rival, work: Work, tuned: Tuned | None, pilot: int
) -> tuple[Training | None, str]:
    """The settings of a rival's trainings; or why it cannot be trained."""
    (start,) = work("rival weights", {"record": None, "rival": rival.key})
    if "failed" in start:
        return None, start["failed"]
    if tuned is None:
        return None, ""
    scale = tuned.candidates.block_lr_scale  # for a rival that has blocks
    tuning = Tuning(config, pilot)
    results: dict[str, dict[str, Any]] = {}
    while attempts := tuning.needed_for_plain(results):
        trainings = [asdict(replace(attempt.training, block_lr_scale=scale)) for attempt in attempts]
        payloads = [
            {"record": None, "rival": rival.key, "part": "base", "training": training} for training in trainings
        ]
        results |= dict(zip([attempt.key for attempt in attempts], work("tuning", *payloads), strict=True))
    if results and all("failed" in result for result in results.values()):
        return None, next(iter(results.values()))["failed"]
    return replace(tuning.chosen_for_plain(results, tuned.base), block_lr_scale=scale), ""
