"""Latency in an inference runtime: a model is exported, loaded, compared with torch, and then timed.

A runtime has its own compiler, memory layout and threads, so there is one mode, and blocks that are slow in torch may
be fast here. It runs the operations in the file, and no Python.
"""

from __future__ import annotations

import time
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from attnsurgery.errors import AttnSurgeryError, UsageError
from attnsurgery.faults import fault_of
from attnsurgery.latency._base import Call, LatencyBackend, first_line
from attnsurgery.latency.conditions import DTYPES, Conditions
from attnsurgery.latency.exported import TOLERANCE, Exported, Outputs, compare_outputs, export, import_optional
from attnsurgery.latency.protocol import Effort, Sampled
from attnsurgery.settings import Mode

_TF32_TOLERANCE = 1e-2
_FIRST_CALLS, _FIRST_SECONDS = 10, 0.1


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in a runtime."""

    call: Call
    """One forward of the input that it was exported with, finished when it returns."""
    outputs: Callable[[], Outputs]
    """Returns the outputs of the last call."""


class RuntimeLatency(LatencyBackend):
    """Measures the forward pass of an exported model in a runtime, after a comparison of its outputs with torch's.

    Each model is exported once. Each placement loads it again, so that its weights are elsewhere in memory.

    One more law, which the contract tests check: the runtime computes what torch does, or the model is refused with an
    ExportError before it is timed.

    Args:
        conditions: what is measured.
        effort: how long; by default `Effort()`.

    Raises:
        UsageError: the runtime does not have the conditions, or its package is missing.
    """

    modes: ClassVar[tuple[Mode, ...]] = ("eager",)
    """A runtime has one mode."""
    title: ClassVar[str]
    """The name of the runtime in messages."""
    module: ClassVar[str]
    """The Python module of the runtime."""
    extra: ClassVar[str]
    """The extra of this package that installs it."""
    devices: ClassVar[tuple[str, ...]]
    """Types of devices that it is measured on."""

    def describe(self) -> str:
        return f"{self.title}, {super().describe().replace(', eager', '')}"

    @classmethod
    def defaults(cls, device: str, dtype: str | None = None) -> dict[str, Any]:
        """float16 on CUDA, for which runtimes have kernels; the runtime chooses the memory layout itself."""
        half = "float16" if device.partition(":")[0] == "cuda" else "float32"
        return {"dtype": dtype or half, "mode": "eager", "channels_last": False}

    def __init__(self, conditions: Conditions, effort: Effort | None = None) -> None:
        if conditions.mode not in self.modes:
            raise UsageError(f"{self.title} has one mode of its own, not {conditions.mode!r}. Use --mode eager.")
        if (kind := torch.device(conditions.device).type) not in self.devices:
            raise UsageError(
                f"{self.title} is measured on {' or '.join(self.devices)}, not on {conditions.device!r}. Use --device "
                f"{self.devices[0]}."
            )
        if kind == "cpu" and conditions.dtype != "float32":
            raise UsageError(
                f"{self.title} on a CPU is measured in float32: {conditions.dtype} has kernels for few operations "
                "there, and the rest would be conversions. Use --dtype float32."
            )
        if conditions.channels_last and not (kind == "cuda" and self.prefers_layout):
            raise UsageError(f"{self.title} chooses the memory layout itself. Leave channels_last out.")
        if conditions.cold_cache:
            raise UsageError(f"a cold cache is not measured in {self.title}. Leave --cold-cache out.")
        self.runtime: Any = import_optional(self.module, self.extra)
        self._exports: weakref.WeakKeyDictionary[nn.Module, tuple[object, Exported]] = weakref.WeakKeyDictionary()
        super().__init__(conditions, effort)

    prefers_layout: ClassVar[bool] = False
    """Whether it has an option for channels last on CUDA."""

    @abstractmethod
    def load(self, exported: Exported) -> Loaded:
        """The model in the runtime, with its input."""

    @property
    def threads(self) -> int:
        """Number of CPU threads."""
        return self.conditions.threads or torch.get_num_threads()

    def time_block(self, call: Call, repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        if self.conditions.cuda:
            torch.cuda.synchronize(self.conditions.device)  # all streams of the device, the runtime's too
        return (time.perf_counter() - start) * 1000.0

    def versions(self) -> dict[str, str]:
        return super().versions() | {self.module: str(getattr(self.runtime, "__version__", "unknown"))}

    def _sample(self, *models: nn.Module) -> Sampled:
        for model in models:
            self._exported(model)  # before the device is locked, since it takes seconds on the CPU
        return super()._sample(*models)

    @contextmanager
    def _prepared(self, model: nn.Module) -> Iterator[Call]:
        """A context with a call of a copy of the model in the runtime.

        Raises:
            UsageError: the model cannot be exported, or the runtime cannot load or run it.
            ExportError: the outputs of the runtime differ from torch's.
            RuntimeError: a fault of the device, unchanged.
        """
        exported = self._exported(model)
        try:
            loaded = self.load(exported)
            start = time.perf_counter()
            for _ in range(_FIRST_CALLS):  # a runtime allocates memory, and its weights are read into the cache
                self.time_block(loaded.call, 1)
                if time.perf_counter() - start > _FIRST_SECONDS:
                    break
            outputs = loaded.outputs()
        except AttnSurgeryError:
            raise
        except Exception as error:
            if fault_of(error) is not None:
                raise
            raise UsageError(
                f"{self.title} cannot run {type(model).__name__} under the conditions of this measurement "
                f"({self.conditions.describe()}): {first_line(error)}"
            ) from error
        compare_outputs(exported, outputs, self._tolerance(), self.title)
        yield loaded.call

    def _tolerance(self) -> float:
        tf32 = self.conditions.tf32 and self.conditions.cuda
        return max(TOLERANCE[self.conditions.dtype], _TF32_TOLERANCE if tf32 else 0.0)

    def _exported(self, model: nn.Module) -> Exported:
        """The model in ONNX, exported again if it has changed."""
        state = _state_of(model)
        cached = self._exports.get(model)
        if cached is None or state is None or cached[0] != state:
            cached = state, export(model, self.conditions.shape, DTYPES[self.conditions.dtype], self.extra)
            self._exports[model] = cached
        return cached[1]


def _state_of(model: nn.Module) -> object:
    """A value that changes with the modules or tensors of the model; None if its tensors have no version counters."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if any(tensor.is_inference() for _, tensor in tensors):
        return None
    return (
        [(name, type(module)) for name, module in model.named_modules()],
        [(name, tensor.data_ptr(), tensor._version, tensor.shape) for name, tensor in tensors],
    )
