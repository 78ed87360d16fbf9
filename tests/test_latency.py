"""A latency has honest conditions, leaves the model untouched, and compares as a ratio with an interval."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from attnsurgery.errors import UnknownNameError, UsageError
from attnsurgery.faults import Fault, fault_of
from attnsurgery.latency import (
    LATENCY,
    Conditions,
    Effort,
    LatencyBackend,
    backend_for,
    card,
    compiled,
    device_defaults,
)
from attnsurgery.latency.fixed import FixedLatency
from attnsurgery.latency.protocol import interval_of_median, ratio_of, relative_noise, sample
from attnsurgery.latency.self_test import SelfTest, self_test
from attnsurgery.tf32 import tf32

QUICK = Effort(max_seconds=0.3, max_warmup_seconds=0.2, min_rounds=5)
SMALL = Conditions(input_size=(3, 16, 16))


def convs(depth: int) -> nn.Module:
    return nn.Sequential(*[nn.Conv2d(3, 3, 3, padding=1) for _ in range(depth)])


@pytest.fixture(params=["cpu", "fixed"])
def backend(request: pytest.FixtureRequest) -> LatencyBackend:
    return backend_for(SMALL, request.param, QUICK)


@pytest.mark.slow
def test_measuring_leaves_model_as_it_was(backend: LatencyBackend) -> None:
    """Measuring and comparing leave training flags, weights and buffers as they were."""
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3).eval()).train(True)
    model[1].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    backend.measure(model)
    backend.compare(model, model)
    assert [module.training for module in model.modules()] == [True, True, False]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_latency_carries_its_conditions(backend: LatencyBackend) -> None:
    """A latency carries device, dtype, batch size, mode, versions and the number of runs."""
    latency = backend.measure(convs(1))
    assert (latency.device, latency.dtype, latency.batch_size, latency.mode) == ("cpu", "float32", 1, "eager")
    assert latency.versions
    assert latency.runs >= 1
    assert latency.p90_ms >= latency.p50_ms > 0


@pytest.mark.slow
def test_compare_more_work_takes_longer(backend: LatencyBackend) -> None:
    """A model with forty times as many layers is slower, and the ratio lies in its interval."""
    comparison = backend.compare(convs(1), convs(40))
    assert comparison.ratio_low <= comparison.ratio <= comparison.ratio_high
    assert comparison.ratio_low > 0
    assert comparison.ratio > 4  # also where the machine is busy, and the interval wide


def test_variant_ms_scaled_by_reference() -> None:
    """`variant_ms` is the ratio of the comparison times the latency of the reference."""
    backend = FixedLatency(SMALL, milliseconds=lambda model: float(len(list(model.children()))))
    reference = backend.measure(convs(10))
    comparison = backend.compare(convs(2), convs(3), reference)
    assert comparison.variant_ms == pytest.approx(15.0)
    assert backend.compare(convs(2), convs(3)).variant_ms == pytest.approx(3.0)


def test_fixed_latency_is_deterministic() -> None:
    """The fixed latency is the same twice for one model and differs between models."""
    backend = backend_for(SMALL, "fixed")
    assert backend.measure(convs(2)) == backend.measure(convs(2))
    assert backend.measure(convs(2)) != backend.measure(convs(3))


@contextmanager
def named(*names: str) -> Iterator[list[Callable[[], str]]]:
    """Yields one subject for each name, which returns that name."""
    yield [lambda name=name: name for name in names]  # type: ignore[misc]


def test_sample_alternates_drops_slow_rounds() -> None:
    """The subjects alternate in both orders, and the round that was disturbed is left out."""
    names_called: list[str] = []

    def time_block(call: Callable[[], str], repeats: int) -> float:
        name = call()
        names_called.append(name)
        disturbed = len(names_called) in range(41, 49)
        return repeats * (100.0 if disturbed else {"base": 3.0, "variant": 6.0}[name])

    effort = Effort(tolerance=0.0, max_seconds=0.05, rounds=1000, placements=1)
    samples = sample(time_block, lambda _: named("base", "variant"), effort)
    rounds = [tuple(names_called[-8 * number - 8 :][:8]) for number in range(6)]
    once, turned = ("base", "variant"), ("variant", "base")
    assert set(rounds) == {(*once, *turned, *turned, *once), (*turned, *once, *once, *turned)}
    assert set(samples.times[0]) == {3.0}
    assert set(samples.times[1]) == {6.0}
    assert samples.runs[0] == samples.runs[1] > len(samples.times[0])
    assert 0 < samples.left_out < 0.5
    assert samples.drift == 0.0


def test_sample_calls_subjects_equally_often() -> None:
    """The first call after another subject's is a slow one; it would weigh more where a block has fewer calls."""
    counts: dict[str, set[int]] = {"base": set(), "variant": set()}

    def time_block(call: Callable[[], str], repeats: int) -> float:
        counts[call()].add(repeats)
        return repeats * {"base": 0.5, "variant": 3.0}[call()]

    samples = sample(time_block, lambda _: named("base", "variant"), Effort(max_seconds=0.0, max_warmup_seconds=0.0))
    assert max(counts["base"]) == max(counts["variant"]) >= 4
    assert samples.runs[0] == samples.runs[1]


