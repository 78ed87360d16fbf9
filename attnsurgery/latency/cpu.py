"""Latency on the CPU: perf_counter around a block of forwards, with a fixed number of threads."""

from __future__ import annotations

import time

import torch

from attnsurgery.errors import UsageError
from attnsurgery.latency._base import LATENCY, Call, Conditions, LatencyBackend
from attnsurgery.latency.protocol import Effort


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
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) * 1000.0
