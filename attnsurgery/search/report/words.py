"""Numbers, states and candidates as text, for figures and sentences of the report."""

from __future__ import annotations

from attnsurgery.search.result.record import Record, Timing
from attnsurgery.settings import RankBy

STATES = {
    "trained": "trained",
    "over_budget": "over budget, not trained",
    "over_reduced_budget": "over budget, trained when the budget was larger",
    "too_many_blocks": "too many blocks, not built",
    "duplicate": "duplicate, not trained again",
    "failed": "failed",
}


def state(record: Record) -> str:
    """The key in STATES that describes a trial best."""
    return "over_reduced_budget" if record.state == "over_budget" and record.metric is not None else record.state


def percent(share: float | None) -> str:
    """'95.82 %', or '' if there is no share."""
    return "" if share is None else f"{100 * share:.2f} %"


def score_label(by: RankBy, metric: str) -> str:
    """The label of an axis of scores, on which higher is better.

    Args:
        by: what candidates are ranked by.
        metric: title of the metric.
    """
    return f"validation {metric}, %" if by == "metric" else "validation loss, axis inverted"


def score(record: Record, rung: int, by: RankBy) -> float:
    """The score of a candidate after a rung: the metric in %, or the negated loss; 0 if it has none."""
    value = record.score_on(rung, by)
    return 0.0 if value is None else 100 * value if by == "metric" else value


def loss(record: Record, rung: int) -> str:
    """'0.4821', or '' if there is no loss."""
    value = record.score_on(rung, "loss")
    return "" if value is None else f"{-value:.4f}"


def points(share: float) -> str:
    """A difference of two shares: '+1.20 points'."""
    return f"{100 * share:+.2f} points"


def ms(timing: Timing | None, unit: str = " ms") -> str:
    """A latency with half its 95 % confidence interval."""
    if timing is None:
        return ""
    half = (timing.high_ms - timing.low_ms) / 2
    return f"{timing.ms:.3f} ± {half:.3f}{unit}"


def budgeted_latency(timing: Timing, budget_ms: float | None) -> str:
    """A latency, compared with its budget if there is one."""
    if budget_ms is None:
        return ms(timing)
    comparison = "which is over" if timing.ms > budget_ms else "within"
    return f"{ms(timing)}, {comparison} the budget of {budget_ms:g} ms"


def quantity(count: int, noun: str) -> str:
    """'1 candidate', '2,000 candidates'."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def record_name(record: Record) -> str:
    """'the base' or 'trial 3'."""
    return "the base" if record.number < 0 else f"trial {record.number}"


def rung_name(rung: int) -> str:
    """'rung 1' for rung 0, the lowest."""
    return f"rung {rung + 1}"


def duration(seconds: float) -> str:
    """'42 s', '12 min', '3.5 h'."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
