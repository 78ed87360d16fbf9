"""Dual attention with every option, and its segmentation head, against the paper's formulas and published counts."""

from __future__ import annotations

import copy
import io
import itertools
import warnings
from typing import Any

import onnxruntime
import pytest
import timm
import torch
from torch import Tensor

import attnsurgery
from attnsurgery.blocks.dual_attention import ChannelAttention, DualAttention, PositionAttention
from attnsurgery.errors import OptionError
from attnsurgery.models.danet import DANetHead
from tests.conftest import LargestTensor
from tests.lower_end import EXPORTS_ANY_SIZE

FUSIONS = ["shared_residual", "sequential", "paper_sum"]
OPTIONS: list[dict[str, Any]] = [
    {"parts": parts, "fusion": fusion, "subsample": subsample, "cam_energy": energy}
    for parts, fusion, subsample, energy in itertools.product(
        ["both", "position", "channel"], FUSIONS, [1, 2], ["code", "paper"]
    )
]
OPTIONS += [{"reduction": 1}, {"reduction": 16, "subsample": 3}]

# Each value of each option at least once: for what takes seconds.
FEW: list[dict[str, Any]] = [
    {},
    {"fusion": "sequential", "subsample": 2, "cam_energy": "paper"},
    {"fusion": "paper_sum", "reduction": 1},
]


def option_id(options: dict[str, Any]) -> str:
    return "-".join(str(value) for value in options.values()) or "default"


every_option = pytest.mark.parametrize("options", OPTIONS, ids=option_id)
few_options = pytest.mark.parametrize("options", FEW, ids=option_id)


def images(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*size, dtype=dtype, generator=torch.Generator().manual_seed(1))


def dual_block(options: dict[str, Any], awake: bool = False, dtype: torch.dtype = torch.float32) -> DualAttention:
    torch.manual_seed(0)
    start = "paper" if options.get("fusion") == "paper_sum" else "identity"
    block = DualAttention(16, **options, start=start, dtype=dtype).eval()
    if awake:
        with torch.no_grad():
            for parameter in block.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
    return block


def naive_position(module: PositionAttention, x: Tensor) -> Tensor:
    """Equations 1 and 2 of the paper, with the N x M matrix written out."""
    query, key, value = module.query_conv(x), module.key_conv(module.pool(x)), module.value_conv(module.pool(x))
    weights = torch.softmax(torch.einsum("bcn,bcm->bnm", query.flatten(2), key.flatten(2)), dim=-1)
    return torch.einsum("bnm,bcm->bcn", weights, value.flatten(2)).reshape(x.shape)


def naive_channel(x: Tensor, energy: str) -> Tensor:
    """Equations 3 and 4 of the paper, or the authors' code for equation 3."""
    product = torch.einsum("bcn,bdn->bcd", x.flatten(2), x.flatten(2))
    if energy == "code":
        product = product.amax(dim=-1, keepdim=True) - product
    return torch.einsum("bcd,bdn->bcn", torch.softmax(product, dim=-1), x.flatten(2)).reshape(x.shape)


def naive(block: DualAttention, x: Tensor, options: dict[str, Any]) -> Tensor:
    energy = options.get("cam_energy", "code")
    terms = []
    if block.sa is not None:
        terms.append(block.sa.gamma * naive_position(block.sa, x))
    if block.sc is not None:
        channel_input = x + sum(terms) if options.get("fusion") == "sequential" else x
        terms.append(block.sc.gamma * naive_channel(channel_input, energy))
    if options.get("fusion") == "paper_sum":
        return sum(x + term for term in terms)  # type: ignore[return-value]
    return x + sum(terms)


@every_option
@pytest.mark.parametrize("size", [(8, 8), (7, 9)])
@pytest.mark.slow
def test_dual_options_compute_paper_formula(options: dict[str, Any], size: tuple[int, int]) -> None:
    """Outputs and gradients of every option are those of the paper's formulas."""
    block = dual_block(options, awake=True, dtype=torch.float64)
    x = images(2, 16, *size, dtype=torch.float64).requires_grad_()
    ours, expected = block(x), naive(block, x, options)
    assert (ours - x).abs().max() > 1e-3
    assert (ours - expected).abs().max() <= 1e-12
    gradients = [torch.autograd.grad(y.square().sum(), [x, *block.parameters()]) for y in (ours, expected)]
    for ours_gradient, formula_gradient in zip(*gradients, strict=True):
        assert torch.allclose(ours_gradient, formula_gradient, atol=1e-10, rtol=1e-10)


