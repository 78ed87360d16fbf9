"""The results of measurements: the latency of one model, single calls, and two models compared."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

_MAX_LEFT_OUT = 0.2
"""Largest share of rounds that may be left out of a steady measurement."""
_MAX_DRIFT = 0.05
"""Largest drift of a steady measurement."""


@dataclass(frozen=True, slots=True)
class Latency:
    """The time of one forward pass of one batch, with the conditions that it holds for."""

    p50_ms: float
    """Median."""
    p90_ms: float
    """90th percentile."""
    runs: int
    """Number of forward passes that were timed, without warm-up."""
    noise: float
    """Half the width of the 95 % confidence interval of the median, as a share of the median."""
    device: str
    dtype: str
    batch_size: int
    mode: str
    versions: dict[str, str] = field(default_factory=dict)
    """Software and hardware that the latency depends on."""
    left_out: float = 0.0
    """Share of the rounds that were disturbed by something else on the machine, and do not count."""
    drift: float = 0.0
    """By how much the end of the measurement was slower than its beginning, as a share: the machine throttles."""
    eager_ms: float | None = None
    """For a CUDA graph, the median of the same forward pass run eagerly, whose kernels Python launches."""
    state: dict[str, Any] = field(default_factory=dict)
    """For a GPU, just after the measurement: clocks, temperature, power, and reasons for throttling."""

    @property
    def images_per_second(self) -> float:
        """Throughput of forward passes one after another."""
        return 1000.0 * self.batch_size / self.p50_ms

    def details(self) -> str:
        """The time without a CUDA graph and the state of the GPU, in words; '' where neither is known."""
        parts = []
        if self.eager_ms is not None:
            ratio = self.eager_ms / self.p50_ms
            parts.append(f"run eagerly it takes {self.eager_ms:.3f} ms, {ratio:.2f} times as long")
        for name, value in self.state.items():
            text = (" and ".join(value) or "no") if isinstance(value, list) else str(value)
            parts.append(f"{name.replace('_', ' ')} {text}")
        return ", ".join(parts)

    @property
    def steady(self) -> bool:
        """False if other work on the machine disturbed the measurement, or the machine changed its speed."""
        return self.left_out <= _MAX_LEFT_OUT and abs(self.drift) <= _MAX_DRIFT


@dataclass(frozen=True, slots=True)
class Singles:
    """Times of single calls, each of which is waited for, as in a server that answers one request at a time."""

    p50_ms: float
    """Median."""
    p90_ms: float
    """90th percentile."""
    p99_ms: float
    """99th percentile."""
    calls: int
    """Number of calls that were timed."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two models that were measured alternately under the same conditions."""

    base: Latency
    variant: Latency
    ratio: float
    """Median over the rounds of the variant's time divided by the base's."""
    ratio_low: float
    ratio_high: float
    """95 % confidence interval of the ratio."""
    reference_ms: float
    """The base's time on whose scale every variant of one search is expressed."""

    @property
    def variant_ms(self) -> float:
        """The variant's time on the scale of the reference, independent of changes of the machine in between."""
        return self.ratio * self.reference_ms
