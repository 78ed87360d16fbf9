"""A Gaussian process over candidates: learns the effect of each block at each place from few trained candidates.

The score of a candidate is modelled as the base's score, plus one effect for each of its blocks, plus a term in the
number of pairs of blocks (the fifth block brings less than the first), plus a residual that is correlated between
candidates that differ at few places. Effects are correlated too: all effects of one block with one set of options share
a component over all places, and so do all of one family of blocks and all of one place. So the kernel is a sum of
low-order kernels (Duvenaud, Nickisch and Rasmussen, "Additive Gaussian processes", NeurIPS 2011) and of one over all
places at once. The standard deviations of these components and of the noise are hyperparameters, which are sampled
from their posterior. Where a block has not been tried at a place yet, its own effect there has a heavy-tailed prior,
Student's t with one degree of freedom: a Gaussian whose standard deviation is sampled anew for each fit (West, "On
scale mixtures of normal distributions", Biometrika 74, 1987). So a single decisive block is found even where similar
blocks elsewhere had no effect.

Everything is Gaussian, so with N candidates all computation is linear algebra on N x N matrices, with N at most a few
hundred. A joint sample of all effects follows Matheron's rule (Wilson et al., "Efficiently sampling functions from
Gaussian process posteriors", ICML 2020, equation 9): a sample from the prior, corrected by its residuals on the data.

Shape letters in this file:  N candidates with scores, M candidates to predict, P places, E effects (one for each block
at each place), D settings of the hyperparameters, H hyperparameters.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy.linalg import cho_solve, solve_triangular

from attnsurgery.samplers.places import Floats, Picks, Places

_COMPONENTS = ("effect", "label", "family", "place", "pairs", "residual")
_LENGTH_SCALE = 2.0
"""Number of places at which candidates differ, over which the correlation of their residuals falls to 1/e."""
_WINSORIZED = 4.0
"""Scores lower than the median by more than this many robust standard deviations are raised to that value: a training
that diverged shows that a candidate is bad, and not how bad."""
_BASE_STD = 3.0
"""Prior standard deviation of the base's score, in standard deviations of the scores."""
_PRIOR_SAMPLES = 24
"""Number of samples from the prior of the hyperparameters; the Markov chain starts at the most probable one."""
_CHAIN_STEPS = 24
"""Number of Metropolis steps of that chain."""
_WINDOW = 64
"""Number of latest candidates that the hyperparameters are fitted to; the effects are fitted to all."""


@dataclass(frozen=True)
class Effects:
    """The additive part of the model: the posterior mean of it, or one posterior sample."""

    base: float
    """The score without any block."""
    values: tuple[Floats, ...]
    """By place, the effect of each choice; that of no block is 0."""
    by_count: Floats
    """The effect of having 0, 1, 2, ... blocks, in addition to the effects of the blocks."""


@dataclass(frozen=True)
class CrossValidation:
    """Leave-one-out cross-validation of the surrogate: each candidate is predicted from all others."""

    r2: float
    """Coefficient of determination: 1 is perfect, 0 is as good as the mean of the other scores."""
    reference_r2: float
    """As `r2`, for the reference model, which knows only at how many places candidates differ."""

    @property
    def is_bad(self) -> bool:
        """True if the reference model predicts clearly better."""
        return self.reference_r2 > max(0.0, self.r2) + 0.2


class Surrogate:
    """The prior: how scores of candidates depend on the choice at each place.

    Args:
        places: the space; labels that are equal up to a bracket are one family of blocks.
        costs: costs are modelled in place of scores: purely additive, and almost without noise.
    """

    def __init__(self, places: Places, costs: bool = False) -> None:
        self.costs = costs
        self._places = places
        labels = list(places.choices.values())
        self._offsets = np.cumsum([0, *(len(choices) - 1 for choices in labels)])
        names = [(place, label) for place, choices in enumerate(labels) for label in choices[1:]]
        groups: dict[str, list[Any]] = {
            "label": [label for _, label in names],
            "family": [label.partition("(")[0] for _, label in names],
            "place": [place for place, _ in names],
        }
        self.loadings = {"effect": np.eye(len(names))}
        """By component, the matrix from its independent variables to the effects, (E, variables)."""
        for component, keys in groups.items():
            column = {key: index for index, key in enumerate(dict.fromkeys(keys))}
            self.loadings[component] = np.eye(len(column))[[column[key] for key in keys]]
        max_blocks = sum(places.weights)
        counts = np.arange(max_blocks + 1)
        self.by_count = float(not costs) * counts * (counts - 1) / 2 / max(1.0, max_blocks / 2)
        """By number of blocks, the number of pairs, scaled to the order of one."""

    def features(self, candidates: Sequence[Picks]) -> Features:
        """Candidates as rows of numbers."""
        return Features(self, np.asarray(candidates, dtype=np.int64).reshape(len(candidates), len(self._offsets) - 1))

    def fit(self, candidates: Sequence[Picks], scores: Sequence[float], rng: np.random.Generator) -> Posterior:
        """The posterior given scores, with hyperparameters sampled from theirs."""
        return Posterior(self, candidates, scores, rng)


