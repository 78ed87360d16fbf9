"""What a search tells while it runs; the command line shows it, a notebook may too, and nobody has to listen."""

from __future__ import annotations

from collections.abc import Sequence

from attnsurgery.evaluate import Epoch
from attnsurgery.search.result.record import Record, Timing


class Listener:
    """Every method may be left out; none may change anything."""

    def lane(self, worker: int) -> Listener:
        """Who is told what one of several workers does, from 0 on; by default nobody else."""
        return self

    def phase(self, text: str) -> None:
        """Something long begins: what it is, for people."""

    def data(self, words: str, notes: Sequence[str]) -> None:
        """The images are known: what they are, and what is not as one might think, for people."""

    def loading(self, split: str, done: int, total: int) -> None:
        """Images of a split were decoded."""

    def epoch(self, epoch: Epoch) -> None:
        """An epoch of whatever is being trained is done."""

    def ready(self, conditions: str, data: str, candidates: int, base: Record) -> None:
        """The base has its latency and its score; trials begin."""

    def trial_started(self, number: int, name: str) -> None:
        """A trial begins with the recipe of that name."""

    def timed(self, number: int, timing: Timing) -> None:
        """A candidate was built, found identical to the base, and measured."""

    def promoted(self, record: Record, rungs: int) -> None:
        """A candidate was trained on a higher one of so many rungs, or could not be."""

    def trial_finished(self, record: Record, trained: int, total: int) -> None:
        """A trial is over.

        Args:
            trained: candidates that are trained by now.
            wanted: candidates that the search is to train.
        """
