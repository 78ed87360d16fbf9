"""Multilabel classification: each image is of several classes, of one, or of none.

Shape letters: B images of a batch, N images of a split, K classes.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from attnsurgery.data import Sources, embedded_name, several_classes
from attnsurgery.data.class_sets import WANTED
from attnsurgery.errors import UsageError
from attnsurgery.tasks._base import TASKS, Criterion, Evaluation, Metric, Task
from attnsurgery.tasks.average_precision import mean_average_precision
from attnsurgery.tasks.ratios import ratio_of_sums
from attnsurgery.tasks.temperature import calibrated_loss


@TASKS.register("multilabel", summary="several classes an image")
class Multilabel(Task):
    """Trains with the binary cross-entropy of each class, and judges by how classes rank images.

    * `map`: the mean over classes of average precision (`mean_average_precision`).
    * `f1`: the mean over classes of F1, the harmonic mean of precision and recall, where a class is predicted if its
      probability is above a half.

    The loss by which models can be ranked is the binary cross-entropy at the temperature where it is smallest
    (`calibrated_loss`).
    """

    metrics = (Metric("map", "mAP"), Metric("f1", "F1"))

    def sources(self, spec: str | None, size: tuple[int, int]) -> Sources:
        if spec is None or embedded_name(spec):
            raise UsageError(
                f"--task multilabel: the embedded {embedded_name(spec)} have one class an image. Give --data: {WANTED}."
            )
        return several_classes(spec)

    def criterion(self, label_smoothing: float) -> Criterion:
        def loss(logits_BK: torch.Tensor, targets_BK: torch.Tensor) -> torch.Tensor:
            smooth_BK = targets_BK * (1 - label_smoothing) + label_smoothing / 2
            return F.binary_cross_entropy_with_logits(logits_BK, smooth_BK)

        return loss

    def statistics(self, outputs_B: torch.Tensor, targets_B: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return outputs_B.cpu(), targets_B.cpu()

    def evaluate(self, *statistics_N: torch.Tensor) -> Evaluation:
        logits_NK, targets_NK = statistics_N
        logits_M, labels_M = logits_NK.T.flatten(), targets_NK.T.flatten().long()  # a decision for each image and class
        loss = calibrated_loss(torch.stack([torch.zeros_like(logits_M), logits_M], dim=1), labels_M)
        if self.metric.name == "map":
            metric, values_N = mean_average_precision(logits_NK, targets_NK)
        else:
            predicted_NK, targets_NK = (logits_NK > 0).double(), targets_NK.double()
            metric, values_N = ratio_of_sums(2 * targets_NK * predicted_NK, targets_NK + predicted_NK)
        return Evaluation(metric, loss, values_N)
