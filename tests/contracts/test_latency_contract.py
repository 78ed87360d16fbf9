"""The laws of `LatencyBackend`, checked for every entry of the catalog; a new backend is tested by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

from attnsurgery.errors import ExportError, UnknownNameError, UsageError
from attnsurgery.latency import LATENCY, MODES, Conditions, Effort, LatencyBackend, backend_for
from attnsurgery.latency.exported import compare_outputs, export
from attnsurgery.latency.runtime import RuntimeLatency

QUICK = Effort(tolerance=0.5, max_seconds=0.2, max_warmup_seconds=0.2, min_rounds=2, placements=2)
DEVICES = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
BATCH = 2

every_backend = pytest.mark.parametrize("name", list(LATENCY))
every_runtime = pytest.mark.parametrize("name", [name for name in LATENCY if issubclass(LATENCY[name], RuntimeLatency)])


@cache
def make(name: str) -> LatencyBackend:
    """A backend of this name on the first device that it has; skips the test where there is none."""
    refusals = []
    for device in DEVICES:
        defaults = LATENCY[name].defaults(device)
        conditions = Conditions.on(device, **defaults, batch_size=BATCH, input_size=(3, 16, 16), threads=1)
        try:
            return backend_for(conditions, name, QUICK)
        except UsageError as refusal:
            refusals.append(str(refusal))
    pytest.skip(f"{name} cannot measure here: {'; '.join(refusals)}")


@cache
def convs(width: int) -> nn.Module:
    """Two convolutions, of which one is frozen, and a norm in eval mode; shared, so that it is exported once."""
    torch.manual_seed(0)
    convs = (nn.Conv2d(3, width, 7, padding=3), nn.Conv2d(width, 3, 7, padding=3))
    model = nn.Sequential(convs[0], nn.BatchNorm2d(width), convs[1]).train()
    model[0].requires_grad_(False)
    model[1].eval()
    return model


def state_of(model: nn.Module) -> list[object]:
    """Whatever a measurement could change in a model."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [
        [(name, type(module), module.training, len(module._forward_hooks)) for name, module in model.named_modules()],
        [(name, tensor.dtype, tensor.device, tensor.stride(), tensor.requires_grad) for name, tensor in tensors],
        [(name, id(tensor), tensor.tolist()) for name, tensor in tensors],
    ]


@every_backend
@pytest.mark.slow
def test_backend_leaves_model_as_it_was(name: str) -> None:
    """No measurement changes weights, buffers, flags, hooks, dtype, device or layout of a model."""
    backend, model, other = make(name), convs(2), convs(256)
    before, other_before = state_of(model), state_of(other)
    threads, random = torch.get_num_threads(), torch.get_rng_state()
    backend.measure(model)
    backend.compare(model, other)
    backend.singles(model, calls=20, max_seconds=0.1)
    backend.peak_bytes(model)
    assert state_of(model) == before
    assert state_of(other) == other_before
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), random)
    assert not torch.is_inference_mode_enabled()


@every_backend
@pytest.mark.slow
def test_backend_latency_is_complete(name: str) -> None:
    """A latency is positive, has ordered quantiles, and carries the conditions that it holds for."""
    backend = make(name)
    latency, conditions = backend.measure(convs(2)), backend.conditions
    assert 0 < latency.p50_ms <= latency.p90_ms < float("inf")
    assert latency.noise >= 0
    assert 0 <= latency.left_out < 1
    assert latency.runs >= 1
    assert latency.images_per_second == pytest.approx(1000 * BATCH / latency.p50_ms)
    assert (latency.device, latency.dtype) == (conditions.device, conditions.dtype)
    assert (latency.batch_size, latency.mode) == (BATCH, conditions.mode)
    assert latency.versions == backend.versions()
    assert latency.versions
    assert all(isinstance(value, str) and value for value in latency.versions.values())
    assert "batch 2, input 3x16x16" in backend.describe()
    singles = backend.singles(convs(2), calls=20, max_seconds=0.1)
    assert 0 < singles.p50_ms <= singles.p90_ms <= singles.p99_ms
    assert singles.calls >= 20


@every_backend
def test_backend_peak_holds_weights_input(name: str) -> None:
    """The peak memory is at least that of weights and input."""
    backend = make(name)
    size = torch.finfo(getattr(torch, backend.conditions.dtype)).bits // 8
    model = nn.Conv2d(3, 64, 3)
    assert backend.peak_bytes(model) >= size * (64 * 3 * 9 + BATCH * 3 * 16 * 16)


