"""Inference runtimes as latency backends, and ONNX files: compared with torch before they are timed or written."""

from __future__ import annotations

import ast
import copy
import dataclasses
import gc
import importlib.util
import json
import re
import time
import tomllib
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from torch import nn

import attnsurgery
from attnsurgery.checkpoint.directory import write_directory
from attnsurgery.cli import main
from attnsurgery.errors import ExportError, UsageError
from attnsurgery.latency import LATENCY, Conditions, Effort, backend_for
from attnsurgery.latency import exported as exporting
from attnsurgery.latency import runtime as runtimes
from attnsurgery.latency.exported import Exported, compare_outputs, export, export_onnx, perturbed
from attnsurgery.latency.onnxruntime import OnnxRuntimeLatency
from attnsurgery.latency.runtime import Loaded, RuntimeLatency, _state_of
from attnsurgery.latency.tensorrt import TensorRtLatency
from attnsurgery.search import SearchConfig, run
from tests.conftest import images, move_gates

SIZE = (3, 64, 64)
FAST = Effort(tolerance=0.5, max_seconds=0.2, min_rounds=2, placements=2)
RUNTIMES = {name: backend for name in LATENCY if issubclass(backend := LATENCY[name], RuntimeLatency)}
ON_CPU = [name for name, backend in RUNTIMES.items() if "cpu" in backend.devices]
SURGICAL = ("test_resnet_nonlocal_s3", "test_resnet_se", "test_resnet_dual_s4", "test_resnet_resattn_s3")


@cache
def is_installed(name: str) -> bool:
    """Whether the package of a runtime is here."""
    return importlib.util.find_spec(RUNTIMES[name].module) is not None


def runtime_cases(*names: str) -> pytest.MarkDecorator:
    """One case for each of these runtimes; skipped where its package is missing."""
    return pytest.mark.parametrize(
        "name",
        [
            pytest.param(
                name,
                marks=pytest.mark.skipif(
                    not is_installed(name), reason=f"{name} needs the package {RUNTIMES[name].module}, which is missing"
                ),
            )
            for name in names
        ],
    )


every_runtime = runtime_cases(*ON_CPU)


def backend(name: str, **changes: Any) -> RuntimeLatency:
    runtime = backend_for(Conditions(**{"input_size": SIZE, "threads": 1, **changes}), name, FAST)
    assert isinstance(runtime, RuntimeLatency)
    return runtime


@cache
def surgical(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5).eval()


@cache
def export_of(name: str) -> Exported:
    """The export of a model, shared by tests because it takes a second or more."""
    return export(surgical(name), (1, *SIZE), torch.float32, "onnxruntime")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return surgical(SURGICAL[0])


def prepared(name: str, architecture: str = "test_resnet_nonlocal_s3", **changes: Any) -> RuntimeLatency:
    """A backend that already has the export of the model."""
    runtime = backend(name, **changes)
    runtime._exports[surgical(architecture)] = (_state_of(surgical(architecture)), export_of(architecture))
    return runtime


