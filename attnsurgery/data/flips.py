"""Tests whether mirrored images have the same labels, before anything is trained on mirrored images.

A model that was trained on mirrored images under their old labels cannot answer this: where left and right are the
classes, it guesses. So the test uses a classifier that has seen none: ridge regression on the responses of filters that
are small patches of the images (A. Coates, A. Ng and H. Lee, "An analysis of single-layer networks in unsupervised
feature learning", AISTATS 2011). By cross-validation, each image is classified as it is and mirrored. Where mirroring
makes significantly more correct predictions wrong than wrong ones correct, labels depend on the side.

The classifier need not be good. On photos it is a little better than chance, mirrored or not; on arrows, letters, and
left and right hands it is correct, and wrong once they are mirrored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from attnsurgery.data.picture import Rendering
from attnsurgery.data.source import Source

_SIDE = 32
"""Height and width that images are resized to, in pixels."""
_PATCH = 6
"""Height and width of a filter, in pixels."""
_FILTERS = 128
"""Number of filters."""
_STRIDE = 2
_THRESHOLD = 0.5
"""Responses of a filter below it count as 0."""
_CELLS = 3
"""Responses are averaged over a grid of so many cells in height and in width."""
_IMAGES = 900
"""Number of images that are classified at most."""
_FOLDS = 3
"""Number of folds of the cross-validation."""
_RIDGE = 0.1
"""Ridge penalty, as a share of the mean of the Gram matrix's diagonal."""
_BATCH = 100
_DROP = 0.1
"""Smallest drop of the accuracy by mirroring that counts."""
_CHANCE = 1e-3
"""Largest p-value that counts."""


@dataclass(frozen=True, slots=True)
class FlipCheck:
    """The accuracy of a simple classifier on images as they are, and mirrored."""

    images: int
    """Number of images that were classified."""
    plain: float
    """Accuracy on the images as they are, 0 to 1."""
    mirrored: float
    """Accuracy on the mirrored images, 0 to 1."""
    p_value: float
    """The p-value of McNemar's one-sided test that mirroring makes no more predictions wrong than right."""

    @property
    def changes_labels(self) -> bool:
        """Whether mirroring lowers the accuracy much and significantly."""
        return self.p_value < _CHANCE and self.plain - self.mirrored > _DROP

    def describe(self) -> str:
        """Both accuracies, in words."""
        return (
            f"a simple classifier is right for {100 * self.plain:.0f} % of {self.images:,} images, and for "
            f"{100 * self.mirrored:.0f} % of them mirrored left to right"
        )


def check_flips(source: Source, rendering: Rendering) -> FlipCheck:
    """Classify at most 900 images, as they are and mirrored, by classifiers fitted to others of them.

    Images that cannot be read are skipped; decoding reports them.
    """
    picks = _balanced_sample(source.labels)
    pixels_NCHW, labels_N = _read_images(source, picks, Rendering("L", rendering.integers, rendering.floats))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        filters = _filters(pixels_NCHW, generator)
        plain_ND, mirrored_ND = (_features(x_NCHW, filters) for x_NCHW in (pixels_NCHW, pixels_NCHW.flip(3)))
        right_N2 = _cross_validate(plain_ND, mirrored_ND, labels_N)
    plain_N, mirrored_N = right_N2[:, 0], right_N2[:, 1]
    worse, better = int((plain_N & ~mirrored_N).sum()), int((~plain_N & mirrored_N).sum())
    from scipy.stats import binomtest  # takes a second to import

    p_value = float(binomtest(worse, worse + better, alternative="greater").pvalue) if worse + better else 1.0
    return FlipCheck(len(labels_N), float(plain_N.mean()), float(mirrored_N.mean()), p_value)


def _balanced_sample(labels: Sequence[int]) -> list[int]:
    """Positions of at most `_IMAGES` random images, as evenly over the classes as possible, in a random order."""
    rng = np.random.default_rng(0)
    order = rng.permutation(len(labels))
    labels_N = np.asarray(labels)[order]
    rank_N = np.empty(len(order), int)
    for label in np.unique(labels_N):
        of_class = np.flatnonzero(labels_N == label)
        rank_N[of_class] = np.arange(len(of_class))
    selected = np.sort(np.argsort(rank_N, kind="stable")[:_IMAGES])
    return [int(index) for index in order[selected]]


