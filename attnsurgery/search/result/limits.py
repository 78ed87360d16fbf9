"""Budgets: the most that a candidate may cost, and by how much one is over.

Parameters and multiply-accumulates add up, so they are known of every candidate before any is built: what is over
such a budget is neither built nor measured. Milliseconds and memory are measured, before any training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from attnsurgery.search.config import SearchConfig
from attnsurgery.search.result.record import Record

EXACT = ("parameters", "macs")
"""Costs that are sums over blocks, by the fields of a record."""


@dataclass(frozen=True, slots=True)
class _Kind:
    field: str
    """Of SearchConfig."""
    of: Callable[[Record], float | None]
    unit: str


_KINDS = {
    "latency": _Kind("most_ms", lambda record: record.timing.ms if record.timing else record.predicted_ms, "ms"),
    "parameters": _Kind("budget_params", lambda record: record.parameters, "parameters"),
    "macs": _Kind("budget_macs", lambda record: record.macs, "MACs"),
    "memory": _Kind("budget_mb", lambda record: record.peak_mb, "MB"),
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

    def excess(self, record: Record) -> dict[str, float]:
        """Of each budget whose cost is known: by how much the record is over it, as a share of it; below 0 within."""
        costs = {name: _KINDS[name].of(record) for name in self.most}
        return {name: cost / self.most[name] - 1.0 for name, cost in costs.items() if cost is not None}

    def over(self, record: Record) -> str:
        """The costs that are over their budgets, in words; '' if none is."""
        over = [name for name, excess in self.excess(record).items() if excess > 0]
        return ", ".join(_amount(float(_KINDS[name].of(record) or 0.0), _KINDS[name].unit) for name in over)

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
