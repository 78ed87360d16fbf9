"""Latency on the CPU: perf_counter around a block of forwards, with a fixed number of threads."""

from __future__ import annotations

import time

from attnsurgery.latency._base import LATENCY, Call, LatencyBackend


@LATENCY.register("cpu")
class CpuLatency(LatencyBackend):
    """Forwards on the CPU return when they are done, so the wall clock is the latency."""

    def time_block(self, call: Call, repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) * 1000.0
