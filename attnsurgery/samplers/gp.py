"""Optuna's Gaussian process sampler, with its acquisition function maximised over the candidates within the budgets.

The model is Optuna's GPSampler: a Matern kernel over places, hyperparameters by maximum a posteriori, log expected
improvement (Ament et al., "Unexpected improvements to expected improvement for Bayesian optimization", NeurIPS 2023,
arXiv:2310.20708), times the probability that learned constraints hold (Gardner et al., "Bayesian optimization with
inequality constraints", ICML 2014). It learns from trials that have a score, and from running ones where they are.
https://optuna.readthedocs.io/en/stable/reference/samplers/generated/optuna.samplers.GPSampler.html

Optuna's own maximiser knows no budgets and may suggest a candidate twice. Here a local search takes its place, which
starts from random candidates and from the neighbours of the best ones, and changes one place at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import GPSampler
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from attnsurgery.samplers._base import AGAIN, BLOCKS, SAMPLERS, Sampler
from attnsurgery.samplers.knapsack import random_candidate
from attnsurgery.samplers.places import Picks, Places
from attnsurgery.samplers.threads import on_one_thread

_STARTUP = 8
"""Number of scores below which candidates are drawn at random."""
_RANDOM = 512
"""Number of random candidates, of which those within the budgets are starting points."""
_KNAPSACKS = 8
"""Number of starting points that are within the budgets however tight these are."""
_LEADERS = 4
"""Number of best candidates whose neighbours are starting points."""
_LOCAL_SEARCHES = 4
"""Number of starting points, those of the largest acquisition function, that are improved by local search."""


@SAMPLERS.register("gp")
class GpSampler(Sampler):
    """Optuna's GPSampler, restricted to untried candidates within the known budgets."""

    @on_one_thread
    def choose(self, direction: StudyDirection, trials: Sequence[FrozenTrial]) -> Mapping[str, str] | None:
        """The candidate with the largest acquisition function; a random one while there are few scores."""
        rng = np.random.default_rng(self.seed)
        known = [(t, picks) for t in trials if (picks := self.places.picks(t.params)) is not None]
        excluded = {picks for t, picks in known if not t.user_attrs.get(AGAIN)} | {self.places.nothing}
        scored = [(t, picks) for t, picks in known if t.value is not None]
        if len(scored) < _STARTUP:
            picks = self.places.drawn(rng, lambda picks: picks not in excluded) or self._knapsack(rng, excluded)
            return None if picks is None else self.places.params(picks)
        sign = -1.0 if direction == StudyDirection.MINIMIZE else 1.0
        ranked = sorted(scored, key=lambda entry: -sign * float(entry[0].value or 0.0))
        leaders = [picks for _, picks in ranked[:_LEADERS]]
        starts = self._starts(rng, leaders, excluded)
        if not starts:
            return None
        study = self._copy(direction, scored, [picks for t, picks in known if not t.state.is_finished()])
        study.sampler = _WithinBudgets(self.places, self.distributions(), self.seed, starts, excluded)
        picks = self.places.picks(study.ask(self.distributions()).params)
        if picks is None or picks in excluded or not self.places.holds(picks):
            picks = starts[0]  # `_optimize_acqf` is no public method: an Optuna without it suggests anything
        return self.places.params(picks)

    def _knapsack(self, rng: np.random.Generator, excluded: set[Picks]) -> Picks | None:
        return random_candidate(self.places, rng, list(self.places.budgets.values()), excluded)

    def _starts(self, rng: np.random.Generator, leaders: Sequence[Picks], excluded: set[Picks]) -> list[Picks]:
        """Untried candidates within the budgets, each once; empty where none is left."""
        first = self._knapsack(rng, excluded)
        if first is None:
            return []
        knapsacks = [first, *(self._knapsack(rng, excluded) or first for _ in range(_KNAPSACKS - 1))]
        random = [self.places.at_random(rng) for _ in range(_RANDOM)]
        neighbours = [picks for leader in leaders for picks in self.places.neighbours(leader)]
        return list(dict.fromkeys([*knapsacks, *_feasible(self.places, [*neighbours, *random], excluded)]))

    def _copy(
        self, direction: StudyDirection, scored: Sequence[tuple[FrozenTrial, Picks]], running: Sequence[Picks]
    ) -> optuna.Study:
        """A study in memory with the trials that GPSampler learns from.

        It wants the same constraints of all of them, in the same order. A known budget is one of them only where a
        candidate with a score is over it, as after the budget was reduced: then this is no score to improve on.
        """
        study = optuna.create_study(storage=InMemoryStorage(), direction=direction)
        exact = {BLOCKS, *self.places.budgets}
        learned = sorted(set[str].intersection(*(set(t.constraints) for t, _ in scored)) - exact)
        exceeded = any(not self.places.holds(picks) for _, picks in scored)
        finished = [(picks, t.value, [t.constraints[name] for name in learned]) for t, picks in scored]
        if self.base_score is not None and not learned:  # what the base has of a learned constraint is unknown
            finished.insert(0, (self.places.nothing, self.base_score, []))
        for picks, value, excesses in finished:
            constraints = dict(zip(learned, excesses, strict=True))
            if exceeded:
                constraints["exact"] = self._excess(picks)
            study.add_trial(
                create_trial(
                    value=value,
                    params=dict(self.places.params(picks)),
                    distributions=self.distributions(),
                    constraints=constraints,
                )
            )
        for picks in running:
            params = dict(self.places.params(picks))
            study.add_trial(create_trial(state=TrialState.RUNNING, params=params, distributions=self.distributions()))
        return study

    def _excess(self, picks: Picks) -> float:
        """The largest excess over any known limit, as a share of it; at most 0 for a candidate within all of them."""
        blocks = (self.places.count(picks) - self.places.limit) / max(1, self.places.limit)
        shares = [
            (float(budget.spent([picks])[0]) - budget.most) / (abs(budget.most) or 1.0)
            for budget in self.places.budgets.values()
        ]
        return max([blocks, *shares])


