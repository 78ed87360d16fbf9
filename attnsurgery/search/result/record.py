"""Record: the result of one trial as plain data for the study, the journal and the report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from attnsurgery.evaluate import Score
from attnsurgery.latency import Comparison
from attnsurgery.search.result.older import NAMES, renamed
from attnsurgery.search.space import INPUT_SIZE, NONE
from attnsurgery.settings import RankBy

State = Literal["pending", "trained", "over_budget", "too_many_blocks", "duplicate", "failed"]
"""The state of a trial: pending until it has a result; pending records are not stored."""


@dataclass(frozen=True, slots=True)
class Timing:
    """A candidate's latency: its measured ratio to the base times the base's reference latency."""

    ms: float
    """The latency, in ms."""
    low_ms: float
    """Lower end of its 95 % interval, in ms."""
    high_ms: float
    """Upper end of its 95 % interval, in ms."""
    ratio: float
    """The latency relative to the base's at the same input size."""

    @classmethod
    def of(cls, comparison: Comparison) -> Timing:
        """The latency of a measured comparison with the base."""
        reference = comparison.reference_ms
        return cls(
            ms=comparison.variant_ms,
            low_ms=comparison.ratio_low * reference,
            high_ms=comparison.ratio_high * reference,
            ratio=comparison.ratio,
        )


@dataclass(frozen=True, slots=True)
class Promotion:
    """The score of a candidate on a higher rung, where it is trained again from the base's starting weights."""

    metric: float
    """Top-1 on the validation split, 0 to 1."""
    loss: float
    """Loss on the validation split."""
    seconds: float
    """Duration of training and scoring."""
    epochs: int
    """Epochs of the training."""
    balanced: float | None = None
    """Balanced accuracy on the validation split, 0 to 1; None if the classes are of similar sizes."""

    @classmethod
    def of(cls, score: Score) -> Promotion:
        """The score of an evaluator, without the answers to single images."""
        return cls(score.metric, score.loss, score.seconds, score.epochs, score.balanced)


