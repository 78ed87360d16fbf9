"""What several test files share: small timm models with every parameter awake."""

from __future__ import annotations

import importlib.util
import itertools
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

# torch.jit.script tells builtin operators by id(). When an overload joins an operator, torch drops the old function but
# keeps its id in that table, and whatever object comes to lie there next "cannot be used as a value". So all are kept.
_KEPT = []
_refresh = torch._ops._refresh_packet


def _keeping(packet: Any) -> None:
    _KEPT.append(packet._op)
    _refresh(packet)


torch._ops._refresh_packet = _keeping

import timm  # noqa: E402  (defines operators)

import attnsurgery  # noqa: E402, F401  (makes the surgical names known to timm)
from attnsurgery.search.workers import spawn  # noqa: E402
from attnsurgery.surgery.operate import grafted_blocks  # noqa: E402
from tests import warm_start  # noqa: E402
from tests.lower_end import skip_older  # noqa: E402
from tests.summary import pytest_sessionfinish, pytest_terminal_summary  # noqa: E402, F401

# One small model of each kind of host: image size and the arguments that make it small.
HOSTS: dict[str, tuple[int, dict[str, Any]]] = {
    "test_resnet": (64, {}),
    "test_convnext": (64, {}),  # layer scale
    "test_efficientnet": (64, {}),  # squeeze-excite and activations inside
    "test_byobnet": (64, {}),
    "test_vit": (64, {"img_size": 64}),  # tokens
    "swin_tiny_patch4_window7_224": (  # windows, channels last
        64,
        {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (1, 2, 2, 1), "num_heads": (1, 2, 3, 4)},
    ),
    "regnetx_002": (64, {}),  # a row of blocks that is no Sequential
    "vgg11": (64, {"mlp_ratio": 0.01}),  # bare layers
    "densenet121": (64, {"block_config": (2, 2, 2, 2)}),  # lists between blocks
}


def wake(model: nn.Module, seed: int = 0) -> nn.Module:
    """Move every parameter and statistic off its initial value.

    timm starts the last norm of residual branches at zero, so on a fresh model whatever stands behind it sees zeros and
    'output unchanged' holds for any block.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer += 0.1 * torch.rand(buffer.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """The same numbers twice, where training is compared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


_cache_number = itertools.count()


@pytest.fixture(scope="session")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(scope="module", autouse=True)
def cache_of_the_file(caches: Path) -> Iterator[None]:
    """Latencies that tests measure are none of the user's, nor of another file's tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTNSURGERY_CACHE", str(caches / str(next(_cache_number))))
        yield


@pytest.fixture(autouse=True)
def cache_of_the_test(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor of another test's."""
    own = caches / str(next(_cache_number))
    monkeypatch.setenv("ATTNSURGERY_CACHE", str(own))
    monkeypatch.setenv("ATTNSURGERY_LOCKS", str(own))  # tests that run at a time do not wait for each other


@pytest.fixture(autouse=True)
def _norms_as_timm_sets_them() -> Iterator[None]:
    """A script run with --fast-norm sets that for the whole process."""
    yield
    timm.layers.set_fast_norm(False)


def build(name: str, **kwargs: object) -> nn.Module:
    """A woken model in eval mode; a host of HOSTS in its small form."""
    torch.manual_seed(0)
    _, small = HOSTS.get(name, (0, {}))
    return wake(timm.create_model(name, **{**small, **kwargs})).eval()


def convnext_of_its_authors(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of timm's ConvNeXt under the names that its authors gave them, which timm converts."""
    found = {}
    for key, value in weights.items():
        key = key.replace("stem.", "downsample_layers.0.")
        for index in range(1, 4):
            key = key.replace(f"stages.{index}.downsample.", f"downsample_layers.{index}.")
        key = key.replace(".blocks.", ".").replace("conv_dw.", "dwconv.").replace("mlp.fc", "pwconv")
        for ours, theirs in [("norm_pre", "norm"), ("head.norm", "norm"), ("head.fc", "head")]:
            key = key.replace(ours, theirs)
        found[key] = value
    return found


def images(size: int, batch: int = 2, channels: int = 3) -> torch.Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


def move_gates(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for block in grafted_blocks(model).values():
            for parameter in block.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """||got - expected|| / ||expected||, in fp64 on the CPU."""
    got, expected = got.detach().double().cpu(), expected.detach().double().cpu()
    norm = float(expected.norm())
    return float((got - expected).norm()) / (norm or 1.0)  # of nothing, the absolute error


def error_tolerated(on_cpu: float, dtype: torch.dtype) -> float:
    """The relative error that a GPU may have where the same computation in the same dtype has `on_cpu` on a CPU.

    Both round as often, but add up in another order: a few times the error. And a last digit where it is almost 0; in
    float32 a few more of them, which cuDNN's Winograd convolutions lose.
    """
    eps = torch.finfo(dtype).eps
    return 4 * on_cpu + (16 * eps if dtype == torch.float32 else eps)


@pytest.fixture
def no_tf32() -> Iterator[None]:
    """float32 on CUDA is float32: by default convolutions round their inputs to 10 bits of mantissa there."""
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch 2.9 and later
        flags: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn]  # type: ignore[attr-defined]
        name, exact = "fp32_precision", "ieee"
    else:
        flags, name, exact = [torch.backends.cuda.matmul, torch.backends.cudnn], "allow_tf32", False  # type: ignore[assignment]
    before = [getattr(flag, name) for flag in flags]
    try:
        for flag in flags:
            setattr(flag, name, exact)
        yield
    finally:
        for flag, value in zip(flags, before, strict=True):
            setattr(flag, name, value)


class LargestTensor(TorchDispatchMode):
    """Watches the largest tensor that any operation returns, forward and backward."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel())
        return result


@pytest.fixture(autouse=True)
def _few_threads() -> Iterator[None]:
    """Small models run fastest on one thread, and only then are sums the same on every machine and under every load."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def pytest_configure(config: pytest.Config) -> None:
    """One server for all processes of pytest-xdist; where there is one process, it starts the server at need."""
    if getattr(config.option, "numprocesses", None):
        warm_start.start_server()


@pytest.fixture(scope="module")
def no_pictures() -> Iterator[None]:
    """Reports have no pictures, which take as long to draw as a small training; tests/test_report.py draws them."""
    from attnsurgery.search.report import figures

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "embed", lambda pictures: (dict.fromkeys(pictures, ""), ""))
        yield


@pytest.fixture(scope="module")
def warm_workers() -> Iterator[None]:
    """Workers of a search start in forks of a process that has done their imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spawn, "COMMAND", warm_start.worker())
        if importlib.util.find_spec("submitit"):
            from submitit.local.local import LocalExecutor

            command = shlex.join([*warm_start.python(), "-m", "submitit.core._submit"])
            patch.setattr(
                LocalExecutor,
                "_submitit_command_str",
                property(lambda executor: f"{command} {shlex.quote(str(executor.folder))}"),
            )
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        skip_older(item)
