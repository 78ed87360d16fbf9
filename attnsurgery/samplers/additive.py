"""Bayesian optimisation over places within exact budgets: the sampler for searches that can train few candidates.

For each choice, a Gaussian process (attnsurgery.samplers.surrogate) is fitted to the ranks of the trained candidates,
candidates are generated, and the acquisition function is evaluated on all of them. It is the expected improvement over
the best score within the budgets (Jones, Schonlau and Welch, "Efficient global optimization of expensive black-box
functions", 1998, equation 15), plus a small weight times the expected improvement over the best score at every lower
cost, which improves the whole front of score and cost.

Generated are the maximisers of several posterior samples of the effects (Thompson sampling), each found exactly by a
knapsack among the untried candidates within every budget; then the neighbours of the best candidates, which differ at
one place, for what a sum of effects cannot express; and some random ones. Running trials count as tried, so several
candidates may be chosen in parallel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from scipy.special import ndtr, ndtri

from attnsurgery.samplers._base import AGAIN, BLOCKS, SAMPLERS, Sampler
from attnsurgery.samplers.knapsack import best, random_candidate
from attnsurgery.samplers.places import Budget, Floats, Picks, Places
from attnsurgery.samplers.surrogate import CrossValidation, Posterior, Surrogate
from attnsurgery.samplers.threads import on_one_thread

_POSTERIOR_SAMPLES = 8
"""Number of knapsacks, one for each posterior sample; every other one has a random share of the budgets."""
_LEADERS = 4
"""Number of best candidates whose neighbours are generated."""
_RANDOM = 32
"""Number of random candidates that are generated."""
_FRONT_WEIGHT = 0.2
"""Weight of the expected improvement at every lower cost, relative to that of the best score."""
_VALIDATED = 16
"""Number of scores above which the surrogate is cross-validated."""
_LARGEST_TOLERANCE = 0.05
"""A predicted cost may exceed its limit by the usual error of predictions, and at most by this share of the base's:
measuring a candidate that is over the budget costs little, never to try the best one costs the search its result."""


@SAMPLERS.register("additive")
class AdditiveSampler(Sampler):
    """Bayesian optimisation with mostly additive effects, and an exact knapsack over all constraints of the study.

    Constraints (`trial.set_constraint`) that are no known budget of the places are learned as additive costs from
    finished trials of any state: a pruned trial that was only measured contributes its costs.

    Args:
        places: the space; the study's parameters are its places, categorical.
        seed: of this choice.
        base_score: score of the candidate without any block, or None where it is unknown.
    """

    def __init__(self, places: Places, seed: int, base_score: float | None = None) -> None:
        super().__init__(places, seed, base_score)
        self._surrogate = Surrogate(places)
        self._cost_surrogate = Surrogate(places, costs=True)
        self._fallback = TPESampler(seed=seed)
        self.cross_validation: CrossValidation | None = None
        """How well the surrogate predicts, as of the last choice; None while there are too few scores."""

    @on_one_thread
    def choose(self, direction: StudyDirection, trials: Sequence[FrozenTrial]) -> Mapping[str, str] | None:
        """The candidate with the largest acquisition function; None where none is left, or TPE is to choose.

        `fell_back` is True where TPE is to choose, because a much simpler model predicts better than the surrogate.
        """
        rng = np.random.default_rng(self.seed)
        known = [(t, picks) for t in trials if (picks := self.places.picks(t.params)) is not None]
        excluded = {picks for t, picks in known if not t.user_attrs.get(AGAIN)}
        excluded.add(self.places.nothing)
        sign = -1.0 if direction == StudyDirection.MINIMIZE else 1.0
        scored = [(picks, sign * float(t.value)) for t, picks in known if t.value is not None]
        if self.base_score is not None:
            scored.insert(0, (self.places.nothing, sign * self.base_score))
        picks = self._next(rng, scored, self._all_budgets(rng, known), excluded)
        return None if picks is None else self.places.params(picks)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """The choice at one place by TPE."""
        return self._fallback.sample_independent(study, trial, param_name, param_distribution)

    def _next(
        self,
        rng: np.random.Generator,
        scored: Sequence[tuple[Picks, float]],
        budgets: Sequence[Budget],
        excluded: set[Picks],
    ) -> Picks | None:
        if len(scored) < 2:
            return random_candidate(self.places, rng, budgets, excluded)
        posterior = self._fitted(rng, [picks for picks, _ in scored], [score for _, score in scored])
        if posterior is None:
            self.fell_back = True
            return None
        evaluated = list(dict.fromkeys([self.places.nothing, *(picks for picks, _ in scored)]))
        mean_K, _ = posterior.predict(evaluated)
        leaders = [evaluated[index] for index in np.argsort(-mean_K)[:_LEADERS]]
        candidates = self._candidates(rng, posterior, leaders, budgets, excluded)
        if not candidates:
            return None
        mean_M, std_M = posterior.predict(candidates)
        front = _Front(_relative_cost(evaluated, budgets), mean_K)
        acquisition_M = front.acquisition(mean_M, std_M, _relative_cost(candidates, budgets))
        return candidates[int(np.argmax(acquisition_M))]

    def _fitted(
        self, rng: np.random.Generator, candidates: Sequence[Picks], scores: Sequence[float]
    ) -> Posterior | None:
        """The surrogate, fitted to the ranks of the scores, or to the scores where it predicts their ranks badly; None
        where it predicts neither well."""
        for values in (normal_scores(scores), scores):
            posterior = self._surrogate.fit(candidates, values, rng)
            self.cross_validation = posterior.cross_validation() if len(scores) > _VALIDATED else None
            if self.cross_validation is None or not self.cross_validation.is_bad:
                return posterior
        return None

    def _candidates(
        self,
        rng: np.random.Generator,
        posterior: Posterior,
        leaders: Sequence[Picks],
        budgets: Sequence[Budget],
        excluded: set[Picks],
    ) -> list[Picks]:
        """Untried candidates within all budgets, each once, on which the acquisition function is evaluated."""
        candidates: dict[Picks, None] = {}
        for number in range(_POSTERIOR_SAMPLES):
            effects = posterior.sample_effects(rng)
            share = rng.random() if number % 2 else 1.0
            reduced = [
                replace(budget, most=budget.most * share if budget.most > 0 else budget.most) for budget in budgets
            ]
            picks = best(self.places, effects.values, effects.by_count, reduced, excluded)
            if picks is None and share < 1.0:
                picks = best(self.places, effects.values, effects.by_count, budgets, excluded)
            if picks is None:
                break  # no candidate is left within the budgets
            candidates[picks] = None
        neighbours = [picks for leader in leaders for picks in self.places.neighbours(leader)]
        random = [self.places.at_random(rng) for _ in range(_RANDOM)]
        untried = [picks for picks in (*neighbours, *random) if picks not in excluded]
        return list(candidates | dict.fromkeys(self.places.within(untried, budgets)))

    def _all_budgets(self, rng: np.random.Generator, known: Sequence[tuple[FrozenTrial, Picks]]) -> list[Budget]:
        """The known budgets, then by name the other constraints as additive costs, learned from trials."""
        measured: dict[str, list[tuple[Picks, float]]] = {}
        for t, picks in known:
            if t.state is not TrialState.RUNNING:
                for name in t.constraints.keys() - {BLOCKS, *self.places.budgets}:
                    measured.setdefault(name, []).append((picks, t.constraints[name]))
        budgets = list(self.places.budgets.values())
        for name in sorted(measured):
            if len(measured[name]) >= 2:
                candidates, excesses = zip(*measured[name], strict=True)
                posterior = self._cost_surrogate.fit(candidates, excesses, rng)
                mean = posterior.mean_effects()
                rmse = float(np.sqrt(np.mean(posterior.leave_one_out_errors() ** 2)))
                tolerance = min(rmse, _LARGEST_TOLERANCE * abs(mean.base))
                budgets.append(Budget(mean.values, tolerance - mean.base))
        return budgets


def normal_scores(scores: Sequence[float]) -> list[float]:
    """The quantiles of a normal distribution at the ranks of scores; equal scores get equal ones.

    Effects add up worse the nearer scores are to their ceiling: where one block takes a network from 50 to 97 %, no
    second one adds as much. On the scale of ranks one score cannot outweigh all others, and small differences among the
    best remain visible. Salinas, Shen and Perrone do this for other surrogates ("A quantile-based approach for
    hyperparameter transfer learning", ICML 2020).

    Example:
        >>> [round(score, 2) for score in normal_scores([0.5, 0.97, 0.99])]
        [-0.97, 0.0, 0.97]
    """
    _, index_N, count_U = np.unique(scores, return_inverse=True, return_counts=True)
    below_U = np.cumsum(count_U) - count_U / 2
    return [float(score) for score in ndtri(below_U / len(scores))[index_N]]


class _Front:
    """The Pareto front of score and cost: the best score at every cost.

    Shape letters: K evaluated candidates, M candidates to choose from, S steps of the front.

    Args:
        cost_K: largest share of any budget that each evaluated candidate takes.
        score_K: their scores.
    """

    def __init__(self, cost_K: Floats, score_K: Floats) -> None:
        order = np.lexsort((-score_K, cost_K))
        best_K = np.maximum.accumulate(score_K[order])
        rises = np.append(True, best_K[1:] > best_K[:-1])
        self._best_S = best_K[rises]
        self._from_S = np.clip(cost_K[order][rises], 0.0, 1.0)
        self._to_S = np.append(self._from_S[1:], 1.0)

    def acquisition(self, mean_M: Floats, std_M: Floats, cost_M: Floats) -> Floats:
        """The expected improvement over the best score, plus a weight times the same integrated over the front.

        The integral is over all costs from the candidate's own to the whole budget.
        """
        improvement_MS = _expected_improvement(mean_M[:, None], std_M[:, None], self._best_S)
        width_MS = np.maximum(0.0, self._to_S - np.maximum(self._from_S, cost_M[:, None]))
        return np.asarray(improvement_MS[:, -1] + _FRONT_WEIGHT * (width_MS * improvement_MS).sum(axis=1))


def _expected_improvement(mean: Floats, std: Floats, incumbent: Floats) -> Floats:
    """The expectation of max(0, score - incumbent) for a Gaussian score."""
    z = (mean - incumbent) / std
    return np.asarray(std * (z * ndtr(z) + np.exp(-0.5 * z**2) / np.sqrt(2.0 * np.pi)))


def _relative_cost(candidates: Sequence[Picks], budgets: Sequence[Budget]) -> Floats:
    """The largest share of any budget that each candidate takes, (M,)."""
    shares = [budget.spent(candidates) / budget.most for budget in budgets if budget.most > 0]
    return np.max(shares, axis=0) if shares else np.zeros(len(candidates))
