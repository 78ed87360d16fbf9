"""How a candidate comes to its score on one rung: trained by itself, or as a path through a supernet."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from attnsurgery.evaluate import Data, Evaluator, Score, TrainSettings, Watch
from attnsurgery.search.execution.supernet import Supernet
from attnsurgery.search.files import packed
from attnsurgery.search.storage.run_directory import is_own, write_own


@dataclass(frozen=True)
class Candidate:
    """A model that may be trained in place, and the choices that it was made from."""

    model: nn.Module
    assignment: Mapping[str, str]


class Scorer(ABC):
    """Of one rung. The same candidate and seed give the same score on the same machine."""

    data: Data
    settings: TrainSettings

    @abstractmethod
    def score(self, candidate: Candidate, seed: int, watch: Watch | None = None) -> Score:
        """On the validation split.

        Raises:
            SearchError: training diverged.
        """

    @abstractmethod
    def in_pieces(self, pieces: int) -> Scorer:
        """The same, with training batches passed in so many pieces."""


class Alone(Scorer):
    """Each candidate is trained by itself, as the evaluator does."""

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator = evaluator
        self.data, self.settings = evaluator.data, evaluator.settings

    def score(self, candidate: Candidate, seed: int, watch: Watch | None = None) -> Score:
        return self.evaluator.score(candidate.model, seed, watch=watch)

    def in_pieces(self, pieces: int) -> Scorer:
        return Alone(type(self.evaluator)(self.data, replace(self.settings, pieces=pieces)))


class Shared(Scorer):
    """All candidates are paths through one supernet. It is trained before the first score, and kept in a file.

    A training that is broken off begins anew: what is kept is whole. A file that no search has written there is not
    read, and is renamed.
    """

    def __init__(self, supernet: Supernet, base: nn.Module, data: Data, settings: TrainSettings, path: Path) -> None:
        """
        Args:
            base: the model that the supernet was made of; its weights of the moment of the first score are begun with.
            path: of the file.
        """
        self.data, self.settings = data, settings
        self._supernet, self._base, self._path = supernet, base, path
        self._ready = False

    def score(self, candidate: Candidate, seed: int, watch: Watch | None = None) -> Score:
        if not self._ready:
            if is_own(self._path.parent, self._path.name):
                self._supernet.load(self._path)
            else:
                self.train(seed, watch)
                write_own(self._path.parent, self._path.name, packed(self._supernet.model))
            self._ready = True
        return self._supernet.score(candidate.assignment, self.data, self.settings, seed, watch)

    def in_pieces(self, pieces: int) -> Scorer:
        settings = replace(self.settings, pieces=pieces)
        return Shared(self._supernet, self._base, self.data, settings, self._path)

    def train(self, seed: int, watch: Watch | None = None) -> None:
        """Train the supernet, and keep nothing of it on the disk.

        Raises:
            SearchError: training diverged.
        """
        self._supernet.begin_from(self._base)
        self._supernet.train(self.data, self.settings, seed, watch)
