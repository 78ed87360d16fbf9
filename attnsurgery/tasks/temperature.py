"""Fits a temperature, so that models are compared by what their outputs rank and not by how confident they are.

A network's cross-entropy changes with the scale of its outputs, which says nothing about which images it gets right:
training longer, or with a higher learning rate, makes it more confident. One number per model, its temperature, removes
that difference (Guo et al., "On Calibration of Modern Neural Networks", 2017, section 4.2).
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

_LARGEST_SCALE = 10.0
"""Outputs are multiplied by at most this, or by at least its inverse."""
_HALVINGS = 24
"""Steps of the bisection; they leave an interval of 3e-7 for the logarithm of the scale."""
_MOST_IMAGES = 4000
"""A larger split fits the temperature on every second, third ... image, which is accurate enough for one number."""


def calibrated_loss(logits_NK: torch.Tensor, labels_N: torch.Tensor) -> float:
    """The mean cross-entropy at the temperature where it is smallest.

    The temperature T minimizes the mean cross-entropy of the logits divided by T, plus (ln T)^2 / (2 N). The second
    term weighs as much as half an image whose logarithm is off by one. It keeps T finite where every image is right.

    Args:
        logits_NK: outputs of a classifier with K classes for N images.
        labels_N: their classes.

    Returns:
        The loss in nats; NaN or infinite if the logits are.
    """
    stride = math.ceil(len(labels_N) / _MOST_IMAGES)
    scale = 1 / temperature(logits_NK[::stride], labels_N[::stride])
    return float(F.cross_entropy(logits_NK.double() * scale, labels_N))


def temperature(logits_NK: torch.Tensor, labels_N: torch.Tensor) -> float:
    """The temperature of `calibrated_loss`, from 0.1 to 10.

    The cross-entropy is convex in the scale 1 / T. Its slope, the mean of the expected logit minus the logit of the
    true class, changes its sign once, so bisection finds the minimum.
    """
    logits_NK = logits_NK.double()
    true_N = logits_NK.gather(1, labels_N[:, None])[:, 0]
    low, high = -math.log(_LARGEST_SCALE), math.log(_LARGEST_SCALE)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        scale = math.exp(middle)
        expected_N = ((scale * logits_NK).softmax(dim=1) * logits_NK).sum(dim=1)
        slope = scale * float((expected_N - true_N).mean()) + middle / len(labels_N)
        low, high = (middle, high) if slope < 0 else (low, middle)
    return math.exp(-(low + high) / 2)
