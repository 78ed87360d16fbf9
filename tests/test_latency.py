"""Latency: honest conditions, an untouched model, a ratio with an interval."""

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


def test_measuring_leaves_training_flags_and_weights_as_they_were(backend: LatencyBackend) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3).eval()).train(True)
    model[1].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    backend.measure(model)
    backend.compare(model, model)
    assert [module.training for module in model.modules()] == [True, True, False]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_the_number_carries_its_conditions(backend: LatencyBackend) -> None:
    latency = backend.measure(convs(1))
    assert (latency.device, latency.dtype, latency.batch_size, latency.mode) == ("cpu", "float32", 1, "eager")
    assert latency.versions
    assert latency.runs >= 1
    assert latency.p90_ms >= latency.p50_ms > 0


def test_more_of_the_same_work_takes_longer(backend: LatencyBackend) -> None:
    comparison = backend.compare(convs(1), convs(40))
    assert comparison.ratio_low <= comparison.ratio <= comparison.ratio_high
    assert comparison.ratio_low > 0
    assert comparison.ratio > 4  # also where the machine is busy, and the interval wide


def test_variant_ms_is_the_ratio_on_the_scale_of_the_reference() -> None:
    backend = FixedLatency(SMALL, milliseconds=lambda model: float(len(list(model.children()))))
    reference = backend.measure(convs(10))
    comparison = backend.compare(convs(2), convs(3), reference)
    assert comparison.variant_ms == pytest.approx(15.0)
    assert backend.compare(convs(2), convs(3)).variant_ms == pytest.approx(3.0)


def test_fixed_latency_is_the_same_twice_and_differs_with_the_model() -> None:
    backend = backend_for(SMALL, "fixed")
    assert backend.measure(convs(2)) == backend.measure(convs(2))
    assert backend.measure(convs(2)) != backend.measure(convs(3))


@contextmanager
def named(*names: str) -> Iterator[list[Callable[[], str]]]:
    """Subjects that say their names."""
    yield [lambda name=name: name for name in names]  # type: ignore[misc]


def test_subjects_alternate_and_the_slow_round_is_left_out() -> None:
    seen: list[str] = []

    def time_block(call: Callable[[], str], repeats: int) -> float:
        name = call()
        seen.append(name)
        disturbed = len(seen) in range(41, 49)
        return repeats * (100.0 if disturbed else {"base": 3.0, "variant": 6.0}[name])

    effort = Effort(tolerance=0.0, max_seconds=0.05, rounds=1000, placements=1)
    found = sample(time_block, lambda _: named("base", "variant"), effort)
    rounds = [tuple(seen[-8 * number - 8 :][:8]) for number in range(6)]
    once, turned = ("base", "variant"), ("variant", "base")
    assert set(rounds) == {(*once, *turned, *turned, *once), (*turned, *once, *once, *turned)}
    assert set(found.times[0]) == {3.0}
    assert set(found.times[1]) == {6.0}
    assert found.runs[0] == found.runs[1] > len(found.times[0])
    assert 0 < found.left_out < 0.5
    assert found.drift == 0.0


def test_all_subjects_are_called_as_often_in_a_block() -> None:
    """The first call after another subject's is a slow one; it would weigh more where a block has fewer calls."""
    counts: dict[str, set[int]] = {"base": set(), "variant": set()}

    def time_block(call: Callable[[], str], repeats: int) -> float:
        counts[call()].add(repeats)
        return repeats * {"base": 0.5, "variant": 3.0}[call()]

    found = sample(time_block, lambda _: named("base", "variant"), Effort(max_seconds=0.0, max_warmup_seconds=0.0))
    assert max(counts["base"]) == max(counts["variant"]) >= 4
    assert found.runs[0] == found.runs[1]


