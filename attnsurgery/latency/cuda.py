"""Latency on a CUDA device: two events around a block of forward passes, optionally replayed as one CUDA graph.

A launch returns before its kernels have run, so the time is that between events on the stream, read after a
synchronisation. A graph excludes the cost of launching kernels, as a deployment with graphs or TensorRT does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from attnsurgery.errors import UsageError
from attnsurgery.faults import fault_of
from attnsurgery.latency import card
from attnsurgery.latency._base import LATENCY, Call, LatencyBackend, first_line
from attnsurgery.latency.conditions import Conditions
from attnsurgery.latency.protocol import Effort, median, warm_up
from attnsurgery.latency.result import Comparison, Latency
from attnsurgery.tf32 import tf32

_cuda: Any = torch.cuda  # half of it carries no types
_EAGER = Effort(max_warmup_seconds=0.3)
_EAGER_BLOCKS = 7
"""Number of blocks whose median is the eager time, which is reported for orientation with that of a graph."""


@LATENCY.register("cuda")
class CudaLatency(LatencyBackend):
    """Measures times between CUDA events on the current stream of the device.

    Args:
        conditions: of a CUDA device.
        effort: how long it measures; by default `Effort()`.

    Raises:
        UsageError: torch sees no CUDA device.
    """

    def __init__(self, conditions: Conditions, effort: Effort | None = None) -> None:
        if not torch.cuda.is_available():
            raise UsageError(
                f"latency on {conditions.device!r} was requested, but torch sees no CUDA device. Use --device cpu."
            )
        super().__init__(conditions, effort)

    def time_block(self, call: Call, repeats: int) -> float:
        if self.conditions.cold_cache:
            return self._cold_block(call, repeats)
        start, end = _cuda.Event(enable_timing=True), _cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    def _cold_block(self, call: Call, repeats: int) -> float:
        """The total time of calls, each after a write that fills the L2 cache, as nvbench does, in ms."""
        pairs = [(_cuda.Event(enable_timing=True), _cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for start, end in pairs:
            self._flushed.zero_()
            start.record()
            call()
            end.record()
        pairs[-1][1].synchronize()
        return float(sum(start.elapsed_time(end) for start, end in pairs))

    @cached_property
    def _flushed(self) -> torch.Tensor:
        cache_bytes = getattr(torch.cuda.get_device_properties(self.conditions.device), "L2_cache_size", 64 << 20)
        return torch.empty(2 * cache_bytes, dtype=torch.int8, device=self.conditions.device)

    def measure(self, model: nn.Module) -> Latency:
        latency = super().measure(model)
        return replace(latency, eager_ms=self._eager_ms(model)) if self.conditions.graph else latency

    def compare(self, base: nn.Module, variant: nn.Module, reference: Latency | None = None) -> Comparison:
        comparison = super().compare(base, variant, reference)
        if not self.conditions.graph:
            return comparison
        return replace(
            comparison,
            base=replace(comparison.base, eager_ms=self._eager_ms(base)),
            variant=replace(comparison.variant, eager_ms=self._eager_ms(variant)),
        )

    def _eager_ms(self, model: nn.Module) -> float:
        """The time of the forward pass without a graph, in ms."""
        with self.lock(), self._environment():
            subject, x_BCHW = self._subject(model)
            self._first_call(subject, x_BCHW, model)
            repeats = warm_up(self.timed, lambda: subject(x_BCHW), _EAGER)
            return median([self.timed(lambda: subject(x_BCHW), repeats) / repeats for _ in range(_EAGER_BLOCKS)])

    def versions(self) -> dict[str, str]:
        return super().versions() | card.facts(self.conditions.device)

    def state(self) -> dict[str, Any]:
        return card.state(self.conditions.device)

    @contextmanager
    def _environment(self) -> Iterator[None]:
        """Also makes the device the current one, and sets TF32 and cuDNN's benchmark mode as the conditions say."""
        cudnn = torch.backends.cudnn
        benchmark = cudnn.benchmark
        cudnn.benchmark = self.conditions.cudnn_benchmark
        try:
            with super()._environment(), tf32(self.conditions.tf32), torch.cuda.device(self.conditions.device):
                yield
        finally:
            cudnn.benchmark = benchmark

    def _free(self) -> None:
        super()._free()
        torch.cuda.empty_cache()

    @contextmanager
    def _recorded(self, call: Call, model: nn.Module) -> Iterator[Call]:
        """A context with the replay of the call as a CUDA graph, in the modes with a graph.

        Raises:
            UsageError: the forward pass cannot be captured in a graph.
        """
        if not self.conditions.graph:
            yield call
            return
        graph = torch.cuda.CUDAGraph()
        try:
            side = _cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # in the first calls libraries allocate memory, which no graph may capture
                for _ in range(3):
                    call()
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph, stream=side):  # torch's default stream for captures is on its first device
                call()
        except Exception as error:
            if fault_of(error) is not None and not _of_capture(error):
                raise
            raise UsageError(
                f"no CUDA graph can hold the forward of {type(model).__name__}: {first_line(error)}. Measure it with "
                "--mode eager or --mode compile."
            ) from error
        try:
            yield graph.replay
        finally:
            graph.reset()  # frees all activations


def _of_capture(error: BaseException | None) -> bool:
    """True for an error about an operation that is not allowed in a capture, after which the device still works."""
    while error is not None:
        if "captur" in str(error):
            return True
        error = error.__context__
    return False
