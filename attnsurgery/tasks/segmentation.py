"""Segmentation: each pixel is of one class.

Shape letters: B images of a batch, N images of a split, K classes, H W height and width of a mask, h w of outputs.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch.nn import functional as F

from attnsurgery.data import IGNORED, Sources
from attnsurgery.data.mask_folders import find_masked
from attnsurgery.tasks._base import TASKS, Criterion, Evaluation, Metric, Task
from attnsurgery.tasks.ratios import ratio_of_sums
from attnsurgery.timm_plugin.segmentation import named


@TASKS.register("segmentation", summary="a class for each pixel")
class Segmentation(Task):
    """Trains with the cross-entropy of pixels, and judges by the class with the largest output at each.

    * `miou`: the mean over classes of intersection over union, both summed over all images, as in the PASCAL VOC and
      Cityscapes benchmarks (Everingham et al., "The PASCAL visual object classes (VOC) challenge", 2010, section 4.1).
    * `pixel`: the share of pixels whose class is predicted.

    A model is a timm architecture with a decoder, such as `resnet50_fcn16` (docs/segmentation.md); an architecture
    alone gets the decoder `fcn`. Outputs are resized to the size of the masks, which is that of the original images. So
    models for different sizes of images are compared on the same pixels.
    """

    metrics = (Metric("miou", "mIoU"), Metric("pixel", "pixel accuracy"))

    def sources(self, spec: str | None, size: tuple[int, int]) -> Sources:
        return find_masked(spec)

    def model_of(self, base: str) -> str:
        return named(base)

    def criterion(self, label_smoothing: float) -> Criterion:
        def loss(outputs: Any, masks_BHW: torch.Tensor) -> torch.Tensor:
            outputs = outputs if isinstance(outputs, tuple | list) else (outputs,)
            losses = [_cross_entropy(logits_BKhw, masks_BHW, label_smoothing) for logits_BKhw in outputs]
            return torch.stack(losses).sum()

        return loss

    def statistics(self, outputs_B: torch.Tensor, targets_B: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """For each image, by class the pixels that were right, predicted and true; and loss and number of pixels."""
        rows = [
            _count(logits_1Khw, mask_1HW)
            for logits_1Khw, mask_1HW in zip(torch.split(outputs_B, 1), torch.split(targets_B, 1), strict=True)
        ]
        return tuple(torch.stack(parts).cpu() for parts in zip(*rows, strict=True))

    @property
    def colours(self) -> Callable[[int], tuple[int, int, int]]:
        return colour_of

    def paint(self, outputs_1: torch.Tensor, targets_1: torch.Tensor) -> tuple[Image.Image, Image.Image]:
        """Mask and prediction, each class in its colour; pixels that do not count are black."""
        predicted_HW = _resized(outputs_1, targets_1).argmax(1)[0]
        return _painted(targets_1[0]), _painted(predicted_HW)

    def evaluate(self, *statistics_N: torch.Tensor) -> Evaluation:
        right_NK, predicted_NK, true_NK, loss_N, pixels_N = (part.double() for part in statistics_N)
        if self.metric.name == "miou":
            metric, values_N = ratio_of_sums(right_NK, predicted_NK + true_NK - right_NK)
        else:
            metric, values_N = ratio_of_sums(right_NK.sum(1, keepdim=True), pixels_N[:, None])
        return Evaluation(metric, float(loss_N.sum() / pixels_N.sum()), values_N)


def colour_of(number: int) -> tuple[int, int, int]:
    """A colour for a class: hues in steps of the golden ratio, so that any few in a row are far apart; three tones."""
    hue, tone = number * 0.61803398875 % 1, number % 3
    red, green, blue = colorsys.hls_to_rgb(hue, (0.5, 0.35, 0.7)[tone], (0.65, 0.8, 0.55)[tone])
    return round(255 * red), round(255 * green), round(255 * blue)


def _painted(classes_HW: torch.Tensor) -> Image.Image:
    image = Image.fromarray(classes_HW.to(torch.uint8).numpy()).convert("P")
    colours = [colour_of(number) if number != IGNORED else (0, 0, 0) for number in range(256)]
    image.putpalette([value for colour in colours for value in colour])
    return image


def _cross_entropy(logits_BKhw: torch.Tensor, masks_BHW: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """The mean over the pixels that count; 0 if there are none."""
    logits_BKHW, targets_BHW = _resized(logits_BKhw, masks_BHW), masks_BHW.long()
    total = F.cross_entropy(
        logits_BKHW, targets_BHW, ignore_index=IGNORED, label_smoothing=label_smoothing, reduction="sum"
    )
    return total / (targets_BHW != IGNORED).sum().clamp(min=1)


def _resized(logits_BKhw: torch.Tensor, masks_BHW: torch.Tensor) -> torch.Tensor:
    size = masks_BHW.shape[-2:]
    if logits_BKhw.shape[-2:] == size:
        return logits_BKhw
    return F.interpolate(logits_BKhw, size=size, mode="bilinear", align_corners=False)


def _count(logits_1Khw: torch.Tensor, mask_1HW: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Statistics of one image.

    Returns:
        Numbers of pixels by class, (K,): right, predicted, true; the sum of the loss, and the number of pixels, ().
    """
    logits_1KHW, classes = _resized(logits_1Khw, mask_1HW), logits_1Khw.shape[1]
    counts_1HW = mask_1HW != IGNORED
    true_P = mask_1HW[counts_1HW].long()
    predicted_P = logits_1KHW.argmax(1)[counts_1HW]
    loss = F.cross_entropy(logits_1KHW, mask_1HW.long(), ignore_index=IGNORED, reduction="sum")
    right_K, predicted_K, true_K = (
        torch.bincount(values_P, minlength=classes) for values_P in (true_P[true_P == predicted_P], predicted_P, true_P)
    )
    return right_K, predicted_K, true_K, loss, counts_1HW.sum()