@pytest.mark.parametrize(("again", "made"), [(True, 5), (False, 1)])
def test_every_placement_is_of_fresh_copies_and_warmed(again: bool, made: int) -> None:
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
    found = sample(time_block, place, effort, again=lambda: again)
    assert places == [False, True, False, True, False][:made]
    assert found.reverse == [way for way in (places if again else places * 5) for _ in range(2)]
    assert found.placement == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert found.times == [[3.0] * 10] * 2


def test_a_machine_that_slows_down_is_noticed() -> None:
    calls = itertools.count()

    def time_block(call: object, repeats: int) -> float:
        return repeats * 3.0 * (1 + 0.002 * min(next(calls), 100))

    effort = Effort(tolerance=0.0, max_seconds=0.0, min_rounds=90, rounds=90, placements=1)
    found = sample(time_block, lambda _: named("base"), effort)
    assert 0.05 < found.drift < 0.25
    latency = backend_for(SMALL, "fixed").measure(convs(1))
    assert latency.steady
    assert not replace(latency, drift=found.drift).steady
    assert not replace(latency, drift=-0.2).steady
    assert not replace(latency, left_out=0.3).steady


def test_the_self_test_counts_intervals_that_hold_one() -> None:
    backend = backend_for(Conditions(input_size=(3, 16, 16), threads=1), "cpu", QUICK)
    done: list[int] = []
    found = self_test(backend, convs(2), 3, done.append)
    assert done == [1, 2, 3]
    assert len(found.ratios) == 3
    assert found.worst == max(abs(ratio - 1) for ratio in found.ratios)
    exact = self_test(backend_for(SMALL, "fixed"), convs(2), 5)
    assert (exact.coverage, exact.worst, exact.passed) == (1.0, 0.0, True)


@pytest.mark.parametrize(
    ("held", "of", "passed"), [(20, 20, True), (17, 20, True), (16, 20, False), (0, 1, True), (85, 100, False)]
)
def test_too_narrow_is_what_chance_does_not_explain(held: int, of: int, passed: bool) -> None:
    assert SelfTest((1.0,) * of, held, 0.01, 0).passed is passed


def test_interval_is_narrow_for_steady_times_and_wide_for_wild_ones() -> None:
    placement = [0] * 10 + [1] * 10
    reverse = [False] * 10 + [True] * 10
    exact = ratio_of([1.0] * 20, [2.0] * 20, placement, reverse)
    assert (exact.value, exact.low, exact.high) == pytest.approx((2.0, 2.0, 2.0))
    wild = ratio_of([1.0, 1.3] * 10, [2.0, 4.0] * 10, placement, reverse)
    assert wild.low < wild.high
    assert relative_noise([1.0] * 9, [0] * 9) == 0.0
    assert relative_noise([1.0, 2.0, 3.0] * 3, [0] * 9) > 0.0


def test_the_ratio_is_of_times_that_met_the_same_machine() -> None:
    assert ratio_of([1.0, 10.0, 2.0], [2.0, 20.0, 4.0], [0] * 3, [False] * 3).value == pytest.approx(2.0)


@pytest.mark.parametrize("placements", [5, 6])
def test_what_is_made_first_is_not_what_is_slow(placements: int) -> None:
    """Whoever is made first is 4 % slower: with an odd number of placements the variant would seem 4 % faster."""
    made: dict[str, float] = {}

    @contextmanager
    def place(backwards: bool) -> Iterator[list[Callable[[], str]]]:
        made.update(base=3.0 if backwards else 3.12, variant=6.24 if backwards else 6.0)
        with named("base", "variant") as calls:
            yield calls

    effort = Effort(tolerance=0.0, max_seconds=0.0, placements=placements, min_rounds=2 * placements)
    found = sample(lambda call, repeats: repeats * made[call()], place, effort)
    assert found.placement[-1] == placements - 1
    ratio = ratio_of(*found.times, found.placement, found.reverse)
    assert ratio.value == pytest.approx(2.0)
    assert ratio.high - ratio.low < 1e-6


