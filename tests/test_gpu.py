"""Tests that need a CUDA device: searches, mixed precision, memory, compilers, graphs, faults, attention.

Each test is skipped with its reason where there is no such device. All of them take a few minutes.
"""

from __future__ import annotations

import copy
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from attnsurgery.blocks import cuda_attention
from attnsurgery.blocks.functional import attend, concatenate
from attnsurgery.data.batches import Batch, Split
from attnsurgery.errors import UsageError
from attnsurgery.evaluate import Epoch, TrainSettings, Watch, evaluate, train
from attnsurgery.latency import Conditions, Effort, backend_for
from attnsurgery.search import Listener, SearchConfig, run
from tests._searches import small_search, write_images, write_space
from tests.conftest import error_tolerated, relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
ROOT = str(Path(__file__).parents[1])
MODES = ["eager", "cudagraph", "compile", "compile-cudagraph"]
every_mode = pytest.mark.parametrize("mode", MODES)
QUICK = Effort(max_seconds=0.5, max_warmup_seconds=0.3, min_rounds=5)
BY_DEVICE = {"dtype", "mode", "channels_last", "train_dtype", "latency"}


# ---- searches


@pytest.fixture
def config(tmp_path: Path) -> SearchConfig:
    """The small search of other tests, with all defaults of a CUDA device."""
    images, space = write_images(tmp_path / "images"), write_space(tmp_path)
    small = small_search(images, space, tmp_path / "run")
    return SearchConfig(**small.model_dump(exclude=BY_DEVICE) | {"device": "cuda", "trials": 3, "latency_seconds": 0.3})


@pytest.mark.parametrize("workers", [0, 1])
def test_gpu_search_finishes(config: SearchConfig, workers: int) -> None:
    """A search on CUDA finishes under the default conditions of a card, with measured and trained candidates."""
    chosen = config.model_copy(update={"workers": workers})
    assert (chosen.mode, chosen.dtype, chosen.channels_last) == ("cudagraph", "bfloat16", True)
    assert chosen.train_dtype == "bfloat16"
    outcome = run(chosen)
    assert outcome.trained == 3
    assert outcome.confirmation is not None
    for record in outcome.records:
        assert record.timing is not None
        assert record.timing.ms > 0
        assert math.isfinite(record.loss or math.nan)


def test_gpu_killed_worker_is_replaced(config: SearchConfig) -> None:
    """A worker that is killed is replaced, and its trial repeated."""
    killed: list[int] = []

    class Killing(Listener):
        def trial_started(self, number: int, name: str) -> None:
            if not killed:
                (worker,) = own_workers()
                killed.append(worker)
                os.kill(worker, signal.SIGKILL)

    outcome = run(config.model_copy(update={"workers": 1}), Killing())
    assert killed
    assert outcome.trained == 3
    assert max(record.attempts for record in outcome.records) == 2


def own_workers() -> list[int]:
    """The ids of the workers that this process has started."""
    children = [int(pid) for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]
    return [
        pid for pid in children if b"attnsurgery.search.workers.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


@two_devices
def test_gpu_two_workers_use_two_devices(config: SearchConfig) -> None:
    """Two workers search on two devices."""
    assert run(config.model_copy(update={"workers": 2})).trained == 3


@two_devices
def test_gpu_measurement_stays_on_its_device() -> None:
    """A measurement on the second device allocates nothing on the first."""
    before = torch.cuda.memory_allocated(0)
    conditions = Conditions(device="cuda:1", input_size=(3, 32, 32), mode="cudagraph")
    assert backend_for(conditions, effort=QUICK).measure(Net(2)).p50_ms > 0
    assert torch.cuda.memory_allocated(0) == before


# ---- training


class Noise(Split):
    """Two classes that any model learns to separate, made on the device."""

    def __init__(self, images: int, size: int) -> None:
        self.ids = [str(number) for number in range(images)]
        self.labels = torch.arange(images) % 2
        self._size = size

    def _load(self, picks: list[Tensor], device: str, augment: torch.Generator | None) -> Iterator[Batch]:
        for picks_B in picks:
            labels_B = self.labels[picks_B].to(device)
            generator = torch.Generator(device).manual_seed(0)
            x_BCHW = torch.randn(len(picks_B), 3, self._size, self._size, device=device, generator=generator)
            yield x_BCHW + 2.0 * labels_B.view(-1, 1, 1, 1), labels_B


class Net(nn.Module):
    """Convolutions of equal width in front of a classifier."""

    def __init__(self, depth: int, width: int = 8, classes: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.convs = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1) for _ in range(depth)])
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for conv in self.convs:
            x = x + torch.relu(conv(x))
        return self.head(x.mean((2, 3)))


