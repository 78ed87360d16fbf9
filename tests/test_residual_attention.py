"""The mask of residual attention equals the paper's formulas, and every option passes every exporter."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import attnsurgery
from attnsurgery.blocks._base import build_block
from attnsurgery.blocks.residual_attention import PreActUnit, ResidualAttention
from attnsurgery.errors import OptionError
from tests.conftest import error_tolerated, relative_error
from tests.lower_end import EXPORTS_ANY_SIZE

OPTIONS: list[dict[str, Any]] = [
    {"depth": 1},
    {"depth": 2, "r": 2},
    {"depth": 3, "width": 0.25},
    {"depth": 0},
    {"depth": 2, "norm": "channel"},
    {"depth": 1, "norm": "spatial", "width": 0.5},
]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


def woken(channels: int = 16, start: str = "identity", dtype: torch.dtype | None = None, **options: Any) -> Any:
    """Builds a block in eval mode, no parameter or statistic of which is at its start."""
    torch.manual_seed(0)
    block = build_block("residual_attention", channels, options, start, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        for buffer in block.buffers():
            if buffer.is_floating_point():
                buffer += 0.2 * torch.rand_like(buffer)
    return block


def images(*size: int, batch: int = 2, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.randn(batch, 16, *size, generator=torch.Generator().manual_seed(1), dtype=dtype)


def pooled(x: torch.Tensor) -> torch.Tensor:
    """Computes max-pooling 3x3 with stride 2 in ceil mode, window by window."""
    height, width = (math.ceil((side - 3) / 2) + 1 for side in x.shape[2:])
    windows = [
        [x[:, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].amax((2, 3)) for j in range(width)] for i in range(height)
    ]
    return torch.stack([torch.stack(row, -1) for row in windows], -2)


def grown(x: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """Computes bilinear interpolation with aligned corners by two matrices."""

    def matrix(few: int, many: int) -> torch.Tensor:
        at = torch.arange(many, dtype=x.dtype) * ((few - 1) / (many - 1) if many > 1 else 0.0)
        return (1 - (at[:, None] - torch.arange(few, dtype=x.dtype)).abs()).clamp(min=0)

    return matrix(x.shape[2], size[0]) @ x @ matrix(x.shape[3], size[1]).T


def unit(module: PreActUnit, x: torch.Tensor) -> torch.Tensor:
    """Computes norm, ReLU and convolution three times, and adds the shortcut."""
    y = x
    for norm, conv in ((module.norm1, module.conv1), (module.norm2, module.conv2), (module.norm3, module.conv3)):
        y = conv(torch.relu(norm(y)))
    return x + y


def paper_mask(block: ResidualAttention, x: torch.Tensor) -> torch.Tensor:
    """Computes figure 3 of the paper for a depth of 2 and any r: M of equation 3 before it is normalised."""
    upper: Any = block.mask
    lower: Any = upper.below
    down = pooled(x)
    for module in upper.down:
        down = unit(module, down)
    y = pooled(down)
    for module in [*lower.down, *lower.up]:
        y = unit(module, y)
    y = grown(y, down.shape[2:]) + unit(upper.skip[0], down)
    for module in upper.up:
        y = unit(module, y)
    y = grown(y, x.shape[2:])
    return block.conv2(torch.relu(block.norm2(block.conv1(torch.relu(block.norm1(y))))))


@pytest.mark.parametrize("size", [(8, 8), (14, 14), (9, 15), (4, 21)])
@pytest.mark.parametrize("r", [1, 2])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.slow
def test_mask_is_the_papers_figure(size: tuple[int, int], r: int, training: bool) -> None:
    """The mask is figure 3 of the paper, values and gradients."""
    block = woken(dtype=torch.float64, depth=2, r=r, start="paper").train(training)
    x = images(*size, dtype=torch.float64).requires_grad_()
    ours, paper = block(x), 1 + torch.sigmoid(paper_mask(block, x))
    assert torch.allclose(ours, paper, atol=1e-12, rtol=0)
    gradients = [torch.autograd.grad(y.square().sum(), [x, *block.parameters()]) for y in (ours, paper)]
    for ours_gradient, expected in zip(*gradients, strict=True):
        assert torch.allclose(ours_gradient, expected, atol=1e-10, rtol=1e-10)


def test_masks_follow_equations_4_to_6() -> None:
    """Masks are normalised as equations 4 to 6 of the paper say."""
    logits = images(6, 7, dtype=torch.float64)
    mean, std = logits.mean((2, 3), keepdim=True), logits.std((2, 3), keepdim=True, correction=0)
    formulas = {
        "mixed": 1 / (1 + torch.exp(-logits)),
        "channel": logits / logits.square().sum(1, keepdim=True).sqrt(),
        "spatial": 1 / (1 + torch.exp(-(logits - mean) / std)),
    }
    for norm, expected in formulas.items():
        # 1e-6 is added below the root, which moves lengths of about 4 by 3e-8 of themselves
        assert torch.allclose(ResidualAttention(16, norm=norm)._normalized(logits), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("norm", ["mixed", "channel", "spatial"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.0, 1e-7, 300.0, 3e4])
@pytest.mark.slow
def test_masks_of_extreme_logits_are_finite(norm: str, dtype: torch.dtype, value: float) -> None:
    """Masks of zero, constant and large logits are finite, and so are their gradients."""
    logits = torch.full((2, 16, 3, 3), value, dtype=dtype, requires_grad=True)
    mask = ResidualAttention(16, norm=norm)._normalized(logits)
    (gradient,) = torch.autograd.grad(mask.float().sum(), logits)
    assert mask.dtype == dtype
    assert torch.isfinite(mask).all()
    assert mask.abs().max() <= 1
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(("depth", "r"), [(1, 1), (2, 1), (3, 1), (4, 1), (3, 2), (0, 1)])
def test_mask_has_the_papers_units(depth: int, r: int) -> None:
    """The number of units of a mask is the paper's."""
    block = ResidualAttention(16, depth=depth, r=r, device="meta")
    units = [module for module in block.modules() if isinstance(module, PreActUnit)]
    assert len(units) == ((2 * r + 1) * (depth - 1) + 2 * r if depth else 2 * r)
    if r == 1 and depth:
        assert len(units) == 3 * (depth - 1) + 2


