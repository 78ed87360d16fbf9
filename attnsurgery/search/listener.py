"""Listener: the callbacks of a running search, for the command line, a notebook or anything else."""

from __future__ import annotations

from collections.abc import Sequence

from attnsurgery.evaluate import Epoch
from attnsurgery.search.result.record import Record, Timing


class Listener:
    """Callbacks of a search. Each one may be overridden, and none may change anything."""

    def lane(self, worker: int) -> Listener:
        """The listener for one of several workers, numbered from 0; by default this one."""
        return self

    def phase(self, text: str) -> None:
        """A longer step begins; the text describes it."""

    def note(self, text: str) -> None:
        """A fact that should stay in view; by default it is shown as a step."""
        self.phase(text)

    def data(self, description: str, notes: Sequence[str]) -> None:
        """The images are loaded: a description, and notes on what is unusual."""

    def loading(self, split: str, count: int, total: int) -> None:
        """`count` of `total` images of a split are decoded."""

    def epoch(self, epoch: Epoch) -> None:
        """An epoch of a training has ended."""

    def ready(self, conditions: str, data: str, candidates: int, base: Record, power: str) -> None:
        """The base is measured and scored, and trials begin.

        Args:
            conditions: of the latency, in words.
            data: a description of the images.
            candidates: number of candidates in the space.
            base: its record.
            power: which gain the verdict can show, in words.
        """

    def trial_started(self, number: int, name: str) -> None:
        """A trial begins.

        Args:
            number: of the trial.
            name: of its recipe.
        """

    def timed(self, number: int, timing: Timing) -> None:
        """The candidate of a trial was built, its outputs were equal to the base's, and it was measured."""

    def promoted(self, record: Record, rungs: int) -> None:
        """A candidate was trained on a higher rung, or its training failed.

        Args:
            record: of the candidate.
            rungs: number of rungs.
        """

    def trial_finished(self, record: Record, trained: int, total: int) -> None:
        """A trial has ended.

        Args:
            record: of the trial.
            trained: number of trained candidates.
            total: number of candidates that the search is to train.
        """
