"""The score of a model on images, how it is trained, and the contract that every evaluator keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from attnsurgery.catalog import Catalog
from attnsurgery.data.batches import Split
from attnsurgery.data.load import Data
from attnsurgery.errors import UsageError
from attnsurgery.tasks import Criterion, Evaluation, Task
from attnsurgery.tasks.classification import Classification

SplitName = Literal["val", "test"]


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """How a model is trained; the same for every model of a search.

    Raises:
        UsageError: a number with which training is impossible.
    """

    epochs: int = 4
    batch_size: int = 64
    optimizer: str = "adamw"
    """Any name that timm's create_optimizer_v2 knows."""
    lr: float = 1e-3
    new_lr_scale: float = 10.0
    """Factor on the learning rate of blocks, which are new, relative to that of the base's weights."""
    weight_decay: float = 0.05
    """Relative to the learning rate `lr`, for the base's weights and those of blocks alike."""
    warmup: float = 0.1
    """Share of all steps over which the learning rate rises linearly."""
    label_smoothing: float = 0.05
    grad_clip: float = 1.0
    device: str = "cpu"
    amp: bool = False
    """Whether to use bfloat16 autocast; on CUDA only."""
    channels_last: bool = False
    """Whether convolutions use the channels-last format on CUDA; on a CPU they always do."""
    tf32: bool = False
    """Whether float32 convolutions and matrix products may round to TF32; on CUDA only."""
    average: float = 0.0
    """Share of the training over which weights are averaged, exponentially; the average is what is left. 0 for none."""
    pieces: int = 1
    """Number of parts that a batch is split into, with accumulated gradients, where memory is known to be short."""

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2 or self.lr <= 0:
            raise UsageError(
                f"epochs={self.epochs}, batch_size={self.batch_size}, lr={self.lr}: training needs at least one epoch, "
                "two images a batch (batch norm), and a learning rate above 0."
            )


@dataclass(frozen=True, slots=True)
class Epoch:
    """A finished epoch, as it is reported."""

    index: int
    """Its number, from 1 on."""
    of: int
    """Number of epochs in all."""
    loss: float
    """Mean training loss."""


class Watch:
    """Callbacks during training; an exception in one of them ends the training and is passed on."""

    def step(self) -> None:
        """Called before each batch, of training and of evaluation."""

    def epoch(self, epoch: Epoch) -> None:
        """Called after each epoch."""

    def accumulating(self, images: int) -> None:
        """Called when memory did not suffice: from now on at most so many images are processed at a time."""


@dataclass(frozen=True, slots=True)
class Score:
    """Results of a model on one split after its training."""

    metric: float
    """The metric of the task, such as top-1 accuracy, 0 to 1."""
    loss: float
    """The mean loss of the task, such as the cross-entropy at the temperature where it is smallest."""
    seconds: float
    """Time that training and evaluation took."""
    epochs: int
    """Number of epochs of the training."""
    values: torch.Tensor = field(repr=False, compare=False)
    """A value for each image, whose mean is the metric, for paired tests: (N,) in the order of the split. Booleans
    where each image is right or wrong."""
    balanced: float | None = None
    """Balanced accuracy, the mean of the accuracies of all classes; None where the classes are balanced, or where it is
    the metric."""

    @classmethod
    def of(cls, evaluation: Evaluation, seconds: float, epochs: int, data: Data) -> Score:
        """The score of a trained model.

        Args:
            evaluation: of the model.
            seconds: time that training and evaluation took.
            epochs: of the training.
            data: tells whether classes differ in size.
        """
        balanced = evaluation.balanced if data.unbalanced else None
        return cls(evaluation.metric, evaluation.loss, seconds, epochs, evaluation.values, balanced)


class Evaluator(ABC):
    """Gives a model a score, after training it in place if the strategy trains.

    Laws, which tests/contracts/test_evaluator_contract.py checks for every entry of the catalog:

    * the same model, data, settings and seed give the same score and weights on the same machine, whatever torch's
      random state, which stays as it was;
    * a score is finite, has an answer for each image of the split, and is that of the model as it is left, in eval
      mode;
    * only values of tensors change: modules, keys, shapes, hooks and `requires_grad` stay the same;
    * `watch.step` is called before each batch, and an exception of the watch is passed on;
    * with `trains`, weights change in as many epochs as the settings say, of which each is reported to the watch, and a
      training that diverges raises a SearchError that names the epoch; without, tensors keep their values, and the
      score has 0 epochs.

    Args:
        data: the three splits.
        settings: how models are trained.
        task: the loss and the metric; by default classification and top-1.
    """

    final = True
    """False for a strategy that only ranks candidates, so that the winner is fine-tuned for its confirmation."""
    trains = True
    """False for a strategy that evaluates a model as it is."""
    unaugmented = ""
    """When the training images are not augmented, whatever `--augment` says, for the report; empty for never."""

    def __init__(self, data: Data, settings: TrainSettings, task: Task | None = None) -> None:
        self.data = data
        self.settings = settings
        self.task = task or Classification()

    @property
    def criterion(self) -> Criterion:
        """The loss that trains a model."""
        return self.task.criterion(self.settings.label_smoothing)

    @abstractmethod
    def score(self, model: nn.Module, seed: int, on: SplitName = "val", watch: Watch | None = None) -> Score:
        """Train `model` in place, then evaluate it on a split.

        Args:
            model: of the task, with an output for each class of the data.
            seed: of the training: order and augmentation of images, dropout.
            on: the split to evaluate on.
            watch: callbacks.

        Raises:
            SearchError: training diverged.
        """

    def split(self, name: SplitName) -> Split:
        """The split of this name."""
        return self.data.val if name == "val" else self.data.test


EVALUATORS: Catalog[Evaluator] = Catalog(
    "evaluator", "attnsurgery.evaluate", group="attnsurgery.evaluators", base=Evaluator
)