class Features:
    """Candidates as rows of numbers.

    Args:
        picks_NP: the choice at each place.
    """

    def __init__(self, surrogate: Surrogate, picks_NP: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        self._surrogate = surrogate
        self.picks_NP = picks_NP
        offsets = surrogate._offsets
        self.effects_NE = np.zeros((len(picks_NP), int(offsets[-1])))
        rows, places = np.nonzero(picks_NP)
        self.effects_NE[rows, offsets[places] + picks_NP[rows, places] - 1] = 1.0
        self.pairs_N = surrogate.by_count[(picks_NP > 0) @ np.asarray(surrogate._places.weights)]

    def grams(self, other: Features, loadings: Mapping[str, Floats]) -> dict[str, Floats]:
        """By component, the kernel matrix with other candidates for a standard deviation of 1, (N, M)."""
        grams = {
            component: (self.effects_NE @ loading) @ (other.effects_NE @ loading).T
            for component, loading in loadings.items()
        }
        grams["pairs"] = np.outer(self.pairs_N, other.pairs_N)
        if not self._surrogate.costs:
            grams["residual"] = np.exp(-self.hamming(other) / _LENGTH_SCALE)
        return grams

    def hamming(self, other: Features) -> Floats:
        """Hamming distance: the number of places at which candidates differ, (N, M)."""
        both_empty = (self.picks_NP == 0).astype(float) @ (other.picks_NP == 0).T
        same_block = self.effects_NE @ other.effects_NE.T
        return np.asarray(self.picks_NP.shape[1] - both_empty - same_block)


class Posterior:
    """The posterior of a surrogate given scores.

    Args:
        surrogate: the prior.
        candidates: those with scores, N of them.
        scores: their scores, larger is better, or their costs.
        rng: for the hyperparameters.
    """

    def __init__(
        self, surrogate: Surrogate, candidates: Sequence[Picks], scores: Sequence[float], rng: np.random.Generator
    ) -> None:
        self._surrogate = surrogate
        y_N = np.asarray(scores, dtype=float)
        if not surrogate.costs:
            median = np.median(y_N)
            robust_std = 1.4826 * np.median(np.abs(y_N - median)) or float(y_N.std()) or 1e-6
            y_N = np.maximum(y_N, median - _WINSORIZED * robust_std)
        self.scale = float(y_N.std()) or 1e-6
        self._mean = float(y_N.mean())
        self._y_N = (y_N - self._mean) / self.scale
        self._data = surrogate.features(candidates)
        self._loadings = dict(surrogate.loadings)
        if not surrogate.costs:
            tails_E = 1.0 / np.abs(rng.standard_normal(self._data.effects_NE.shape[1]))
            self._loadings["effect"] = np.diag(np.where(self._data.effects_NE.any(axis=0), 1.0, tails_E))
        self._grams = self._data.grams(self._data, self._loadings)
        self._components = [component for component in _COMPONENTS if component in self._grams]
        mean_blocks = max(1.0, float(self._data.effects_NE.sum(axis=1).mean()))
        prior_stds = {"effect": 0.6, "residual": 0.4 * np.sqrt(mean_blocks)}
        self._prior_mean_H = np.log(
            [prior_stds.get(component, 0.4) / np.sqrt(mean_blocks) for component in self._components] + [0.5]
        )
        if surrogate.costs:
            self._prior_mean_H[-1] = np.log(0.02)
        *stds, self._noise = np.exp(self._sample_log_stds(rng)).tolist()
        self._stds = dict(zip(self._components, stds, strict=True))
        self._kernel_NN = self._kernel(np.array([*stds, self._noise]))
        self._lower_NN = np.linalg.cholesky(self._kernel_NN)
        self._weights_N = self._solve(self._y_N)

    def predict(self, candidates: Sequence[Picks]) -> tuple[Floats, Floats]:
        """Posterior mean and standard deviation of the scores of candidates, without noise, each (M,)."""
        features = self._surrogate.features(candidates)
        cross_MN = np.full((len(candidates), len(self._y_N)), _BASE_STD**2)
        for component, gram_MN in features.grams(self._data, self._loadings).items():
            cross_MN += self._stds[component] ** 2 * gram_MN
        prior_M = _BASE_STD**2 + (self._stds["pairs"] * features.pairs_N) ** 2 + self._stds.get("residual", 0.0) ** 2
        for component, loading in self._loadings.items():
            prior_M = prior_M + self._stds[component] ** 2 * ((features.effects_NE @ loading) ** 2).sum(axis=1)
        white_NM = solve_triangular(self._lower_NN, cross_MN.T, lower=True, check_finite=False)
        std_M = np.sqrt(np.maximum(prior_M - (white_NM**2).sum(axis=0), 1e-12))
        return self._mean + self.scale * (cross_MN @ self._weights_N), self.scale * std_M

    def sample_effects(self, rng: np.random.Generator) -> Effects:
        """A sample of all effects from their joint posterior."""
        theta_E = np.zeros(self._data.effects_NE.shape[1])
        for component, loading in self._loadings.items():
            theta_E = theta_E + self._stds[component] * (loading @ rng.standard_normal(loading.shape[1]))
        pairs = self._stds["pairs"] * rng.standard_normal()
        base = _BASE_STD * rng.standard_normal()
        scores_N = base + self._data.effects_NE @ theta_E + pairs * self._data.pairs_N
        scores_N = scores_N + self._residual_lower_NN @ rng.standard_normal(len(self._y_N))
        return self._conditioned(base, theta_E, pairs, scores_N)

    def mean_effects(self) -> Effects:
        """The posterior mean of all effects."""
        zero_E, zero_N = np.zeros(self._data.effects_NE.shape[1]), np.zeros(len(self._y_N))
        return self._conditioned(0.0, zero_E, 0.0, zero_N)

    def leave_one_out_errors(self) -> Floats:
        """Each score minus its prediction from all others, (N,)."""
        return self.scale * _leave_one_out_errors(self._kernel_NN, self._y_N)

    def cross_validation(self) -> CrossValidation:
        """Leave-one-out cross-validation on the latest candidates."""
        latest = slice(-_WINDOW, None)
        y_N = self._y_N[latest] - self._y_N[latest].mean()
        from_mean_N = y_N * len(y_N) / max(1, len(y_N) - 1)  # errors of predicting the mean of the others

        def r2(kernel_NN: Floats) -> float:
            errors_N = _leave_one_out_errors(kernel_NN, y_N)
            return 1.0 - float(errors_N @ errors_N) / max(float(from_mean_N @ from_mean_N), 1e-12)

        hamming_NN = self._data.hamming(self._data)[latest, latest]
        reference = [
            r2(np.exp(-hamming_NN / length_scale) + _BASE_STD**2 + noise**2 * np.eye(len(y_N)))
            for length_scale in (0.5, 1.0, 2.0, 4.0)
            for noise in (0.1, 0.3, 0.7)
        ]
        return CrossValidation(r2(self._kernel_NN[latest, latest]), max(reference))

    @cached_property
    def _latest_grams(self) -> dict[str, Floats]:
        """The kernel matrices of the candidates that the hyperparameters are fitted to."""
        return {name: np.ascontiguousarray(gram[-_WINDOW:, -_WINDOW:]) for name, gram in self._grams.items()}

    @cached_property
    def _residual_lower_NN(self) -> Floats:
        """Cholesky factor of the covariance of residual and noise, the part that is not additive."""
        residual_NN = (self._noise**2 + 1e-6) * np.eye(len(self._y_N))
        if "residual" in self._grams:
            residual_NN += self._stds["residual"] ** 2 * self._grams["residual"]
        return np.linalg.cholesky(residual_NN)

    def _conditioned(self, base: float, theta_E: Floats, pairs: float, scores_N: Floats) -> Effects:
        """Matheron's rule: a prior sample of effects and scores, moved by the residuals of these scores."""
        weights_N = self._solve(self._y_N - scores_N)
        pull_E = self._data.effects_NE.T @ weights_N
        for component, loading in self._loadings.items():
            theta_E = theta_E + self._stds[component] ** 2 * (loading @ (loading.T @ pull_E))
        pairs += self._stds["pairs"] ** 2 * float(self._data.pairs_N @ weights_N)
        base += _BASE_STD**2 * float(weights_N.sum())
        values = tuple(
            np.concatenate([[0.0], theta_E[start:end]]) * self.scale
            for start, end in itertools.pairwise(self._surrogate._offsets)
        )
        return Effects(self._mean + base * self.scale, values, self._surrogate.by_count * pairs * self.scale)

    def _solve(self, y_N: Floats) -> Floats:
        """The inverse of the kernel matrix times a vector."""
        return np.asarray(cho_solve((self._lower_NN, True), y_N, check_finite=False))

    def _kernel(self, stds_H: Floats) -> Floats:
        """The covariance of all scores for these standard deviations of components and noise, (N, N)."""
        return np.asarray(self._kernels(stds_H[None], self._grams)[0])

    def _kernels(self, stds_DH: Floats, grams: Mapping[str, Floats]) -> Floats:
        """Covariances of scores for several settings of the standard deviations, (D, N, N)."""
        kernel_DNN: Floats = np.full((len(stds_DH), *grams["effect"].shape), _BASE_STD**2)
        for name, std_D in zip(self._components, stds_DH[:, :-1].T, strict=True):
            kernel_DNN += (std_D**2)[:, None, None] * grams[name]
        diagonal = np.arange(kernel_DNN.shape[1])
        kernel_DNN[:, diagonal, diagonal] += (stds_DH[:, -1] ** 2 + 1e-6)[:, None]
        return kernel_DNN

    def _log_posterior(self, log_stds_DH: Floats) -> Floats:
        """Log posterior density of the hyperparameters, up to a constant, (D,)."""
        kernel_DNN = self._kernels(np.exp(log_stds_DH), self._latest_grams)
        try:
            lower_DNN = np.linalg.cholesky(kernel_DNN)
        except np.linalg.LinAlgError:  # one of the settings is singular
            if len(kernel_DNN) == 1:
                return np.array([-np.inf])
            return np.concatenate([self._log_posterior(log_stds_H[None]) for log_stds_H in log_stds_DH])
        log_prior_D = -0.5 * ((log_stds_DH - self._prior_mean_H) ** 2).sum(axis=1)
        y_N = self._y_N[-_WINDOW:]
        white_DN = np.array([solve_triangular(lower, y_N, lower=True, check_finite=False) for lower in lower_DNN])
        half_log_det_D = np.log(np.diagonal(lower_DNN, axis1=1, axis2=2)).sum(axis=1)
        return np.asarray(log_prior_D - 0.5 * (white_DN**2).sum(axis=1) - half_log_det_D)

    def _sample_log_stds(self, rng: np.random.Generator) -> Floats:
        """Log standard deviations of components and noise: the last state of a short Metropolis chain, (H,).

        It starts at the most probable of some samples from the prior.
        """
        starts_DH = self._prior_mean_H + rng.standard_normal((_PRIOR_SAMPLES, len(self._prior_mean_H)))
        densities_D = self._log_posterior(starts_DH)
        state_H: Floats = starts_DH[int(np.argmax(densities_D))]
        density = float(densities_D.max())
        for _ in range(0 if self._surrogate.costs else _CHAIN_STEPS):
            proposal_H = state_H + 0.35 * rng.standard_normal(len(state_H))
            proposed_density = float(self._log_posterior(proposal_H[None])[0])
            if np.log(rng.random()) < proposed_density - density:
                state_H, density = proposal_H, proposed_density
        return state_H


def _leave_one_out_errors(kernel_NN: Floats, y_N: Floats) -> Floats:
    """Leave-one-out errors in closed form (Rasmussen and Williams, "Gaussian processes for machine learning", 2006,
    equation 5.12)."""
    inverse_NN = np.linalg.inv(kernel_NN)
    return np.asarray((inverse_NN @ y_N) / np.diag(inverse_NN))
