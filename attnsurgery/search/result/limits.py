"""Budgets: upper limits of a candidate's costs, and by how much a candidate exceeds them.

Parameters and multiply-accumulates are sums over blocks, so they are known before a candidate is built, and one that is
over such a budget is neither built nor measured. Latency and memory are measured before any training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from attnsurgery.search.config import SearchConfig
from attnsurgery.search.result.record import Record

EXACT = ("parameters", "macs")
"""Costs that are known exactly, as sums over blocks, by the fields of a record."""
POSSIBLE = "possible at its size"
"""Name of the limit on blocks that are impossible at the candidate's input size: there may be none."""


Rule = Literal["estimate", "low", "high"]
"""Which number stands for a measured latency: the estimate, or an end of its 95 % confidence interval.

A trial is compared with its budget by the estimate, and the base by the low end, to tell whether a search is hopeless.
A winner has to keep to its budget surely, so it is compared by the high end.
"""


@dataclass(frozen=True, slots=True)
class Check:
    """The result of comparing a candidate with the budgets."""

    within: bool
    """Whether no known cost is over its budget."""
    by: Mapping[str, float]
    """The relative excess over each budget whose cost is known: cost / budget - 1, at most 0 within the budget."""
    words: str
    """The costs that are over their budgets, in words; '' if none is."""


@dataclass(frozen=True, slots=True)
class CostKind:
    """A kind of cost that may have a budget."""

    field: str
    """The field of SearchConfig that holds the budget."""
    of: Callable[[Record, Rule], float | None]
    """The cost of a candidate; None if it is not known."""
    unit: str
    """The unit for messages."""


def _milliseconds(record: Record, rule: Rule) -> float | None:
    if record.timing is None:
        return record.predicted_ms
    return {"estimate": record.timing.ms, "low": record.timing.low_ms, "high": record.timing.high_ms}[rule]


COST_KINDS = {
    "latency": CostKind("latency_budget_ms", _milliseconds, "ms"),
    "parameters": CostKind("budget_params", lambda record, rule: record.parameters, "parameters"),
    "macs": CostKind("budget_macs", lambda record, rule: record.macs, "MACs"),
    "memory": CostKind("budget_mb", lambda record, rule: record.peak_mb, "MB"),
}


@dataclass(frozen=True)
class Budgets:
    """The limits that candidates have to keep to."""

    limits: Mapping[str, float]
    """The largest allowed cost, by the name of the cost."""
    images_per_second: float | None = None
    """The requested throughput, if the latency budget was given as one."""

    @classmethod
    def of(cls, config: SearchConfig) -> Budgets:
        """The budgets in the settings of a search."""
        limits = {name: getattr(config, kind.field) for name, kind in COST_KINDS.items()}
        return cls({name: float(limit) for name, limit in limits.items() if limit is not None}, config.budget_ips)

    def check(self, record: Record, rule: Rule = "estimate") -> Check:
        """Compare a candidate's known costs with the budgets.

        Args:
            record: of the candidate.
            rule: which number stands for a measured latency.
        """
        costs = {name: COST_KINDS[name].of(record, rule) for name in self.limits}
        known_costs = {name: cost for name, cost in costs.items() if cost is not None}
        excess = {name: cost / self.limits[name] - 1.0 for name, cost in known_costs.items()}
        words = ", ".join(
            amount(known_costs[name], COST_KINDS[name].unit) for name, share in excess.items() if share > 0
        )
        return Check(not words, excess, words)

    def describe(self) -> str:
        """The budgets in words, such as '10 ms and 26 M parameters'."""
        throughput = f" ({self.images_per_second:g} images a second)" if self.images_per_second else ""
        amounts = {name: amount(limit, COST_KINDS[name].unit) for name, limit in self.limits.items()}
        return " and ".join(text + (throughput if name == "latency" else "") for name, text in amounts.items())


def amount(value: float, unit: str) -> str:
    if unit in ("ms", "MB"):
        return f"{value:.4g} {unit}"
    power = next((power for power in (9, 6, 3) if value >= 10**power), 0)
    return f"{value / 10**power:.4g} {'GMk'[(9 - power) // 3]} {unit}" if power else f"{value:g} {unit}"