@pytest.mark.parametrize(("again", "placement_count"), [(True, 5), (False, 1)])
def test_sample_places_fresh_warm_copies(again: bool, placement_count: int) -> None:
    """Every placement is of fresh copies, which are warmed up before they are timed."""
    places: list[bool] = []
    cold: set[str] = set()

    @contextmanager
    def place(backwards: bool) -> Iterator[list[Callable[[], str]]]:
        places.append(backwards)
        cold.update(("base", "variant"))
        with named("base", "variant") as calls:
            yield calls

    def time_block(call: Callable[[], str], repeats: int) -> float:
        slow = 10.0 if call() in cold else 1.0
        cold.discard(call())
        return repeats * 3.0 * slow

    effort = Effort(tolerance=0.0, max_seconds=0.0, placements=5, min_rounds=10)
    samples = sample(time_block, place, effort, may_copy=lambda: again)
    assert places == [False, True, False, True, False][:placement_count]
    assert samples.reverse == [way for way in (places if again else places * 5) for _ in range(2)]
    assert samples.placement == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert samples.times == [[3.0] * 10] * 2


def test_latency_drift_is_not_steady() -> None:
    """A machine that slows down during the measurement is noticed: the latency is not steady."""
    calls = itertools.count()

    def time_block(call: object, repeats: int) -> float:
        return repeats * 3.0 * (1 + 0.002 * min(next(calls), 100))

    effort = Effort(tolerance=0.0, max_seconds=0.0, min_rounds=90, rounds=90, placements=1)
    samples = sample(time_block, lambda _: named("base"), effort)
    assert 0.05 < samples.drift < 0.25
    latency = backend_for(SMALL, "fixed").measure(convs(1))
    assert latency.steady
    assert not replace(latency, drift=samples.drift).steady
    assert not replace(latency, drift=-0.2).steady
    assert not replace(latency, left_out=0.3).steady


@pytest.mark.slow
def test_self_test_counts_intervals_of_one() -> None:
    """The self-test counts the confidence intervals that contain 1, and reports its progress."""
    backend = backend_for(Conditions(input_size=(3, 16, 16), threads=1), "cpu", QUICK)
    progress: list[int] = []
    result = self_test(backend, convs(2), 3, progress.append)
    assert progress == [1, 2, 3]
    assert len(result.ratios) == 3
    assert result.worst == max(abs(ratio - 1) for ratio in result.ratios)
    exact = self_test(backend_for(SMALL, "fixed"), convs(2), 5)
    assert (exact.coverage, exact.worst, exact.passed) == (1.0, 0.0, True)


