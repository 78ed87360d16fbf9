"""The non-local block is compared, in every mode, with the paper's formulas and published parameter counts."""

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
from torch.nn.attention import SDPBackend, sdpa_kernel

import attnsurgery  # noqa: F401  (makes the surgical names known to timm)
from attnsurgery.blocks.non_local import NonLocal
from attnsurgery.errors import OptionError
from tests.lower_end import EXPORTS_ANY_SIZE

MODES = ["embedded_gaussian", "gaussian", "dot_product", "concatenation"]
SUBSAMPLING: list[dict[str, Any]] = [
    {},
    *(
        {"subsample": 2, "subsample_op": op, "subsample_order": order}
        for op, order in itertools.product(["max", "avg"], ["project_first", "pool_first"])
    ),
]
OPTIONS = [
    {"mode": mode, "norm": norm, **subsampling}
    for mode, norm, subsampling in itertools.product(MODES, ["batch", "layer", "none"], SUBSAMPLING)
]
OPTIONS += [{"scale": "inner", "reduction": 4}, {"subsample": 4, "mode": "dot_product"}, {"reduction": 16}]

# Each value of each option at least once: for what takes seconds.
FEW = [
    {"mode": "embedded_gaussian", "subsample": 2, "norm": "layer", "scale": "inner"},
    {"mode": "gaussian", "subsample": 2, "subsample_op": "avg"},
    {"mode": "dot_product", "subsample": 2, "subsample_order": "pool_first"},
    {"mode": "concatenation", "norm": "none"},
    {"mode": "concatenation", "subsample": 2},
]


def of(options: dict[str, Any]) -> str:
    return "-".join(str(value) for value in options.values()) or "default"


every_option = pytest.mark.parametrize("options", OPTIONS, ids=of)
few_options = pytest.mark.parametrize("options", FEW, ids=of)


def build_block(options: dict[str, Any], awake: bool = False, dtype: torch.dtype = torch.float32) -> NonLocal:
    torch.manual_seed(0)
    block = NonLocal(16, **options, dtype=dtype).eval()
    if awake:
        with torch.no_grad():
            for parameter in block.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
    return block


def images(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*size, dtype=dtype, generator=torch.Generator().manual_seed(1))


def naive(block: NonLocal, x: Tensor, options: dict[str, Any]) -> Tensor:
    """Computes equations 1 to 6 of the paper with the N x M matrix, in the order that the options name."""
    mode = options.get("mode", "embedded_gaussian")
    if options.get("subsample_order") == "pool_first":
        of_pooled = block.pool(x)
        phi, g = block.phi(of_pooled).flatten(2), block.g(of_pooled).flatten(2)
    else:
        phi, g = block.pool(block.phi(x)).flatten(2), block.pool(block.g(x)).flatten(2)
    theta = block.theta(x).flatten(2)
    product = torch.einsum("bdn,bdm->bnm", theta, phi)
    if "gaussian" in mode:
        scale = theta.shape[1] ** -0.5 if options.get("scale") == "inner" else 1.0
        weights = torch.softmax(scale * product, dim=-1)
    elif mode == "dot_product":
        weights = product / phi.shape[2]
    else:
        n, m = theta.shape[2], phi.shape[2]
        pairs = torch.cat([theta[:, :, :, None].expand(-1, -1, -1, m), phi[:, :, None].expand(-1, -1, n, -1)], dim=1)
        weights = torch.relu(block.w_f(pairs)).squeeze(1) / m
    y = torch.einsum("bnm,bdm->bdn", weights, g).reshape(x.shape[0], -1, *x.shape[2:])
    return block.norm(block.w_z(y)) + x


@every_option
@pytest.mark.parametrize("size", [(8, 8), (7, 9)])
@pytest.mark.slow
def test_non_local_computes_the_formula(options: dict[str, Any], size: tuple[int, int]) -> None:
    """Every option computes the paper's formula, values and gradients."""
    block = build_block(options, awake=True, dtype=torch.float64)
    x = images(2, 16, *size, dtype=torch.float64).requires_grad_()
    ours, expected = block(x), naive(block, x, options)
    assert (ours - x).abs().max() > 1e-3
    assert (ours - expected).abs().max() <= 1e-12
    gradients = [torch.autograd.grad(y.square().sum(), [x, *block.parameters()]) for y in (ours, expected)]
    for ours_gradient, expected_gradient in zip(*gradients, strict=True):
        assert torch.allclose(ours_gradient, expected_gradient, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(28, 38), (1, 1100)])