def test_dual_large_maps_compute_formula() -> None:
    """Large maps, which take the other form of the computation, compute the same formula."""
    block, x = dual_block({}, awake=True, dtype=torch.float64), images(2, 16, 28, 38, dtype=torch.float64)
    assert (block(x) - naive(block, x, {})).abs().max() <= 1e-12


@every_option
def test_dual_options_start_at_identity(options: dict[str, Any]) -> None:
    """Every option starts as the identity, except the paper's sum of two parts, which starts as 2 x."""
    block, x = dual_block(options), images(2, 16, 7, 9)
    twice = options.get("fusion") == "paper_sum" and options["parts"] == "both"
    for training in (True, False):
        assert torch.equal(block.train(training)(x), 2 * x if twice else x)
        assert block(x).data_ptr() != x.data_ptr()


def test_dual_paper_sum_refuses_identity() -> None:
    """The paper's sum is refused with an identity start, and the message says why."""
    with pytest.raises(OptionError, match=r"2 x at gamma = 0.*Use fusion: shared_residual .* or start: paper"):
        DualAttention(16, fusion="paper_sum")


@every_option
@pytest.mark.slow
def test_dual_options_keep_format_and_dtype(options: dict[str, Any]) -> None:
    """Every option keeps the memory format and the dtype."""
    block, x = dual_block(options, awake=True), images(3, 16, 7, 9)
    got = block(x.contiguous(memory_format=torch.channels_last))
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(got, block(x), atol=1e-5)
    assert dual_block(options, dtype=torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


@every_option
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.slow
def test_dual_options_finite_under_autocast(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Under autocast outputs are close to full precision, and outputs and gradients are finite."""
    block, x = dual_block(options, awake=True), images(2, 16, 8, 8).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        got = block(x)
    assert got.dtype == x.dtype
    assert torch.allclose(got, block(x), atol=0.1, rtol=0.1)
    for gradient in torch.autograd.grad(got.square().mean(), [x, *block.parameters()]):
        assert torch.isfinite(gradient).all()


def test_dual_fp16_channel_attention_finite() -> None:
    """Channel attention of large fp16 maps is finite, though their product in fp16 is not."""
    block = dual_block({"parts": "channel"}, awake=True)
    x = 40 * images(1, 16, 56, 56)
    assert not torch.isfinite(x.half().flatten(2) @ x.half().flatten(2).transpose(1, 2)).all()
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.isfinite(block(x)).all()
    assert torch.isfinite(block.half()(x.half())).all()


@every_option
@pytest.mark.slow
def test_dual_options_script_to_same_outputs(options: dict[str, Any]) -> None:
    """Every option gives the same outputs when scripted."""
    block, x = dual_block(options, awake=True), images(2, 16, 8, 9)
    assert torch.equal(torch.jit.script(block)(x), block(x))


def dynamic(block: DualAttention) -> dict[str, Any]:
    """Shapes of any size that leaves two positions a side."""
    sides = {axis: torch.export.Dim(name, min=2 * block.subsample) for axis, name in ((2, "height"), (3, "width"))}
    return {"x": {0: torch.export.Dim("batch"), **sides}}


@few_options
@pytest.mark.since(*EXPORTS_ANY_SIZE)
@pytest.mark.slow
def test_dual_options_compile_and_export(options: dict[str, Any]) -> None:
    """Options compile, export for any size, and go on to ONNX."""
    block, x, file = dual_block(options, awake=True), images(2, 16, 8, 9), io.BytesIO()
    assert torch.equal(torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x))
    exported = torch.export.export(block, (x,), dynamic_shapes=dynamic(block))
    for size in [(4, 16, 5, 6), (1, 16, 40, 30)]:
        assert torch.allclose(exported.module()(images(*size)), block(images(*size)), atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(exported, dynamo=True, verbose=False)
    assert program is not None
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (name,) = (entry.name for entry in session.get_inputs())
    for size in [(2, 16, 8, 9), (3, 16, 5, 6), (1, 16, 40, 30)]:
        (got,) = session.run(None, {name: images(*size).numpy()})
        assert torch.allclose(torch.from_numpy(got), block(images(*size)), atol=1e-4)


@few_options
def test_dual_options_are_deterministic(options: dict[str, Any]) -> None:
    """Under deterministic algorithms gradients repeat."""
    block = dual_block(options, awake=True)
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(2):
            x = images(2, 16, 33, 33).requires_grad_()
            runs.append(torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()]))
        assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@every_option
@pytest.mark.slow
def test_dual_options_cost_what_torch_counts(options: dict[str, Any]) -> None:
    """The multiply-accumulates of every option are those that torch counts."""
    from torch.utils.flop_counter import FlopCounterMode

    block = dual_block(options)
    twin = copy.deepcopy(block).to("meta")  # on a CPU some versions of torch count no fused attention
    for size in [(8, 8), (6, 9), (40, 30)]:
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            twin(images(1, 16, *size).to("meta"))
        assert block.cost(*size).macs == counter.get_total_flops() // 2


def test_dual_builds_no_matrix_on_large_maps() -> None:
    """On large maps no matrix of positions by positions is built, which the plain formula does."""
    block, x = dual_block({}, awake=True), images(1, 16, 56, 56).requires_grad_()
    with LargestTensor() as watched:
        block(x).square().sum().backward()
    assert watched.largest < 3136**2 / 4
    with LargestTensor() as of_naive, torch.no_grad():
        naive(block, x, {})
    assert of_naive.largest == 3136**2


def test_dual_has_published_parameters() -> None:
    """The numbers of parameters are the published ones."""
    assert sum(p.numel() for p in PositionAttention(512, device="meta").parameters()) == 328_321
    assert sum(p.numel() for p in ChannelAttention(device="meta").parameters()) == 1
    assert sum(p.numel() for p in DualAttention(512, device="meta").parameters()) == 328_322
    with torch.device("meta"):
        assert sum(p.numel() for p in DANetHead(2048, 19).parameters()) == 23_954_619


def test_danet_head_learns_from_zero_gammas() -> None:
    """The head gives three maps of scores, and its gammas get gradients at 0."""
    torch.manual_seed(0)
    head, x = DANetHead(64, 5).train(), images(2, 64, 6, 7)
    outputs = head(x)
    assert [output.shape for output in outputs] == [(2, 5, 6, 7)] * 3
    sum(output.square().mean() for output in outputs).backward()
    assert head.sa.gamma.grad.abs() > 0
    assert head.sc.gamma.grad.abs() > 0
    scripted, head = torch.jit.script(head.eval()), head.eval()
    assert all(torch.equal(got, expected) for got, expected in zip(scripted(x), head(x), strict=True))


def test_danet_head_too_narrow_is_refused() -> None:
    """A head too narrow for position attention is refused."""
    with pytest.raises(ValueError, match=r"needs 32 channels at least, and was given 28"):
        DANetHead(28, 5)


def test_dual_empty_maps_and_widths_refused() -> None:
    """Maps and widths that leave no position or channel are refused with what would work."""
    with pytest.raises(OptionError, match=r"no channel is left. The largest that works here is 4"):
        DualAttention(4)
    with pytest.raises(OptionError, match=r"1 x 1. Use parts: channel"):
        DualAttention(16).check_map(1, 1)
    with pytest.raises(OptionError, match=r"at least 4 x 4, and this one is 3 x 7: use subsample: 3 or less"):
        DualAttention(16, subsample=4).check_map(3, 7)
    DualAttention(4, parts="channel").check_map(1, 1)
    DualAttention(16, subsample=3).check_map(3, 7)


def test_plan_macs_equal_those_of_verify() -> None:
    """The MACs that `plan` predicts are those that `verify` counts."""
    recipe = {"version": 1, "name": "n", "base": "test_resnet", "edits": [{"at": "stage:23 last", "block": "dual"}]}
    plan = attnsurgery.plan("test_resnet", recipe, (3, 64, 64))
    report = attnsurgery.verify(attnsurgery.operate(timm.create_model("test_resnet"), recipe), (3, 64, 64))
    assert plan.macs_added == report.macs_after - report.macs_before > 0
