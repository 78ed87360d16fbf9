"""Thompson sampling with an additive model and exact budgets: what a search needs that can train only a few candidates.

Each ask draws one version of what every block at every place is worth from all that is known, and takes the candidate
that would be the best if that were true, found exactly among those that keep to every budget and were not tried yet.
What is uncertain is drawn high now and then and so gets its trial; what is known to be bad never does. Several may be
asked at a time: candidates that still run are not asked for again, and draws differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from attnsurgery.samplers._base import AGAIN, BLOCKS, SAMPLERS
from attnsurgery.samplers.additive import AdditiveModel, Fit
from attnsurgery.samplers.knapsack import best
from attnsurgery.samplers.places import Budget, Picks, Places

_SHARPNESS = 2.0
"""Draws have half the deviation of the posterior: with tens of trials, and not thousands, exploring in full costs more
than it finds out."""
_JUDGED = 16
"""From so many trained candidates on the model is asked whether it fits."""


@SAMPLERS.register("additive")
class AdditiveSampler(BaseSampler):
    """Additive Bayesian Thompson sampling with an exact knapsack over all constraints of the study.

    Constraints (`trial.set_constraint`) that are no known budget of the places are learned as scores are, from trials
    that finished with any state: a pruned trial that was only measured teaches its costs.

    Args:
        places: the space; the study's parameters are its places, categorical.
        seed: of this sampler; for the same study, the same seed asks for the same candidate.
        base_score: the score without any block, if known.
    """

    begins_by_itself = True

    def __init__(self, places: Places, seed: int, base_score: float | None = None) -> None:
        self._places = places
        self._seed = seed
        self._base_score = base_score
        self._model = AdditiveModel(places)
        self._costs = AdditiveModel(places, costs=True)
        self._other = TPESampler(seed=seed)
        self.fit: Fit | None = None
        """How well scores add up, as of the last ask; None before there are enough."""

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {name: optuna.distributions.CategoricalDistribution(c) for name, c in self._places.choices.items()}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        rng = np.random.default_rng(self._seed)
        trials = [t for t in study.get_trials(deepcopy=False) if t.number != trial.number]
        asked = {t.number: picks for t in trials if (picks := self._places.picks(t.params)) is not None}
        tried = {asked[t.number] for t in trials if t.number in asked and not t.user_attrs.get(AGAIN)}
        tried.add((0,) * len(self._places.choices))
        sign = -1.0 if study.direction == StudyDirection.MINIMIZE else 1.0
        scored = [(asked[t.number], sign * float(t.value)) for t in trials if t.number in asked and t.value is not None]
        if self._base_score is not None:
            scored.insert(0, ((0,) * len(self._places.choices), sign * self._base_score))
        picks = self._next(rng, scored, self._budgets(rng, trials, asked), tried)
        if picks is None:
            return {}
        return dict(self._places.params(picks))

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._other.sample_independent(study, trial, param_name, param_distribution)

    def _next(
        self,
        rng: np.random.Generator,
        scored: Sequence[tuple[Picks, float]],
        budgets: Sequence[Budget],
        tried: set[Picks],
    ) -> Picks | None:
        if len(scored) < 2:  # nothing is known: any value is as likely as any other
            values = [np.append(0.0, rng.standard_normal(len(c) - 1)) for c in self._places.choices.values()]
            return best(self._places, values, None, budgets, tried)
        told = self._model.told([picks for picks, _ in scored], [score for _, score in scored], rng)
        self.fit = told.fit() if len(scored) > _JUDGED else None
        if self.fit is not None and self.fit.misses_interactions:
            return None  # then every place is asked of TPE by itself
        effects = told.draw(rng, _SHARPNESS)
        return best(self._places, effects.values, effects.by_count, budgets, tried)

    def _budgets(
        self, rng: np.random.Generator, trials: Sequence[FrozenTrial], asked: dict[int, Picks]
    ) -> list[Budget]:
        """Every constraint as costs that add up, as far as trials have shown."""
        known: dict[str, list[tuple[Picks, float]]] = {}
        for t in trials:
            if t.number in asked and t.state is not TrialState.RUNNING:
                for name in t.constraints.keys() - {BLOCKS, *self._places.budgets}:
                    known.setdefault(name, []).append((asked[t.number], t.constraints[name]))
        budgets = list(self._places.budgets.values())
        for measured in known.values():
            if len(measured) >= 2:
                costs = self._costs.told([picks for picks, _ in measured], [cost for _, cost in measured], rng).mean()
                budgets.append(Budget(costs.values, -costs.base))
        return budgets