@pytest.fixture
def without_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the exporter by one that loses the blocks."""
    real = torch.onnx.export

    def broken(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return real(attnsurgery.remove(copy.deepcopy(model)), *args, **kwargs)

    monkeypatch.setattr(torch.onnx, "export", broken)


# ---- the comparison


@every_runtime
@pytest.mark.parametrize("architecture", SURGICAL)
@pytest.mark.slow
def test_runtime_computes_what_torch_does(name: str, architecture: str) -> None:
    runtime, one = prepared(name, architecture), export_of(architecture)
    with runtime._prepared(surgical(architecture)) as call:
        call()
    loaded = runtime.load(one)
    loaded.call()
    assert compare_outputs(one, loaded.outputs(), 1e-4, name) < 1e-4
    with torch.no_grad():
        (plain,) = exporting.outputs_of(attnsurgery.remove(perturbed(surgical(architecture))), one.x_BCHW)
    with pytest.raises(ExportError, match=r"computes something else in there than in torch: outputs differ by up to"):
        compare_outputs(one, [plain], 1e-3, "there")  # so the blocks do show in what is compared


@every_runtime
@pytest.mark.usefixtures("without_blocks")
@pytest.mark.slow
def test_runtime_refuses_export_sans_blocks(name: str, model: nn.Module) -> None:
    """A runtime times nothing if the export lost the blocks."""
    runtime = backend(name)
    runtime.timed = lambda call, repeats: pytest.fail("timed")  # type: ignore[method-assign]
    with pytest.raises(ExportError, match=r"the exported ResNet computes something else in .*of the largest"):
        runtime.measure(model)


def test_moved_copy_shows_lost_blocks(model: nn.Module) -> None:
    """Lost blocks do not show in the outputs of a model at its identity start, but in those of a moved copy."""
    x = images(64)
    with torch.no_grad():
        assert torch.equal(model(x), attnsurgery.remove(copy.deepcopy(model))(x))
        awake = perturbed(model)
        assert not torch.allclose(awake(x), attnsurgery.remove(copy.deepcopy(awake))(x), rtol=1e-2)


def test_moved_copy_has_no_constant_weight(model: nn.Module) -> None:
    """A moved copy has no parameter that is all 0 or 1, is repeatable, and leaves the model alone."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    copied = perturbed(model)
    for key, value in copied.named_parameters():
        assert not bool((value == 0).all() | (value == 1).all()), key
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(copied.parameters(), perturbed(model).parameters(), strict=True))
    trained = move_gates(copy.deepcopy(model))
    for key, value in perturbed(trained).named_parameters():
        constant = (trained.get_parameter(key) == 0).all() | (trained.get_parameter(key) == 1).all()
        assert bool(constant) or torch.equal(value, trained.get_parameter(key)), key


def one_of(*outputs: torch.Tensor) -> Exported:
    return Exported(b"", "Net", torch.zeros(1), outputs)


def test_compared_refuses_other_outputs() -> None:
    """Outputs of another shape, with other values, or not finite are refused."""
    good = torch.tensor([1.0, -4.0])
    assert compare_outputs(one_of(good, good), [good, good + 0.001], 1e-3, "R") == pytest.approx(0.001 / 4, rel=1e-3)
    for got in ([good], [good, good[None]]):
        with pytest.raises(ExportError, match="outputs of shapes"):
            compare_outputs(one_of(good, good), got, 1e-3, "R")
    for got_one in (good * torch.nan, good + 1):
        with pytest.raises(ExportError, match="computes something else in R"):
            compare_outputs(one_of(good), [got_one], 1e-3, "R")
    with pytest.raises(ExportError, match="not finite in torch"):
        compare_outputs(one_of(good * torch.inf), [good], 1e-3, "R")
    assert compare_outputs(one_of(good * 0), [good * 0], 1e-3, "R") == 0.0
    with pytest.raises(ExportError, match="computes something else"):
        compare_outputs(one_of(good * 0), [good], 1e-3, "R")


# ---- the backends


@every_runtime
@pytest.mark.slow
def test_runtime_measures_and_compares(name: str, model: nn.Module) -> None:
    runtime = prepared(name)
    before = copy.deepcopy(model.state_dict())
    comparison = runtime.compare(model, model)
    assert comparison.variant.p50_ms > 0
    assert comparison.ratio > 0
    assert comparison.base.runs > 0
    assert {runtime.module, "torch"} <= set(comparison.base.versions)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.slow
