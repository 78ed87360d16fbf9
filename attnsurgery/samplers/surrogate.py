"""What each block at each place is worth, learned from few trained candidates: a Gaussian process over candidates.

The score of a candidate is taken as the base's score plus one effect for each block in it, plus a term for pairs of
blocks, which tells that the fifth block brings less than the first, plus something of the candidate's own, shared with
those that differ at few places. Effects are not strangers to each other: those of one block and option share a part
over all places, so do those of one family of blocks, and those of one place. So the kernel is a sum of low-order ones
(Duvenaud, Nickisch and Rasmussen, "Additive Gaussian processes", NeurIPS 2011) and of one over all places at once. How
large each of these parts is, and how large the noise, is unknown too, and drawn from its posterior. Where a block has
not been tried at a place yet, its own effect there may also be far larger than all that were seen: it is from Student's
t with one degree of freedom, a Gaussian whose deviation is drawn anew for each ask (West, "On scale mixtures of normal
distributions", Biometrika 74, 1987). So the one block that decides everything is found, also where its like elsewhere
did nothing.

All is Gaussian, so with N candidates everything is algebra on N x N matrices, at most a few hundred wide. A draw of all
effects at once follows Matheron's rule (Wilson et al., "Efficiently sampling functions from Gaussian process
posteriors", ICML 2020, equation 9): a draw from the prior, corrected by what it misses of the data.
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

_PARTS = ("effect", "label", "family", "place", "pairs", "own")
_REACH = 2.0
"""Places at which candidates differ, over which what they have of their own falls to 1/e."""
_FAR = 4.0
"""Scores this many times the usual deviation below the middle are taken as no lower: a training that broke down says
that a candidate is bad, and nothing about how bad."""
_BASE = 3.0
"""How far the base may be from the middle of all scores, in their deviations, before it is known."""
_PRIOR_DRAWS = 24
_STEPS = 24
_ENOUGH = 64
"""Candidates, the last ones, that say how large parts and noise are; the effects are learned from all."""


@dataclass(frozen=True)
class Effects:
    """What adds up: one draw from the posterior, or its mean."""

    base: float
    """The score without any block."""
    values: tuple[Floats, ...]
    """What each choice at each place adds to it; 0 for no block."""
    by_count: Floats
    """Worth of having so many blocks, beside their own values."""


@dataclass(frozen=True)
class Fit:
    """How well the surrogate foretells candidates that it was not told, each from all others."""

    explained: float
    """1 less the squared error by that of the mean of the others: 1 is perfect, 0 is no better than that mean."""
    otherwise: float
    """The same of a model that knows nothing but at how many places candidates differ."""

    @property
    def is_bad(self) -> bool:
        """True if that model is clearly the better one."""
        return self.otherwise > max(0.0, self.explained) + 0.2


class Surrogate:
    """Scores of candidates by what stands at each place.

    Args:
        places: blocks are of one family if their labels are the same up to a bracket.
        costs: what is foretold is a cost and no score: it adds up, and has hardly any noise.
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
        self.shares = {"effect": np.eye(len(names))}
        """By part which effects (E rows) have which of its unknowns in them."""
        for part, keys in groups.items():
            column = {key: at for at, key in enumerate(dict.fromkeys(keys))}
            self.shares[part] = np.eye(len(column))[[column[key] for key in keys]]
        most = sum(places.weights)
        counts = np.arange(most + 1)
        self.by_count = float(not costs) * counts * (counts - 1) / 2 / max(1.0, most / 2)
        """Pairs of blocks among so many, of the order of one."""

    def features(self, candidates: Sequence[Picks]) -> Features:
        return Features(self, np.asarray(candidates, dtype=np.int64).reshape(len(candidates), len(self._offsets) - 1))

    def told(self, candidates: Sequence[Picks], scores: Sequence[float], rng: np.random.Generator) -> Posterior:
        """The surrogate with what is known, and the sizes of its parts drawn from their posterior."""
        return Posterior(self, candidates, scores, rng)


