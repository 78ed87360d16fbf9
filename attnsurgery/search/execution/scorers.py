"""Scorers: how a candidate is scored on one rung, by its own training or as a path through a supernet."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from attnsurgery.data import Data
from attnsurgery.evaluate import Evaluator, Score, TrainSettings, Watch
from attnsurgery.search.execution.supernet import Supernet
from attnsurgery.search.files import to_safetensors
from attnsurgery.search.storage.run_directory import is_own, write_own
from attnsurgery.search.tuning import Training
from attnsurgery.tasks import Task


@dataclass(frozen=True)
class Candidate:
    """A candidate as a model."""

    model: nn.Module
    """The model, which may be trained in place."""
    assignment: Mapping[str, str]
    """A label for every variable."""


class Scorer(ABC):
    """Scores candidates on one rung. The same candidate and seed give the same score on the same machine."""

    data: Data
    settings: TrainSettings

    @abstractmethod
    def score(self, candidate: Candidate, seed: int, watch: Watch | None = None) -> Score:
        """Train a candidate and score it on the validation split.

        Raises:
            SearchError: training diverged.
        """

    @abstractmethod
    def changed(self, pieces: int, training: Training | None) -> Scorer:
        """The same scorer with other settings of its training; the number of epochs stays that of the rung.

        Args:
            pieces: number of parts that each batch is split into, to save memory.
            training: the learning rates; None for the same as before.
        """

    @abstractmethod
    def on(self, data: Data) -> Scorer:
        """The same scorer on the same images at another input size."""


class Alone(Scorer):
    """Trains each candidate by itself, with an evaluator."""

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator = evaluator
        self.data, self.settings = evaluator.data, evaluator.settings

    def score(self, candidate: Candidate, seed: int, watch: Watch | None = None) -> Score:
        return self.evaluator.score(candidate.model, seed, watch=watch)

    def changed(self, pieces: int, training: Training | None) -> Scorer:
        settings = replace(self.settings, pieces=pieces)
        if training is not None:
            settings = replace(settings, lr=training.lr, new_lr_scale=training.block_lr_scale)
        return Alone(type(self.evaluator)(self.data, settings, self.evaluator.task))

    def on(self, data: Data) -> Scorer:
        return Alone(type(self.evaluator)(data, self.settings, self.evaluator.task))


class Shared(Scorer):
    """Scores candidates as paths through one supernet, which is trained before the first score and saved in a file.

    One supernet serves the base and all candidates, so learning rates that are chosen for either do not change it.

    An interrupted training starts again, as only complete weights are saved. A file that the search has not written is
    not read, but renamed.

    Args:
        supernet: of the space.
        base: the model that the supernet was made of. Training starts from its weights at the time of the first score.
        data: the images.
        settings: of the training.
        task: the loss and the metric.
        path: of the file.
    """

    def __init__(
        self, supernet: Supernet, base: nn.Module, data: Data, settings: TrainSettings, task: Task, path: Path
    ) -> None:
        self.data, self.settings, self._task = data, settings, task
        self._supernet, self._base, self._path = supernet, base, path
        self._ready = False

    def score(self, candidate: Candidate, seed: int, watch: Watch | None = None) -> Score:
        if not self._ready:
            if is_own(self._path.parent, self._path.name):
                self._supernet.load(self._path)
            else:
                self.train(seed, watch)
                write_own(self._path.parent, self._path.name, to_safetensors(self._supernet.model))
            self._ready = True
        return self._supernet.score(candidate.assignment, self.data, self.settings, seed, watch, self._task)

    def changed(self, pieces: int, training: Training | None) -> Scorer:
        if pieces == self.settings.pieces:
            return self  # a new one would read the supernet from its file again
        settings = replace(self.settings, pieces=pieces)
        return Shared(self._supernet, self._base, self.data, settings, self._task, self._path)

    def on(self, data: Data) -> Scorer:
        raise AssertionError("a space with several input sizes has no supernet")

    def train(self, seed: int, watch: Watch | None = None) -> None:
        """Train the supernet without saving it.

        Raises:
            SearchError: training diverged.
        """
        self._supernet.begin_from(self._base)
        self._supernet.train(self.data, self.settings, seed, watch, self._task)
