"""Metrics that are ratios of sums over images, such as accuracy, recall, F1 and intersection over union.

Shape letters: N images, K classes.
"""

from __future__ import annotations

import torch


def ratio_of_sums(numerator_NK: torch.Tensor, denominator_NK: torch.Tensor) -> tuple[float, torch.Tensor]:
    """The mean over classes of a ratio of sums over images, and a value for each image whose mean is that metric.

    For R = n / d with the sums n and d over N images, the value of image i is R + N (n_i - R d_i) / d: the metric plus
    the empirical influence of the image on it. So the mean of the values is R, and the variance of their mean is the
    delta-method variance of R, which is what the infinitesimal jackknife gives (Efron, "Nonparametric estimates of
    standard error: the jackknife, the bootstrap and other methods", 1981). Whatever compares two means can then compare
    two such metrics. Where each d_i is 1, the values are the n_i.

    Args:
        numerator_NK: of each image, for each class.
        denominator_NK: likewise. Classes whose sum is 0 are left out of the mean.

    Returns:
        The metric, and the values, (N,), in float64.

    Example: the recall of two classes, of which the first has three images and the second one
        >>> label_NK = torch.tensor([[1, 0], [1, 0], [1, 0], [0, 1]])
        >>> right_N = torch.tensor([1, 1, 0, 0])
        >>> metric, values_N = ratio_of_sums(right_N[:, None] * label_NK, label_NK)
        >>> round(metric, 4), round(float(values_N.mean()), 4)
        (0.3333, 0.3333)
    """
    numerator_NK, denominator_NK = numerator_NK.double(), denominator_NK.double()
    total_K = denominator_NK.sum(0)
    kept_K = total_K > 0
    numerator_NK, denominator_NK, total_K = numerator_NK[:, kept_K], denominator_NK[:, kept_K], total_K[kept_K]
    ratio_K = numerator_NK.sum(0) / total_K
    influence_NK = len(numerator_NK) * (numerator_NK - ratio_K * denominator_NK) / total_K
    return float(ratio_K.mean()), (ratio_K + influence_NK).mean(1)
