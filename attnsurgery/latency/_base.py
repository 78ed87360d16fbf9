"""How fast: the conditions of a measurement, its result, and the contract that every latency backend keeps.

A number without its conditions is no latency, so the two never travel apart. Two models are compared by the *ratio* of
their times, measured alternately: a machine that warms up or is shared slows both alike, and the ratio stays.
"""

from __future__ import annotations

import copy
import gc
import platform
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, ClassVar

import torch
from torch import nn

from attnsurgery.catalog import Catalog
from attnsurgery.errors import UsageError
from attnsurgery.faults import Fault, fault_of
from attnsurgery.latency.compiled import compiled, fresh_compiler
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
from attnsurgery.settings import Mode

Call = Callable[[], Any]

_MOST_LEFT_OUT = 0.2
_MOST_DRIFT = 0.05
_CACHE_BYTES = 256 << 20
"""As much as the caches of most CPUs hold."""


@dataclass(frozen=True, slots=True)
class Latency:
    """The time of one forward of one batch, with the conditions that it holds for."""

    p50_ms: float
    p90_ms: float
    runs: int
    """Forwards that were timed, warm-up not counted."""
    noise: float
    """Half the 95 % interval of the median, as a share of it."""
    device: str
    dtype: str
    batch_size: int
    mode: str
    versions: dict[str, str] = field(default_factory=dict)
    left_out: float = 0.0
    """Share of the rounds in which something else slowed the machine down; they do not count."""
    drift: float = 0.0
    """By how much the end of the measurement was slower than its beginning, as a share: a machine that throttles."""
    eager_ms: float | None = None
    """Beside the time of a CUDA graph: the median of the same forward run eagerly, whose kernels Python launches."""
    state: dict[str, Any] = field(default_factory=dict)
    """Of a GPU just after the measurement: clocks, temperature, power, and why it was throttled, if it was."""

    @property
    def images_per_second(self) -> float:
        """Throughput, of forwards one after another."""
        return 1000.0 * self.batch_size / self.p50_ms

    def beside(self) -> str:
        """What a CUDA graph saves and what the card was doing, in words; '' where there is nothing to say."""
        said = []
        if self.eager_ms is not None:
            said.append(f"run eagerly it takes {self.eager_ms:.3f} ms, {self.eager_ms / self.p50_ms:.2f} times as long")
        for name, value in self.state.items():
            words = (" and ".join(value) or "no") if isinstance(value, list) else str(value)
            said.append(f"{name.replace('_', ' ')} {words}")
        return ", ".join(said)

    @property
    def steady(self) -> bool:
        """False if the machine did something else meanwhile, or changed its speed."""
        return self.left_out <= _MOST_LEFT_OUT and abs(self.drift) <= _MOST_DRIFT


@dataclass(frozen=True, slots=True)
class Singles:
    """Times of single calls, each waited for: what a server sees that answers one request at a time."""

    p50_ms: float
    p90_ms: float
    p99_ms: float
    calls: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two models measured alternately under the same conditions."""

    base: Latency
    variant: Latency
    ratio: float
    """Median over the rounds of the variant's time by the base's."""
    ratio_low: float
    ratio_high: float
    """95 % interval of the ratio."""
    reference_ms: float
    """The base's time that every variant of one search is expressed in."""

    @property
    def variant_ms(self) -> float:
        """The variant's time on the scale of the reference: free of what the machine did in between."""
        return self.ratio * self.reference_ms


