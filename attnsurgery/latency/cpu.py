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
"""More than the last-level cache of any processor that is common."""


@LATENCY.register("cpu")
class CpuLatency(LatencyBackend):
    """Forwards on the CPU return when they are done, so the wall clock is the latency.

    Raises:
        UsageError: conditions of another device, where calls return before their work is done.
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
        """One call behind a write that takes up the whole last-level cache."""
        self._flushed.add_(1)
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1000.0

    @cached_property
    def _flushed(self) -> torch.Tensor:
        return torch.zeros(_FLUSHED_BYTES, dtype=torch.int8)
