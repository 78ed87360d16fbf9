"""Decides which candidate a search tries next: one drawn uniformly, one of the sampler, or a last resort.

The first candidates are drawn uniformly, and so is the next one after several that taught nothing. Otherwise the
sampler chooses. Where it finds no candidate within the budgets, latencies are measured that are only predicted to be
over them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from attnsurgery.errors import SearchError
from attnsurgery.samplers import Sampler
from attnsurgery.samplers.knapsack import best, best_by_first
from attnsurgery.samplers.places import Picks, Places
from attnsurgery.search.result.limits import EXACT, POSSIBLE
from attnsurgery.search.result.record import Record, trained
from attnsurgery.search.space import BoundSpace
from attnsurgery.search.storage.schema import SLOT

_STARTUP = 6
"""Number of candidates that are drawn uniformly before the sampler chooses. The sampler learns from them, a supernet is
checked by them, and the report compares later candidates with them."""
_STUCK = 3
"""After this many candidates in a row that taught nothing, the next one is drawn from those not seen yet."""
_UNTRAINED = {"duplicate", "too_many_blocks"}


@dataclass(frozen=True, slots=True)
class Proposal:
    """The next candidate, and who chose it."""

    sampler: BaseSampler
    """The sampler that Optuna is to ask where there is no assignment."""
    assignment: Mapping[str, str] | None
    """A label for every variable; None if Optuna is to ask the sampler, or has a waiting trial."""
    drawn: bool
    """The candidate was drawn uniformly at random, and nothing that was learned had a say in it."""

    @property
    def origin(self) -> dict[str, bool]:
        """`drawn`, and whether the sampler's model did not fit so that TPE chose: once the sampler was asked."""
        return {"drawn": self.drawn, "fell_back": getattr(self.sampler, "fell_back", False)}


def propose(
    sampler_class: Any,
    direction: StudyDirection,
    space: BoundSpace,
    places: Places,
    records: Sequence[Record],
    trials: Sequence[FrozenTrial],
    slot: int,
    seed: int,
    *,
    base_score: float | None,
    repeats: bool,
) -> Proposal:
    """Choose the next candidate.

    Args:
        sampler_class: an entry of `SAMPLERS`.
        direction: of the study.
        space: makes recipes of assignments.
        places: the space as samplers see it, with the budgets that are known or predicted by now.
        records: all finished trials, in order.
        trials: all trials of the study.
        slot: how many candidates were asked for before.
        seed: of this choice.
        base_score: the base's score on the lowest rung, if it is known.
        repeats: the last candidate is being worked on already, so the next one is drawn at random.

    Raises:
        SearchError: the sampler chose what is no candidate of the space.
    """
    running = [trial for trial in trials if not trial.state.is_finished()]
    digests = {record.digest for record in records} | {_digest(space, places, trial.params) for trial in running}
    startup = slot < _STARTUP
    stuck = repeats or (len(records) >= _STUCK and not any(map(_teaches, records[-_STUCK:])))
    drawn = _draw_new(space, places, digests, seed) if startup or stuck else None
    sampler: BaseSampler = _Fixed(places, drawn) if drawn else sampler_class(places, seed, base_score)
    waiting = any(trial.state is TrialState.WAITING for trial in running)
    choice: Mapping[str, str] | None = None
    if isinstance(sampler, Sampler) and not waiting:
        choice = sampler.choose(direction, trials)
        if choice and places.picks(choice) is None:
            raise SearchError(
                f"The sampler {type(sampler).__qualname__} chose {dict(choice)}, which is no candidate of this "
                "space: a choice has one label for every place (attnsurgery.samplers.Sampler)."
            )
    if isinstance(sampler, Sampler) and not (waiting or choice or sampler.fell_back):
        # every candidate that is predicted to be within the budgets was asked for: a measurement may still find others
        exact = replace(
            places, budgets={name: limit for name, limit in places.budgets.items() if name in (*EXACT, POSSIBLE)}
        )
        choice = None if trained(records) else _fastest(places, exact, trials)
        choice = choice or _draw_new(space, exact, digests, seed)
    # a candidate that is drawn because the sampler is stuck does not count as drawn at random
    uniform = getattr(sampler_class, "draws_uniformly", False) or (startup and drawn is not None)
    return Proposal(sampler, choice, uniform)


def next_slot(trials: Sequence[FrozenTrial]) -> int:
    """How many candidates were asked for."""
    return 1 + max((trial.user_attrs.get(SLOT, -1) for trial in trials), default=-1)


def _draw_new(space: BoundSpace, places: Places, digests: set[str | None], seed: int) -> dict[str, str] | None:
    """A legal candidate that was not asked for yet, drawn uniformly; None where there seems to be none."""

    def is_new(picks: Picks) -> bool:
        recipe = space.recipe_for(places.params(picks))
        return recipe is not None and recipe.digest() not in digests

    picks = places.drawn(np.random.default_rng(seed), is_new)
    return None if picks is None else places.params(picks)


def _digest(space: BoundSpace, places: Places, params: Mapping[str, str]) -> str:
    """The digest of the candidate of a running trial; '' where its parameters are not complete yet."""
    if params.keys() != places.choices.keys():
        return ""
    recipe = space.recipe_for(params)
    return recipe.digest() if recipe else ""


def _fastest(places: Places, exact: Places, trials: Sequence[FrozenTrial]) -> dict[str, str] | None:
    """The candidate with the lowest predicted latency of those not asked for; None if no latency is predicted.

    Args:
        exact: `places` with only the budgets that are known exactly.
    """
    latency = places.budgets.get("latency")
    if latency is None:
        return None
    tried = {picks for trial in trials if (picks := places.picks({k: str(v) for k, v in trial.params.items()}))}
    nothing = (0,) * len(places.choices)
    values = [[-costs for costs in table] for table in latency.by_first or [latency.costs]]
    excluded, budgets = {nothing, *tried}, list(exact.budgets.values())
    if latency.by_first:
        picks = best_by_first(exact, values, None, budgets, excluded)
    else:
        picks = best(exact, values[0], None, budgets, excluded)
    return None if picks is None else places.params(picks)


def _teaches(record: Record) -> bool:
    """Whether a trial gave new information; a duplicate does not, nor a candidate with known costs over a budget."""
    return record.state not in _UNTRAINED and (record.state != "over_budget" or record.timing is not None)


class _Fixed(Sampler):
    """Chooses one given candidate."""

    def __init__(self, places: Places, assignment: Mapping[str, str]) -> None:
        super().__init__(places, seed=0)
        self._assignment = assignment

    def choose(self, direction: StudyDirection, trials: Sequence[FrozenTrial]) -> Mapping[str, str]:
        """The given candidate."""
        return self._assignment