def test_runtime_exports_model_once(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is exported once until it changes, and its export goes with it."""
    subjects: list[nn.Module] = []
    monkeypatch.setattr(runtimes, "export", lambda model, *rest: (subjects.append(model), export_of(SURGICAL[0]))[1])
    one, runtime = copy.deepcopy(model), backend("onnxruntime")
    runtime.measure(one)
    runtime.compare(one, one)
    assert len(subjects) == 1
    with torch.no_grad():
        next(one.parameters()).mul_(1.5)
    assert (runtime._exported(one), len(subjects)) == (export_of(SURGICAL[0]), 2)
    runtime._exported(attnsurgery.remove(one))
    assert len(subjects) == 3
    with torch.inference_mode():
        untold = copy.deepcopy(model)
    for number in (4, 5):  # tensors that do not count their changes
        runtime._exported(untold)
        assert len(subjects) == number
    del one, untold, subjects[:]
    gc.collect()
    assert not len(runtime._exports)


@runtime_cases("onnxruntime", "openvino")  # each shows its threads in another way
def test_runtime_uses_threads_of_conditions(name: str, model: nn.Module) -> None:
    """A runtime uses the number of threads of the conditions."""
    runtime = prepared(name, threads=2)
    threads: dict[str, Any] = {}
    if name == "onnxruntime":
        real = runtime.runtime.InferenceSession

        def session(source: Any, options: Any, **kwargs: Any) -> Any:
            threads.update(intra=options.intra_op_num_threads, inter=options.inter_op_num_threads)
            return real(source, options, **kwargs)

        runtime.runtime = SimpleNamespace(SessionOptions=onnxruntime.SessionOptions, InferenceSession=session)
    else:
        core = runtime.runtime.Core()

        def compile_model(*args: Any) -> Any:
            compiled = core.compile_model(*args)
            keys = ("INFERENCE_NUM_THREADS", "NUM_STREAMS", "INFERENCE_PRECISION_HINT")
            threads.update({key: compiled.get_property(key) for key in keys})
            return compiled

        inner = SimpleNamespace(compile_model=compile_model, read_model=core.read_model)
        runtime.runtime = SimpleNamespace(Core=lambda: inner, Tensor=runtime.runtime.Tensor)
    runtime.load(runtime._exported(model)).call()
    assert list(threads.values())[:2] == [2, 1], threads
    assert "f32" in str(threads.get("INFERENCE_PRECISION_HINT", "f32")) or "float32" in str(threads)


def test_bound_outputs_are_of_the_last_call() -> None:
    """The outputs of a bound session are those of the last call."""
    runtime, one = backend("onnxruntime"), export_of(SURGICAL[0])
    loaded = runtime.load(one)
    loaded.call()
    (output,) = loaded.outputs()
    output.zero_()
    loaded.call()
    assert torch.allclose(output, one.outputs[0], rtol=1e-3, atol=1e-4)


@every_runtime
def test_time_block_equals_clock(name: str) -> None:
    """OpenVINO measures the time itself, which has to be that of the clock but for a little of Python."""
    runtime = prepared(name)
    with runtime._prepared(surgical(SURGICAL[0])) as call:
        rounds = []
        for _ in range(9):
            start = time.perf_counter()
            block_ms = runtime.time_block(call, 5)
            rounds.append(block_ms / 1000 / (time.perf_counter() - start))
    assert 0.5 < sorted(rounds)[4] <= 1.001


@every_runtime
@pytest.mark.slow
def test_call_keeps_input_and_outputs_alive(name: str) -> None:
    """A runtime reads and writes them by address, so memory that is free or another's would be overwritten."""
    runtime = backend(name)
    tensor = export_of(SURGICAL[0]).x_BCHW.clone()
    loaded = runtime.load(dataclasses.replace(export_of(SURGICAL[0]), x_BCHW=tensor))
    reference = weakref.ref(tensor)
    del tensor
    call, outputs = loaded.call, loaded.outputs
    del loaded, outputs
    gc.collect()
    assert referents(call, torch.Tensor | np.ndarray), "nothing holds the input"
    call()
    del call
    gc.collect()
    assert reference() is None


def referents(start: object, kind: Any) -> list[object]:
    """The objects of a kind that are held by an object or by what it refers to, two steps deep."""
    one = gc.get_referents(start)
    return [referent for referent in [*one, *gc.get_referents(*one)] if isinstance(referent, kind)]


@pytest.mark.slow
def test_runtime_compares_every_output() -> None:
    """A model with several outputs is compared in each of them."""
    many = timm.create_model("test_resnet", features_only=True).eval()
    one = export(many, (1, *SIZE), torch.float32, "onnxruntime")
    assert len(one.outputs) > 2
    for name in filter(is_installed, ON_CPU):
        runtime = backend(name)
        runtime._exports[many] = (_state_of(many), one)
        with runtime._prepared(many) as call:
            call()


@pytest.mark.slow
def test_export_of_large_weights_uses_a_file(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights too large for one protobuf message go into a file of their own, which goes with the export."""
    monkeypatch.setattr(exporting, "_LARGEST_PROTO", 0)
    one = export(model, (1, *SIZE), torch.float32, "onnxruntime")
    assert isinstance(one.source, str)
    folder = Path(one.source).parent
    assert sorted(file.name for file in folder.iterdir()) == ["model.onnx", "model.onnx.data"]
    for name in filter(is_installed, ON_CPU):
        runtime = backend(name)
        runtime._exports[model] = (_state_of(model), one)
        with runtime._prepared(model) as call:
            call()
    del one, runtime, call
    gc.collect()
    assert not folder.exists()


@pytest.mark.parametrize(
    ("name", "conditions", "message"),
    [
        ("onnxruntime", {"mode": "compile"}, "ONNX Runtime has one mode of its own, not 'compile'. Use --mode eager"),
        ("openvino", {"mode": "compile"}, "OpenVINO has one mode"),
        ("onnxruntime", {"dtype": "bfloat16"}, r"ONNX Runtime on a CPU is measured in float32.*Use --dtype float32"),
        ("openvino", {"dtype": "float16"}, "OpenVINO on a CPU is measured in float32"),
        ("openvino", {"device": "cuda"}, "OpenVINO is measured on cpu, not on 'cuda'"),
        ("tensorrt", {}, "TensorRT is measured on cuda, not on 'cpu'"),
        ("onnxruntime", {"channels_last": True}, "chooses the memory layout itself"),
        ("openvino", {"cold_cache": True}, "a cold cache is not measured"),
    ],
)
def test_runtime_refuses_conditions_it_lacks(name: str, conditions: dict[str, Any], message: str) -> None:
    """Conditions that a runtime does not have are refused."""
    with pytest.raises(UsageError, match=message):
        backend(name, **conditions)


@pytest.mark.parametrize("name", RUNTIMES)
def test_runtime_refuses_what_no_runtime_has(name: str) -> None:
    """What runtimes have no choice of is refused by each of them, with its name and with what to do."""
    runtime = RUNTIMES[name]
    device = runtime.devices[0]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"device": device, "mode": "compile"}, "has one mode of its own, not 'compile'. Use --mode eager"),
        ({"device": "mps"}, f"is measured on {' or '.join(runtime.devices)}, not on 'mps'. Use --device {device}"),
        ({"device": device, "cold_cache": True}, "Leave --cold-cache out"),
    ]
    if "cpu" in runtime.devices:
        cases.append(({"dtype": "float16"}, "on a CPU is measured in float32"))
    if "cpu" in runtime.devices or not runtime.prefers_layout:
        cases.append(({"device": device, "channels_last": True}, "chooses the memory layout itself"))
    for conditions, message in cases:
        with pytest.raises(UsageError, match=re.escape(message)) as refusal:
            runtime(Conditions(**conditions))
        assert runtime.title in str(refusal.value)


@pytest.mark.parametrize("name", RUNTIMES)
def test_missing_runtime_names_its_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime whose package is missing is refused with an extra that installs it."""
    runtime = RUNTIMES[name]
    hide(monkeypatch, runtime.module)
    with pytest.raises(UsageError, match=rf"'{runtime.module}'.*pip install 'attnsurgery\[{runtime.extra}\]'"):
        backend(name, device=runtime.devices[0])
    extras = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    requirements = extras[runtime.extra]
    for requirement in requirements:
        if nested := re.match(r"attnsurgery\[(\S+)\]", requirement):
            requirements = requirements + extras[nested[1]]
    assert any(re.match(rf"{runtime.module}\b", requirement) for requirement in requirements)


def test_missing_exporter_names_its_extra(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing exporter is refused with the extra of the runtime."""
    runtime = backend("openvino")
    hide(monkeypatch, "onnxscript")
    with pytest.raises(UsageError, match=r"'onnxscript'.*attnsurgery\[openvino\]"):
        runtime.measure(model)


def hide(monkeypatch: pytest.MonkeyPatch, hidden: str) -> None:
    real = importlib.import_module

    def load(name: str, *args: Any) -> Any:
        if name == hidden:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", load)


@pytest.mark.parametrize(("name", "extra"), [("onnxruntime", "onnxruntime-gpu"), ("tensorrt", "tensorrt")])
def test_missing_provider_names_its_extra(name: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build without the provider is refused with the extra that has it."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UsageError, match=rf"has no \w+ExecutionProvider; it has CPU.*attnsurgery\[{extra}\]"):
        backend(name, device="cuda")


def test_catalog_lists_runtimes_unimported() -> None:
    """The catalog lists the runtimes without importing them."""
    assert {"onnxruntime", "openvino", "tensorrt"} <= set(RUNTIMES)
    packages = {"onnx", "onnxscript", "tensorrt", *(runtime.module for runtime in RUNTIMES.values())}
    for source in (Path(attnsurgery.__file__).parent / "latency").glob("*.py"):
        for node in ast.parse(source.read_text()).body:  # an import in a function is made when it is needed
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & packages, source


@pytest.mark.slow
def test_export_failure_says_so() -> None:
    """A model that cannot be exported, or takes no images of the size, is refused."""

    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if float(x.sum()) > 0 else x

    with pytest.raises(UsageError, match=r"torch\.onnx cannot export Odd: "):
        backend("onnxruntime").measure(Odd())
    with pytest.raises(UsageError, match="Linear cannot take an input of 3x64x64"):
        backend("onnxruntime").measure(nn.Linear(3, 3))


def test_runtime_failure_is_a_usage_error(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime that cannot run a model is a usage error; a fault of the device is not."""
    runtime = prepared("onnxruntime")
    monkeypatch.setattr(runtime, "load", raising(Exception("[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED")))
    with pytest.raises(UsageError, match=r"ONNX Runtime cannot run ResNet under the conditions.*NOT_IMPLEMENTED"):
        runtime.measure(model)
    monkeypatch.setattr(runtime, "load", raising(RuntimeError("CUDA error: an illegal memory access")))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        runtime.measure(model)


def raising(error: Exception) -> Callable[[Exported], Loaded]:
    def load(one: Exported) -> Loaded:
        raise error

    return load


# ---- CUDA, as far as it goes without: what is asked of ONNX Runtime


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    waited: list[str] = []
    there = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: there)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waited.append(str(device)))
    return waited


def test_cuda_provider_gets_the_conditions(cuda: list[str]) -> None:
    """The CUDA provider gets the conditions, and timing waits for the device."""
    conditions = Conditions(device="cuda:1", dtype="float16", channels_last=True, tf32=True)
    runtime = OnnxRuntimeLatency(conditions)
    name, options = runtime.providers()[0]
    assert name == "CUDAExecutionProvider"
    assert (options["device_id"], options["use_tf32"], options["prefer_nhwc"]) == (1, 1, 1)
    assert options["cudnn_conv_algo_search"] == "HEURISTIC"
    tuned = OnnxRuntimeLatency(dataclasses.replace(conditions, cudnn_benchmark=True)).providers()[0][1]
    assert tuned["cudnn_conv_algo_search"] == "EXHAUSTIVE"
    calls: list[int] = []
    runtime.time_block(lambda: calls.append(len(cuda)), 3)
    assert calls == [0, 0, 0]
    assert cuda == ["cuda:1"]


@pytest.mark.usefixtures("cuda")
def test_tensorrt_comes_before_cuda() -> None:
    """TensorRT is the first provider, CUDA the second; TensorRT refuses a memory layout."""
    runtime = TensorRtLatency(Conditions(device="cuda", dtype="float16"))
    (first, options), (second, _), (third, _) = runtime.providers()
    assert (first, second, third) == ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider")
    assert options["trt_fp16_enable"]
    assert not options["trt_bf16_enable"]
    with pytest.raises(UsageError, match="TensorRT chooses the memory layout"):
        TensorRtLatency(Conditions(device="cuda", dtype="float16", channels_last=True))


def test_session_on_fallback_is_refused(request: pytest.FixtureRequest) -> None:
    """A session that fell back to another provider is refused."""
    one = export_of(SURGICAL[0])
    request.getfixturevalue("cuda")
    runtime = OnnxRuntimeLatency(Conditions(device="cuda", input_size=SIZE))
    fallen = SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    runtime.runtime = SimpleNamespace(
        SessionOptions=onnxruntime.SessionOptions, InferenceSession=lambda *args, **kwargs: fallen
    )
    with pytest.raises(UsageError, match="could not load CUDAExecutionProvider and would run on CPU"):
        runtime._session_of(one)


# ---- ONNX files


@pytest.mark.slow
def test_onnx_file_computes_same_as_model(model: nn.Module, tmp_path: Path) -> None:
    """The ONNX file computes what the model does, blocks included, at any batch."""
    awake, path = move_gates(copy.deepcopy(model)).eval(), tmp_path / "new" / "model.onnx"
    difference = export_onnx(awake, path, SIZE, batch_size=2)
    assert difference is not None
    assert 0 < difference < 1e-4
    (got,) = onnxruntime.InferenceSession(path).run(None, {"input": images(64).numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(got, awake(images(64)).numpy(), rtol=1e-3, atol=1e-4)
        assert float((attnsurgery.remove(awake)(images(64)) - torch.from_numpy(got)).abs().max()) > 1e-2
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]


@pytest.mark.usefixtures("without_blocks")
@pytest.mark.slow
def test_export_onnx_writes_no_wrong_file(model: nn.Module, tmp_path: Path) -> None:
    """An ONNX file that computes something else is not written, unless the check is off."""
    with pytest.raises(ExportError, match="computes something else in ONNX Runtime"):
        export_onnx(model, tmp_path / "model.onnx", SIZE)
    assert not list(tmp_path.iterdir())
    assert export_onnx(model, tmp_path / "model.onnx", SIZE, check=False) is None


@pytest.mark.slow
def test_onnx_file_has_large_weights_beside(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large weights stand in a file beside the ONNX file."""
    monkeypatch.setattr(exporting, "_LARGEST_PROTO", 0)
    export_onnx(model, tmp_path / "model.onnx", SIZE)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    (got,) = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"input": images(64)[:1].numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(got, model(images(64)[:1]).numpy(), rtol=1e-3, atol=1e-4)


def command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


@pytest.mark.slow
def test_export_command_writes_checked_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`export --onnx` writes a file that is compared with the model, and overwrites none."""
    recipe = "test_resnet_se"
    surgical = timm.create_model(recipe, num_classes=3)
    write_directory(surgical, tmp_path / "model", architecture=recipe)
    file = tmp_path / "model.onnx"
    assert command("export", tmp_path / "model", "--onnx", file, "--check", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["shape"] == [1, 3, 160, 160]
    assert report["largest_difference"] < 1e-4
    assert file.exists()
    assert command("export", tmp_path / "model", "--onnx", file) == 2
    assert "exists and is never overwritten" in capsys.readouterr().err
    assert command("export", tmp_path / "model", "--onnx", tmp_path / "b.onnx", "--no-check", "--batch-size", 2) == 0
    assert "not compared" in capsys.readouterr().out
    assert command("export", tmp_path / "model", "--onnx", tmp_path / "c.onnx", "--stock") == 2
    assert command("export", tmp_path / "model", "--onnx", tmp_path / "c.onnx", "--output", tmp_path / "d") == 2


# ---- a search


@pytest.mark.slow
def test_search_holds_budget_in_onnx_runtime(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A search on the embedded digits holds a budget that is measured in ONNX Runtime."""
    config = SearchConfig(
        base="test_resnet",
        data="digits",
        space="tiny",
        budget_ms=100.0,
        latency="onnxruntime",
        latency_seconds=0.3,
        trials=2,
        epochs=1,
        lr=1e-3,
        block_lr_scale=10.0,
        base_epochs=1,
        finalists=1,
        confirm_seeds=1,
        input_size=32,
        threads=1,
        workers=0,
        output=str(tmp_path / "run"),
    )
    outcome = run(config)
    assert outcome.trained == 2
    assert outcome.best is not None
    assert outcome.confirmation is not None
    assert "onnxruntime" in outcome.about.versions
    assert outcome.best.timing is not None
    capsys.readouterr()
    assert command("export", tmp_path / "run" / "best", "--onnx", tmp_path / "winner.onnx", "--check", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["largest_difference"] < 1e-4


def test_conditions_name_the_runtime() -> None:
    pytest.importorskip("onnxruntime")
    assert (
        backend_for(Conditions(threads=1), "onnxruntime").describe().startswith("ONNX Runtime, cpu, float32, batch 1")
    )
    assert "eager" not in backend_for(Conditions(), "onnxruntime").describe()
    assert "eager" in backend_for(Conditions(), "cpu").describe()