class Features:
    """Candidates as a surrogate sees them.

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

    def grams(self, other: Features, shares: Mapping[str, Floats]) -> dict[str, Floats]:
        """By part how candidates vary together with others, (N, M), for a size of 1."""
        grams = {part: (self.effects_NE @ share) @ (other.effects_NE @ share).T for part, share in shares.items()}
        grams["pairs"] = np.outer(self.pairs_N, other.pairs_N)
        if not self._surrogate.costs:
            grams["own"] = np.exp(-self.differ(other) / _REACH)
        return grams

    def differ(self, other: Features) -> Floats:
        """At how many places: (N, M)."""
        kept = [(self.picks_NP == 0).astype(float) @ (other.picks_NP == 0).T, self.effects_NE @ other.effects_NE.T]
        return np.asarray(self.picks_NP.shape[1] - kept[0] - kept[1])


class Posterior:
    """A surrogate and its data."""

    def __init__(
        self, surrogate: Surrogate, candidates: Sequence[Picks], scores: Sequence[float], rng: np.random.Generator
    ) -> None:
        self._surrogate = surrogate
        y_N = np.asarray(scores, dtype=float)
        if not surrogate.costs:
            middle = np.median(y_N)
            usual = 1.4826 * np.median(np.abs(y_N - middle)) or float(y_N.std()) or 1e-6
            y_N = np.maximum(y_N, middle - _FAR * usual)
        self.scale = float(y_N.std()) or 1e-6
        self._middle = float(y_N.mean())
        self._y_N = (y_N - self._middle) / self.scale
        self._data = surrogate.features(candidates)
        self._shares = dict(surrogate.shares)
        if not surrogate.costs:
            tails_E = 1.0 / np.abs(rng.standard_normal(self._data.effects_NE.shape[1]))
            self._shares["effect"] = np.diag(np.where(self._data.effects_NE.any(axis=0), 1.0, tails_E))
        self._grams = self._data.grams(self._data, self._shares)
        self._parts = [part for part in _PARTS if part in self._grams]
        usual_blocks = max(1.0, float(self._data.effects_NE.sum(axis=1).mean()))
        middles = {"effect": 0.6, "own": 0.4 * np.sqrt(usual_blocks)}
        self._middles = np.log([middles.get(part, 0.4) / np.sqrt(usual_blocks) for part in self._parts] + [0.5])
        if surrogate.costs:
            self._middles[-1] = np.log(0.02)
        *sizes, self._noise = np.exp(self._sizes_drawn(rng)).tolist()
        self._sizes = dict(zip(self._parts, sizes, strict=True))
        self._kernel_NN = self._kernel(np.array([*sizes, self._noise]))
        self._lower_NN = np.linalg.cholesky(self._kernel_NN)
        self._weights_N = self._solve(self._y_N)

    def foretell(self, candidates: Sequence[Picks]) -> tuple[Floats, Floats]:
        """The scores of candidates without the noise of a training, (M,): what is expected, and the deviation."""
        asked = self._surrogate.features(candidates)
        with_MN = np.full((len(candidates), len(self._y_N)), _BASE**2)
        for part, gram_MN in asked.grams(self._data, self._shares).items():
            with_MN += self._sizes[part] ** 2 * gram_MN
        alone_M = _BASE**2 + (self._sizes["pairs"] * asked.pairs_N) ** 2 + self._sizes.get("own", 0.0) ** 2
        for part, share in self._shares.items():
            alone_M = alone_M + self._sizes[part] ** 2 * ((asked.effects_NE @ share) ** 2).sum(axis=1)
        white_NM = solve_triangular(self._lower_NN, with_MN.T, lower=True, check_finite=False)
        spread_M = np.sqrt(np.maximum(alone_M - (white_NM**2).sum(axis=0), 1e-12))
        return self._middle + self.scale * (with_MN @ self._weights_N), self.scale * spread_M

    def draw(self, rng: np.random.Generator) -> Effects:
        """Effects drawn from their posterior."""
        theta_E = np.zeros(self._data.effects_NE.shape[1])
        for part, share in self._shares.items():
            theta_E = theta_E + self._sizes[part] * (share @ rng.standard_normal(share.shape[1]))
        pairs = self._sizes["pairs"] * rng.standard_normal()
        base = _BASE * rng.standard_normal()
        foretold_N = base + self._data.effects_NE @ theta_E + pairs * self._data.pairs_N
        foretold_N = foretold_N + self._rest_lower_NN @ rng.standard_normal(len(self._y_N))
        return self._corrected(base, theta_E, pairs, foretold_N)

    def mean(self) -> Effects:
        """The expected effects."""
        nothing_E, nothing_N = np.zeros(self._data.effects_NE.shape[1]), np.zeros(len(self._y_N))
        return self._corrected(0.0, nothing_E, 0.0, nothing_N)

    def errors(self) -> Floats:
        """What each score is off from what all others foretell, (N,)."""
        return self.scale * _left_out(self._kernel_NN, self._y_N)

    def fit(self) -> Fit:
        """How well it foretells what it was not told, of the last candidates."""
        last = slice(-_ENOUGH, None)
        y_N = self._y_N[last] - self._y_N[last].mean()
        plain_N = y_N * len(y_N) / max(1, len(y_N) - 1)  # from the mean of the others

        def explained(kernel_NN: Floats) -> float:
            errors_N = _left_out(kernel_NN, y_N)
            return 1.0 - float(errors_N @ errors_N) / max(float(plain_N @ plain_N), 1e-12)

        differ_NN = self._data.differ(self._data)[last, last]
        others = [
            explained(np.exp(-differ_NN / reach) + _BASE**2 + noise**2 * np.eye(len(y_N)))
            for reach in (0.5, 1.0, 2.0, 4.0)
            for noise in (0.1, 0.3, 0.7)
        ]
        return Fit(explained(self._kernel_NN[last, last]), max(others))

    @cached_property
    def _last_grams(self) -> dict[str, Floats]:
        """Of the candidates that say how large parts and noise are."""
        return {name: np.ascontiguousarray(gram[-_ENOUGH:, -_ENOUGH:]) for name, gram in self._grams.items()}

    @cached_property
    def _rest_lower_NN(self) -> Floats:
        """What does not add up: the root of its covariance."""
        rest_NN = (self._noise**2 + 1e-6) * np.eye(len(self._y_N))
        if "own" in self._grams:
            rest_NN += self._sizes["own"] ** 2 * self._grams["own"]
        return np.linalg.cholesky(rest_NN)

    def _corrected(self, base: float, theta_E: Floats, pairs: float, foretold_N: Floats) -> Effects:
        """Effects that foretold these scores, moved by what the scores really are."""
        weights_N = self._solve(self._y_N - foretold_N)
        pull_E = self._data.effects_NE.T @ weights_N
        for part, share in self._shares.items():
            theta_E = theta_E + self._sizes[part] ** 2 * (share @ (share.T @ pull_E))
        pairs += self._sizes["pairs"] ** 2 * float(self._data.pairs_N @ weights_N)
        base += _BASE**2 * float(weights_N.sum())
        values = tuple(
            np.concatenate([[0.0], theta_E[start:end]]) * self.scale
            for start, end in itertools.pairwise(self._surrogate._offsets)
        )
        return Effects(self._middle + base * self.scale, values, self._surrogate.by_count * pairs * self.scale)

    def _solve(self, y_N: Floats) -> Floats:
        return np.asarray(cho_solve((self._lower_NN, True), y_N, check_finite=False))

    def _kernel(self, sizes: Floats) -> Floats:
        """How scores vary together, of all candidates, for these sizes of the parts and the noise."""
        return np.asarray(self._kernels(sizes[None], self._grams)[0])

    def _kernels(self, sizes_DP: Floats, grams: Mapping[str, Floats]) -> Floats:
        """The same for several sizes at a time, (D, N, N)."""
        kernel_DNN: Floats = np.full((len(sizes_DP), *grams["effect"].shape), _BASE**2)
        for name, size_D in zip(self._parts, sizes_DP[:, :-1].T, strict=True):
            kernel_DNN += (size_D**2)[:, None, None] * grams[name]
        diagonal = np.arange(kernel_DNN.shape[1])
        kernel_DNN[:, diagonal, diagonal] += (sizes_DP[:, -1] ** 2 + 1e-6)[:, None]
        return kernel_DNN

    def _evidence(self, log_hyper_DP: Floats) -> Floats:
        """Log posterior density of the sizes, up to a constant, (D,)."""
        kernel_DNN = self._kernels(np.exp(log_hyper_DP), self._last_grams)
        try:
            lower_DNN = np.linalg.cholesky(kernel_DNN)
        except np.linalg.LinAlgError:  # of one of them
            if len(kernel_DNN) == 1:
                return np.array([-np.inf])
            return np.concatenate([self._evidence(one[None]) for one in log_hyper_DP])
        prior_D = -0.5 * ((log_hyper_DP - self._middles) ** 2).sum(axis=1)
        y_N = self._y_N[-_ENOUGH:]
        white_DN = np.array([solve_triangular(one, y_N, lower=True, check_finite=False) for one in lower_DNN])
        logs_D = np.log(np.diagonal(lower_DNN, axis1=1, axis2=2)).sum(axis=1)
        return np.asarray(prior_D - 0.5 * (white_DN**2).sum(axis=1) - logs_D)

    def _sizes_drawn(self, rng: np.random.Generator) -> Floats:
        """Log sizes of the parts and of the noise, from a short chain that starts at a good place."""
        starts = self._middles + rng.standard_normal((_PRIOR_DRAWS, len(self._middles)))
        levels_D = self._evidence(starts)
        at: Floats = starts[int(np.argmax(levels_D))]
        level = float(levels_D.max())
        for _ in range(0 if self._surrogate.costs else _STEPS):
            step = at + 0.35 * rng.standard_normal(len(at))
            there = float(self._evidence(step[None])[0])
            if np.log(rng.random()) < there - level:
                at, level = step, there
        return at


def _left_out(kernel_NN: Floats, y_N: Floats) -> Floats:
    """The errors of leaving one out, in closed form (Rasmussen and Williams, "Gaussian processes for machine
    learning", 2006, equation 5.12)."""
    inverse_NN = np.linalg.inv(kernel_NN)
    return np.asarray((inverse_NN @ y_N) / np.diag(inverse_NN))
