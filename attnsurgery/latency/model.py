"""A latency model: the time of any candidate, from a few that were measured in place.

The ratio of a candidate's time to the base's is taken as 1 plus what each of its blocks adds. What a block adds depends
on its options and on the tensor it is put on, and not on where in the model that is: sites of equal shape share what is
learned. Blocks never measured are predicted from those that were, by number, multiply-accumulates and size of map;
what each then differs by is learned as well (a Bayesian linear regression with two levels, after Lindley and Smith,
"Bayes estimates for the linear model", JRSS B 1972). How large such differences are is unknown, too: all sizes that are
likely count, so that a model which was told little does not believe that it knows much.

Measured are whole candidates with several blocks in them: a weighing of many items at once tells more about each than
weighing them one at a time (Hotelling, "Some improvements in weighing and other experimental techniques", 1944).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float64]]
Counts = Mapping[str, int]
"""How often each kind of block, by its key, is in a candidate."""

_LEVELS = (0.02, 2.0, 0.05)
"""How large the shared parts are thought to be: share of the base's time for a block as such, for as many
multiply-accumulates as the base has, and for the largest map."""
_OWN = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)
"""What a kind may differ by from what its size predicts."""
_MISFIT = (0.003, 0.01, 0.03, 0.1)
"""How wrong a sum of parts may be, as a share of that sum."""
_UNLIKELY = 0.01
"""Settings of the two that are this much less likely than the likeliest are left out; the others all count."""
_FLOOR = 5e-4
"""No measurement of a ratio is trusted beyond that."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A block with its options on a tensor of some shape."""

    macs: int
    """Multiply-accumulates of one image."""
    elements: int
    """Of the tensor that it is put on, one image."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One candidate whose ratio to the base is known."""

    counts: Counts
    ratio: float
    sigma: float
    """Standard error of the ratio."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a candidate's ratio to the base will be."""

    ratio: float
    sigma: float

    def bound(self, z: float) -> float:
        """So many standard deviations above the middle, or below."""
        return self.ratio + z * self.sigma


class LatencyModel:
    """What each kind of block adds to the base's time, from measured candidates.

    Args:
        base_macs: multiply-accumulates of the base, one image.
        kinds: every kind that will be asked about, by key.
        measured: the candidates that are known; their kinds have to be among `kinds`.
    """

    def __init__(self, base_macs: int, kinds: Mapping[str, Kind], measured: Sequence[Measured]) -> None:
        kinds = dict(sorted(kinds.items()))  # the same sums in the same order, whoever names the kinds
        self._index = {key: number for number, key in enumerate(kinds)}
        largest = max((kind.elements for kind in kinds.values()), default=1)
        shared = [[1.0, kind.macs / max(1, base_macs), kind.elements / largest] for kind in kinds.values()]
        self._shared_KL = np.array(shared or np.zeros((0, len(_LEVELS))))
        x_NP = np.array([self._row(one.counts) for one in measured]).reshape(len(measured), self._width)
        y_N = np.array([one.ratio - 1.0 for one in measured])
        noise_N = np.array([max(one.sigma, _FLOOR) for one in measured])
        settings = list(itertools.product(_OWN, _MISFIT))
        evidence = np.array([self._evidence(x_NP, y_N, noise_N, *setting) for setting in settings])
        likely = np.exp(evidence - evidence.max())
        kept = [index for index in np.argsort(-likely) if likely[index] > _UNLIKELY]
        self._share_S: Floats = likely[kept] / likely[kept].sum()
        self._misfit_S = np.array([settings[index][1] for index in kept])
        self.misfit = float(np.sqrt(self._share_S @ self._misfit_S**2))
        """How wrong a sum of parts is thought to be, as a share of that sum."""
        means, covariances = [], []
        for own, misfit in (settings[index] for index in kept):
            weights_N = 1.0 / (noise_N**2 + (misfit * y_N) ** 2)
            covariance_PP = np.linalg.inv((x_NP.T * weights_N) @ x_NP + np.diag(1.0 / self._prior(own)))
            covariances.append(covariance_PP)
            means.append(covariance_PP @ (x_NP.T @ (weights_N * y_N)))
        self._mean_SP, self._covariance_SPP = np.stack(means), np.stack(covariances)

    @property
    def _width(self) -> int:
        return len(_LEVELS) + len(self._index)

    def predict(self, counts: Counts) -> Prediction:
        """The ratio of a candidate with these blocks.

        Raises:
            KeyError: a kind that the model was not made for.
        """
        mean_S, doubt_S = self._by_setting(counts)
        mean = float(self._share_S @ mean_S)
        spread_S = doubt_S + (self._misfit_S * mean_S) ** 2 + (mean_S - mean) ** 2
        return Prediction(1.0 + mean, math.sqrt(float(self._share_S @ spread_S)))

    def added(self, counts: Counts) -> float:
        """What these blocks add, as a share of the base's time; such shares add up."""
        return float(self._share_S @ self._by_setting(counts)[0])

    def gain(self, counts: Counts) -> float:
        """How much a measurement of this candidate would tell: its variance by that of a measurement."""
        mean_S, doubt_S = self._by_setting(counts)
        return float(self._share_S @ (doubt_S / (_FLOOR**2 + (self._misfit_S * mean_S) ** 2)))

    def _by_setting(self, counts: Counts) -> tuple[Floats, Floats]:
        """What these blocks add, and the variance of that, if each setting were the true one."""
        x_P = self._row(counts)
        return self._mean_SP @ x_P, np.einsum("p,spq,q->s", x_P, self._covariance_SPP, x_P)

    def _row(self, counts: Counts) -> Floats:
        own_K = np.zeros(len(self._index))
        for key, count in counts.items():
            own_K[self._index[key]] = count
        return np.concatenate([own_K @ self._shared_KL, own_K])

    def _prior(self, own: float) -> Floats:
        return np.concatenate([np.array(_LEVELS) ** 2, np.full(len(self._index), own**2)])

    def _evidence(self, x_NP: Floats, y_N: Floats, noise_N: Floats, own: float, misfit: float) -> float:
        """Log density of what was measured, for such sizes of what is unknown."""
        kernel_NN = (x_NP * self._prior(own)) @ x_NP.T + np.diag(noise_N**2 + (misfit * y_N) ** 2)
        lower_NN = np.linalg.cholesky(kernel_NN)
        white_N = np.linalg.solve(lower_NN, y_N)
        return -0.5 * float(white_N @ white_N) - float(np.log(np.diag(lower_NN)).sum())