class LatencyBackend(ABC):
    """Measures forwards of a model: eval mode, inference_mode, warmed up, in blocks of at least 2 ms.

    A copy is measured, so the caller's model keeps its device, dtype and training flags, whatever happens.

    Laws, which tests/test_latency.py checks:

    * `measure` and `compare` leave the model as it was;
    * a model compared with itself has a ratio whose interval holds 1;
    * more of the same work is never reported as less time.
    """

    modes: ClassVar[tuple[Mode, ...]] = MODES
    """What this backend can run a forward in."""

    def __init__(self, conditions: Conditions, effort: Effort | None = None) -> None:
        if conditions.mode not in self.modes:
            raise UsageError(
                f"the latency backend {type(self).__name__} has no mode {conditions.mode!r}. Use --mode "
                f"{' or '.join(self.modes)}."
            )
        self.conditions = conditions
        self.effort = effort or Effort()
        if conditions.cold_cache:  # each call is timed by itself, and what flushes the cache takes longer than most
            self.effort = replace(self.effort, block_ms=0.0)
        self.alone: Callable[[], AbstractContextManager[None]] = nullcontext
        """What every measurement is made under: a lock, where others use the device too."""

    @classmethod
    def defaults(cls, device: str, dtype: str | None = None) -> dict[str, Any]:
        """`dtype`, `mode` and `channels_last` for whoever does not say, as `device_defaults`."""
        return device_defaults(device, dtype)

    @abstractmethod
    def time_block(self, call: Call, repeats: int) -> float:
        """Milliseconds that `repeats` calls took, one after another, all work finished."""

    def timed(self, call: Call, repeats: int) -> float:
        """`time_block`, if the work was finished when it said so.

        Raises:
            UsageError: the device still works, so what was timed is how fast it can be told to.
        """
        spent = self.time_block(call, repeats)
        device = torch.device(self.conditions.device)
        if device.type == "cuda" and not torch.cuda.current_stream(device).query():
            raise UsageError(
                f"the latency backend {type(self).__name__} gave a time while {device} was still at work. Such a time "
                "is no latency: time_block has to wait for the device before it reads the clock."
            )
        return spent

    def measure(self, model: nn.Module) -> Latency:
        """The time of one forward.

        Raises:
            UsageError: the model cannot take an input of these conditions.
        """
        return self._latency(self._sample(model), 0)

    def compare(self, base: nn.Module, variant: nn.Module, reference: Latency | None = None) -> Comparison:
        """Both models, interleaved: see attnsurgery.latency.protocol.

        Args:
            reference: the base's time to express the variant in; the one measured here when not given.

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
    def carefully(self, times: float = 2.0) -> Iterator[None]:
        """What is measured meanwhile may take so many times as long."""
        usual = self.effort
        self.effort = replace(usual, max_seconds=times * usual.max_seconds)
        try:
            yield
        finally:
            self.effort = usual

    def singles(self, model: nn.Module, calls: int = 1000, max_seconds: float = 3.0) -> Singles:
        """Times of single calls, each waited for before the next begins.

        Args:
            calls: at most; at least 20 are timed, however long they take.

        Raises:
            UsageError: the model cannot take an input of these conditions.
        """
        compiler = fresh_compiler() if self.conditions.compiled else nullcontext()
        with self.alone(), self._session(), compiler, self._prepared(model) as call:
            warm_up(self.timed, call, self.effort)
            times_ms: list[float] = []
            deadline = time.perf_counter() + max_seconds
            while len(times_ms) < calls and (len(times_ms) < 20 or time.perf_counter() < deadline):
                times_ms.append(self.timed(call, 1))
        p50_ms, p90_ms, p99_ms = (quantile(times_ms, share) for share in (0.5, 0.9, 0.99))
        return Singles(p50_ms, p90_ms, p99_ms, len(times_ms))

    def describe(self) -> str:
        """The conditions in one line, and what runs the model where that is not torch."""
        return self.conditions.describe()

    def versions(self) -> dict[str, str]:
        """Software and hardware that a latency depends on."""
        threads = self.conditions.threads or torch.get_num_threads()
        return {
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}",
            "processor": _processor(),
            "threads": str(threads),
        }

    def state(self) -> dict[str, Any]:
        """Of the device now: clocks and the like, where it tells."""
        return {}

    def _sample(self, *models: nn.Module) -> Sampled:
        """What the protocol says of the models.

        Where memory does not hold two placements, which follow each other, each is given up before the next is made.

        Raises:
            torch.OutOfMemoryError: memory does not hold one placement.
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
        with self.alone(), self._session(), compiler as again:
            try:
                return sample(self.timed, placed, self.effort, again=again)
            except Exception as error:
                if fault_of(error) is not Fault.OUT_OF_MEMORY:
                    raise
            self._free()  # out of the handler, whose traceback holds on to the memory
            return sample(self.timed, placed, self.effort, again=again, overlap=False)

    @contextmanager
    def _session(self) -> Iterator[None]:
        """What the whole measurement runs under: no autograd, the agreed number of threads."""
        before = torch.get_num_threads()
        if self.conditions.threads:
            torch.set_num_threads(self.conditions.threads)
        try:
            with torch.inference_mode():
                yield
        finally:
            torch.set_num_threads(before)

    def _free(self) -> None:
        """Give back memory that nothing uses any more."""
        gc.collect()

    def peak_bytes(self, model: nn.Module) -> int:
        """The most memory at a time in one eager forward: weights, buffers, input and live activations.

        Raises:
            UsageError: the model cannot take an input of these conditions.
        """
        with self.alone(), self._session():
            subject, x_BCHW = self._subject(model)
            self._first(subject, x_BCHW, model)  # libraries allocate their workspaces in the first call
            return peak_bytes(subject, x_BCHW, lambda: subject(x_BCHW))

    @contextmanager
    def _prepared(self, model: nn.Module) -> Iterator[Call]:
        """A call without arguments that runs one forward of a copy of the model."""
        subject, x_BCHW = self._subject(model)
        forward: Callable[[torch.Tensor], Any] = compiled(subject) if self.conditions.compiled else subject
        self._first(forward, x_BCHW, model)
        with self._recorded(lambda: forward(x_BCHW), model) as call:
            yield call

    def _subject(self, model: nn.Module) -> tuple[nn.Module, torch.Tensor]:
        """A copy of the model, and an input for it, as the conditions want them."""
        conditions = self.conditions
        layout = torch.channels_last if conditions.channels_last else torch.contiguous_format
        subject = copy.deepcopy(model).eval().to(device=conditions.device, dtype=DTYPES[conditions.dtype])
        x_BCHW = torch.zeros(conditions.shape, device=conditions.device, dtype=DTYPES[conditions.dtype])
        x_BCHW = x_BCHW.normal_(generator=torch.Generator(conditions.device).manual_seed(0))
        if conditions.channels_last:
            for tensor in (*subject.parameters(), *subject.buffers()):
                if tensor.dim() == 4:  # Module.to would ask it of weights with five dimensions too
                    tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
        return subject, x_BCHW.contiguous(memory_format=layout)

    def _first(self, forward: Callable[[torch.Tensor], Any], x_BCHW: torch.Tensor, model: nn.Module) -> None:
        """The first forward, in which a model shows that it cannot take the input.

        Raises:
            UsageError: it cannot, or torch.compile cannot compile it.
            RuntimeError: a fault of the device, as it came.
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
        """A hook for backends that record the forward first, such as a CUDA graph."""
        yield call

    def _latency(self, sampled: Sampled, index: int) -> Latency:
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
    """Write more than the CPU's caches hold of models of so many bytes, so that each has to be read again."""
    torch.zeros(min(4 * weight_bytes, _CACHE_BYTES), dtype=torch.uint8).add_(1)


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@cache
def _processor() -> str:
    """What the CPU calls itself."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


LATENCY: Catalog[LatencyBackend] = Catalog("latency backend", "attnsurgery.latency", group="attnsurgery.latency")


def backend_for(conditions: Conditions, name: str | None = None, effort: Effort | None = None) -> LatencyBackend:
    """The backend that measures under these conditions.

    Args:
        name: a backend of the catalog; by default the one named like the device's type.

    Raises:
        UnknownNameError: there is none for this device.
        UsageError: the device is not there.
    """
    return LATENCY[name or torch.device(conditions.device).type](conditions, effort)
