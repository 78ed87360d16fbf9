"""Record: all that is known of one trial, as plain data for the study, the journal and the report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from attnsurgery.evaluate import Score
from attnsurgery.latency import Comparison
from attnsurgery.settings import RankBy

State = Literal["pending", "trained", "over_budget", "too_many_blocks", "duplicate", "failed"]
"""What became of a candidate; it is pending until that is known, and no pending one is stored."""


@dataclass(frozen=True, slots=True)
class Timing:
    """A candidate's latency on the scale of the base's reference."""

    ms: float
    low_ms: float
    high_ms: float
    """95 % interval."""
    ratio: float

    @classmethod
    def of(cls, comparison: Comparison) -> Timing:
        reference = comparison.reference_ms
        return cls(
            ms=comparison.variant_ms,
            low_ms=comparison.ratio_low * reference,
            high_ms=comparison.ratio_high * reference,
            ratio=comparison.ratio,
        )


@dataclass(frozen=True, slots=True)
class Promotion:
    """What a candidate came to on a higher rung of fidelity, trained anew from the base's starting weights."""

    top1: float
    """On the validation split, 0 to 1."""
    loss: float
    seconds: float
    epochs: int
    balanced: float | None = None
    """As in `Record`."""

    @classmethod
    def of(cls, score: Score) -> Promotion:
        return cls(score.top1, score.loss, score.seconds, score.epochs, score.balanced)


@dataclass(frozen=True, slots=True)
class Record:
    """One trial. `number` is the study's; -1 is the base as it is."""

    number: int
    state: State
    assignment: Mapping[str, str] = field(default_factory=dict)
    recipe: Mapping[str, Any] | None = None
    digest: str | None = None
    blocks: int = 0
    timing: Timing | None = None
    predicted_ms: float | None = None
    """What the latency model said, where that was so far over the budget that nothing was measured."""
    top1: float | None = None
    """On the validation split, 0 to 1; on the lowest rung, which every trained candidate has been on."""
    loss: float | None = None
    balanced: float | None = None
    """Mean over the classes of their shares of right answers there; None where classes are of similar sizes."""
    promotions: tuple[Promotion, ...] = ()
    """On the rungs above, from the second lowest up, as far as it came."""
    halted: str | None = None
    """Why it could not be trained on the next rung, though it was its turn."""
    parameters: int | None = None
    macs: int | None = None
    """Multiply-accumulates of one image."""
    peak_mb: float | None = None
    """Most memory at a time in a forward under the conditions of the latency; measured if there is a budget for it."""
    proxies: Mapping[str, float] = field(default_factory=dict)
    """What could be known of it without training, by the proxy's name."""
    seconds: float = 0.0
    epochs: int = 0
    slot: int | None = None
    """How many candidates the search had asked for before this one."""
    attempts: int = 1
    """How often it was begun: more than once where a worker did not come back from it."""
    reason: str | None = None
    """Why it failed, or what it costs that is over a budget."""
    duplicate_of: int | None = None
    drawn: bool = False
    """True if it was drawn uniformly at random, and nothing that was learned had a say in it."""
    fell_back: bool = False
    """True if the sampler's model did not fit what was known by then, and TPE chose."""

    def as_dict(self) -> dict[str, Any]:
        """JSON data from which `from_dict` makes an equal record."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Record:
        timing = data.get("timing")
        promotions = tuple(Promotion(**fields) for fields in data.get("promotions", ()))
        if "foretold_ms" in data:  # its name in studies of version 0.1
            data = {**data, "predicted_ms": data["foretold_ms"]}
            del data["foretold_ms"]
        return cls(**{**data, "timing": Timing(**timing) if timing else None, "promotions": promotions})

    def what(self) -> str:
        """The blocks and their places: 'se(reduction=4) at layer1.0.bn2'."""
        placed = [f"{label} at {place}" for place, label in self.assignment.items() if label != "none"]
        return ", ".join(placed) or "the base as it is"

    def top1_on(self, rung: int) -> float | None:
        """On the validation split, trained as on that rung, 0 being the lowest; None where it has not been."""
        if rung == 0:
            return self.top1
        return self.promotions[rung - 1].top1 if rung <= len(self.promotions) else None

    def balanced_on(self, rung: int) -> float | None:
        """The balanced accuracy there."""
        if rung == 0:
            return self.balanced
        return self.promotions[rung - 1].balanced if rung <= len(self.promotions) else None

    def score_on(self, rung: int, by: RankBy) -> float | None:
        """The same by what candidates are ranked by; larger is better."""
        if by == "top1" or self.top1_on(rung) is None:
            return self.top1_on(rung)
        loss = self.promotions[rung - 1].loss if rung else self.loss
        return None if loss is None else -loss

    @property
    def reached(self) -> int:
        """The highest rung it has been on."""
        return len(self.promotions)

    @property
    def final_top1(self) -> float | None:
        """On the highest rung it has been on; to be compared with others of that rung only."""
        return self.top1_on(self.reached)

    @property
    def final_loss(self) -> float | None:
        """There, too."""
        return self.promotions[-1].loss if self.promotions else self.loss

    def rank(self, by: RankBy) -> tuple[float, ...]:
        """Larger is better: rung, score there, then latency, then the other score."""
        score, other = (self.score_on(self.reached, one) for one in (by, "loss" if by == "top1" else "top1"))
        return self.reached, _or_worst(score), -(self.timing.ms if self.timing else 0.0), _or_worst(other)


def trained(records: Iterable[Record]) -> list[Record]:
    """Those that count: within the budget, and trained themselves."""
    return [record for record in records if record.state == "trained"]


def best(records: Iterable[Record], by: RankBy) -> Record | None:
    """Of those on the highest rung that any is on: the best score, then the lowest latency."""
    return max(trained(records), key=lambda record: record.rank(by), default=None)


def contenders(records: Iterable[Record], by: RankBy) -> list[Record]:
    """Those on the highest rung that any is on, the best first."""
    order = sorted(trained(records), key=lambda record: record.rank(by), reverse=True)
    return [record for record in order if record.reached == order[0].reached]


def front(records: Iterable[Record], by: RankBy) -> list[Record]:
    """Those on the highest rung that no other there beats in both score and latency, the fastest first."""
    order = contenders(records, by)
    order.sort(key=lambda record: record.timing.ms if record.timing else 0.0)
    kept: list[Record] = []
    for record in order:
        if not kept or record.rank(by)[:2] > kept[-1].rank(by)[:2]:
            kept.append(record)
    return kept


def _or_worst(score: float | None) -> float:
    return -math.inf if score is None else score
