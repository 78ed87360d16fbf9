"""How good: the score of a model on images, and the contract that every evaluator keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from attnsurgery.catalog import Catalog
from attnsurgery.errors import UsageError
from attnsurgery.evaluate.batches import Split
from attnsurgery.evaluate.data import Data

SplitName = Literal["val", "test"]


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """How a model is trained; the same for every model of a search.

    Raises:
        UsageError: a number that trains nothing.
    """

    epochs: int = 4
    batch_size: int = 64
    optimizer: str = "adamw"
    """Any name that timm's create_optimizer_v2 knows."""
    lr: float = 1e-3
    new_lr_scale: float = 10.0
    """Grafted blocks learn so many times faster than the weights that were there before."""
    weight_decay: float = 0.05
    warmup: float = 0.1
    """Share of all steps over which the learning rate rises."""
    label_smoothing: float = 0.05
    grad_clip: float = 1.0
    device: str = "cpu"
    amp: bool = False
    """bfloat16 autocast; on CUDA only."""
    channels_last: bool = False
    """Convolutions with channels last; on CUDA only, for on a CPU they always are."""
    tf32: bool = False
    """float32 convolutions and matrix products may round to TF32; on CUDA only."""
    pieces: int = 1
    """A batch is passed in so many from the start, their gradients added up: where memory is known to be short."""

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2 or self.lr <= 0:
            raise UsageError(
                f"epochs={self.epochs}, batch_size={self.batch_size}, lr={self.lr}: training needs at least one epoch, "
                "two images a batch (batch norm), and a learning rate above 0."
            )


@dataclass(frozen=True, slots=True)
class Epoch:
    """One epoch is done; what a display or a stop button needs."""

    index: int
    of: int
    loss: float
    """Mean training loss."""


class Watch:
    """Looks on while a model trains; whatever a method raises ends the training and comes out."""

    def step(self) -> None:
        """Before each batch, trained on or judged by."""

    def epoch(self, epoch: Epoch) -> None:
        """After each epoch."""

    def accumulating(self, images: int) -> None:
        """Memory ran out: from now on at most so many images are passed at a time."""


@dataclass(frozen=True, slots=True)
class Score:
    """How a model did on one split after its training."""

    top1: float
    """Share of images whose most likely class is right, 0 to 1."""
    loss: float
    """Mean cross-entropy without smoothing."""
    seconds: float
    epochs: int
    correct: torch.Tensor = field(repr=False, compare=False)
    """(N,) booleans in the order of the split: what a paired test needs."""
    balanced: float | None = None
    """Mean over the classes of their shares of right answers; None where classes are not of very different sizes."""


class Evaluator(ABC):
    """Gives a model a score, training it in place as far as the strategy does so at all.

    Laws: the same model, data, settings and seed give the same score on the same machine; what the watch raises comes
    out; a training that yields no finite number is a SearchError that says when.
    """

    final = True
    """False: it helps to choose, and the winner is confirmed by a fine-tuning."""

    def __init__(self, data: Data, settings: TrainSettings) -> None:
        self.data = data
        self.settings = settings

    @abstractmethod
    def score(self, model: nn.Module, seed: int, on: SplitName = "val", watch: Watch | None = None) -> Score:
        """Train `model` in place, then measure it on the split called `on`.

        Raises:
            SearchError: training diverged.
        """

    def split(self, name: SplitName) -> Split:
        return self.data.val if name == "val" else self.data.test


EVALUATORS: Catalog[Evaluator] = Catalog("evaluator", "attnsurgery.evaluate", group="attnsurgery.evaluators")
