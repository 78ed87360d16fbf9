"""Bayesian optimisation over places, with exact budgets: what a search needs that can train only a few candidates.

Each ask fits a Gaussian process to what was trained (attnsurgery.samplers.surrogate), proposes candidates, and takes
the one that promises most: the expected improvement of the best candidate within the budgets (Jones, Schonlau and
Welch, "Efficient global optimization of expensive black-box functions", 1998, equation 15), plus a small share of the
same for the best at every smaller expense, so that the whole front comes along.

Proposed are the best candidates of several draws of what each block is worth, each found exactly among those that keep
to every budget and were not tried yet; then all that differ from the best ones at one place, for what a sum of effects
cannot tell; and some at random. Several may be asked at a time: candidates that still run are not asked for again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from scipy.special import ndtr

from attnsurgery.samplers._base import AGAIN, BLOCKS, SAMPLERS
from attnsurgery.samplers.knapsack import best
from attnsurgery.samplers.places import Budget, Floats, Picks, Places
from attnsurgery.samplers.surrogate import Fit, Posterior, Surrogate
from attnsurgery.samplers.threads import on_one_thread

_DRAWS = 8
"""So many knapsacks, every other one within a part of the budgets."""
_BEST = 4
"""So many of the best have their neighbours proposed."""
_RANDOM = 32
_FRONT = 0.2
"""What an improvement at every smaller expense counts, beside that of the best."""
_JUDGED = 16
"""From so many trained candidates on the surrogate is asked whether it fits."""
_SLACK = 0.05
"""A cost that is only guessed may be over its limit by what guesses are usually off, and never by more than this share:
measuring one that is over costs little, to leave the best one out costs the search."""


@SAMPLERS.register("additive")
class AdditiveSampler(BaseSampler):
    """Bayesian optimisation with effects that mostly add up, and an exact knapsack over all constraints of the study.

    Constraints (`trial.set_constraint`) that are no known budget of the places are learned as scores are, from trials
    that finished with any state: a pruned trial that was only measured teaches its costs.

    Args:
        places: the space; the study's parameters are its places, categorical.
        seed: of this sampler; for the same study, the same seed asks for the same candidate.
        base_score: the score without any block, if known.
    """

    def __init__(self, places: Places, seed: int, base_score: float | None = None) -> None:
        self._places = places
        self._seed = seed
        self._base_score = base_score
        self._surrogate = Surrogate(places)
        self._costs = Surrogate(places, costs=True)
        self._nothing: Picks = (0,) * len(places.choices)
        self._other = TPESampler(seed=seed)
        self.fit: Fit | None = None
        """How well the surrogate foretells, as of the last ask; None before there are enough."""
        self.fell_back = False
        """True if that was so badly that TPE was asked in its place."""

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {name: optuna.distributions.CategoricalDistribution(c) for name, c in self._places.choices.items()}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        trials = study.get_trials(deepcopy=False)
        return self.choose(study.direction, [t for t in trials if t.number != trial.number])

    @on_one_thread
    def choose(self, direction: StudyDirection, trials: Sequence[FrozenTrial]) -> dict[str, str]:
        """What to try next, without a trial to try it in; nothing where every place is to be asked for by itself.

        Args:
            direction: of the study.
            trials: all that it has.
        """
        rng = np.random.default_rng(self._seed)
        asked = {t.number: picks for t in trials if (picks := self._places.picks(t.params)) is not None}
        tried = {asked[t.number] for t in trials if t.number in asked and not t.user_attrs.get(AGAIN)}
        tried.add(self._nothing)
        sign = -1.0 if direction == StudyDirection.MINIMIZE else 1.0
        scored = [(asked[t.number], sign * float(t.value)) for t in trials if t.number in asked and t.value is not None]
        if self._base_score is not None:
            scored.insert(0, (self._nothing, sign * self._base_score))
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
        told = self._surrogate.told([picks for picks, _ in scored], [score for _, score in scored], rng)
        self.fit = told.fit() if len(scored) > _JUDGED else None
        if self.fit is not None and self.fit.is_bad:
            self.fell_back = True
            return None  # then every place is asked of TPE by itself
        known = list(dict.fromkeys([self._nothing, *(picks for picks, _ in scored)]))
        expected_K, _ = told.foretell(known)
        leaders = [known[index] for index in np.argsort(-expected_K)[:_BEST]]
        proposed = self._proposed(rng, told, leaders, budgets, tried)
        if not proposed:
            return None
        mean_M, spread_M = told.foretell(proposed)
        front = _Front(_expense(known, budgets), expected_K)
        promise_M = front.promise(mean_M, spread_M, _expense(proposed, budgets))
        return proposed[int(np.argmax(promise_M))]

    def _proposed(
        self,
        rng: np.random.Generator,
        told: Posterior,
        leaders: Sequence[Picks],
        budgets: Sequence[Budget],
        tried: set[Picks],
    ) -> list[Picks]:
        """Candidates that hold and were not tried, each once."""
        found: dict[Picks, None] = {}
        for number in range(_DRAWS):
            effects = told.draw(rng)
            share = rng.random() if number % 2 else 1.0
            smaller = [
                replace(budget, most=budget.most * share if budget.most > 0 else budget.most) for budget in budgets
            ]
            picks = best(self._places, effects.values, effects.by_count, smaller, tried)
            if picks is None and share < 1.0:
                picks = best(self._places, effects.values, effects.by_count, budgets, tried)
            if picks is None:
                break  # nothing is left at all
            found[picks] = None
        neighbours = (picks for leader in leaders for picks in self._neighbours(leader))
        random = (self._places.at_random(rng) for _ in range(_RANDOM))
        for some in (neighbours, random):
            found.update(dict.fromkeys(self._holding(some, budgets, tried)))
        return list(found)

    def _neighbours(self, picks: Picks) -> Iterable[Picks]:
        for place, choices in enumerate(self._places.choices.values()):
            for choice in range(len(choices)):
                if choice != picks[place]:
                    yield (*picks[:place], choice, *picks[place + 1 :])

    def _holding(self, some: Iterable[Picks], budgets: Sequence[Budget], tried: set[Picks]) -> list[Picks]:
        fresh = [picks for picks in some if picks not in tried and self._places.count(picks) <= self._places.limit]
        within_M = np.ones(len(fresh), dtype=bool)
        for budget in budgets:
            within_M &= budget.spent(fresh) <= budget.most
        return [picks for picks, within in zip(fresh, within_M.tolist(), strict=True) if within]

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
        for name in sorted(known):
            if len(known[name]) >= 2:
                told = self._costs.told([picks for picks, _ in known[name]], [cost for _, cost in known[name]], rng)
                mean = told.mean()
                slack = min(float(np.sqrt(np.mean(told.errors() ** 2))), _SLACK * abs(mean.base))
                budgets.append(Budget(mean.values, slack - mean.base))
        return budgets


class _Front:
    """The best that is known at every expense.

    Args:
        expense_K: of the known candidates, as a share of the budgets.
        expected_K: their scores.
    """

    def __init__(self, expense_K: Floats, expected_K: Floats) -> None:
        order = np.lexsort((-expected_K, expense_K))
        best_K = np.maximum.accumulate(expected_K[order])
        risen = np.append(True, best_K[1:] > best_K[:-1])
        self._best_S = best_K[risen]
        self._from_S = np.clip(expense_K[order][risen], 0.0, 1.0)
        self._to_S = np.append(self._from_S[1:], 1.0)

    def promise(self, mean_M: Floats, spread_M: Floats, expense_M: Floats) -> Floats:
        """The expected improvement of the best, and of the front, over all expenses from a candidate's own on."""
        improvement_MS = _improvement(mean_M[:, None], spread_M[:, None], self._best_S)
        width_MS = np.maximum(0.0, self._to_S - np.maximum(self._from_S, expense_M[:, None]))
        return np.asarray(improvement_MS[:, -1] + _FRONT * (width_MS * improvement_MS).sum(axis=1))


def _improvement(mean: Floats, spread: Floats, best: Floats) -> Floats:
    """Expected, over `best`."""
    ahead = (mean - best) / spread
    return np.asarray(spread * (ahead * ndtr(ahead) + np.exp(-0.5 * ahead**2) / np.sqrt(2.0 * np.pi)))


def _expense(candidates: Sequence[Picks], budgets: Sequence[Budget]) -> Floats:
    """Of each candidate: the share of the budgets that it takes, of that which it takes most of."""
    shares = [budget.spent(candidates) / budget.most for budget in budgets if budget.most > 0]
    return np.max(shares, axis=0) if shares else np.zeros(len(candidates))
