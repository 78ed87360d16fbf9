"""Latency: honest conditions, an untouched model, a ratio with an interval."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from attnsurgery.errors import UnknownNameError, UsageError
from attnsurgery.latency import LATENCY, Conditions, Effort, LatencyBackend, backend_for
from attnsurgery.latency.fixed import FixedLatency
from attnsurgery.latency.protocol import interval_of_ratio, relative_noise, sample
from attnsurgery.latency.self_test import SelfTest, self_test

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
    assert comparison.ratio_low > 1


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


def test_subjects_alternate_and_the_slow_round_is_left_out() -> None:
    seen: list[str] = []

    def time_block(call: object, repeats: int) -> float:
        name = call()  # type: ignore[operator]
        seen.append(name)
        disturbed = len(seen) in (41, 42, 43, 44)
        return repeats * (100.0 if disturbed else {"base": 3.0, "variant": 6.0}[name])

    found = sample(time_block, (lambda: "base", lambda: "variant"), Effort(tolerance=0.0, max_seconds=0.05))
    assert seen[-4:] == ["base", "variant", "variant", "base"]
    assert set(found.times[0]) == {3.0}
    assert set(found.times[1]) == {6.0}
    assert found.runs[0] == found.runs[1] > len(found.times[0])
    assert 0 < found.left_out < 0.5
    assert found.drift == 0.0


def test_a_machine_that_slows_down_is_noticed() -> None:
    calls = itertools.count()

    def time_block(call: object, repeats: int) -> float:
        return repeats * 3.0 * (1 + 0.002 * min(next(calls), 100))

    found = sample(time_block, (lambda: None,), Effort(tolerance=0.0, max_seconds=0.01, min_rounds=90))
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
    assert interval_of_ratio([1.0] * 20, [2.0] * 20) == (2.0, 2.0)
    low, high = interval_of_ratio([1.0, 1.3] * 10, [2.0, 4.0] * 10)
    assert low < high
    assert relative_noise([1.0] * 9) == 0.0
    assert relative_noise([1.0, 2.0, 3.0] * 3) > 0.0


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


def test_a_model_that_cannot_take_the_input_is_named_with_the_conditions() -> None:
    with pytest.raises(UsageError, match=r"Conv2d cannot run .* input 3x8x8"):
        backend_for(Conditions(input_size=(3, 8, 8)), "cpu", QUICK).measure(nn.Conv2d(4, 4, 1))


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"dtype": "int8"}, "float32, bfloat16"),
        ({"batch_size": 0}, "at least one image"),
        ({"mode": "cudagraph"}, "needs a CUDA device"),
    ],
)
def test_conditions_that_mean_nothing_are_refused(field: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Conditions(**field)  # type: ignore[arg-type]


def test_unknown_backend_lists_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match="cpu, cuda, fixed"):
        backend_for(Conditions(device="xpu"))
    assert list(LATENCY) == ["cpu", "cuda", "fixed"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no CUDA device")
def test_cuda_backend_without_cuda_says_so() -> None:
    with pytest.raises(UsageError, match="no CUDA device here"):
        backend_for(Conditions(device="cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["eager", "cudagraph"])
def test_cuda_events_see_more_work_as_more_time(mode: str) -> None:
    conditions = Conditions(device="cuda", input_size=(3, 64, 64), mode=mode)  # type: ignore[arg-type]
    assert backend_for(conditions, effort=QUICK).compare(convs(1), convs(40)).ratio_low > 1
