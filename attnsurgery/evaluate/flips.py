"""Whether a mirrored image keeps its label, asked of the images themselves before anything is trained on mirrored ones.

A model that has seen mirrored images under their old labels cannot tell any more: where left and right are the classes,
it guesses. So the question goes to a classifier that has seen none: ridge regression on what small patches of the
images, as filters, find in them (A. Coates, A. Ng and H. Lee, "An analysis of single-layer networks in unsupervised
feature learning", AISTATS 2011). Each image is judged by one fitted to others, as it is and mirrored. Where mirroring
makes right answers wrong, by more than chance does, labels depend on the side.

It need not be a good classifier. Photos it gets right a little more often than chance, mirrored or not; arrows, letters
and left and right hands it gets right and, mirrored, wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from attnsurgery.evaluate.picture import Rendering
from attnsurgery.evaluate.source import Source

_SIDE = 32
_PATCH = 6
_FILTERS = 128
_STRIDE = 2
_LEAST = 0.5
"""A filter is met where its product with a patch is larger."""
_CELLS = 3
"""What filters find is added up in so many parts of height and of width."""
_IMAGES = 900
_FOLDS = 3
_RIDGE = 0.1
"""Of the mean of the diagonal."""
_BATCH = 100
_DROP = 0.1
_CHANCE = 1e-3


@dataclass(frozen=True, slots=True)
class FlipCheck:
    """What became of right answers when the images were mirrored."""

    images: int
    plain: float
    """Share of right answers, 0 to 1."""
    mirrored: float
    p_value: float
    """That chance alone makes so many right answers wrong (McNemar, one-sided)."""

    @property
    def changes_labels(self) -> bool:
        return self.p_value < _CHANCE and self.plain - self.mirrored > _DROP

    def words(self) -> str:
        """For people."""
        return (
            f"a simple classifier gets {100 * self.plain:.0f} % of {self.images:,} images right, and mirrored left to "
            f"right {100 * self.mirrored:.0f} %"
        )


def check_flips(source: Source, rendering: Rendering) -> FlipCheck:
    """Judge at most some hundred images of all classes by a classifier fitted to others of them.

    Images that cannot be read are left out; whoever trains on them names them.
    """
    picks = _spread(source.labels)
    pixels_NCHW, labels_N = _read(source, picks, Rendering("L", rendering.whole, rendering.real))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        filters = _filters(pixels_NCHW, generator)
        plain_ND, mirrored_ND = (_features(x_NCHW, filters) for x_NCHW in (pixels_NCHW, pixels_NCHW.flip(3)))
        right_N2 = _judged(plain_ND, mirrored_ND, labels_N)
    plain_N, mirrored_N = right_N2[:, 0], right_N2[:, 1]
    lost, won = int((plain_N & ~mirrored_N).sum()), int((~plain_N & mirrored_N).sum())
    from scipy.stats import binomtest  # takes a second to import

    p_value = float(binomtest(lost, lost + won, alternative="greater").pvalue) if lost + won else 1.0
    return FlipCheck(len(labels_N), float(plain_N.mean()), float(mirrored_N.mean()), p_value)


def _spread(labels: Sequence[int]) -> list[int]:
    """Positions of as many of each class as there is room for, drawn at random, in a random order."""
    rng = np.random.default_rng(0)
    order = rng.permutation(len(labels))
    labels_N = np.asarray(labels)[order]
    rank_N = np.empty(len(order), int)
    for label in np.unique(labels_N):
        of_class = np.flatnonzero(labels_N == label)
        rank_N[of_class] = np.arange(len(of_class))
    chosen = np.sort(np.argsort(rank_N, kind="stable")[:_IMAGES])
    return [int(index) for index in order[chosen]]


def _read(source: Source, picks: Sequence[int], rendering: Rendering) -> tuple[torch.Tensor, torch.Tensor]:
    pixels, labels = [], []
    for index in picks:
        try:
            image = rendering(source.open(index)).resize((_SIDE, _SIDE))
        except Exception:
            continue
        pixels.append(np.asarray(image, np.float32))
        labels.append(source.labels[index])
    x_NHW = torch.from_numpy(np.stack(pixels))
    x_NHW = (x_NHW - x_NHW.mean(dim=(1, 2), keepdim=True)) / (x_NHW.std(dim=(1, 2), keepdim=True) + 10.0)
    return x_NHW[:, None], torch.tensor(labels)


def _filters(x_NCHW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Patches of the images themselves, without their mean and of length 1, those that are not flat: (K, 1, P, P)."""
    numbers = torch.randint(len(x_NCHW), (8 * _FILTERS,), generator=generator)
    corners = torch.randint(_SIDE - _PATCH + 1, (8 * _FILTERS, 2), generator=generator).tolist()
    patches_KPP = torch.stack(
        [x_NCHW[number, 0, y : y + _PATCH, x : x + _PATCH] for number, (y, x) in zip(numbers, corners, strict=True)]
    )
    patches_KPP = patches_KPP - patches_KPP.mean(dim=(1, 2), keepdim=True)
    length_K = patches_KPP.flatten(1).norm(dim=1)
    strongest = length_K.argsort(descending=True)[: 4 * _FILTERS]
    some = strongest[torch.randperm(len(strongest), generator=generator)[:_FILTERS]]
    unit_KPP: torch.Tensor = patches_KPP[some] / length_K[some, None, None].clamp_min(1e-6)
    return unit_KPP[:, None]


