"""Latency on a CUDA device: two events around a block of forwards, optionally replayed as one CUDA graph.

A launch returns before its kernels ran, so only events on the stream, read after a synchronisation, give a time.
A graph takes the cost of launching out of the number, as a deployment with graphs or TensorRT would.
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
from attnsurgery.latency._base import LATENCY, Call, Comparison, Latency, LatencyBackend, first_line
from attnsurgery.latency.conditions import Conditions
from attnsurgery.latency.protocol import Effort, median, warm_up
from attnsurgery.tf32 import tf32

_cuda: Any = torch.cuda  # half of it carries no types
_EAGER = Effort(max_warmup_seconds=0.3)
_EAGER_BLOCKS = 7
"""Blocks of which the eager time beside that of a graph is the median: a figure for orientation."""


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
        """The calls alone, each behind a write that takes up the whole L2 cache, as nvbench does."""
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
        found = super().measure(model)
        return replace(found, eager_ms=self._eager_ms(model)) if self.conditions.graph else found

    def compare(self, base: nn.Module, variant: nn.Module, reference: Latency | None = None) -> Comparison:
        found = super().compare(base, variant, reference)
        if not self.conditions.graph:
            return found
        return replace(
            found,
            base=replace(found.base, eager_ms=self._eager_ms(base)),
            variant=replace(found.variant, eager_ms=self._eager_ms(variant)),
        )

    def _eager_ms(self, model: nn.Module) -> float:
        """What the forward takes where no graph is replayed."""
        with self.alone(), self._session():
            subject, x_BCHW = self._subject(model)
            self._first(subject, x_BCHW, model)
            repeats = warm_up(self.timed, lambda: subject(x_BCHW), _EAGER)
            return median([self.timed(lambda: subject(x_BCHW), repeats) / repeats for _ in range(_EAGER_BLOCKS)])

    def versions(self) -> dict[str, str]:
        return super().versions() | card.facts(self.conditions.device)

    def state(self) -> dict[str, Any]:
        return card.state(self.conditions.device)

    @contextmanager
    def _session(self) -> Iterator[None]:
        """The device is the current one, and what rounds or chooses kernels is as the conditions say."""
        cudnn = torch.backends.cudnn
        before = cudnn.benchmark
        cudnn.benchmark = self.conditions.cudnn_benchmark
        try:
            with super()._session(), tf32(self.conditions.tf32), torch.cuda.device(self.conditions.device):
                yield
        finally:
            cudnn.benchmark = before

    def _free(self) -> None:
        super()._free()
        torch.cuda.empty_cache()

    @contextmanager
    def _recorded(self, call: Call, model: nn.Module) -> Iterator[Call]:
        """The call as one graph to be replayed, in the modes that have one.

        Raises:
            UsageError: no graph can hold the forward.
        """
        if not self.conditions.graph:
            yield call
            return
        graph = torch.cuda.CUDAGraph()
        try:
            side = _cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # libraries choose and allocate in the first calls, which no graph may hold
                for _ in range(3):
                    call()
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph, stream=side):  # torch's own stream for captures stays on its first device
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
            graph.reset()  # a graph keeps all activations, until it goes


def _of_capture(error: BaseException | None) -> bool:
    """True of an error that says that an operation is not allowed in a capture; the device is as good as before."""
    while error is not None:
        if "captur" in str(error):
            return True
        error = error.__context__
    return False