@pytest.mark.parametrize(
    ("containing", "of", "passed"), [(20, 20, True), (17, 20, True), (16, 20, False), (0, 1, True), (85, 100, False)]
)
def test_self_test_allows_for_chance(containing: int, of: int, passed: bool) -> None:
    """The self-test fails only when fewer intervals contain 1 than chance explains."""
    assert SelfTest((1.0,) * of, containing, 0.01, 0).passed is passed


def test_ratio_interval_follows_noise() -> None:
    """The interval of a ratio is a point for steady times and wide for noisy ones."""
    placement = [0] * 10 + [1] * 10
    reverse = [False] * 10 + [True] * 10
    exact = ratio_of([1.0] * 20, [2.0] * 20, placement, reverse)
    assert (exact.value, exact.low, exact.high) == pytest.approx((2.0, 2.0, 2.0))
    wild = ratio_of([1.0, 1.3] * 10, [2.0, 4.0] * 10, placement, reverse)
    assert wild.low < wild.high
    assert relative_noise([1.0] * 9, [0] * 9) == 0.0
    assert relative_noise([1.0, 2.0, 3.0] * 3, [0] * 9) > 0.0


def test_ratio_is_of_paired_rounds() -> None:
    """A ratio compares times of one round, during which the machine was the same."""
    assert ratio_of([1.0, 10.0, 2.0], [2.0, 20.0, 4.0], [0] * 3, [False] * 3).value == pytest.approx(2.0)


@pytest.mark.parametrize("placements", [5, 6])
def test_ratio_free_of_placement_order(placements: int) -> None:
    """The copy that is made first is 4 % slower; the ratio does not depend on which one that is."""
    block_ms: dict[str, float] = {}

    @contextmanager
    def place(backwards: bool) -> Iterator[list[Callable[[], str]]]:
        block_ms.update(base=3.0 if backwards else 3.12, variant=6.24 if backwards else 6.0)
        with named("base", "variant") as calls:
            yield calls

    effort = Effort(tolerance=0.0, max_seconds=0.0, placements=placements, min_rounds=2 * placements)
    samples = sample(lambda call, repeats: repeats * block_ms[call()], place, effort)
    assert samples.placement[-1] == placements - 1
    ratio = ratio_of(*samples.times, samples.placement, samples.reverse)
    assert ratio.value == pytest.approx(2.0)
    assert ratio.high - ratio.low < 1e-6


@pytest.mark.parametrize(
    ("placements", "offset"), [(2, 0.0), *((count, offset) for count in (4, 12) for offset in (0.0, 1.0, 5.0))]
)
@pytest.mark.slow
def test_interval_covers_offsets_of_copies(placements: int, offset: float) -> None:
    """Offsets of copies `offset` times as large as what the rounds of a copy differ by; two copies cannot tell."""
    draw = np.random.default_rng(placements)
    hits = 0
    for _ in range(300):
        centre_G = offset * draw.standard_normal(placements)
        values_GR = centre_G[:, None] + draw.standard_normal((placements, 6))
        low, high = interval_of_median(values_GR.ravel(), np.repeat(np.arange(placements), 6))
        hits += low <= 0 <= high
    assert hits / 300 >= 0.92


def test_measuring_sets_threads_for_a_while() -> None:
    """The number of threads is that of the conditions during a measurement, and is restored afterwards."""
    thread_counts: set[int] = set()

    class Spy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            thread_counts.add(torch.get_num_threads())
            return x

    before = torch.get_num_threads()
    backend_for(Conditions(input_size=(3, 8, 8), threads=1), "cpu", QUICK).measure(Spy())
    assert thread_counts == {1}
    assert torch.get_num_threads() == before