@pytest.mark.slow
def test_non_local_formula_on_large_maps(mode: str, size: tuple[int, int]) -> None:
    """Large maps compute the same formula in their other form."""
    block, x = build_block({"mode": mode}, awake=True, dtype=torch.float64), images(2, 16, *size, dtype=torch.float64)
    assert (block(x) - naive(block, x, {"mode": mode})).abs().max() <= 1e-12


@every_option
@pytest.mark.slow
def test_non_local_starts_at_identity(options: dict[str, Any]) -> None:
    """Every option starts as the identity and leaves it with the first step."""
    block, x = build_block(options), images(2, 16, 7, 9)
    for training in (True, False):
        assert torch.equal(block.train(training)(x), x)
    optimiser = torch.optim.SGD(block.parameters(), 0.5)
    (block.train()(x) - images(2, 16, 7, 9).flip(0)).square().mean().backward()
    optimiser.step()
    assert not torch.equal(block.eval()(x), x)


@every_option
@pytest.mark.slow
def test_non_local_keeps_format_and_dtype(options: dict[str, Any]) -> None:
    """Every option keeps the memory format and the dtype."""
    block = build_block(options, awake=True)
    expected = block(images(3, 16, 7, 9))
    x = images(3, 16, 7, 9).contiguous(memory_format=torch.channels_last)
    output = block(x)
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(output, expected, atol=1e-5)
    half = build_block(options, dtype=torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16


@every_option
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.slow
def test_non_local_is_finite_under_autocast(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Every option stays finite and near the result in fp32 under autocast."""
    block, x = build_block(options, awake=True), images(2, 16, 8, 8).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        output = block(x)
    assert torch.isfinite(output).all()
    assert torch.allclose(output, block(x), atol=0.1, rtol=0.1)
    for gradient in torch.autograd.grad(output.square().mean(), [x, *block.parameters()]):
        assert torch.isfinite(gradient).all()


@every_option
@pytest.mark.slow
def test_non_local_scripts_exactly(options: dict[str, Any]) -> None:
    """Every option computes the same numbers when it is scripted."""
    block = build_block(options, awake=True)
    scripted = torch.jit.script(block)
    assert torch.equal(scripted(images(1, 16, 8, 9)), block(images(1, 16, 8, 9)))
    large = images(1, 16, 4, 270)
    output, expected = scripted(large), block(large)
    # the widths of Gaussian keys and values differ, and what can be scripted pads them
    assert torch.allclose(output, expected, atol=1e-5) if block.mode == "gaussian" else torch.equal(output, expected)


@few_options
@pytest.mark.slow
def test_non_local_compiles_exactly(options: dict[str, Any]) -> None:
    """The options compute the same numbers when they are compiled."""
    block, x = build_block(options, awake=True), images(2, 16, 8, 9)
    assert torch.equal(torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x))


@pytest.mark.since(*EXPORTS_ANY_SIZE)
@pytest.mark.slow
def test_non_local_compiles_once_for_sizes() -> None:
    """A block that is compiled for any size does not compile again where its form would change."""
    block = build_block({"mode": "concatenation"}, awake=True)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.compiler.set_stance("default"):
        compiled(images(2, 16, 8, 9))
    with torch.compiler.set_stance("fail_on_recompile"):
        for size in [(7, 6), (40, 30)]:
            assert torch.allclose(compiled(images(2, 16, *size)), block(images(2, 16, *size)), atol=1e-5)


def dynamic(block: NonLocal) -> dict[str, Any]:
    """Returns dynamic shapes for any size that leaves two positions a side."""
    sides = {axis: torch.export.Dim(name, min=2 * block.subsample) for axis, name in ((2, "height"), (3, "width"))}
    return {"x": {0: torch.export.Dim("batch"), **sides}}


@few_options
@pytest.mark.since(*EXPORTS_ANY_SIZE)
@pytest.mark.slow
def test_non_local_exports_with_any_size(options: dict[str, Any]) -> None:
    """The options export for any batch size, height and width, and on to ONNX."""
    block, file = build_block(options, awake=True), io.BytesIO()
    exported = torch.export.export(block, (images(2, 16, 8, 9),), dynamic_shapes=dynamic(block))
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
        (output,) = session.run(None, {name: images(*size).numpy()})
        assert torch.allclose(torch.from_numpy(output), block(images(*size)), atol=1e-4)


@few_options
def test_non_local_is_deterministic(options: dict[str, Any]) -> None:
    """The options give the same gradients twice with torch's deterministic algorithms."""
    block = build_block(options, awake=True).train()
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
def test_non_local_cost_equals_torch_count(options: dict[str, Any]) -> None:
    """The cost of every option is what torch counts."""
    from torch.utils.flop_counter import FlopCounterMode

    block = build_block(options)
    twin = copy.deepcopy(block).to("meta")  # on a CPU some versions of torch count no fused attention
    for size in [(8, 8), (6, 9), (40, 30)]:
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            twin(images(1, 16, *size).to("meta"))
        assert block.cost(*size).macs == counter.get_total_flops() // 2


@pytest.mark.parametrize(("channels", "params"), [(256, 132_224), (512, 526_592), (1024, 2_101_760), (2048, 8_397_824)])
@pytest.mark.parametrize("mode", ["embedded_gaussian", "dot_product"])
def test_non_local_has_paper_parameters(mode: str, channels: int, params: int) -> None:
    """The block has the published number of parameters."""
    assert sum(p.numel() for p in NonLocal(channels, mode=mode, device="meta").parameters()) == params


@pytest.mark.parametrize(("mode", "params"), [("gaussian", 1_052_160), ("concatenation", 2_102_784)])
def test_non_local_parameters_by_mode(mode: str, params: int) -> None:
    """The Gaussian and the concatenation mode have their own numbers of parameters."""
    assert sum(p.numel() for p in NonLocal(1024, mode=mode, device="meta").parameters()) == params


@pytest.mark.parametrize(
    ("name", "params"), [("resnet50_nonlocal_s3", 27_658_792), ("resnet50_nonlocal5", 25_557_032 + 7_358_464)]
)
def test_non_local_models_have_parameters(name: str, params: int) -> None:
    """The models of the paper have the published number of parameters."""
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == params


@pytest.mark.parametrize(
    ("channels", "side", "percent"), [(1024, 14, (2, 9)), (512, 28, (16, 43)), (256, 56, (60, 86))]
)
def test_non_local_share_of_pairs_in_cost(channels: int, side: int, percent: tuple[int, int]) -> None:
    """The share of the pairs in the cost at 224 pixels, with sub-sampling by 2 and without it."""
    for subsample, expected in zip((2, 1), percent, strict=True):
        block = NonLocal(channels, subsample=subsample, device="meta")
        pairs = side**2 * (side // subsample) ** 2 * channels
        assert round(100 * pairs / block.cost(side, side).macs) == expected


def test_non_local_keys_are_stable() -> None:
    """A checkpoint of the default block has the keys that it always had."""
    embeddings = [f"{name}.{kind}" for name in ("theta", "phi", "g", "w_z") for kind in ("weight", "bias")]
    of_norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert list(NonLocal(16).state_dict()) == [*embeddings, *(f"norm.{name}" for name in of_norm)]


@pytest.mark.parametrize("mode", ["embedded_gaussian", "gaussian"])
def test_non_local_runs_fused_kernel(mode: str) -> None:
    """Large maps run the fused attention kernel and never its fallback."""
    block = build_block({"mode": mode, "reduction": 1}, awake=True)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = images(1, 16, 33, 33).contiguous(memory_format=memory_format)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            output = block(x)
        assert torch.allclose(output, naive(block, x, {"mode": mode}), atol=1e-4)


def test_non_local_refuses_one_position() -> None:
    """A map of one position is refused."""
    with pytest.raises(OptionError, match=r"no meaning on a map of 1 x 1.*Use an earlier stage"):
        NonLocal(16).check_map(1, 1)
    NonLocal(16).check_map(1, 2)


def test_non_local_refuses_foreign_scale() -> None:
    """A scale is refused in a mode that has none."""
    for mode in ("gaussian", "dot_product", "concatenation"):
        with pytest.raises(OptionError, match=f"mode='{mode}'.*Use scale: none"):
            NonLocal(16, mode=mode, scale="inner")
