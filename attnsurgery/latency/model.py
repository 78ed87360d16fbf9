"""A latency model: predicts the latency of every candidate from measurements of a few.

The ratio of a candidate's time to the base's is modelled as 1 plus one term for each of its blocks. The term depends on
the options of the block and on the shape of its input, and not on its place in the model, so sites of equal shape share
a term. It is the sum of a part that all blocks share, which is linear in multiply-accumulates and size of map, and of
the block's own part: a Bayesian linear regression with two levels (Lindley and Smith, "Bayes estimates for the linear
model", JRSS B 1972). So blocks that were never measured are predicted from the others. The prior standard deviations
are averaged over all likely values, so that few measurements do not give too narrow predictions.

Whole candidates with several blocks are measured: weighing many items at once gives more information about each than
weighing them one at a time (Hotelling, "Some improvements in weighing and other experimental techniques", 1944).

Shape letters in this file:  N measurements, K kinds of blocks, L shared terms, P parameters (L + K), S settings.
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
"""By the key of each kind of block, its number in a candidate."""

_SHARED_STDS = (0.02, 2.0, 0.05)
"""Prior standard deviations of the shared terms, as shares of the base's time: for any block, for as many
multiply-accumulates as the base has, and for the largest map."""
_OWN_STDS = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)
"""Possible prior standard deviations of the own term of a kind."""
_MISFITS = (0.003, 0.01, 0.03, 0.1)
"""Possible standard deviations of the error of a sum of terms, as a share of that sum."""
_UNLIKELY = 0.01
"""Settings of these two are left out if their likelihood, relative to that of the most likely setting, is lower."""
_FLOOR = 5e-4
"""Smallest standard error of a measured ratio."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A block with its options on a tensor of some shape."""

    macs: int
    """Multiply-accumulates of one image."""
    elements: int
    """Number of elements of its input for one image."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A candidate whose ratio to the base was measured."""

    counts: Counts
    """Its blocks."""
    ratio: float
    """Its time divided by the base's."""
    sigma: float
    """Standard error of the ratio."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """The predicted ratio of a candidate to the base."""

    ratio: float
    """Its mean."""
    sigma: float
    """Its standard deviation."""

    def bound(self, z: float) -> float:
        """The ratio `z` standard deviations above the mean."""
        return self.ratio + z * self.sigma


class LatencyModel:
    """Predicts ratios of candidates to the base from those that were measured.

    Args:
        base_macs: multiply-accumulates of the base for one image.
        kinds: by key, every kind of block in candidates to predict.
        measured: the measured candidates, whose kinds are among `kinds`.
    """

    def __init__(self, base_macs: int, kinds: Mapping[str, Kind], measured: Sequence[Measured]) -> None:
        kinds = dict(sorted(kinds.items()))  # sums in the same order, whatever the order of `kinds`
        self._index = {key: number for number, key in enumerate(kinds)}
        largest = max((kind.elements for kind in kinds.values()), default=1)
        shared = [[1.0, kind.macs / max(1, base_macs), kind.elements / largest] for kind in kinds.values()]
        self._shared_KL = np.array(shared or np.zeros((0, len(_SHARED_STDS))))
        x_NP = np.array([self._row(measurement.counts) for measurement in measured]).reshape(len(measured), self._width)
        y_N = np.array([measurement.ratio - 1.0 for measurement in measured])
        noise_N = np.array([max(measurement.sigma, _FLOOR) for measurement in measured])
        settings = list(itertools.product(_OWN_STDS, _MISFITS))
        evidence = np.array([self._evidence(x_NP, y_N, noise_N, *setting) for setting in settings])
        likelihood = np.exp(evidence - evidence.max())
        selected = [index for index in np.argsort(-likelihood) if likelihood[index] > _UNLIKELY]
        self._share_S: Floats = likelihood[selected] / likelihood[selected].sum()
        self._misfit_S = np.array([settings[index][1] for index in selected])
        self.misfit = float(np.sqrt(self._share_S @ self._misfit_S**2))
        """Standard deviation of the error of a sum of terms, as a share of that sum."""
        means, covariances = [], []
        for own, misfit in (settings[index] for index in selected):
            weights_N = 1.0 / (noise_N**2 + (misfit * y_N) ** 2)
            covariance_PP = np.linalg.inv((x_NP.T * weights_N) @ x_NP + np.diag(1.0 / self._prior(own)))
            covariances.append(covariance_PP)
            means.append(covariance_PP @ (x_NP.T @ (weights_N * y_N)))
        self._mean_SP, self._covariance_SPP = np.stack(means), np.stack(covariances)

    @property
    def _width(self) -> int:
        return len(_SHARED_STDS) + len(self._index)

    def predict(self, counts: Counts) -> Prediction:
        """The predicted ratio of a candidate with these blocks.

        Raises:
            KeyError: a kind that is not among those of the model.
        """
        mean_S, variance_of_mean_S = self._by_setting(counts)
        mean = float(self._share_S @ mean_S)
        variance_S = variance_of_mean_S + (self._misfit_S * mean_S) ** 2 + (mean_S - mean) ** 2
        return Prediction(1.0 + mean, math.sqrt(float(self._share_S @ variance_S)))

    def added(self, counts: Counts) -> float:
        """The sum of the terms of these blocks, as a share of the base's time."""
        return float(self._share_S @ self._by_setting(counts)[0])

    def gain(self, counts: Counts) -> float:
        """The information in a measurement of this candidate: its variance divided by that of a measurement."""
        mean_S, variance_S = self._by_setting(counts)
        return float(self._share_S @ (variance_S / (_FLOOR**2 + (self._misfit_S * mean_S) ** 2)))

    def _by_setting(self, counts: Counts) -> tuple[Floats, Floats]:
        """The sum of the terms of these blocks and its variance, for each setting: (S,) and (S,)."""
        x_P = self._row(counts)
        return self._mean_SP @ x_P, np.einsum("p,spq,q->s", x_P, self._covariance_SPP, x_P)

    def _row(self, counts: Counts) -> Floats:
        """The row of the design matrix for a candidate, (P,)."""
        own_K = np.zeros(len(self._index))
        for key, count in counts.items():
            own_K[self._index[key]] = count
        return np.concatenate([own_K @ self._shared_KL, own_K])

    def _prior(self, own: float) -> Floats:
        """Prior variances of all parameters, (P,)."""
        return np.concatenate([np.array(_SHARED_STDS) ** 2, np.full(len(self._index), own**2)])

    def _evidence(self, x_NP: Floats, y_N: Floats, noise_N: Floats, own: float, misfit: float) -> float:
        """Log marginal likelihood of the measurements for one setting, up to a constant."""
        kernel_NN = (x_NP * self._prior(own)) @ x_NP.T + np.diag(noise_N**2 + (misfit * y_N) ** 2)
        lower_NN = np.linalg.cholesky(kernel_NN)
        white_N = np.linalg.solve(lower_NN, y_N)
        return -0.5 * float(white_N @ white_N) - float(np.log(np.diag(lower_NN)).sum())
