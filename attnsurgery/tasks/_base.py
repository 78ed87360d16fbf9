"""What a model learns: the images with their targets, the model for them, the loss that trains it, the metric that
judges it, and the value of each image for a test.

Shape letters: B images of a batch, N images of a split.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image

from attnsurgery.catalog import Catalog
from attnsurgery.data import Sources, labelled_images
from attnsurgery.errors import UnknownNameError, did_you_mean

Criterion = Callable[[Any, torch.Tensor], torch.Tensor]
"""Maps the outputs of a model in training mode, in float32, and the targets of a batch to the mean loss, a scalar."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A number by which models are judged; larger is better, and it is written as a percentage."""

    name: str
    """As `--metric` takes it, such as 'top1'."""
    title: str
    """In a sentence, such as 'top-1'."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How a model did on the images of a split."""

    metric: float
    """The metric."""
    loss: float
    """The mean loss, by which models can be ranked too."""
    values: torch.Tensor
    """(N,) one value for each image, whose mean is the metric. Two models are compared by the differences between the
    values of the same images. Booleans where each image is right or wrong."""
    balanced: float | None = None
    """Balanced accuracy, 0 to 1; None where there are no classes, or it is the metric itself."""


class Task(ABC):
    """A task: what is trained on, how outputs are judged, and how two models are compared.

    Laws, which tests/contracts/test_task_contract.py checks for every entry of the catalog:

    * the mean of the values is the metric, up to rounding;
    * the statistics of batches, concatenated, give the same evaluation however the split is divided into batches;
    * values are finite for finite outputs, and the order of the images does not change the metric;
    * the criterion is finite and differentiable, and lower for outputs that are right.

    Args:
        metric: name of the metric; by default the first of `metrics`.

    Raises:
        UnknownNameError: the task has no such metric.
    """

    metrics: ClassVar[tuple[Metric, ...]]
    """The metrics that models can be judged by, the default first."""
    weighs_classes: ClassVar[bool] = False
    """Whether the loss can weigh classes (`weighted`)."""

    def __init__(self, metric: str | None = None) -> None:
        known = {one.name: one for one in self.metrics}
        if metric is not None and metric not in known:
            raise UnknownNameError(
                f"--metric {metric}: this task has no such metric. Known: {', '.join(known)}."
                f"{did_you_mean(metric, known)}"
            )
        self.metric = self.metrics[0] if metric is None else known[metric]

    def sources(self, spec: str | None, size: tuple[int, int]) -> Sources:
        """The images that `--data` names, with their targets. By default each image is of one class.

        Targets of other kinds are `Source.targets`, (N, ...), with `Sources.outputs` as the number of a model's
        outputs, or `Source.masks`. Splits that the data does not come with are taken out of its training images.

        Args:
            spec: what `--data` says; None if it says nothing.
            size: height and width that drawn images are to have; (0, 0) where none is opened.

        Raises:
            UsageError, SearchError: there is no such data, or it is of another kind.
        """
        return labelled_images(spec, size)

    def model_of(self, base: str) -> str:
        """The timm name of the model for this task that a base stands for; by default its own.

        Args:
            base: a timm name, as the user gave it.
        """
        return base

    def weighted(self, weights_K: torch.Tensor) -> Task:
        """The same task with a loss that weighs the images of each class; for tasks with `weighs_classes`.

        Args:
            weights_K: the weight of each class, whose mean over training images is 1.
        """
        raise NotImplementedError(f"{type(self).__name__} weighs no classes")

    @abstractmethod
    def criterion(self, label_smoothing: float) -> Criterion:
        """The loss that trains a model.

        Args:
            label_smoothing: share of the target that is given to all classes alike, 0 to 1; a task without classes
                ignores it.
        """

    def paint(self, outputs_1: torch.Tensor, targets_1: torch.Tensor) -> tuple[Image.Image, Image.Image] | None:
        """What a model should return for an image, and what it returns, as pictures for the report; None for none.

        Args:
            outputs_1: of one image, with a batch dimension of 1, on the host.
            targets_1: likewise.
        """
        return None

    @property
    def colours(self) -> Callable[[int], tuple[int, int, int]] | None:
        """The colour of each class in these pictures, red, green and blue from 0 to 255; None if there are none."""
        return None

    @abstractmethod
    def statistics(self, outputs_B: torch.Tensor, targets_B: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What an evaluation needs of a batch: tensors with one row for each image, on the host.

        Args:
            outputs_B: of the model, in float32.
            targets_B: what they should have been, as `Source` says.
        """

    @abstractmethod
    def evaluate(self, *statistics_N: torch.Tensor) -> Evaluation:
        """Judge a model by the statistics of all images of a split.

        Args:
            statistics_N: what `statistics` returned, the batches concatenated.
        """


def balanced_weights(labels_N: torch.Tensor, classes: int) -> torch.Tensor:
    """Weights of classes that are inversely proportional to their numbers of images, (K,), with mean 1 over images.

    They are N / (K n) for a class with n of N images, as scikit-learn's class_weight="balanced" (King and Zeng,
    "Logistic regression in rare events data", 2001).

    Args:
        labels_N: the class of each training image.
        classes: their number, each with at least one image.

    Example: a class of three images and one of a single image
        >>> balanced_weights(torch.tensor([0, 0, 1, 0]), 2).tolist()
        [0.6666666865348816, 2.0]
    """
    counts_K = torch.bincount(labels_N, minlength=classes)
    return (len(labels_N) / (classes * counts_K.double())).float()


TASKS: Catalog[Task] = Catalog("task", "attnsurgery.tasks", group="attnsurgery.tasks", base=Task)


def task_of(name: str, metric: str | None = None) -> Task:
    """The task of a name, judged by a metric.

    Args:
        name: of the catalog, or 'package.module:Class' of your own.
        metric: name of the metric; None for the task's default.

    Raises:
        UnknownNameError: there is no such task or metric.
        UsageError: the class cannot be imported, or is no task.

    Example: the default, and a metric for classes of different sizes
        >>> task_of("classification").metric.title
        'top-1'
        >>> task_of("classification", "balanced").metric.title
        'balanced accuracy'
    """
    return TASKS[name](metric)
