"""The confirmation of a search as plain data: winner against base on images that the search never saw."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any, Literal

from attnsurgery.search.result.options import Option, advice
from attnsurgery.search.result.record import Record, Timing
from attnsurgery.search.result.sequential import SIGNIFICANT
from attnsurgery.settings import RankBy

Verdict = Literal["better", "no significant difference", "worse", "not trained out"]


@dataclass(frozen=True, slots=True)
class Finalist:
    """One of the best candidates, which are trained again to choose the winner."""

    number: int
    """Number of its trial."""
    digest: str
    """Digest of its recipe."""
    metrics: tuple[float, ...]
    """Top-1 on the validation split for every seed, 0 to 1; empty if a training failed."""
    loss: float | None
    """Loss on the validation split, the mean over the seeds."""
    failed: str = ""
    """Why it was not trained again; '' if it was."""
    slow: bool = False
    """True if its second measurement was not surely within the budget."""
    training: Mapping[str, Any] | None = None
    """Its own best settings, by the fields of `attnsurgery.search.tuning.Training`; None for those of all trials."""

    def rank(self, by: RankBy) -> tuple[float, float]:
        """A key to order finalists by; larger is better."""
        if self.loss is None:
            return -math.inf, 0.0
        metric = fmean(self.metrics)
        return (metric, -self.loss) if by == "metric" else (-self.loss, metric)

    def score(self, by: RankBy) -> str:
        """The score that it is ranked by, as text; the mean over the seeds."""
        return f"{100 * fmean(self.metrics):.2f} %" if by == "metric" else f"loss {self.loss:.4f}"


@dataclass(frozen=True, slots=True)
class Confirmation:
    """Winner against base on the test split."""

    digest: str
    """Digest of the winner's recipe."""
    images: int
    """Number of test images."""
    seeds: int
    """Number of trainings of each."""
    epochs: int
    """Epochs of each training."""
    base_metric: float
    """Top-1 of the base, the mean over the seeds, 0 to 1."""
    winner_metric: float
    """Top-1 of the winner, the mean over the seeds, 0 to 1."""
    low: float
    """Lower end of the 95 % interval of the gain, winner minus base."""
    high: float
    """Upper end of that interval."""
    p_value: float
    """Two-sided p-value of the gain."""
    verdict: Verdict
    """The result of the test at level SIGNIFICANT. No winner is called better than a base that is not trained out."""
    timing: Timing
    """Latency of the winner, measured at the end of the search."""
    finalists: tuple[Finalist, ...] = ()
    """The candidates that the winner was chosen from, the best of the search first."""
    rank_by: RankBy = "metric"
    """The score that the winner was chosen by."""
    anew: bool = False
    """True if the tested trainings are others than those that the winner was chosen by; False in old studies."""
    balanced: tuple[float, float] | None = None
    """Balanced accuracy of base and winner on the test split, the mean over the seeds, 0 to 1; None if the classes are
    of similar sizes."""
    looks: int = field(default=1, compare=False)
    """How often this search has evaluated on the test images; each time after the first is another chance to err."""
    limit: float = SIGNIFICANT
    """The significance level of the last look at the trainings; all looks together have the level SIGNIFICANT."""
    looks_at_seeds: int = 1
    """How often the trainings were compared, while their number grew."""
    first_seeds: int = 0
    """Number of trainings at the first of these looks; 0 in old studies."""
    most_seeds: int = 0
    """Number of trainings at which the comparison would have ended; 0 in old studies."""
    difference: float = 0.0
    """The smallest gain that matters, 0 to 1; 0 in old studies."""
    paired: bool = False
    """True if trainings were compared in pairs of the same seed."""
    options: tuple[Option, ...] = ()
    """The ways to spend the budget that were compared: winner, base, and rivals; () in old studies."""
    metric: str = "top-1"
    """Title of the metric by which models are judged."""
    trained_out: bool | None = None
    """False if the base still gained from longer training; None if that was not tried."""

    def sentence(self) -> str:
        """The result as a sentence, with its numbers."""
        gain = 100 * (self.winner_metric - self.base_metric)
        numbers = (
            f"{self._measure()}{100 * self.winner_metric:.2f} % against {100 * self.base_metric:.2f} % of the base "
            "trained equally long "
            f"({gain:+.2f} points, 95 % interval {100 * self.low:+.2f} to {100 * self.high:+.2f}, "
            f"p = {self.p_value:.3g}{self._of_looks()}, {self.images} test images, "
            f"{self.seeds} seed{'s' if self.seeds > 1 else ''})"
        )
        words = {
            "better": "The winner is better on images that the search never saw",
            "worse": "The winner is WORSE than the base on images that the search never saw",
            "not trained out": "The base is NOT TRAINED OUT: it still gained from longer training, so a better winner "
            "proves nothing yet. On images that the search never saw",
            "no significant difference": "No significant difference on images that the search never saw",
        }
        again = (
            f" This is look {self.looks} of this search at the test images, and each look raises the chance of "
            "a false positive. An independent confirmation needs other images."
            if self.looks > 1
            else ""
        )
        return f"{words[self.verdict]}: {numbers}.{self._of_difference()}{self._by_class()}{again}"

    def _measure(self) -> str:
        """The metric's title in front of its values; '' for top-1, which percentages are taken for."""
        return "" if self.metric == "top-1" else f"{self.metric} "

    def _of_looks(self) -> str:
        """The significance level of the last of several looks, in words."""
        if self.looks_at_seeds == 1:
            return ""
        return f" where {self.limit:.2g} is significant at look {self.looks_at_seeds}"

    def _of_difference(self) -> str:
        """What is known of the smallest gain that matters, as a sentence; '' if it was not asked for."""
        if not self.difference:
            return ""
        text = f"{100 * self.difference:g} points"
        if self.low >= self.difference:
            return f" The gain is at least {text}."
        if self.high < self.difference:
            return f" A gain of {text} is ruled out."
        more = "more seeds or test images" if self.seeds == self.most_seeds else "more test images"
        return f" Whether the gain is {text} or more is open: that needs {more}."

    def _by_class(self) -> str:
        """Balanced accuracy as a sentence, if the classes are of different sizes."""
        if self.balanced is None:
            return ""
        base, winner = self.balanced
        return f" With all classes counted alike, {100 * winner:.2f} % against {100 * base:.2f} %."

    def choice(self) -> str:
        """How the winner was chosen among the finalists, in words; '' if there was only one."""
        if len(self.finalists) < 2:
            return ""
        means = ", ".join(
            f"{finalist.score(self.rank_by)} (trial {finalist.number}"
            f"{', the winner' if finalist.digest == self.digest else ''})"
            for finalist in self.finalists
            if not finalist.failed
        )
        out = ", ".join(
            f"trial {finalist.number} ({finalist.failed.rstrip('.')})" for finalist in self.finalists if finalist.failed
        )
        count = sum(not finalist.failed for finalist in self.finalists)
        best = f"the {count} best" if count > 1 else "the best"
        trainings = max((len(finalist.metrics) for finalist in self.finalists), default=self.seeds)
        seeds = f"{trainings} seed{'s' if trainings > 1 else ''}"
        left_out = f"; left out: {out}" if out else ""
        anew = "; trained once more for the verdict, from fresh seeds" if self.anew and count > 1 else ""
        return f"{best}, trained again from {seeds}, on validation images: {means}{left_out}{anew}"

    def answers(
        self,
        order: Sequence[Record],
        count: int | None = None,
        seeds: tuple[int, int] | None = None,
        difference: float = 0.0,
    ) -> bool:
        """Whether another confirmation would have the same finalists and seeds.

        Args:
            order: all candidates that may be the winner, the best first.
            count: requested number of finalists; None for any.
            seeds: requested number of trainings at the first and at the last look; None for any.
            difference: the smallest gain that matters, which decides between the two numbers, 0 to 1.
        """
        digests = [finalist.digest for finalist in self.finalists]
        if digests != [record.digest for record in order[: len(digests)]]:
            return False
        if seeds is not None and not self._has_seeds(*seeds, difference):
            return False
        actual = sum(not finalist.slow for finalist in self.finalists)
        return count is None or actual == count or (actual < count and len(digests) == len(order))

    def _has_seeds(self, first: int, most: int, difference: float) -> bool:
        """Whether it is a comparison with these numbers of trainings; that of an old study is any with several."""
        if not self.first_seeds:
            return first < most or self.seeds == first
        same = (self.first_seeds, self.most_seeds) == (first, most)
        return same and (first == most or self.difference == difference)

    def after(self, earlier: Mapping[str, Any] | None) -> Confirmation:
        """This confirmation, counted as one more look at the test images than an earlier one of the same search."""
        return replace(self, looks=1 + (earlier.get("looks", 1) if earlier else 0))

    def with_base(self, trained_out: bool | None) -> Confirmation:
        """This confirmation with what is known of the base.

        Args:
            trained_out: False if the base still gained from longer training.
        """
        verdict: Verdict = "not trained out" if trained_out is False and self.verdict == "better" else self.verdict
        return replace(self, verdict=verdict, trained_out=trained_out)

    def advice(self) -> str:
        """The best way to spend the budget, as sentences; '' in old studies."""
        return advice(self.options, self.trained_out is not False) if self.options else ""

    def undone(self) -> Confirmation:
        """This confirmation without finalists: it is made again, but still counts as a look at the test images."""
        return replace(self, finalists=(), seeds=0)

    def as_dict(self) -> dict[str, Any]:
        """JSON data from which `from_dict` makes an equal confirmation."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Confirmation:
        """The confirmation in JSON data."""
        finalists = tuple(
            Finalist(**{**finalist, "metrics": tuple(finalist["metrics"])}) for finalist in data.get("finalists", ())
        )
        balanced = None if data.get("balanced") is None else tuple(data["balanced"])
        options = tuple(map(Option.from_dict, data.get("options", ())))
        made = {"timing": Timing(**data["timing"]), "finalists": finalists, "balanced": balanced, "options": options}
        return cls(**{**data, **made})