def test_conditions_reach_the_model() -> None:
    """The model is called with the batch size, dtype and memory layout of the conditions."""
    inputs: list[torch.Tensor] = []

    class Spy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inputs.append(x)
            return x

    conditions = Conditions(dtype="bfloat16", batch_size=2, input_size=(3, 8, 8), channels_last=True)
    backend_for(conditions, "fixed").measure(Spy())
    assert inputs[0].shape == (2, 3, 8, 8)
    assert inputs[0].dtype is torch.bfloat16
    assert inputs[0].is_contiguous(memory_format=torch.channels_last)


def test_channels_last_skips_5d_weights() -> None:
    """channels_last changes weights of four dimensions and leaves those of five alone."""

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat, self.deep = nn.Conv2d(3, 3, 3), nn.Conv3d(1, 1, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert self.flat.weight.is_contiguous(memory_format=torch.channels_last)
            return self.deep(self.flat(x)[:, None])

    assert backend_for(Conditions(input_size=(3, 8, 8), channels_last=True), "cpu", QUICK).measure(Deep()).p50_ms > 0


def test_measuring_names_unfit_model() -> None:
    """A model that cannot take the input is named in the error, with the conditions."""
    with pytest.raises(UsageError, match=r"Conv2d cannot run .* input 3x8x8"):
        backend_for(Conditions(input_size=(3, 8, 8)), "cpu", QUICK).measure(nn.Conv2d(4, 4, 1))


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"dtype": "int8"}, "float32, bfloat16"),
        ({"batch_size": 0}, "at least one image"),
        ({"mode": "cudagraph"}, "needs a CUDA device"),
        ({"mode": "compile-cudagraph"}, "needs a CUDA device"),
        ({"mode": "fast"}, "no mode 'fast'.* eager, cudagraph, compile"),
    ],
)
def test_conditions_refuse_nonsense(field: dict[str, object], message: str) -> None:
    """Conditions that mean nothing are refused with the values that are allowed."""
    with pytest.raises(UsageError, match=message):
        Conditions(**field)  # type: ignore[arg-type]