class Losses(Watch):
    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []

    def epoch(self, epoch: Epoch) -> None:
        self.losses.append(epoch.loss)


@pytest.mark.parametrize("channels_last", [False, True])
def test_gpu_mixed_precision_lowers_the_loss(channels_last: bool) -> None:
    """Training in mixed precision computes in bfloat16, lowers the loss and stays finite."""
    torch.manual_seed(0)
    model, watch = timm.create_model("test_resnet", num_classes=2), Losses()
    settings = TrainSettings(
        epochs=4, batch_size=32, device="cuda", amp=True, channels_last=channels_last, label_smoothing=0.0
    )
    used: list[torch.dtype] = []
    hook = model.conv1 if isinstance(model.conv1, nn.Conv2d) else next(iter(model.conv1))
    hook.register_forward_hook(lambda module, args, result: used.append(result.dtype))
    train(model, Noise(256, 32), settings, 0, watch)
    assert set(used) == {torch.bfloat16}
    assert all(map(math.isfinite, watch.losses))
    assert watch.losses[-1] < 0.7 * watch.losses[0]
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    evaluation = evaluate(model, Noise(64, 32), settings)
    assert evaluation.metric > 0.9
    assert math.isfinite(evaluation.loss)


@pytest.fixture
def memory_limit() -> Iterator[Any]:
    """Limits the memory of torch to so many bytes more than it holds now."""

    def limit(more: float) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        allowed = torch.cuda.memory_reserved() + more
        torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(0).total_memory)

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def peak_of(work: Any) -> int:
    """The largest number of bytes that `work` allocates, beside what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def batch_sizes(model: nn.Module) -> list[int]:
    """A list that gets the size of every batch that the model finishes."""
    sizes: list[int] = []
    model.register_forward_hook(lambda module, args, result: sizes.append(len(result)))
    return sizes


def test_gpu_training_continues_in_pieces(memory_limit: Any) -> None:
    """Training continues in pieces of the batch where memory is short."""
    settings = TrainSettings(epochs=1, batch_size=64, device="cuda")
    split = Noise(128, 64)
    whole = peak_of(lambda: train(Net(8, 64), split, settings, 0))
    model, watch = Net(8, 64), Losses()
    sizes = batch_sizes(model)
    memory_limit(0.6 * whole)
    train(model, split, settings, 0, watch)
    assert max(sizes) <= 64
    assert sizes.count(32) + sizes.count(16) >= 4
    assert all(map(math.isfinite, watch.losses))


def test_gpu_evaluation_halves_its_batch(memory_limit: Any) -> None:
    """Evaluation continues at half the batch where memory is short, with the same score."""
    settings = TrainSettings(epochs=1, batch_size=64, device="cuda")
    split, model = Noise(512, 64), Net(4, 64).cuda()
    whole = peak_of(lambda: evaluate(model, split, settings))
    expected = evaluate(model, split, settings)
    sizes = batch_sizes(model)
    memory_limit(0.6 * whole)
    got = evaluate(model, split, settings)
    assert sum(sizes) == 512
    assert max(sizes) < 256
    assert len(got.values) == len(expected.values)
    assert got.metric == pytest.approx(expected.metric, abs=0.02)
    assert got.loss == pytest.approx(expected.loss, rel=0.05)


# ---- what is measured


@every_mode
def test_gpu_more_work_takes_more_time(mode: str) -> None:
    """A deeper model is slower in every mode."""
    conditions = Conditions.on("cuda", input_size=(3, 64, 64), mode=mode)
    assert backend_for(conditions, effort=QUICK).compare(Net(1), Net(24)).ratio_low > 1


@every_mode
def test_gpu_ratio_of_model_to_itself_is_one(mode: str) -> None:
    """One interval of 20 may miss 1, so of three two at least have to hold it. A graph's is narrow; that of launches by
    Python is as wide as these are irregular.
    """
    conditions = Conditions.on("cuda", input_size=(3, 96, 96), mode=mode, batch_size=32)
    backend, model = backend_for(conditions, effort=Effort(max_seconds=2)), timm.create_model("test_resnet")
    comparisons = [backend.compare(model, model) for _ in range(3)]
    assert sum(one.ratio_low <= 1 <= one.ratio_high for one in comparisons) >= 2, comparisons
    if conditions.graph:
        assert all((one.ratio_high - one.ratio_low) / 2 < 0.01 for one in comparisons), comparisons


def test_gpu_peak_is_weights_and_activations() -> None:
    """Peak memory is that of weights, input and activations."""
    for batch in (8, 32):
        backend = backend_for(Conditions(device="cuda", input_size=(16, 64, 64), batch_size=batch))
        conv = nn.Conv2d(16, 64, 3, padding=1)
        images, maps = batch * 16 * 64 * 64 * 4, batch * 64 * 64 * 64 * 4
        weights = 4 * sum(parameter.numel() for parameter in conv.parameters())
        peak = backend.peak_bytes(conv)
        assert weights + images + maps <= peak <= weights + images + 3 * maps + (64 << 20)
        assert backend.peak_bytes(nn.Sequential(conv, nn.Conv2d(64, 64, 1))) >= weights + images + 2 * maps


def test_gpu_compiles_each_of_ten_candidates() -> None:
    """Dynamo caches 8 variants of one forward, and would run the ninth eagerly."""
    from torch._dynamo.utils import counters

    backend = backend_for(Conditions.on("cuda", input_size=(3, 32, 32), mode="compile"), effort=QUICK)
    for depth in range(1, 11):
        counters.clear()
        backend.measure(Net(depth))
        assert counters["stats"]["unique_graphs"] >= 1, f"candidate {depth} of 10"


class StoredOutput(nn.Module):
    """Stores its last output where a graph can write it."""

    def __init__(self, model: nn.Module, like: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("output", torch.zeros_like(like))

    def forward(self, x: Tensor) -> Tensor:
        y = self.model(x)
        self.output.copy_(y)
        return y


@every_mode
def test_gpu_modes_compute_the_model(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each mode errs no more than the eager model."""
    conditions = Conditions.on("cuda", input_size=(3, 64, 64), batch_size=4, mode=mode)
    backend = backend_for(conditions, effort=QUICK)
    model = timm.create_model("test_resnet").eval()
    subjects: list[tuple[StoredOutput, Tensor]] = []
    make = backend._subject

    def record_subject(model: nn.Module) -> Any:
        subjects.append(make(model))  # type: ignore[arg-type]
        return subjects[-1]

    monkeypatch.setattr(backend, "_subject", record_subject)
    backend.measure(StoredOutput(model, torch.zeros(4, model.num_classes)))
    subject, x_BCHW = subjects[0]
    with torch.no_grad():
        expected = copy.deepcopy(model).bfloat16().double().cpu()(x_BCHW.double().cpu())
        eager = relative_error(subject.model(x_BCHW), expected)
    assert relative_error(subject.output, expected) <= error_tolerated(eager, torch.bfloat16)


