"""Time and peak memory of single runs on a CPU or a GPU."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "5")

import torch
from torch import Tensor

CUDA = torch.cuda.is_available()
Run = Callable[[], Any]


def clock(run: Run) -> float:
    """Seconds of one run; on a GPU between events, after a write that empties the L2 cache."""
    if not CUDA:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    _cache_tensor().zero_()
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    run()
    end_event.record()
    torch.cuda.synchronize()
    return start_event.elapsed_time(end_event) / 1000


_cache_filler: list[Tensor] = []


def _cache_tensor() -> Tensor:
    if not _cache_filler:
        _cache_filler.append(torch.empty(256 * 2**20, dtype=torch.int8, device="cuda"))
    return _cache_filler[0]


def medians(candidates: dict[str, Run], seconds: float) -> dict[str, float]:
    """Median milliseconds of each candidate; they run alternately for about so many seconds, 3 to 200 rounds."""
    for run in candidates.values():
        run()
    round_seconds = sum(clock(run) for run in candidates.values())
    rounds = int(min(max(seconds / round_seconds, 3), 200))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            times[name].append(clock(run))
    return {name: 1000 * statistics.median(values) for name, values in times.items()}


def peak_mib(run: Run) -> float:
    """Peak memory that one run allocates, in MiB."""
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - allocated) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    current = peak = 0
    for _, change in changes:
        current += change
        peak = max(peak, current)
    return peak / 2**20


def forward(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Run:
    """A run of the forward pass."""

    def run() -> None:
        with torch.no_grad():
            function(*inputs)

    return run


def forward_backward(function: Callable[..., Tensor], inputs: Sequence[Tensor], parameters: Sequence[Tensor]) -> Run:
    """A run of the forward and the backward pass, with gradients of inputs and parameters."""
    with torch.no_grad():
        gradient = torch.randn_like(function(*inputs))

    def run() -> None:
        torch.autograd.grad(function(*inputs), [*inputs, *parameters], gradient, allow_unused=True)

    return run
