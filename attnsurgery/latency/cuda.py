"""Latency on a CUDA device: two events around a block of forwards, optionally replayed as one CUDA graph.

A launch returns before its kernels ran, so only events on the stream, read after a synchronisation, give a time.
A graph takes the cost of launching out of the number, as a deployment with graphs or TensorRT would.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from attnsurgery.errors import UsageError
from attnsurgery.latency._base import LATENCY, Call, Conditions, LatencyBackend
from attnsurgery.latency.protocol import Effort

_cuda: Any = torch.cuda  # half of it carries no types


@LATENCY.register("cuda")
class CudaLatency(LatencyBackend):
    """Times between CUDA events on the current stream of the device.

    Raises:
        UsageError: torch sees no CUDA device.
    """

    def __init__(self, conditions: Conditions, effort: Effort | None = None) -> None:
        if not torch.cuda.is_available():
            raise UsageError(
                f"latency on {conditions.device!r} was asked for, but torch sees no CUDA device here. Use --device cpu."
            )
        super().__init__(conditions, effort)

    def time_block(self, call: Call, repeats: int) -> float:
        with torch.cuda.device(self.conditions.device):
            start, end = _cuda.Event(enable_timing=True), _cuda.Event(enable_timing=True)
            start.record()
            for _ in range(repeats):
                call()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end))

    def versions(self) -> dict[str, str]:
        return super().versions() | {
            "gpu": torch.cuda.get_device_name(self.conditions.device),
            "cuda": str(torch.version.cuda),
        }

    @contextmanager
    def _prepared(self, model: nn.Module) -> Iterator[Call]:
        with super()._prepared(model) as call:
            yield call
            if self.conditions.mode == "cudagraph":
                call.__self__.reset()  # type: ignore[attr-defined]  # a graph keeps all activations, until it goes

    def _call(self, call: Call) -> Call:
        if self.conditions.mode != "cudagraph":
            return call
        with torch.cuda.device(self.conditions.device):
            side = _cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # libraries choose and allocate in the first calls, which no graph may hold
                for _ in range(3):
                    call()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
        return graph.replay
