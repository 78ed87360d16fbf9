"""Budgets: the most that a candidate may cost, and by how much one is over.

Parameters and multiply-accumulates add up, so they are known of every candidate before any is built: what is over
such a budget is neither built nor measured. Milliseconds and memory are measured, before any training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from attnsurgery.search.config import SearchConfig
from attnsurgery.search.result.record import Record

EXACT = ("parameters", "macs")
"""Costs that are sums over blocks, by the fields of a record."""


Rule = Literal["estimate", "low", "high"]
"""Which number stands for a measured latency: the estimate itself, or an end of its 95 % confidence interval. A trial
is judged by the estimate. Whether a search is hopeless is judged by the low end. A winner has to keep to its budget
surely, so it is judged by the high end."""


@dataclass(frozen=True, slots=True)
class Check:
    """A candidate against the budgets."""

    within: bool
    by: Mapping[str, float]
    """Of each budget whose cost is known: by how much it is exceeded, as a share of it; below 0 within."""
    words: str
    """The costs that are over their budgets; '' if none is."""


@dataclass(frozen=True, slots=True)
class _Kind:
    field: str
    """Of SearchConfig."""
    of: Callable[[Record, Rule], float | None]
    unit: str


def _milliseconds(record: Record, rule: Rule) -> float | None:
    if record.timing is None:
        return record.predicted_ms
    return {"estimate": record.timing.ms, "low": record.timing.low_ms, "high": record.timing.high_ms}[rule]


_KINDS = {
    "latency": _Kind("most_ms", _milliseconds, "ms"),
    "parameters": _Kind("budget_params", lambda record, rule: record.parameters, "parameters"),
    "macs": _Kind("budget_macs", lambda record, rule: record.macs, "MACs"),
    "memory": _Kind("budget_mb", lambda record, rule: record.peak_mb, "MB"),
}


@dataclass(frozen=True)
class Budgets:
    """What candidates have to keep to, by the name of the cost."""

    most: Mapping[str, float]
    images_per_second: float | None = None
    """The throughput that the latency budget was asked for as, if it was."""

    @classmethod
    def of(cls, config: SearchConfig) -> Budgets:
        asked = {name: getattr(config, kind.field) for name, kind in _KINDS.items()}
        return cls({name: float(most) for name, most in asked.items() if most is not None}, config.budget_ips)

    def check(self, record: Record, rule: Rule = "estimate") -> Check:
        """Whether a candidate keeps to all budgets, as far as its costs are known.

        Args:
            rule: which number stands for a latency that was measured.
        """
        costs = {name: _KINDS[name].of(record, rule) for name in self.most}
        known = {name: cost for name, cost in costs.items() if cost is not None}
        excess = {name: cost / self.most[name] - 1.0 for name, cost in known.items()}
        words = ", ".join(_amount(known[name], _KINDS[name].unit) for name, share in excess.items() if share > 0)
        return Check(not words, excess, words)

    def describe(self) -> str:
        """For people: '10 ms and 26 M parameters'."""
        throughput = f" ({self.images_per_second:g} images a second)" if self.images_per_second else ""
        said = {name: _amount(most, _KINDS[name].unit) for name, most in self.most.items()}
        return " and ".join(words + (throughput if name == "latency" else "") for name, words in said.items())


def _amount(value: float, unit: str) -> str:
    if unit in ("ms", "MB"):
        return f"{value:.4g} {unit}"
    power = next((power for power in (9, 6, 3) if value >= 10**power), 0)
    return f"{value / 10**power:.4g} {'GMk'[(9 - power) // 3]} {unit}" if power else f"{value:g} {unit}"
