"""Latency on the CPU: perf_counter around a block of forwards, with a fixed number of threads."""

from __future__ import annotations

import time
from functools import cached_property

import torch

from attnsurgery.errors import UsageError
from attnsurgery.latency._base import LATENCY, Call, LatencyBackend
from attnsurgery.latency.conditions import Conditions
from attnsurgery.latency.protocol import Effort

_FLUSHED_BYTES = 256 << 20
"""More than the last-level cache of common processors."""


@LATENCY.register("cpu")
class CpuLatency(LatencyBackend):
    """Times forward passes on the CPU by the wall clock, since they return when they are finished.

    Args:
        conditions: of a CPU.
        effort: how long it measures; by default `Effort()`.

    Raises:
        UsageError: conditions of another device, where calls return before their work is finished.
    """

    def __init__(self, conditions: Conditions, effort: Effort | None = None) -> None:
        if torch.device(conditions.device).type != "cpu":
            raise UsageError(
                f"the latency backend 'cpu' cannot time {conditions.device!r}, where a call returns before its work is "
                f"done. Use the device's own: --latency {torch.device(conditions.device).type}."
            )
        super().__init__(conditions, effort)

    def time_block(self, call: Call, repeats: int) -> float:
        if self.conditions.cold_cache:
            return sum(self._cold_call(call) for _ in range(repeats))
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) * 1000.0

    def _cold_call(self, call: Call) -> float:
        """The time of one call after a write that fills the last-level cache, in ms."""
        self._flushed.add_(1)
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1000.0

    @cached_property
    def _flushed(self) -> torch.Tensor:
        return torch.zeros(_FLUSHED_BYTES, dtype=torch.int8)
