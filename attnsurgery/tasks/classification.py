"""Classification: each image is of one class.

Shape letters: B images of a batch, N images of a split, K classes.
"""

from __future__ import annotations

import copy

import torch
from torch.nn import functional as F

from attnsurgery.tasks._base import TASKS, Criterion, Evaluation, Metric, Task
from attnsurgery.tasks.ratios import ratio_of_sums
from attnsurgery.tasks.temperature import calibrated_loss


@TASKS.register("classification", summary="one class an image")
class Classification(Task):
    """Trains with the cross-entropy of the classes, and judges by the class with the largest output.

    * `top1`: the share of images whose class is predicted.
    * `balanced`: the mean over classes of the share of their images that is predicted, for classes of different sizes.
    * `f1`: the mean over classes of F1, the harmonic mean of precision and recall.

    The loss by which models can be ranked is the cross-entropy at the temperature where it is smallest
    (`calibrated_loss`).
    """

    metrics = (Metric("top1", "top-1"), Metric("balanced", "balanced accuracy"), Metric("f1", "F1"))
    weighs_classes = True
    _weights_K: torch.Tensor | None = None

    def weighted(self, weights_K: torch.Tensor) -> Classification:
        """The same task, in whose loss each image has the weight of its class."""
        task = copy.copy(self)
        task._weights_K = weights_K
        return task

    def criterion(self, label_smoothing: float) -> Criterion:
        weights_K = self._weights_K

        def loss(logits_BK: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(logits_BK, labels_B, label_smoothing=label_smoothing)

        def weighted_loss(logits_BK: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
            nonlocal weights_K
            assert weights_K is not None, "the loss that weighs classes has weights"
            weights_K = weights_K.to(labels_B.device)
            loss_B = F.cross_entropy(logits_BK, labels_B, label_smoothing=label_smoothing, reduction="none")
            return (weights_K[labels_B] * loss_B).mean()

        return loss if weights_K is None else weighted_loss

    def statistics(self, outputs_B: torch.Tensor, targets_B: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return outputs_B.cpu(), targets_B.cpu()

    def evaluate(self, *statistics_N: torch.Tensor) -> Evaluation:
        logits_NK, labels_N = statistics_N
        predicted_N, loss = logits_NK.argmax(dim=1), calibrated_loss(logits_NK, labels_N)
        right_N = predicted_N == labels_N
        label_NK, predicted_NK = (
            F.one_hot(classes_N, logits_NK.shape[1]).double() for classes_N in (labels_N, predicted_N)
        )
        balanced, recall_N = ratio_of_sums(right_N[:, None] * label_NK, label_NK)
        if self.metric.name == "top1":
            return Evaluation(float(right_N.float().mean()), loss, right_N, balanced)
        if self.metric.name == "balanced":
            return Evaluation(balanced, loss, recall_N)
        metric, values_N = ratio_of_sums(2 * label_NK * predicted_NK, label_NK + predicted_NK)
        return Evaluation(metric, loss, values_N, balanced)