@pytest.mark.parametrize(
    ("placements", "offset"), [(2, 0.0), *((count, offset) for count in (4, 12) for offset in (0.0, 1.0, 5.0))]
)
def test_the_interval_covers_where_the_copies_differ(placements: int, offset: float) -> None:
    """Offsets of copies `offset` times as large as what the rounds of a copy differ by; two copies cannot tell."""
    draw = np.random.default_rng(placements)
    held = 0
    for _ in range(300):
        centre_G = offset * draw.standard_normal(placements)
        values_GR = centre_G[:, None] + draw.standard_normal((placements, 6))
        low, high = interval_of_median(values_GR.ravel(), np.repeat(np.arange(placements), 6))
        held += low <= 0 <= high
    assert held / 300 >= 0.92


def test_threads_are_fixed_during_the_measurement_and_restored() -> None:
    seen: set[int] = set()

    class Spy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.add(torch.get_num_threads())
            return x

    before = torch.get_num_threads()
    backend_for(Conditions(input_size=(3, 8, 8), threads=1), "cpu", QUICK).measure(Spy())
    assert seen == {1}
    assert torch.get_num_threads() == before


def test_batch_dtype_and_layout_reach_the_model() -> None:
    seen: list[torch.Tensor] = []

    class Spy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return x

    conditions = Conditions(dtype="bfloat16", batch_size=2, input_size=(3, 8, 8), channels_last=True)
    backend_for(conditions, "fixed").measure(Spy())
    assert seen[0].shape == (2, 3, 8, 8)
    assert seen[0].dtype is torch.bfloat16
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


