"""The verdict on a search, as plain data: winner against base on images that the search never saw."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any, Literal

from attnsurgery.search.result.record import Record, Timing
from attnsurgery.settings import RankBy

Verdict = Literal["better", "no significant difference", "worse"]
SIGNIFICANT = 0.05
"""A p-value below it makes a difference more than chance."""


@dataclass(frozen=True, slots=True)
class Finalist:
    """One of the few best, trained again."""

    number: int
    digest: str
    top1s: tuple[float, ...]
    """On the validation split, of every seed; none if one of them failed."""
    loss: float | None
    """There too, the mean over the seeds."""
    failed: str = ""
    """Why it was not trained again, or could not be."""
    slow: bool = False
    """When it was measured again, it was not surely within its budget."""

    def rank(self, by: RankBy) -> tuple[float, float]:
        """Larger is better."""
        if self.loss is None:
            return -math.inf, 0.0
        top1 = fmean(self.top1s)
        return (top1, -self.loss) if by == "top1" else (-self.loss, top1)

    def score(self, by: RankBy) -> str:
        """What it is ranked by, the mean over the seeds, for people."""
        return f"{100 * fmean(self.top1s):.2f} %" if by == "top1" else f"loss {self.loss:.4f}"


@dataclass(frozen=True, slots=True)
class Confirmation:
    """Winner against base on the test split."""

    digest: str
    images: int
    seeds: int
    epochs: int
    base_top1: float
    """Mean over the seeds, 0 to 1."""
    winner_top1: float
    low: float
    """95 % interval of the gain, winner less base, 0 to 1."""
    high: float
    p_value: float
    verdict: Verdict
    timing: Timing
    """Measured again, after everything else."""
    finalists: tuple[Finalist, ...] = ()
    """Among whom the winner was chosen, the best of the search first."""
    rank_by: RankBy = "top1"
    anew: bool = False
    """The trainings that were tested are none of those that the winner was chosen by. False of verdicts from before
    that was so."""
    balanced: tuple[float, float] | None = None
    """Of base and winner: the mean over the classes of their shares of right test images, and over the seeds; None
    where classes are of similar sizes."""
    looks: int = field(default=1, compare=False)
    """How often this search has looked at the test images by now: each look after the first is a chance more."""

    def sentence(self) -> str:
        """The result for people, with its numbers."""
        gain = 100 * (self.winner_top1 - self.base_top1)
        numbers = (
            f"{100 * self.winner_top1:.2f} % against {100 * self.base_top1:.2f} % of the base trained equally long "
            f"({gain:+.2f} points, 95 % interval {100 * self.low:+.2f} to {100 * self.high:+.2f}, "
            f"p = {self.p_value:.3g}, {self.images} test images, {self.seeds} seed{'s' if self.seeds > 1 else ''})"
        )
        words = {
            "better": "The winner is better on images that the search never saw",
            "worse": "The winner is WORSE than the base on images that the search never saw",
            "no significant difference": "No significant difference on images that the search never saw",
        }
        again = (
            f" This is look {self.looks} of this search at the test images, and each look is a chance more to find a "
            "difference: one of its own would need other images."
            if self.looks > 1
            else ""
        )
        return f"{words[self.verdict]}: {numbers}.{self._by_class()}{again}"

    def _by_class(self) -> str:
        """Balanced accuracy, where top-1 is mostly that of the largest class."""
        if self.balanced is None:
            return ""
        base, winner = self.balanced
        return f" With all classes counted alike, {100 * winner:.2f} % against {100 * base:.2f} %."

    def choice(self) -> str:
        """How the winner came out of the finalists; nothing where there was only one."""
        if len(self.finalists) < 2:
            return ""
        means = ", ".join(
            f"{one.score(self.rank_by)} (trial {one.number}{', the winner' if one.digest == self.digest else ''})"
            for one in self.finalists
            if not one.failed
        )
        out = ", ".join(f"trial {one.number} ({one.failed.rstrip('.')})" for one in self.finalists if one.failed)
        count = sum(not one.failed for one in self.finalists)
        who = f"the {count} best" if count > 1 else "the best"
        seeds = f"{self.seeds} seed{'s' if self.seeds > 1 else ''}"
        left_out = f"; left out: {out}" if out else ""
        anew = "; trained once more for the verdict, from fresh seeds" if self.anew and count > 1 else ""
        return f"{who}, trained again from {seeds}, on validation images: {means}{left_out}{anew}"

    def answers(self, order: Sequence[Record], wanted: int | None = None, seeds: int | None = None) -> bool:
        """True if these would be confirmed in this order, and as many, from as many seeds, as are wanted."""
        digests = [one.digest for one in self.finalists]
        if digests != [one.digest for one in order[: len(digests)]] or self.seeds != (seeds or self.seeds):
            return False
        there = sum(not one.slow for one in self.finalists)
        return wanted is None or there == wanted or (there < wanted and len(digests) == len(order))

    def after(self, earlier: Mapping[str, Any] | None) -> Confirmation:
        """The same, counted as one look more than an earlier confirmation of the same search."""
        return replace(self, looks=1 + (earlier.get("looks", 1) if earlier else 0))

    def undone(self) -> Confirmation:
        """The same as one that answers nothing any more, but counts as a look at the test images."""
        return replace(self, finalists=(), seeds=0)

    def as_dict(self) -> dict[str, Any]:
        """JSON data from which `from_dict` makes an equal confirmation."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Confirmation:
        finalists = tuple(Finalist(**{**one, "top1s": tuple(one["top1s"])}) for one in data.get("finalists", ()))
        balanced = None if data.get("balanced") is None else tuple(data["balanced"])
        return cls(**{**data, "timing": Timing(**data["timing"]), "finalists": finalists, "balanced": balanced})