def _read_images(source: Source, picks: Sequence[int], rendering: Rendering) -> tuple[torch.Tensor, torch.Tensor]:
    """Standardised grey images, (N, 1, H, W), and their labels, (N,), without those that cannot be read."""
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
    """Random patches of high contrast, without their mean and scaled to length 1: (K, 1, P, P)."""
    numbers = torch.randint(len(x_NCHW), (8 * _FILTERS,), generator=generator)
    corners = torch.randint(_SIDE - _PATCH + 1, (8 * _FILTERS, 2), generator=generator).tolist()
    patches_KPP = torch.stack(
        [x_NCHW[number, 0, y : y + _PATCH, x : x + _PATCH] for number, (y, x) in zip(numbers, corners, strict=True)]
    )
    patches_KPP = patches_KPP - patches_KPP.mean(dim=(1, 2), keepdim=True)
    length_K = patches_KPP.flatten(1).norm(dim=1)
    strongest = length_K.argsort(descending=True)[: 4 * _FILTERS]
    sample = strongest[torch.randperm(len(strongest), generator=generator)[:_FILTERS]]
    unit_KPP: torch.Tensor = patches_KPP[sample] / length_K[sample, None, None].clamp_min(1e-6)
    return unit_KPP[:, None]


def _features(x_NCHW: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    """Responses of the filters: their means over a coarse grid, and their maxima, (N, D)."""
    weight_PK, side = filters.flatten(1).T.contiguous(), (_SIDE - _PATCH) // _STRIDE + 1
    cell = side // _CELLS
    features = []
    for x_BCHW in torch.split(x_NCHW, _BATCH):
        response_BSSK = (F.unfold(x_BCHW, _PATCH, stride=_STRIDE).mT @ weight_PK).reshape(len(x_BCHW), side, side, -1)
        response_BSSK = response_BSSK[:, : _CELLS * cell, : _CELLS * cell]
        for sign in (1, -1):
            strong_BSSK = F.relu(sign * response_BSSK - _THRESHOLD)
            cells = strong_BSSK.reshape(len(x_BCHW), _CELLS, cell, _CELLS, cell, -1).mean(dim=(2, 4))
            features.append(torch.cat([cells.flatten(1), strong_BSSK.amax(dim=(1, 2))], dim=1))
    by_batch = [torch.cat(pair, dim=1) for pair in zip(features[::2], features[1::2], strict=True)]
    return torch.cat(by_batch).double()


def _cross_validate(plain_ND: torch.Tensor, mirrored_ND: torch.Tensor, labels_N: torch.Tensor) -> Any:
    """Whether each image is classified correctly as it is, and mirrored, by cross-validation: booleans, (N, 2)."""
    fold_N = torch.arange(len(labels_N)) % _FOLDS
    right_N2 = torch.zeros(len(labels_N), 2, dtype=torch.bool)
    target_NK = F.one_hot(labels_N).double()
    for fold in range(_FOLDS):
        fit_N, held_out_N = fold_N != fold, fold_N == fold
        if not (fit_N.any() and held_out_N.any()):
            continue
        mean_D, std_D = plain_ND[fit_N].mean(dim=0), plain_ND[fit_N].std(dim=0, unbiased=False) + 1e-6
        fitted_MD = (plain_ND[fit_N] - mean_D) / std_D
        centre_K = target_NK[fit_N].mean(dim=0)
        gram_MM = fitted_MD @ fitted_MD.T
        gram_MM += torch.eye(len(gram_MM), dtype=torch.double) * (_RIDGE * gram_MM.diagonal().mean() + 1e-9)
        dual_MK = torch.linalg.solve(gram_MM, target_NK[fit_N] - centre_K)
        for column, features_ND in enumerate((plain_ND, mirrored_ND)):
            scores_HK = ((features_ND[held_out_N] - mean_D) / std_D) @ fitted_MD.T @ dual_MK + centre_K
            right_N2[held_out_N, column] = scores_HK.argmax(dim=1) == labels_N[held_out_N]
    return right_N2.numpy()