def test_backend_unknown_name_lists_known() -> None:
    """The error for an unknown latency backend lists the known ones."""
    assert {"cpu", "cuda", "fixed"} <= set(LATENCY)
    with pytest.raises(UnknownNameError, match=", ".join(LATENCY)):
        backend_for(Conditions(device="xpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no CUDA device")
def test_cuda_backend_needs_cuda() -> None:
    """The CUDA backend says that there is no CUDA device."""
    with pytest.raises(UsageError, match="sees no CUDA device"):
        backend_for(Conditions(device="cuda"))


@pytest.mark.parametrize("idle", [True, False])
def test_timed_needs_an_idle_device(idle: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A time that was taken while the device was still at work is refused."""

    class Hasty(FixedLatency):
        def time_block(self, call: Callable[[], object], repeats: int) -> float:
            return 1.0

    class Stream:
        def query(self) -> bool:
            return idle

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    backend = Hasty(Conditions(device="cuda"))
    if idle:
        assert backend.timed(lambda: None, 1) == 1.0
    else:
        with pytest.raises(UsageError, match="Hasty gave a time while cuda was still at work"):
            backend.timed(lambda: None, 1)


def test_cpu_backend_refuses_cuda_device() -> None:
    """The wall clock is refused on a device whose calls return before they are done."""
    with pytest.raises(UsageError, match=r"'cpu' cannot time 'cuda:0'.* --latency cuda"):
        backend_for(Conditions(device="cuda:0"), "cpu")


# ---- compiled


class Scaled(nn.Module):
    """A module whose instances are variants of one code object, as the models of one class are."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


class Pieces(nn.Module):
    """A module whose loop Dynamo leaves to Python, so that it compiles each part by itself."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Scaled(number) for number in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            torch._dynamo.graph_break()
            x = part(x)
        return x


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[list[torch.fx.node.Argument]]:
    """Collects the shapes of the inputs of every graph, with a compiler that takes no time."""
    compile_, shapes = torch.compile, []

    def marked(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        shapes.append([tuple(value.shape) if isinstance(value, torch.Tensor) else value for value in inputs])
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda model, **options: compile_(model, backend=marked, **options))
    return shapes


def compile_meter(batch_size: int = 1) -> LatencyBackend:
    conditions = Conditions(mode="compile", input_size=(3, 4, 4), batch_size=batch_size)
    return backend_for(conditions, "cpu", Effort(max_seconds=0.0, max_warmup_seconds=0.0, min_rounds=1, placements=1))


@pytest.mark.slow
def test_compile_handles_twenty_candidates(graphs: list[object]) -> None:
    """Twenty candidates and their bases are each compiled, without reaching the limit of recompilations."""
    for number in range(20):
        compile_meter().compare(Scaled(1), Scaled(number + 2))
        assert len(graphs) == 2 * (number + 1)


def test_compile_of_model_beside_its_twin(graphs: list[object]) -> None:
    """A compiled model can be compared with itself."""
    model = convs(2)
    assert compile_meter().compare(model, model).ratio > 0
    assert graphs


@pytest.mark.parametrize(("recompiles", "copies"), [(False, 3), (True, 2)])
def test_compile_reuses_or_places_copies(graphs: list[object], recompiles: bool, copies: int) -> None:
    """Fresh copies are placed unless each of them would be compiled again."""
    deepcopies: list[int] = []

    class Copied(Scaled):
        def __deepcopy__(self, memo: object) -> Scaled:
            deepcopies.append(1)
            return Copied(len(deepcopies) if recompiles else 1)

    effort = Effort(max_seconds=0.0, max_warmup_seconds=0.0, min_rounds=3, placements=3, rounds=1)
    backend_for(Conditions(mode="compile", input_size=(3, 4, 4)), "cpu", effort).measure(Copied(1))
    assert (len(deepcopies), len(graphs)) == (copies, copies if recompiles else 1)


def test_compile_has_static_shapes(graphs: list[list[object]]) -> None:
    """The graph is compiled once for each batch size, with static shapes."""
    for batch_size in (2, 3, 4):
        compile_meter(batch_size).measure(Scaled(1))
        assert graphs[-1] == [(batch_size, 3, 4, 4)]
    assert len(graphs) == 3


@pytest.mark.slow
def test_compile_of_many_pieces(graphs: list[object]) -> None:
    """A model that Dynamo splits into twenty pieces has each of them compiled."""
    compile_meter().measure(Pieces(20))
    assert len(graphs) >= 20


def test_compile_refuses_eager_fallback(graphs: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an error when torch.compile falls back to eager mode."""
    monkeypatch.setattr(compiled, "_LIMIT", 2)
    with pytest.raises(UsageError, match=r"Pieces cannot run .* Use --mode eager"):
        compile_meter().measure(Pieces(5))


def test_compile_of_nothing_is_error() -> None:
    """It is an error when torch.compile compiles nothing of the model."""

    class Opaque(nn.Module):
        @torch._dynamo.disable
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with pytest.raises(UsageError, match="compiled nothing of Opaque"):
        compile_meter().measure(Opaque())


# ---- devices


def test_device_fault_is_no_usage_error() -> None:
    """A device fault in the first forward pass is not reported as a mistake of the user."""

    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory") as caught:
        backend_for(SMALL, "cpu", QUICK).measure(Broken())
    assert fault_of(caught.value) is Fault.DEVICE


class Capture:
    """Stands in for torch.cuda: `graph` says that it captures, and nothing is captured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.active = False
        stream = SimpleNamespace(query=lambda: True, wait_stream=lambda other: None)
        for name, does in {
            "is_available": lambda: True,
            "device": nullcontext,
            "stream": nullcontext,
            "Stream": lambda: stream,
            "current_stream": lambda device=None: stream,
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None, reset=lambda: None),
            "graph": self.graph,
        }.items():
            monkeypatch.setattr(torch.cuda, name, does)

    @contextmanager
    def graph(self, graph: object, **named: object) -> Iterator[None]:
        self.active = True
        yield
        self.active = False


@pytest.mark.parametrize(
    ("message", "refused"),
    [
        ("Cannot copy between CPU and CUDA tensors during CUDA graph capture unless the CPU tensor is pinned.", True),
        ("CUDA error: operation not permitted when stream is capturing", True),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_cudagraph_refusal_gives_advice(monkeypatch: pytest.MonkeyPatch, message: str, refused: bool) -> None:
    """As timm's EdgeNeXt, which makes a tensor on the host in its forward; a broken device is no matter of graphs."""
    capture = Capture(monkeypatch)

    class OnHost(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if capture.active:
                raise RuntimeError(message)
            return x

    backend = backend_for(Conditions(device="cuda", mode="cudagraph", input_size=(3, 4, 4)), effort=QUICK)
    monkeypatch.setattr(backend, "_subject", lambda model: (model, torch.zeros(1, 3, 4, 4)))
    with pytest.raises(UsageError if refused else RuntimeError) as caught:
        backend.measure(OnHost())
    pattern = "no CUDA graph can hold the forward of OnHost: .* --mode eager or --mode compile"
    assert bool(re.search(pattern, str(caught.value))) == refused
    assert refused or fault_of(caught.value) is Fault.DEVICE


@pytest.mark.slow
def test_sample_holds_one_placement_a_time() -> None:
    """Copies of an earlier placement are gone before the next is made, once memory has run out."""
    alive: set[int] = set()

    class Large(nn.Module):
        def __deepcopy__(self, memo: object) -> Large:
            if alive:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            duplicate = Large()
            alive.add(id(duplicate))
            weakref.finalize(duplicate, alive.discard, id(duplicate))
            return duplicate

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    effort = replace(QUICK, placements=3)
    assert len(set(backend_for(SMALL, "cpu", effort)._sample(Large()).placement)) >= 3
    with pytest.raises(torch.OutOfMemoryError):
        backend_for(SMALL, "cpu", effort).compare(Large(), Large())


@pytest.mark.parametrize(
    ("device", "dtype", "mode", "channels_last"),
    [
        ("cpu", None, "eager", False),
        ("cuda:1", None, "cudagraph", True),
        ("cuda", "float16", "cudagraph", True),
        ("cuda", "float32", "cudagraph", False),
    ],
)
def test_conditions_default_to_deployment(device: str, dtype: str, mode: str, channels_last: bool) -> None:
    """The defaults of the conditions are how the device is used in deployment."""
    conditions = Conditions.on(device, dtype=dtype, channels_last=None)
    assert (conditions.mode, conditions.channels_last) == (mode, channels_last)
    assert conditions.dtype == device_defaults(device, dtype)["dtype"]
    assert Conditions.on(device, mode="eager", channels_last=False).mode == "eager"


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "mode"),
    [
        ("cuda", "cuda", "bfloat16", "cudagraph"),
        ("onnxruntime", "cuda", "float16", "eager"),
        ("openvino", "cpu", "float32", "eager"),
        ("fixed", "cuda", "bfloat16", "eager"),
    ],
)
def test_defaults_suit_the_backend(backend: str, device: str, dtype: str, mode: str) -> None:
    """The default dtype and mode are ones that the backend can measure."""
    defaults = LATENCY[backend].defaults(device)
    assert (defaults["dtype"], defaults["mode"]) == (dtype, mode)
    assert defaults["mode"] in LATENCY[backend].modes
    assert LATENCY[backend].defaults(device, "float32")["dtype"] == "float32"


def test_conditions_describe_rounding_flush() -> None:
    """The description names TF32, the cuDNN benchmark and the cold cache where they matter."""
    assert "TF32" not in SMALL.describe()
    assert "no TF32" in Conditions(device="cuda").describe()
    assert "TF32" not in Conditions(device="cuda", dtype="bfloat16").describe()
    description = Conditions(device="cuda", tf32=True, cudnn_benchmark=True, cold_cache=True).describe()
    assert description.endswith("eager, TF32, cuDNN benchmark, cold cache")


def test_throttle_reasons_have_names() -> None:
    """Throttle reasons have names."""
    assert card.reasons(0x1 | 0x2) == []  # idle, and clocks that someone has set
    assert card.reasons(0x4 | 0x40) == ["power cap", "hardware thermal slowdown"]


def test_card_without_nvml_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without NVML the state of a card is empty."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert card.state("cuda") == {}


# ---- more than one number


def test_singles_time_one_call_each(backend: LatencyBackend) -> None:
    """Single calls are timed one at a time, at most as many as were ordered."""
    singles = backend.singles(convs(2), calls=30)
    assert singles.p50_ms <= singles.p90_ms <= singles.p99_ms
    assert singles.calls == 30
    assert backend.singles(convs(2), calls=30, max_seconds=0.0).calls == 20


def test_throughput_is_of_the_whole_batch() -> None:
    """The throughput counts all images of a batch."""
    latency = backend_for(replace(SMALL, batch_size=8), "fixed").measure(convs(1))
    assert latency.images_per_second == pytest.approx(8000 / latency.p50_ms)


def test_cold_cache_flush_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is flushed before every call, and the flush is not timed."""
    meter = backend_for(replace(SMALL, cold_cache=True), "cpu", QUICK)
    events: list[str] = []

    class Buffer:
        def add_(self, value: int) -> None:
            events.append("flush")
            time.sleep(0.01)

    meter.__dict__["_flushed"] = Buffer()
    spent_ms = meter.time_block(lambda: events.append("call"), 5)
    assert events == ["flush", "call"] * 5
    assert spent_ms < 5 * 10


def test_cold_cache_times_single_calls() -> None:
    """Blocks of 2 ms of calls would flush, and not time, for many times as long."""
    assert backend_for(replace(SMALL, cold_cache=True), "cpu").effort.block_ms == 0.0
    assert backend_for(SMALL, "cpu").effort.block_ms > 0.0


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_tf32_is_switched_and_restored(precision: str) -> None:
    """TF32 is switched inside the context and restored behind it, at every precision."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    usual = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision(precision)
        before = matmul.allow_tf32, cudnn.allow_tf32
        for allowed in (True, False):
            with tf32(allowed):
                assert (matmul.allow_tf32, cudnn.allow_tf32) == (allowed, allowed)
            assert torch.get_float32_matmul_precision() == precision
            assert (matmul.allow_tf32, cudnn.allow_tf32) == before
    finally:
        torch.set_float32_matmul_precision(usual[0])
        cudnn.allow_tf32 = usual[1]


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch 2.9 brought it")
@pytest.mark.slow
def test_tf32_works_beside_newer_switches() -> None:
    """TF32 is switched and restored also where torch's newer precision switches are in use."""
    script = (
        "import torch; from attnsurgery.tf32 import tf32; m = torch.backends.cuda.matmul; m.fp32_precision = 'tf32'\n"
        "with tf32(False): inside = m.fp32_precision\n"
        "print(inside, m.fp32_precision)"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert process.stdout.split() == ["ieee", "tf32"]


def test_backend_refuses_unknown_mode() -> None:
    """A backend refuses a mode that it does not have and names one that it has."""

    class Runtime(FixedLatency):
        modes = ("eager",)

    with pytest.raises(UsageError, match=r"Runtime has no mode 'compile'. Use --mode eager"):
        Runtime(Conditions(mode="compile"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["eager", "cudagraph"])
def test_cuda_events_time_more_work_longer(mode: str) -> None:
    """CUDA events measure more time for more work."""
    conditions = Conditions(device="cuda", input_size=(3, 64, 64), mode=mode)  # type: ignore[arg-type]
    assert backend_for(conditions, effort=QUICK).compare(convs(1), convs(40)).ratio_low > 1
