"""What each block at each place is worth, learned from few trained candidates: a Bayesian linear model.

The score of a candidate is taken as the base's score plus one effect for each block in it, plus a term for pairs of
blocks, which tells that the fifth block brings less than the first. Effects are not strangers to each other: those of
one block and option share a part over all places, so do those of one family of blocks, and those of one place. How
large each of these parts is, and how large the noise, is unknown too, and drawn from its posterior.

All is Gaussian, so with N candidates everything is algebra on N x N matrices, at most a few hundred wide. A draw of all
effects at once follows Matheron's rule (Wilson et al., "Efficiently sampling functions from Gaussian process
posteriors", ICML 2020, equation 9): a draw from the prior, corrected by what it misses of the data.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attnsurgery.samplers.places import Floats, Picks, Places

_PARTS = ("effect", "label", "family", "place", "pairs")
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
    """One draw from the posterior, or its mean."""

    base: float
    """The score without any block."""
    values: tuple[Floats, ...]
    """What each choice at each place adds to it; 0 for no block."""
    by_count: Floats
    """Worth of having so many blocks, beside their own values."""


@dataclass(frozen=True)
class Fit:
    """How well the model foretells candidates that it was not told, each from all others."""

    explained: float
    """1 less the squared error by that of the mean of the others: 1 is perfect, 0 is no better than that mean."""
    with_interactions: float
    """The same of a model in which any change of a place may depend on all others."""

    @property
    def misses_interactions(self) -> bool:
        """True if effects that add up are clearly the wrong picture."""
        return self.with_interactions > max(0.0, self.explained) + 0.2


class AdditiveModel:
    """Scores of candidates by what stands at each place.

    Args:
        places: blocks are of one family if their labels are the same up to a bracket.
        costs: what is foretold is a cost and no score: it has hardly any noise, and pairs of blocks add nothing.
    """

    def __init__(self, places: Places, costs: bool = False) -> None:
        self.costs = costs
        self._places = places
        labels = list(places.choices.values())
        self._offsets = np.cumsum([0, *(len(choices) - 1 for choices in labels)])
        names = [(place, label) for place, choices in enumerate(labels) for label in choices[1:]]
        count = len(names)
        groups: dict[str, list[Any]] = {
            "label": [label for _, label in names],
            "family": [label.partition("(")[0] for _, label in names],
            "place": [place for place, _ in names],
        }
        self._shares = {"effect": np.eye(count)}
        for part, keys in groups.items():
            distinct = list(dict.fromkeys(keys))
            self._shares[part] = np.array([[key == other for other in distinct] for key in keys], dtype=float)
        most = sum(places.weights)
        counts = np.arange(most + 1)
        self._pairs = float(not costs) * counts * (counts - 1) / 2 / max(1.0, most / 2)

    def design(self, candidates: Sequence[Picks]) -> tuple[Floats, Floats]:
        """Which effects each candidate has, (N, E), and its term for pairs, (N,)."""
        x_NE = np.zeros((len(candidates), int(self._offsets[-1])))
        for row, picks in enumerate(candidates):
            for place, pick in enumerate(picks):
                if pick:
                    x_NE[row, self._offsets[place] + pick - 1] = 1.0
        return x_NE, self._pairs[[self._places.count(picks) for picks in candidates]]

    def told(self, candidates: Sequence[Picks], scores: Sequence[float], rng: np.random.Generator) -> Told:
        """The model with what is known, and the sizes of its parts drawn from their posterior."""
        return Told(self, candidates, scores, rng)


class Told:
    """A model and its data."""

    def __init__(
        self, model: AdditiveModel, candidates: Sequence[Picks], scores: Sequence[float], rng: np.random.Generator
    ) -> None:
        self._model = model
        y_N = np.asarray(scores, dtype=float)
        if not model.costs:
            middle = np.median(y_N)
            usual = 1.4826 * np.median(np.abs(y_N - middle)) or float(y_N.std()) or 1e-6
            y_N = np.maximum(y_N, middle - _FAR * usual)
        self.scale = float(y_N.std()) or 1e-6
        self._middle = float(y_N.mean())
        self._y_N = (y_N - self._middle) / self.scale
        self._x_NE, self._pairs_N = model.design(candidates)
        self._picks = np.asarray(candidates)
        self._grams = {part: _gram(self._x_NE @ share) for part, share in model._shares.items()}
        self._grams["pairs"] = _gram(self._pairs_N[:, None])
        usual_blocks = max(1.0, float(self._x_NE.sum(axis=1).mean()))
        middles = {"effect": 0.6, "label": 0.4, "family": 0.4, "place": 0.4, "pairs": 0.4}
        self._middles = np.log(np.array([middles[part] / np.sqrt(usual_blocks) for part in _PARTS] + [0.5]))
        if model.costs:
            self._middles[-1] = np.log(0.02)
        *sizes, self._noise = np.exp(self._sizes_drawn(rng))
        self._sizes = dict(zip(_PARTS, sizes, strict=True))
        self._kernel_NN = self._kernel(np.array([*sizes, self._noise]))

    def draw(self, rng: np.random.Generator, sharpness: float = 1.0) -> Effects:
        """Effects drawn from their posterior.

        Args:
            sharpness: 1 is Thompson sampling; larger keeps nearer to the mean.
        """
        shares = self._model._shares
        theta_E = np.zeros(self._x_NE.shape[1])
        for part, share in shares.items():
            theta_E = theta_E + self._sizes[part] * (share @ rng.standard_normal(share.shape[1]))
        pairs = self._sizes["pairs"] * rng.standard_normal()
        base = _BASE * rng.standard_normal()
        foretold_N = base + self._x_NE @ theta_E + pairs * self._pairs_N
        foretold_N = foretold_N + self._noise * rng.standard_normal(len(self._y_N))
        return self._corrected(base / sharpness, theta_E / sharpness, pairs / sharpness, foretold_N / sharpness)

    def mean(self) -> Effects:
        """The expected effects."""
        nothing_E, nothing_N = np.zeros(self._x_NE.shape[1]), np.zeros(len(self._y_N))
        return self._corrected(0.0, nothing_E, 0.0, nothing_N)

    def fit(self) -> Fit:
        """How well it foretells what it was not told."""
        differ_NN = (self._picks[:, None, :] != self._picks[None, :, :]).sum(axis=2)
        others = [
            self._explained(np.exp(-differ_NN / reach) + _BASE**2 + noise**2 * np.eye(len(self._y_N)))
            for reach in (0.5, 1.0, 2.0, 4.0)
            for noise in (0.1, 0.3, 0.7)
        ]
        return Fit(self._explained(self._kernel_NN), max(others))

    def _corrected(self, base: float, theta_E: Floats, pairs: float, foretold_N: Floats) -> Effects:
        """Effects that foretold these scores, moved by what the scores really are."""
        weights_N = np.linalg.solve(self._kernel_NN, self._y_N - foretold_N)
        pull_E = self._x_NE.T @ weights_N
        for part, share in self._model._shares.items():
            theta_E = theta_E + self._sizes[part] ** 2 * (share @ (share.T @ pull_E))
        pairs += self._sizes["pairs"] ** 2 * float(self._pairs_N @ weights_N)
        base += _BASE**2 * float(weights_N.sum())
        model = self._model
        values = tuple(
            np.concatenate([[0.0], theta_E[start:end]]) * self.scale
            for start, end in itertools.pairwise(model._offsets)
        )
        return Effects(self._middle + base * self.scale, values, model._pairs * pairs * self.scale)

    def _explained(self, kernel_NN: Floats) -> float:
        inverse_NN = np.linalg.inv(kernel_NN)
        errors_N = (inverse_NN @ self._y_N) / np.diag(inverse_NN)
        count = len(self._y_N)
        plain_N = self._y_N * count / max(1, count - 1)  # the mean of the others, as the mean of all is 0
        return 1.0 - float(errors_N @ errors_N) / max(float(plain_N @ plain_N), 1e-12)

    def _kernel(self, sizes: Floats, last: int | None = None) -> Floats:
        """How scores vary together, of all candidates or the last ones, for these sizes of the parts and the noise."""
        part = slice(None) if last is None else slice(-last, None)
        kernel_NN: Floats = np.full_like(self._grams["effect"][part, part], _BASE**2)
        for name, size in zip(_PARTS, sizes[:-1], strict=True):
            kernel_NN += size**2 * self._grams[name][part, part]
        kernel_NN[np.diag_indices_from(kernel_NN)] += sizes[-1] ** 2 + 1e-6
        return kernel_NN

    def _evidence(self, log_hyper: Floats) -> float:
        """Log posterior density of the sizes, up to a constant."""
        prior = -0.5 * float(((log_hyper - self._middles) ** 2).sum())
        try:
            lower = np.linalg.cholesky(self._kernel(np.exp(log_hyper), _ENOUGH))
        except np.linalg.LinAlgError:
            return -np.inf
        white_N = np.linalg.solve(lower, self._y_N[-_ENOUGH:])
        return prior - 0.5 * float(white_N @ white_N) - float(np.log(np.diag(lower)).sum())

    def _sizes_drawn(self, rng: np.random.Generator) -> Floats:
        """Log sizes of the parts and of the noise, from a short chain that starts at a good place."""
        starts = self._middles + rng.standard_normal((_PRIOR_DRAWS, len(self._middles)))
        levels = [self._evidence(start) for start in starts]
        at: Floats = starts[int(np.argmax(levels))]
        level = max(levels)
        for _ in range(0 if self._model.costs else _STEPS):
            step = at + 0.35 * rng.standard_normal(len(at))
            there = self._evidence(step)
            if np.log(rng.random()) < there - level:
                at, level = step, there
        return at


def _gram(features: Floats) -> Floats:
    return np.asarray(features @ features.T)
