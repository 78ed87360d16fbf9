"""A latency that is computed from multiply-accumulates: the same on every machine, for tests and dry runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from attnsurgery.latency._base import LATENCY, Call, LatencyBackend
from attnsurgery.latency.conditions import Conditions, device_defaults
from attnsurgery.latency.protocol import Effort, Sampled
from attnsurgery.latency.result import Comparison, Latency

_MACS_PER_MS = 1e8
_MS_PER_MODULE = 0.001


@LATENCY.register("fixed", hidden=True)
class FixedLatency(LatencyBackend):
    """Computes 1 ms per 10^8 multiply-accumulates of a batch and 1 us per module, or another function of the model.

    Args:
        conditions: input and batch size.
        effort: limits the number of single calls.
        milliseconds: maps a model to its time in ms.
    """

    @classmethod
    def defaults(cls, device: str, dtype: str | None = None) -> dict[str, Any]:
        """As `device_defaults`, but eager: without a measurement there is no CUDA graph."""
        return device_defaults(device, dtype) | {"mode": "eager"}

    def __init__(
        self,
        conditions: Conditions,
        effort: Effort | None = None,
        milliseconds: Callable[[nn.Module], float] | None = None,
    ) -> None:
        super().__init__(conditions, effort)
        self.effort = replace(self.effort, block_ms=0.0)  # no clock is read, so one call is a block
        self._milliseconds = milliseconds or self._from_macs

    def time_block(self, call: Call, repeats: int) -> float:
        """The time of the multiply-accumulates that the calls made."""
        with FlopCounterMode(display=False) as counter:
            for _ in range(repeats):
                call()
        return float(counter.get_total_flops()) / 2 / _MACS_PER_MS

    def measure(self, model: nn.Module) -> Latency:
        return self._latency(Sampled([[self._milliseconds(model)]], [0], [False], [1], left_out=0.0, drift=0.0), 0)

    def compare(self, base: nn.Module, variant: nn.Module, reference: Latency | None = None) -> Comparison:
        first, second = self.measure(base), self.measure(variant)
        ratio = second.p50_ms / first.p50_ms
        return Comparison(first, second, ratio, ratio, ratio, (reference or first).p50_ms)

    def versions(self) -> dict[str, str]:
        return {"latency": "computed, not measured"}

    def _from_macs(self, model: nn.Module) -> float:
        with torch.no_grad(), self._prepared(model) as call:
            return self.time_block(call, 1) + _MS_PER_MODULE * sum(1 for _ in model.modules())