class Uncapturable(nn.Module):
    """Reads a number from the device in the middle of its forward, which no graph can capture."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y * float(y.abs().amax().item())


def test_gpu_uncapturable_model_is_refused() -> None:
    """A model that no CUDA graph can hold is refused with the modes that work."""
    backend = backend_for(Conditions.on("cuda", input_size=(3, 32, 32), mode="cudagraph"), effort=QUICK)
    with pytest.raises(UsageError, match=r"no CUDA graph can hold the forward of Uncapturable.*eager.*compile"):
        backend.measure(Uncapturable())
    assert backend.measure(Net(1)).p50_ms > 0, "the device is as good as before"


ILLEGAL = """
import torch
from torch import nn
from attnsurgery.errors import UsageError
from attnsurgery.faults import fault_of
from attnsurgery.latency import Conditions, backend_for

class Illegal(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(4, 8)

    def forward(self, x):
        return self.table((x[:, 0] * 0 + 1000).long())

try:
    backend_for(Conditions(device="cuda", input_size=(3, 16, 16))).measure(Illegal())
except Exception as error:
    print("refused" if isinstance(error, UsageError) else fault_of(error))
"""


def test_gpu_illegal_access_is_device_fault() -> None:
    """An illegal memory access during a measurement is a fault of the device."""
    done = subprocess.run(
        [sys.executable, "-c", ILLEGAL], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ROOT}
    )
    assert done.stdout.split() == ["device"], done.stdout + done.stderr[-2000:]


# ---- attention


def rows(batch: int, positions: int, width: int, seed: int) -> Tensor:
    return torch.randn(batch, positions, width, generator=torch.Generator().manual_seed(seed))


def formula(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return torch.softmax(scale * query @ key.transpose(1, 2), dim=-1) @ value


@pytest.mark.usefixtures("no_tf32")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("width", "value_width"), [(64, 64), (64, 512), (512, 512), (512, 256), (33, 20)])
@pytest.mark.parametrize("form", ["as measured", "product", "in heads", "one head"])
def test_gpu_attention_error_within_cpu(form: str, width: int, value_width: int, dtype: torch.dtype) -> None:
    """No form errs more than the formula on a CPU, forward and in the gradients of all three inputs, against fp64."""
    scale = width**-0.5
    forms = {
        "as measured": attend,
        "product": cuda_attention.product,
        "in heads": lambda *sources: cuda_attention.fused(*sources, True),
        "one head": lambda *sources: cuda_attention.fused(*sources, False),
    }
    sources = [rows(2, 196, width, 1), rows(2, 49, width, 2), rows(2, 49, value_width, 3)]

    def results_of(run: Any, device: str, as_dtype: torch.dtype) -> list[Tensor]:
        inputs = [t.to(dtype).to(device, as_dtype).requires_grad_() for t in sources]
        y = run(*inputs, scale)
        towards = rows(2, 196, value_width, 4).to(dtype).to(device, as_dtype)
        return [y, *torch.autograd.grad(y, inputs, towards)]

    exact = results_of(formula, "cpu", torch.float64)
    on_cpu = results_of(formula, "cpu", dtype)
    on_gpu = results_of(forms[form], "cuda", dtype)
    for expected, cpu, gpu in zip(exact, on_cpu, on_gpu, strict=True):
        assert gpu.shape == expected.shape
        assert relative_error(gpu, expected) <= error_tolerated(relative_error(cpu, expected), dtype)


@pytest.mark.usefixtures("no_tf32")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("limit", [1 << 26, 0])
def test_gpu_concatenation_error_within_cpu(limit: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The product and the sorted form err no more than the formula on a CPU, forward and in gradients, against fp64."""
    monkeypatch.setattr(cuda_attention, "LARGEST_MATRIX", limit)
    sources = [rows(2, 196, 1, 1)[:, :, 0], rows(2, 49, 1, 2)[:, :, 0], rows(2, 49, 64, 3)]

    def formula(a: Tensor, b: Tensor, g: Tensor) -> Tensor:
        return torch.relu(a[:, :, None] + b[:, None, :]) @ g / b.shape[1]

    def results_of(run: Any, device: str, as_dtype: torch.dtype) -> list[Tensor]:
        inputs = [t.to(dtype).to(device, as_dtype).requires_grad_() for t in sources]
        y = run(*inputs)
        towards = rows(2, 196, 64, 4).to(dtype).to(device, as_dtype)
        return [y, *torch.autograd.grad(y, inputs, towards)]

    exact, on_cpu = results_of(formula, "cpu", torch.float64), results_of(formula, "cpu", dtype)
    for expected, cpu, gpu in zip(exact, on_cpu, results_of(concatenate, "cuda", dtype), strict=True):
        assert relative_error(gpu, expected) <= error_tolerated(relative_error(cpu, expected), dtype)