def _features(x_NCHW: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    """(N, D): where, roughly, and how strongly each filter is met."""
    weight_PK, side = filters.flatten(1).T.contiguous(), (_SIDE - _PATCH) // _STRIDE + 1
    cell = side // _CELLS
    found = []
    for x_BCHW in torch.split(x_NCHW, _BATCH):
        met_BSSK = (F.unfold(x_BCHW, _PATCH, stride=_STRIDE).mT @ weight_PK).reshape(len(x_BCHW), side, side, -1)
        met_BSSK = met_BSSK[:, : _CELLS * cell, : _CELLS * cell]
        for sign in (1, -1):
            strong_BSSK = F.relu(sign * met_BSSK - _LEAST)
            cells = strong_BSSK.reshape(len(x_BCHW), _CELLS, cell, _CELLS, cell, -1).mean(dim=(2, 4))
            found.append(torch.cat([cells.flatten(1), strong_BSSK.amax(dim=(1, 2))], dim=1))
    both = [torch.cat(pair, dim=1) for pair in zip(found[::2], found[1::2], strict=True)]
    return torch.cat(both).double()


def _judged(plain_ND: torch.Tensor, mirrored_ND: torch.Tensor, labels_N: torch.Tensor) -> Any:
    """(N, 2) booleans: right as it is, right when mirrored; each by a classifier that was fitted to other images."""
    fold_N = torch.arange(len(labels_N)) % _FOLDS
    right_N2 = torch.zeros(len(labels_N), 2, dtype=torch.bool)
    target_NK = F.one_hot(labels_N).double()
    for fold in range(_FOLDS):
        fit_N, held_N = fold_N != fold, fold_N == fold
        if not (fit_N.any() and held_N.any()):
            continue
        mean_D, std_D = plain_ND[fit_N].mean(dim=0), plain_ND[fit_N].std(dim=0, unbiased=False) + 1e-6
        fitted_MD = (plain_ND[fit_N] - mean_D) / std_D
        centre_K = target_NK[fit_N].mean(dim=0)
        gram_MM = fitted_MD @ fitted_MD.T
        gram_MM += torch.eye(len(gram_MM), dtype=torch.double) * (_RIDGE * gram_MM.diagonal().mean() + 1e-9)
        dual_MK = torch.linalg.solve(gram_MM, target_NK[fit_N] - centre_K)
        for column, features_ND in enumerate((plain_ND, mirrored_ND)):
            scores_HK = ((features_ND[held_N] - mean_D) / std_D) @ fitted_MD.T @ dual_MK + centre_K
            right_N2[held_N, column] = scores_HK.argmax(dim=1) == labels_N[held_N]
    return right_N2.numpy()