def test_channels_last_leaves_weights_of_five_dimensions_alone() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat, self.deep = nn.Conv2d(3, 3, 3), nn.Conv3d(1, 1, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert self.flat.weight.is_contiguous(memory_format=torch.channels_last)
            return self.deep(self.flat(x)[:, None])

    assert backend_for(Conditions(input_size=(3, 8, 8), channels_last=True), "cpu", QUICK).measure(Deep()).p50_ms > 0


def test_a_model_that_cannot_take_the_input_is_named_with_the_conditions() -> None:
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
def test_conditions_that_mean_nothing_are_refused(field: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Conditions(**field)  # type: ignore[arg-type]


def test_unknown_backend_lists_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match="cpu, cuda, fixed, onnxruntime, openvino, tensorrt"):
        backend_for(Conditions(device="xpu"))
    assert list(LATENCY) == ["cpu", "cuda", "fixed", "onnxruntime", "openvino", "tensorrt"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no CUDA device")
def test_cuda_backend_without_cuda_says_so() -> None:
    with pytest.raises(UsageError, match="no CUDA device here"):
        backend_for(Conditions(device="cuda"))


@pytest.mark.parametrize("done", [True, False])
def test_a_time_taken_while_the_device_still_works_is_no_latency(done: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hasty(FixedLatency):
        def time_block(self, call: Callable[[], object], repeats: int) -> float:
            return 1.0

    class Stream:
        def query(self) -> bool:
            return done

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    backend = Hasty(Conditions(device="cuda"))
    if done:
        assert backend.timed(lambda: None, 1) == 1.0
    else:
        with pytest.raises(UsageError, match="Hasty gave a time while cuda was still at work"):
            backend.timed(lambda: None, 1)


def test_the_wall_clock_is_refused_where_calls_return_early() -> None:
    with pytest.raises(UsageError, match=r"'cpu' cannot time 'cuda:0'.* --latency cuda"):
        backend_for(Conditions(device="cuda:0"), "cpu")


# ---- compiled


class Scaled(nn.Module):
    """Every instance is another variant of one code object, as the models of one class are."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


class Pieces(nn.Module):
    """Dynamo leaves the loop to Python and compiles what it calls."""

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
    """The shapes of the inputs of every graph that is compiled, by a compiler that takes no time."""
    compile_, found = torch.compile, []

    def marked(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        found.append([tuple(value.shape) if isinstance(value, torch.Tensor) else value for value in inputs])
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda model, **given: compile_(model, backend=marked, **given))
    return found


def compile_meter(batch_size: int = 1) -> LatencyBackend:
    conditions = Conditions(mode="compile", input_size=(3, 4, 4), batch_size=batch_size)
    return backend_for(conditions, "cpu", Effort(max_seconds=0.0, max_warmup_seconds=0.0, min_rounds=1, placements=1))


def test_compile_compiles_twenty_candidates_and_their_bases(graphs: list[object]) -> None:
    for number in range(20):
        compile_meter().compare(Scaled(1), Scaled(number + 2))
        assert len(graphs) == 2 * (number + 1)


def test_compile_of_a_model_beside_its_twin_is_no_error(graphs: list[object]) -> None:
    model = convs(2)
    assert compile_meter().compare(model, model).ratio > 0
    assert graphs


@pytest.mark.parametrize(("recompiles", "copies"), [(False, 3), (True, 2)])
def test_compile_places_fresh_copies_unless_each_is_compiled_anew(
    graphs: list[object], recompiles: bool, copies: int
) -> None:
    made: list[int] = []

    class Copied(Scaled):
        def __deepcopy__(self, memo: object) -> Scaled:
            made.append(1)
            return Copied(len(made) if recompiles else 1)

    effort = Effort(max_seconds=0.0, max_warmup_seconds=0.0, min_rounds=3, placements=3, rounds=1)
    backend_for(Conditions(mode="compile", input_size=(3, 4, 4)), "cpu", effort).measure(Copied(1))
    assert (len(made), len(graphs)) == (copies, copies if recompiles else 1)


def test_compile_has_static_shapes_at_any_batch_size(graphs: list[list[object]]) -> None:
    for batch_size in (2, 3, 4):
        compile_meter(batch_size).measure(Scaled(1))
        assert graphs[-1] == [(batch_size, 3, 4, 4)]
    assert len(graphs) == 3


def test_compile_of_many_pieces_compiles_each(graphs: list[object]) -> None:
    compile_meter().measure(Pieces(20))
    assert len(graphs) >= 20


def test_compile_that_falls_back_to_eager_is_an_error(graphs: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_LIMIT", 2)
    with pytest.raises(UsageError, match=r"Pieces cannot run .* Use --mode eager"):
        compile_meter().measure(Pieces(5))


def test_compile_of_nothing_is_an_error() -> None:
    class Opaque(nn.Module):
        @torch._dynamo.disable
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with pytest.raises(UsageError, match="compiled nothing of Opaque"):
        compile_meter().measure(Opaque())


# ---- devices


def test_device_fault_in_the_first_forward_is_not_the_users() -> None:
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
    ("says", "refused"),
    [
        ("Cannot copy between CPU and CUDA tensors during CUDA graph capture unless the CPU tensor is pinned.", True),
        ("CUDA error: operation not permitted when stream is capturing", True),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_model_that_no_graph_can_hold_is_refused_with_advice(
    monkeypatch: pytest.MonkeyPatch, says: str, refused: bool
) -> None:
    """As timm's EdgeNeXt, which makes a tensor on the host in its forward; a broken device is no matter of graphs."""
    capture = Capture(monkeypatch)

    class OnHost(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if capture.active:
                raise RuntimeError(says)
            return x

    backend = backend_for(Conditions(device="cuda", mode="cudagraph", input_size=(3, 4, 4)), effort=QUICK)
    monkeypatch.setattr(backend, "_subject", lambda model: (model, torch.zeros(1, 3, 4, 4)))
    with pytest.raises(UsageError if refused else RuntimeError) as caught:
        backend.measure(OnHost())
    said = "no CUDA graph can hold the forward of OnHost: .* --mode eager or --mode compile"
    assert bool(re.search(said, str(caught.value))) == refused
    assert refused or fault_of(caught.value) is Fault.DEVICE


def test_memory_for_one_placement_at_a_time_is_enough() -> None:
    """Copies of an earlier placement are gone before the next is made, once memory has run out."""
    alive: set[int] = set()

    class Large(nn.Module):
        def __deepcopy__(self, memo: object) -> Large:
            if alive:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            made = Large()
            alive.add(id(made))
            weakref.finalize(made, alive.discard, id(made))
            return made

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
def test_defaults_are_how_a_device_is_deployed(device: str, dtype: str, mode: str, channels_last: bool) -> None:
    found = Conditions.on(device, dtype=dtype, channels_last=None)
    assert (found.mode, found.channels_last) == (mode, channels_last)
    assert found.dtype == device_defaults(device, dtype)["dtype"]
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
def test_defaults_are_what_a_backend_can_measure(backend: str, device: str, dtype: str, mode: str) -> None:
    found = LATENCY[backend].defaults(device)
    assert (found["dtype"], found["mode"]) == (dtype, mode)
    assert found["mode"] in LATENCY[backend].modes
    assert LATENCY[backend].defaults(device, "float32")["dtype"] == "float32"


def test_conditions_say_what_rounds_and_what_is_flushed() -> None:
    assert "TF32" not in SMALL.describe()
    assert "no TF32" in Conditions(device="cuda").describe()
    assert "TF32" not in Conditions(device="cuda", dtype="bfloat16").describe()
    said = Conditions(device="cuda", tf32=True, cudnn_benchmark=True, cold_cache=True).describe()
    assert said.endswith("eager, TF32, cuDNN benchmark, cold cache")


def test_throttle_reasons_have_names() -> None:
    assert card.reasons(0x1 | 0x2) == []  # idle, and clocks that someone has set
    assert card.reasons(0x4 | 0x40) == ["power cap", "hardware thermal slowdown"]


def test_card_without_nvml_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert card.state("cuda") == {}


# ---- more than one number


def test_singles_are_timed_one_at_a_time(backend: LatencyBackend) -> None:
    found = backend.singles(convs(2), calls=30)
    assert found.p50_ms <= found.p90_ms <= found.p99_ms
    assert found.calls == 30
    assert backend.singles(convs(2), calls=30, max_seconds=0.0).calls == 20


def test_throughput_is_of_the_whole_batch() -> None:
    latency = backend_for(replace(SMALL, batch_size=8), "fixed").measure(convs(1))
    assert latency.images_per_second == pytest.approx(8000 / latency.p50_ms)


def test_cold_cache_is_flushed_before_every_call_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_cold_cache_times_one_call_after_each_flush() -> None:
    """Blocks of 2 ms of calls would flush, and not time, for many times as long."""
    assert backend_for(replace(SMALL, cold_cache=True), "cpu").effort.block_ms == 0.0
    assert backend_for(SMALL, "cpu").effort.block_ms > 0.0


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_tf32_is_switched_and_put_back(precision: str) -> None:
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
def test_tf32_is_switched_beside_the_newer_switches() -> None:
    script = (
        "import torch; from attnsurgery.tf32 import tf32; m = torch.backends.cuda.matmul; m.fp32_precision = 'tf32'\n"
        "with tf32(False): inside = m.fp32_precision\n"
        "print(inside, m.fp32_precision)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["ieee", "tf32"]


def test_backend_refuses_a_mode_that_it_has_not() -> None:
    class Runtime(FixedLatency):
        modes = ("eager",)

    with pytest.raises(UsageError, match=r"Runtime has no mode 'compile'. Use --mode eager"):
        Runtime(Conditions(mode="compile"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["eager", "cudagraph"])
def test_cuda_events_see_more_work_as_more_time(mode: str) -> None:
    conditions = Conditions(device="cuda", input_size=(3, 64, 64), mode=mode)  # type: ignore[arg-type]
    assert backend_for(conditions, effort=QUICK).compare(convs(1), convs(40)).ratio_low > 1