def test_mask_has_the_papers_parameters() -> None:
    """The mask has the paper's number of parameters, and one more with the identity start."""
    # a unit: 2C + C^2/4 + 2C/4 + 9 C^2/16 + 2C/4 + C^2/4; two norms and two 1x1 convolutions at the end
    for channels, depth in ((256, 3), (512, 2), (1024, 1)):
        one = 3 * channels + channels**2 * 17 // 16
        expected = (3 * (depth - 1) + 2) * one + 2 * (2 * channels + channels**2)
        paper = ResidualAttention(channels, depth=depth, start="paper", device="meta")
        identity = ResidualAttention(channels, depth=depth, device="meta")
        assert sum(p.numel() for p in paper.parameters()) == expected
        assert sum(p.numel() for p in identity.parameters()) == expected + 1


@settings(max_examples=40, deadline=None)
@given(height=st.integers(1, 40), width=st.integers(1, 40), depth=st.integers(0, 6))
@pytest.mark.slow
def test_check_map_accepts_what_trains(height: int, width: int, depth: int) -> None:
    """A map that check_map accepts trains at batch 1, and the depth that it advises is accepted."""
    block = ResidualAttention(4, depth=depth)
    try:
        block.check_map(height, width)
    except OptionError as refusal:
        assert (height >> depth) * (width >> depth) <= 1
        if "use depth: " in str(refusal):
            advised = int(str(refusal).partition("use depth: ")[2].split()[0])
            assert advised < depth
            ResidualAttention(4, depth=advised).check_map(height, width)
            with pytest.raises(OptionError):
                ResidualAttention(4, depth=advised + 1).check_map(height, width)
        else:
            assert height * width == 1
        return
    x = torch.randn(1, 4, height, width)
    assert torch.equal(block.train()(x), torch.ones_like(x))