class _WithinBudgets(GPSampler):
    """GPSampler with another maximiser of the acquisition function.

    Args:
        places: the space with the budgets that are known.
        distributions: the space as Optuna has it.
        seed: of Optuna's random numbers.
        starts: untried candidates within the budgets, one at least.
        excluded: candidates that must not be chosen.
    """

    def __init__(
        self,
        places: Places,
        distributions: Mapping[str, BaseDistribution],
        seed: int,
        starts: Sequence[Picks],
        excluded: set[Picks],
    ) -> None:
        super().__init__(seed=seed, n_startup_trials=1)
        self._places = places
        self._distributions = distributions
        self._starts = starts
        self._excluded = excluded
        self._varied = [place for place, choices in enumerate(places.choices.values()) if len(choices) > 1]

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All places with more than one choice, in the order of the columns below."""
        names = list(self._places.choices)
        return {names[place]: self._distributions[names[place]] for place in self._varied}

    def _optimize_acqf(self, acqf: Any, best_params: Any) -> Any:
        """The best candidate of the local searches, as Optuna has categorical parameters: indices as floats."""

        def evaluated(candidates: Sequence[Picks]) -> np.ndarray[Any, Any]:
            return np.asarray(acqf.eval_acqf_no_grad(np.array(candidates, dtype=float)[:, self._varied]))

        value_S = evaluated(self._starts)
        peaks: list[tuple[float, Picks]] = []
        for index in np.argsort(-value_S, kind="stable")[:_LOCAL_SEARCHES]:
            value, picks = float(value_S[index]), self._starts[index]
            while neighbours := _feasible(self._places, self._places.neighbours(picks), self._excluded):
                value_M = evaluated(neighbours)
                best = int(np.argmax(value_M))
                if not value_M[best] > value:
                    break
                value, picks = float(value_M[best]), neighbours[best]
            peaks.append((value, picks))
        _, picks = max(peaks, key=lambda peak: peak[0])
        return np.array(picks, dtype=float)[self._varied]


def _feasible(places: Places, candidates: Iterable[Picks], excluded: set[Picks]) -> list[Picks]:
    """The untried candidates within the limit on blocks and within the known budgets."""
    return places.within([picks for picks in candidates if picks not in excluded], list(places.budgets.values()))