@dataclass(frozen=True, slots=True)
class Record:
    """The result of one trial, or of the base."""

    number: int
    """Number of the study's trial; -1 for the base without blocks."""
    state: State
    """The state of the trial."""
    assignment: Mapping[str, str] = field(default_factory=dict)
    """A label for every place of the space."""
    recipe: Mapping[str, Any] | None = None
    """The recipe as JSON data; None for the base without blocks."""
    digest: str | None = None
    """Digest of the recipe; '' for the base without blocks."""
    blocks: int = 0
    """Number of blocks."""
    timing: Timing | None = None
    """The measured latency."""
    predicted_ms: float | None = None
    """The predicted latency, in ms, if it was certainly over the budget, so that nothing was measured."""
    metric: float | None = None
    """Top-1 on the validation split, 0 to 1, on the lowest rung, where every trained candidate is scored."""
    loss: float | None = None
    """Loss on the validation split, on the lowest rung."""
    balanced: float | None = None
    """Balanced accuracy on the validation split, 0 to 1, on the lowest rung; None if classes are of similar sizes."""
    promotions: tuple[Promotion, ...] = ()
    """Scores on the higher rungs that it reached, from the second lowest up."""
    halted: str | None = None
    """Why its training on the next rung failed; None if it did not."""
    parameters: int | None = None
    """Number of parameters."""
    macs: int | None = None
    """Multiply-accumulates of one image."""
    peak_mb: float | None = None
    """Peak memory of a forward pass under the conditions of the latency, in MB, if there is a budget for it."""
    proxies: Mapping[str, float] = field(default_factory=dict)
    """Training-free scores, by name."""
    seconds: float = 0.0
    """Duration of training and scoring on the lowest rung."""
    epochs: int = 0
    """Epochs of the training on the lowest rung."""
    slot: int | None = None
    """Number of candidates that the search had asked for before this one."""
    attempts: int = 1
    """Number of times that work on it began; more than one if a worker was lost."""
    reason: str | None = None
    """Why it failed, or the costs that are over a budget."""
    duplicate_of: int | None = None
    """Number of the earlier trial with the same candidate."""
    drawn: bool = False
    """True if it was drawn uniformly at random, independently of all results."""
    fell_back: bool = False
    """True if the sampler's model did not fit the results, and TPE chose."""

    def as_dict(self) -> dict[str, Any]:
        """JSON data from which `from_dict` makes an equal record."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Record:
        """The record in JSON data, also of an earlier version."""
        if NAMES.keys() & data.keys():
            data = renamed(data)
        timing = data.get("timing")
        promotions = tuple(Promotion(**fields) for fields in data.get("promotions", ()))
        return cls(**{**data, "timing": Timing(**timing) if timing else None, "promotions": promotions})

    def describe(self) -> str:
        """The blocks and their places: 'se(reduction=4) at layer1.0.bn2'; and the input size, if not the base's own."""
        placed = [
            f"{label} at {site}" for site, label in self.assignment.items() if label != NONE and site != INPUT_SIZE
        ]
        size = (self.recipe or {}).get("input_size")
        if size is None:
            return ", ".join(placed) or "the base as it is"
        return f"{', '.join(placed) or 'the base'}, at {' x '.join(map(str, size))} pixels"

    def metric_on(self, rung: int) -> float | None:
        """Top-1 on the validation split on a rung, 0 being the lowest; None if it was not trained there."""
        if rung == 0:
            return self.metric
        return self.promotions[rung - 1].metric if rung <= len(self.promotions) else None

    def balanced_on(self, rung: int) -> float | None:
        """Balanced accuracy on the validation split on a rung; None if it was not trained there."""
        if rung == 0:
            return self.balanced
        return self.promotions[rung - 1].balanced if rung <= len(self.promotions) else None

    def score_on(self, rung: int, by: RankBy) -> float | None:
        """The score on a rung that candidates are ranked by, larger is better; None if it was not trained there."""
        if by == "metric" or self.metric_on(rung) is None:
            return self.metric_on(rung)
        loss = self.promotions[rung - 1].loss if rung else self.loss
        return None if loss is None else -loss

    @property
    def reached(self) -> int:
        """The highest rung that it was trained on, 0 being the lowest."""
        return len(self.promotions)

    @property
    def final_metric(self) -> float | None:
        """Top-1 on the highest rung that it was trained on; comparable only with candidates of the same rung."""
        return self.metric_on(self.reached)

    @property
    def final_loss(self) -> float | None:
        """Loss on the highest rung that it was trained on; comparable only with candidates of the same rung."""
        return self.promotions[-1].loss if self.promotions else self.loss

    def rank(self, by: RankBy) -> tuple[float, ...]:
        """A key to order candidates by, larger is better: rung, score on it, lower latency, the other score."""
        score = self.score_on(self.reached, by)
        other_score = self.score_on(self.reached, "loss" if by == "metric" else "metric")
        return self.reached, _or_worst(score), -(self.timing.ms if self.timing else 0.0), _or_worst(other_score)


def trained(records: Iterable[Record]) -> list[Record]:
    """The records of trained candidates within the budget; duplicates are not among them."""
    return [record for record in records if record.state == "trained"]


def best(records: Iterable[Record], by: RankBy) -> Record | None:
    """The candidate with the best score on the highest rung that any has reached; ties go to the lower latency."""
    return max(trained(records), key=lambda record: record.rank(by), default=None)


def contenders(records: Iterable[Record], by: RankBy) -> list[Record]:
    """The candidates on the highest rung that any has reached, the best first."""
    order = sorted(trained(records), key=lambda record: record.rank(by), reverse=True)
    return [record for record in order if record.reached == order[0].reached]


def front(records: Iterable[Record], by: RankBy) -> list[Record]:
    """The Pareto front of score and latency on the highest rung that any candidate has reached, the fastest first."""
    order = contenders(records, by)
    order.sort(key=lambda record: record.timing.ms if record.timing else 0.0)
    optimal: list[Record] = []
    for record in order:
        if not optimal or record.rank(by)[:2] > optimal[-1].rank(by)[:2]:
            optimal.append(record)
    return optimal


def _or_worst(score: float | None) -> float:
    return -math.inf if score is None else score