def test_small_map_error_names_a_depth() -> None:
    """A map that is too small is refused with the depth that would do."""
    with pytest.raises(OptionError, match=r"depth=4 halves a map of 14 x 14 to 0 x 0.*use depth: 2 or an earlier"):
        ResidualAttention(16, depth=4).check_map(14, 14)
    with pytest.raises(OptionError, match="use an earlier stage"):
        ResidualAttention(16, depth=0).check_map(1, 1)


@pytest.mark.parametrize(
    ("side", "depth"), [(56, 3), (28, 2), (14, 1), (7, 0), (32, 3), (16, 2), (8, 1), (4, 0), (3, 0), (1, 0)]
)
def test_depth_follows_map_as_in_the_paper(side: int, depth: int) -> None:
    """Depth follows the map as in the paper."""
    assert ResidualAttention.fittings({"r": 2}, side, side + 5) == ({"r": 2, "depth": depth},)
    assert ResidualAttention.fittings({"depth": 5}, side, side) == ({"depth": 5},)


@pytest.mark.slow
def test_masks_of_named_model_are_papers() -> None:
    """The masks of a named model are as deep as the paper's, and an explicit depth is kept."""
    with torch.device("meta"):
        model = timm.create_model("resnet50_resattn")
    masks = [module for module in model.modules() if isinstance(module, ResidualAttention)]
    assert [mask.depth for mask in masks] == [3, 2, 1, 0]
    edit: dict[str, Any] = {"at": "layer1.1 .. layer1.2", "block": "residual_attention", "options": {"depth": 2}}
    recipe = {"version": 1, "name": "shallow", "base": "resnet50", "edits": [edit]}
    with torch.device("meta"):
        operated = attnsurgery.operate(timm.create_model("resnet50"), recipe)
    (mask,) = [module for module in operated.modules() if isinstance(module, ResidualAttention)]
    assert mask.depth == 2
    edit["options"]["depth"] = 6
    with pytest.raises(OptionError, match=r"depth=6 halves a map of 56 x 56.*use depth: 4 or an earlier stage"):
        attnsurgery.operate(timm.create_model("resnet50"), recipe)


@every_option
@pytest.mark.parametrize("size", [(8, 8), (9, 15), (16, 11)])
@pytest.mark.slow
def test_mask_starts_at_1_and_moves(options: dict[str, Any], size: tuple[int, int]) -> None:
    """Every option starts at exactly 1 and moves."""
    x = images(*size)
    for training in (True, False):
        fresh = build_block("residual_attention", 16, options, "identity").train(training)
        assert torch.equal(fresh(x), torch.ones_like(x))
    assert (woken(**options)(x) - 1).abs().max() > 1e-3


@every_option
@pytest.mark.parametrize("start", ["identity", "paper"])
@pytest.mark.slow
def test_mask_keeps_layout_and_counts_macs(options: dict[str, Any], start: str) -> None:
    """Every option keeps the memory layout and costs what torch counts."""
    block = woken(start=start, **options)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = images(16, 9).to(memory_format=memory_format)
        assert block(x).is_contiguous(memory_format=memory_format)
        assert torch.allclose(block(x), block(x.contiguous()), atol=1e-5)
    for size in ((16, 16), (17, 9)):
        with FlopCounterMode(display=False) as counter:
            block(images(*size, batch=1))
        assert block.cost(*size).macs == counter.get_total_flops() // 2


