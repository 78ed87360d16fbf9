"""A task of one's own that is no classification: a number for each image, here the brightness that its name tells."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch.nn import functional as F

from attnsurgery.data import Source, Sources
from attnsurgery.tasks import Criterion, Evaluation, Metric, Task


class Brightness(Task):
    """Predicts the number in names such as `0.25-7.png`; judges by R^2, the explained share of the variance."""

    metrics = (Metric("r2", "R²"),)

    def sources(self, spec: str | None, size: tuple[int, int]) -> Sources:
        paths = tuple(sorted(Path(str(spec)).glob("*.png")))
        targets_N1 = torch.tensor([[float(path.stem.partition("-")[0])] for path in paths])
        names = tuple(path.name for path in paths)
        images = Source(names, (0,) * len(paths), lambda i: Image.open(paths[i]), paths, targets=targets_N1)
        return Sources(str(spec), (), images, outputs=1)

    def criterion(self, label_smoothing: float) -> Criterion:
        return F.mse_loss

    def statistics(self, outputs_B: torch.Tensor, targets_B: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return outputs_B.cpu(), targets_B.cpu()

    def evaluate(self, *statistics_N: torch.Tensor) -> Evaluation:
        outputs_N1, targets_N1 = statistics_N
        error_N = (outputs_N1 - targets_N1).double().square()[:, 0]
        values_N = 1 - error_N / targets_N1.double().var(correction=0)
        return Evaluation(float(values_N.mean()), float(error_N.mean()), values_N)