@every_backend
@pytest.mark.slow
def test_backend_more_work_takes_longer(name: str) -> None:
    """A hundred times as much of the same work takes longer, and the ratio lies in its interval."""
    backend = make(name)
    comparison = backend.compare(convs(2), convs(256))
    assert 0 < comparison.ratio_low <= comparison.ratio <= comparison.ratio_high
    assert comparison.ratio > 1.5  # also where the machine is busy
    assert comparison.reference_ms == comparison.base.p50_ms
    reference = replace(comparison.base, p50_ms=7.0)
    scaled = backend.compare(convs(2), convs(2), reference)
    assert scaled.variant_ms == pytest.approx(7.0 * scaled.ratio)
    assert 0.2 < scaled.ratio < 5.0


@every_backend
def test_backend_refuses_unfit_model(name: str) -> None:
    """A model that does not take the input is refused with its class and the conditions."""
    with pytest.raises(UsageError, match=r"Conv2d.* 3x16x16|Conv2d.*16"):
        make(name).measure(nn.Conv2d(4, 4, 1))


@every_backend
def test_backend_defaults_are_its_own(name: str) -> None:
    """The defaults for a device are a mode that the backend has, and the requested dtype."""
    for device in ("cpu", "cuda"):
        defaults = LATENCY[name].defaults(device, "float32")
        assert set(defaults) == {"dtype", "mode", "channels_last"}
        assert defaults["dtype"] == "float32"
        assert defaults["mode"] in LATENCY[name].modes
        assert LATENCY[name].defaults(device)["mode"] in LATENCY[name].modes


@every_backend
def test_backend_refuses_mode_it_lacks(name: str) -> None:
    """A mode that a backend lacks is refused with one that it has."""
    backend = make(name)
    device = backend.conditions.device
    of_device = set(MODES) - (set() if backend.conditions.cuda else {"cudagraph", "compile-cudagraph"})
    lacking = of_device - set(LATENCY[name].modes)
    if not lacking:
        pytest.skip(f"{name} has every mode of {device}")
    for mode in lacking:
        with pytest.raises(UsageError, match=rf"{mode}.*--mode {LATENCY[name].modes[0]}"):
            backend_for(Conditions(device=device, mode=mode), name)


@every_backend
def test_backend_name_is_suggested(name: str) -> None:
    """A name that is nearly right is refused with the right one and all others."""
    with pytest.raises(UnknownNameError, match=f"Did you mean '{name}'.*Known: {', '.join(LATENCY)}"):
        backend_for(Conditions(), f"{name}x")


@every_backend
@pytest.mark.slow
def test_backend_holds_lock_while_timing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is timed is timed under the lock, which each measurement enters and leaves."""
    backend = make(name)
    time_block, depth, depths = backend.time_block, 0, []

    @contextmanager
    def lock() -> Iterator[None]:
        nonlocal depth
        depth += 1
        yield
        depth -= 1

    def timed(call: Callable[[], object], repeats: int) -> float:
        depths.append(depth)
        return time_block(call, repeats)

    monkeypatch.setattr(backend, "lock", lock)
    monkeypatch.setattr(backend, "timed", timed)
    backend.measure(convs(2))
    backend.compare(convs(2), convs(2))
    backend.singles(convs(2), calls=20, max_seconds=0.1)
    assert set(depths) == {1}
    assert depth == 0


@every_runtime
@pytest.mark.slow
def test_runtime_outputs_equal_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime computes what torch does, and a model that lost a part on the way is refused before it is timed."""
    runtime = make(name)
    assert isinstance(runtime, RuntimeLatency)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid())
    exported = export(model, runtime.conditions.shape, getattr(torch, runtime.conditions.dtype), runtime.extra)
    loaded = runtime.load(exported)
    loaded.call()
    assert compare_outputs(exported, loaded.outputs(), runtime._tolerance(), runtime.title) <= runtime._tolerance()
    real = torch.onnx.export

    def lose(module: nn.Module, *args: object, **options: object) -> object:
        return real(module[0], *args, **options)  # type: ignore[index,arg-type]

    monkeypatch.setattr(torch.onnx, "export", lose)
    with pytest.raises(ExportError, match=runtime.title):
        runtime.measure(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid()))