@every_option
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.slow
def test_mask_trains_in_autocast(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Every option trains under autocast with finite gradients."""
    block, x = woken(**options), images(16, 17)
    with torch.autocast("cpu", dtype=dtype):
        factor = block.train()(x)
    assert factor.dtype == dtype
    (factor.float() - images(16, 17)).square().mean().backward()
    assert torch.isfinite(factor).all()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for p in block.parameters())


@pytest.mark.parametrize("options", OPTIONS[3:], ids=str)
@pytest.mark.since(*EXPORTS_ANY_SIZE)
@pytest.mark.slow
def test_mask_exports_by_every_exporter(options: dict[str, Any], tmp_path: Path) -> None:
    """Every kind of mask can be scripted, compiled, and exported to torch.export and ONNX."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnxscript")
    block, x = woken(**options), images(16, 18)
    expected = block(x)
    torch._dynamo.reset()
    assert torch.equal(torch.jit.script(block)(x), expected)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
    assert torch.allclose(compiled, expected, atol=2e-6, rtol=0)  # torch takes the interpolation apart, and rounds
    side = 2 ** (block.depth + 1)
    dims = {
        0: torch.export.Dim("batch"),
        2: torch.export.Dim("height", min=side),
        3: torch.export.Dim("width", min=side),
    }
    program = torch.export.export(block, (x,), dynamic_shapes={"x": dims})
    path = tmp_path / "block.onnx"
    torch.onnx.export(program, dynamo=True, verbose=False).save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in ((side, side), (side + 1, 2 * side + 3)):
        other = images(*size, batch=3)
        assert torch.allclose(program.module()(other), block(other), atol=1e-6)
        (through_onnx,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
        assert torch.allclose(torch.from_numpy(through_onnx), block(other), atol=1e-5)


class _FullSize(TorchDispatchMode):
    """Counts operations that return a tensor as large as the input or larger."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.names = numel, []  # type: ignore[var-annotated]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, tuple) else out
        if first.numel() >= self.numel:
            self.names.append(func.__name__)
        return out


def test_mask_runs_few_full_size_operations() -> None:
    """At most ten operations touch a tensor of full size."""
    block, x = woken(depth=2, r=2), images(32, 32)
    with torch.no_grad(), _FullSize(x.numel()) as operations:
        block(x)
    # up, norm, relu, 1x1, norm, relu, 1x1, sigmoid, times alpha, plus 1
    assert len(operations.names) == 10, operations.names


def test_mask_repeats_bit_for_bit() -> None:
    """Forward and backward pass repeat bit for bit."""
    block = woken(depth=2).train()
    x = images(15, 12).requires_grad_()
    runs = [torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()]) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.usefixtures("no_tf32")
@every_option
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mask_errs_on_gpu_as_on_cpu(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Outputs and gradients err on a GPU no more than on the CPU, against fp64."""
    rounded = woken(**options).to(dtype)

    def output_and_gradients(block: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        x = x.requires_grad_()
        y = block(x)
        of_image, *of_weights = torch.autograd.grad(y, [x, *block.parameters()], torch.ones_like(y))
        return [y, of_image, torch.cat([gradient.flatten() for gradient in of_weights])]

    image = images(16, 16).to(dtype)
    expected = output_and_gradients(copy.deepcopy(rounded).double(), image.double())
    on_cpu = output_and_gradients(copy.deepcopy(rounded), image.clone())
    on_gpu = output_and_gradients(copy.deepcopy(rounded).cuda(), image.cuda())
    for exact, cpu, gpu in zip(expected, on_cpu, on_gpu, strict=True):
        assert relative_error(gpu, exact) <= error_tolerated(relative_error(cpu, exact), dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_mask_repeats_on_gpu_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients on a GPU repeat bit for bit with torch's deterministic algorithms."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    block = woken(depth=2).train().cuda()
    x = images(15, 12).cuda().requires_grad_()
    torch.use_deterministic_algorithms(True)
    try:
        runs = [torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()]) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_unit_shortcut_changes_shape() -> None:
    """A unit changes width and stride through its shortcut."""
    one = PreActUnit(8, 16, stride=2).eval()
    x = images(9, 7)[:, :8]
    activated = torch.relu(one.norm1(x))
    y = activated
    for norm, conv in ((nn.Identity(), one.conv1), (one.norm2, one.conv2), (one.norm3, one.conv3)):
        y = conv(y if isinstance(norm, nn.Identity) else torch.relu(norm(y)))
    shortcut = F.conv2d(activated, one.downsample.weight, stride=2)
    assert torch.allclose(one(x), y + shortcut, atol=1e-6)
    assert one(x).shape == (2, 16, 5, 4)
