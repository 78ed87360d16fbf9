"""The contract of latency backends, and how one measures a model or compares two.

Two models are compared by the *ratio* of their times, which are measured alternately: a machine that warms up or is
shared slows both down equally, and the ratio stays the same.
"""

from __future__ import annotations

import copy
import gc
import platform
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar

import torch
from torch import nn

from attnsurgery.catalog import Catalog
from attnsurgery.errors import UsageError
from attnsurgery.faults import Fault, fault_of
from attnsurgery.latency.compiled import compile_model, fresh_compiler
from attnsurgery.latency.conditions import DTYPES, MODES, Conditions, device_defaults
from attnsurgery.latency.memory import peak_bytes
from attnsurgery.latency.protocol import (
    Effort,
    Sampled,
    median,
    quantile,
    ratio_of,
    relative_noise,
    sample,
    warm_up,
)
from attnsurgery.latency.result import Comparison, Latency, Singles
from attnsurgery.settings import Mode

Call = Callable[[], Any]

_CACHE_BYTES = 256 << 20
"""Size of the caches of most CPUs."""


class LatencyBackend(ABC):
    """Measures forward passes of a model: in eval mode and inference_mode, after a warm-up, in blocks of at least 2 ms.

    Copies are measured, so the caller's model keeps its device, dtype and training flags.

    Laws, which tests/contracts/test_latency_contract.py checks for every entry of the catalog:

    * no measurement changes a model: its weights, buffers, flags, hooks, dtype, device and memory format;
    * times are positive, their quantiles are ordered, and a latency carries its conditions and versions;
    * the 95 % confidence interval of the ratio of a model to itself contains 1, as often as it should (tested for the
      CPU and the protocol, in tests/test_latency.py);
    * more of the same work is never reported as less time;
    * whatever is timed is timed in the context of `lock`;
    * a mode that the backend lacks, and a model that cannot take the input, are refused with a UsageError.

    Args:
        conditions: what is measured.
        effort: how long; by default `Effort()`.

    Raises:
        UsageError: the backend does not have the mode of the conditions.
    """

    modes: ClassVar[tuple[Mode, ...]] = MODES
    """The modes of a forward pass that this backend has."""

    def __init__(self, conditions: Conditions, effort: Effort | None = None) -> None:
        if conditions.mode not in self.modes:
            raise UsageError(
                f"the latency backend {type(self).__name__} has no mode {conditions.mode!r}. Use --mode "
                f"{' or '.join(self.modes)}."
            )
        self.conditions = conditions
        self.effort = effort or Effort()
        if conditions.cold_cache:  # each call is timed by itself, since flushing the cache takes longer than most calls
            self.effort = replace(self.effort, block_ms=0.0)
        self.lock: Callable[[], AbstractContextManager[None]] = nullcontext
        """Makes the context of every measurement: a lock, where other processes use the device too."""

    @classmethod
    def defaults(cls, device: str, dtype: str | None = None) -> dict[str, Any]:
        """The defaults of `dtype`, `mode` and `channels_last`, as `device_defaults`."""
        return device_defaults(device, dtype)

    @abstractmethod
    def time_block(self, call: Call, repeats: int) -> float:
        """The time of `repeats` calls one after another in ms, until all their work is finished."""

    def timed(self, call: Call, repeats: int) -> float:
        """`time_block`, with a check that all work was finished.

        Raises:
            UsageError: the device is still working, so only the launching of work was timed.
        """
        elapsed_ms = self.time_block(call, repeats)
        device = torch.device(self.conditions.device)
        if device.type == "cuda" and not torch.cuda.current_stream(device).query():
            raise UsageError(
                f"the latency backend {type(self).__name__} gave a time while {device} was still at work. Such a time "
                "is no latency: time_block has to wait for the device before it reads the clock."
            )
        return elapsed_ms

    def measure(self, model: nn.Module) -> Latency:
        """The latency of one forward pass.

        Raises:
            UsageError: the model cannot take an input of these conditions.
        """
        return self._latency(self._sample(model), 0)

    def compare(self, base: nn.Module, variant: nn.Module, reference: Latency | None = None) -> Comparison:
        """The latencies of two models, measured alternately, and their ratio: see attnsurgery.latency.protocol.

        Args:
            base: the model that the other one is compared with.
            variant: the other model.
            reference: the base's latency on whose scale the variant is expressed; by default the one measured here.

        Raises:
            UsageError: a model cannot take an input of these conditions.
        """
        sampled = self._sample(base, variant)
        base_ms, variant_ms = sampled.times
        ratio = ratio_of(base_ms, variant_ms, sampled.placement, sampled.reverse)
        base_latency = self._latency(sampled, 0)
        return Comparison(
            base=base_latency,
            variant=self._latency(sampled, 1),
            ratio=ratio.value,
            ratio_low=ratio.low,
            ratio_high=ratio.high,
            reference_ms=(reference or base_latency).p50_ms,
        )

    @contextmanager
    def longer(self, times: float = 2.0) -> Iterator[None]:
        """A context in which measurements may take so many times as long."""
        effort = self.effort
        self.effort = replace(effort, max_seconds=times * effort.max_seconds)
        try:
            yield
        finally:
            self.effort = effort

    def singles(self, model: nn.Module, calls: int = 1000, max_seconds: float = 3.0) -> Singles:
        """Times of single calls, each of which is waited for before the next one begins.

        Args:
            model: the model.
            calls: the largest number of calls.
            max_seconds: no more calls after this time; but at least 20 are timed.

        Raises:
            UsageError: the model cannot take an input of these conditions.
        """
        compiler_context = fresh_compiler() if self.conditions.compiled else nullcontext()
        with self.lock(), self._environment(), compiler_context, self._prepared(model) as call:
            warm_up(self.timed, call, self.effort)
            times_ms: list[float] = []
            deadline = time.perf_counter() + max_seconds
            while len(times_ms) < calls and (len(times_ms) < 20 or time.perf_counter() < deadline):
                times_ms.append(self.timed(call, 1))
        p50_ms, p90_ms, p99_ms = (quantile(times_ms, share) for share in (0.5, 0.9, 0.99))
        return Singles(p50_ms, p90_ms, p99_ms, len(times_ms))

    def describe(self) -> str:
        """The conditions, and the runtime where it is not torch, in one line."""
        return self.conditions.describe()

    def versions(self) -> dict[str, str]:
        """Software and hardware that a latency depends on, by name."""
        threads = self.conditions.threads or torch.get_num_threads()
        return {
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}",
            "processor": _processor(),
            "threads": str(threads),
        }

    def state(self) -> dict[str, Any]:
        """The present state of the device, such as its clocks, as far as it is known."""
        return {}

    def _sample(self, *models: nn.Module) -> Sampled:
        """Times of the models by the protocol.

        Where two successive placements do not fit into memory, each is freed before the next one is made.

        Raises:
            torch.OutOfMemoryError: one placement does not fit into memory.
        """

        @contextmanager
        def placed(backwards: bool) -> Iterator[list[Call]]:
            order = list(enumerate(models))[:: -1 if backwards else 1]
            with ExitStack() as stack:
                calls = {index: stack.enter_context(self._prepared(model)) for index, model in order}
                if len(models) > 1 and not self.conditions.cuda:
                    _empty_caches(sum(map(_weight_bytes, models)))
                yield [calls[index] for index in range(len(models))]

        compiler = fresh_compiler() if self.conditions.compiled else nullcontext(lambda: True)
        with self.lock(), self._environment(), compiler as may_copy:
            try:
                return sample(self.timed, placed, self.effort, may_copy=may_copy)
            except Exception as error:
                if fault_of(error) is not Fault.OUT_OF_MEMORY:
                    raise
            self._free()  # after the handler, whose traceback keeps tensors alive
            return sample(self.timed, placed, self.effort, may_copy=may_copy, overlap=False)

    @contextmanager
    def _environment(self) -> Iterator[None]:
        """The context of a whole measurement: no autograd, and the number of threads of the conditions."""
        before = torch.get_num_threads()
        if self.conditions.threads:
            torch.set_num_threads(self.conditions.threads)
        try:
            with torch.inference_mode():
                yield
        finally:
            torch.set_num_threads(before)

    def _free(self) -> None:
        """Free unused memory."""
        gc.collect()

    def peak_bytes(self, model: nn.Module) -> int:
        """The peak memory of one eager forward pass in bytes: weights, buffers, input and live activations.

        Raises:
            UsageError: the model cannot take an input of these conditions.
        """
        with self.lock(), self._environment():
            subject, x_BCHW = self._subject(model)
            self._first_call(subject, x_BCHW, model)  # libraries allocate their workspaces in the first call
            return peak_bytes(subject, x_BCHW, lambda: subject(x_BCHW))

    @contextmanager
    def _prepared(self, model: nn.Module) -> Iterator[Call]:
        """A context with a call without arguments that runs one forward pass of a copy of the model."""
        subject, x_BCHW = self._subject(model)
        forward: Callable[[torch.Tensor], Any] = compile_model(subject) if self.conditions.compiled else subject
        self._first_call(forward, x_BCHW, model)
        with self._recorded(lambda: forward(x_BCHW), model) as call:
            yield call

    def _subject(self, model: nn.Module) -> tuple[nn.Module, torch.Tensor]:
        """A copy of the model, and an input for it, under the conditions."""
        conditions = self.conditions
        layout = torch.channels_last if conditions.channels_last else torch.contiguous_format
        subject = copy.deepcopy(model).eval().to(device=conditions.device, dtype=DTYPES[conditions.dtype])
        x_BCHW = torch.zeros(conditions.shape, device=conditions.device, dtype=DTYPES[conditions.dtype])
        x_BCHW = x_BCHW.normal_(generator=torch.Generator(conditions.device).manual_seed(0))
        if conditions.channels_last:
            for tensor in (*subject.parameters(), *subject.buffers()):
                if tensor.dim() == 4:  # Module.to would fail for weights with five dimensions
                    tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
        return subject, x_BCHW.contiguous(memory_format=layout)

    def _first_call(self, forward: Callable[[torch.Tensor], Any], x_BCHW: torch.Tensor, model: nn.Module) -> None:
        """Run the first forward pass, which fails for a model that cannot take the input.

        Raises:
            UsageError: it cannot take the input, or torch.compile cannot compile it.
            RuntimeError: a fault of the device, unchanged.
        """
        try:
            forward(x_BCHW)
        except UsageError:
            raise
        except Exception as error:
            if fault_of(error) is not None:
                raise
            advice = " Use --mode eager, or cudagraph on a GPU." if self.conditions.compiled else ""
            raise UsageError(
                f"{type(model).__name__} cannot run under the conditions of this measurement "
                f"({self.conditions.describe()}): {first_line(error)}{advice}"
            ) from error

    @contextmanager
    def _recorded(self, call: Call, model: nn.Module) -> Iterator[Call]:
        """A context with the call to time; backends override it to record the forward pass, as in a CUDA graph."""
        yield call

    def _latency(self, sampled: Sampled, index: int) -> Latency:
        """The latency of the subject at an index."""
        conditions, times_ms = self.conditions, sampled.times[index]
        return Latency(
            p50_ms=median(times_ms),
            p90_ms=quantile(times_ms, 0.9),
            runs=sampled.runs[index],
            noise=relative_noise(times_ms, sampled.placement),
            device=conditions.device,
            dtype=conditions.dtype,
            batch_size=conditions.batch_size,
            mode=conditions.mode,
            versions=self.versions(),
            left_out=sampled.left_out,
            drift=sampled.drift,
            state=self.state(),
        )


def _weight_bytes(model: nn.Module) -> int:
    return sum(int(tensor.nbytes) for tensor in (*model.parameters(), *model.buffers()))


def _empty_caches(weight_bytes: int) -> None:
    """Write so much memory that models of this size are no longer in the CPU's caches."""
    torch.zeros(min(4 * weight_bytes, _CACHE_BYTES), dtype=torch.uint8).add_(1)


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@cache
def _processor() -> str:
    """The name of the CPU."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


LATENCY: Catalog[LatencyBackend] = Catalog(
    "latency backend", "attnsurgery.latency", group="attnsurgery.latency", base=LatencyBackend
)


def backend_for(conditions: Conditions, name: str | None = None, effort: Effort | None = None) -> LatencyBackend:
    """The backend that measures under these conditions.

    Args:
        conditions: what is measured.
        name: a backend of the catalog; by default the one with the name of the device's type.
        effort: how long it measures; by default `Effort()`.

    Raises:
        UnknownNameError: there is no such backend.
        UsageError: the device does not exist.
    """
    return LATENCY[name or torch.device(conditions.device).type](conditions, effort)
