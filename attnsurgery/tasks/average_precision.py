"""The mean over classes of average precision, with a value for each image.

Shape letters: N images, K classes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[np.float64]


def mean_average_precision(scores_NK: torch.Tensor, targets_NK: torch.Tensor) -> tuple[float, torch.Tensor]:
    """The mean average precision, and a value for each image whose mean it is.

    The average precision of a class is the mean, over its images, of the precision among all images that score at least
    as high: the area under the steps of the precision-recall curve, without interpolation (Buckley and Voorhees,
    "Evaluating evaluation measure stability", 2000). Images of equal scores count together, so their order does not
    matter. Classes without images are left out of the mean.

    The value of image i is the metric plus N - 1 times (the mean of the metrics without one image, minus the metric
    without image i): the jackknife's pseudo-value (Tukey, "Bias and confidence in not quite large samples", 1958),
    shifted so that the mean is the metric itself and not its bias-corrected estimate. The variance of their mean is the
    jackknife's variance of the metric (Efron and Stein, "The jackknife estimate of variance", 1981). A class whose only
    image is left out keeps its average precision.

    All N metrics without one image take O(N log N) for a class: leaving an image out changes the precision at lower
    scores only, and prefix sums add those up.

    Args:
        scores_NK: of any scale.
        targets_NK: 1 where an image is of a class, otherwise 0.

    Returns:
        The metric, 0 if no class has images; and the values, (N,), in float64.

    Example: the three images of one class are first, second and fourth of five
        >>> scores = torch.tensor([[0.9], [0.8], [0.7], [0.6], [0.5]])
        >>> metric, values_N = mean_average_precision(scores, torch.tensor([[1], [1], [0], [1], [0]]))
        >>> round(metric, 4), round(float(values_N.mean()), 4)
        (0.9167, 0.9167)
    """
    scores, positive = scores_NK.double().numpy(), targets_NK.numpy() > 0.5
    classes = np.flatnonzero(positive.any(axis=0))
    images = len(scores)
    if not len(classes):
        return 0.0, torch.zeros(images, dtype=torch.float64)
    total, without_N = 0.0, np.zeros(images)
    for label in classes:
        precision, left_out_N = _without_each(scores[:, label], positive[:, label])
        total += precision
        without_N += left_out_N
    metric = float(total / len(classes))
    without_N /= len(classes)
    return metric, torch.from_numpy(metric + (images - 1) * (without_N.mean() - without_N))


def _without_each(score_N: Array, positive_N: npt.NDArray[np.bool_]) -> tuple[float, Array]:
    """The average precision of a class, and those without one image, (N,)."""
    order = np.argsort(-score_N, kind="stable")
    score_N, hit_N = -score_N[order], positive_N[order].astype(np.float64)  # ascending, so best images come first
    first_N = np.searchsorted(score_N, score_N, side="left")  # of the images with the same score
    end_N = np.searchsorted(score_N, score_N, side="right")
    all_N = end_N.astype(np.float64)  # images that score at least as high
    hits_N = np.cumsum(hit_N)[end_N - 1]  # those of the class among them
    positives = hit_N.sum()

    def below(values_N: Array) -> tuple[Array, float]:
        """Sums of values of images of the class, over those that score no higher than each image; and over all."""
        sums = np.concatenate([[0.0], np.cumsum(values_N * hit_N)])
        return sums[-1] - sums[first_N], float(sums[-1])

    fewer_N = np.maximum(all_N - 1, 1)
    kept_N, whole = below(hits_N / all_N)
    without_other_N, _ = below(hits_N / fewer_N)
    without_hit_N, _ = below((hits_N - 1) / fewer_N)
    above_N = whole - kept_N
    if positives > 1:
        own_N = (hits_N - 1) / fewer_N  # the image itself is no longer there
        of_hit_N = (above_N + without_hit_N - own_N) / (positives - 1)
    else:
        of_hit_N = np.full_like(above_N, whole)
    result_N = np.empty_like(above_N)
    result_N[order] = np.where(hit_N > 0, of_hit_N, (above_N + without_other_N) / positives)
    return float(whole / positives), result_N
