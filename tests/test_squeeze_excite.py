"""Squeeze-and-excitation in all its kinds equals the papers' formulas, their figures and timm's modules."""

from __future__ import annotations

import itertools
import math

import pytest
import timm
import torch
from timm.layers import SEModule

import attnsurgery
from attnsurgery.blocks.squeeze_excite import SqueezeExcite
from attnsurgery.errors import OptionError
from attnsurgery.surgery.verify import count_macs
from attnsurgery.timm_plugin.architectures import weightless
from tests.conftest import build, images

KINDS = [
    {"kind": "cse"},
    {"kind": "cse", "max_pool": True, "gate": "hardsigmoid"},
    {"kind": "sse"},
    {"kind": "sse", "gate": "hardsigmoid", "bias": False},
    {"kind": "scse", "reduction": 2},
    {"kind": "scse", "gate": "hardsigmoid", "max_pool": True},
    {"kind": "scse", "fusion": "max", "reduction": 2},
    {"kind": "scse", "fusion": "max", "gate": "hardsigmoid", "bias": False},
]
every_kind = pytest.mark.parametrize("options", KINDS, ids=str)


def naive(block: SqueezeExcite, x: torch.Tensor, options: dict[str, object]) -> torch.Tensor:
    """Computes equations 2 to 4 of Hu et al. and 2 to 6 of Roy et al., whose two results are written out."""
    gate = torch.nn.functional.hardsigmoid if options.get("gate") == "hardsigmoid" else torch.sigmoid
    results = []
    if options["kind"] != "sse":
        z = x.flatten(2).mean(2)
        if options.get("max_pool"):
            z = (z + x.flatten(2).max(2).values) / 2
        w1, w2 = block.fc1.weight[:, :, 0, 0], block.fc2.weight[:, :, 0, 0]
        b1, b2 = (0 if fc.bias is None else fc.bias for fc in (block.fc1, block.fc2))
        results.append(x * gate((z @ w1.T + b1).relu() @ w2.T + b2)[:, :, None, None])
    if options["kind"] != "cse":
        q = torch.einsum("c,bchw->bhw", block.spatial.weight[0, :, 0, 0], x)
        results.append(x * gate(q + (0 if block.spatial.bias is None else block.spatial.bias))[:, None])
    if len(results) == 1:
        return results[0]
    return torch.maximum(*results) if options.get("fusion") == "max" else results[0] + results[1]


@every_kind
def test_se_computes_the_papers_formula(options: dict[str, object]) -> None:
    """The paper's start computes the paper's formula, values and gradients."""
    torch.manual_seed(0)
    block = SqueezeExcite(16, start="paper", dtype=torch.float64, **options)
    x = torch.randn(3, 16, 5, 7, dtype=torch.float64, requires_grad=True)
    ours, theirs = block(x), naive(block, x, options)
    assert torch.allclose(ours, theirs, atol=1e-12, rtol=0)
    gradients = [torch.autograd.grad(y.square().sum(), [x, *block.parameters()]) for y in (ours, theirs)]
    for ours_gradient, expected in zip(*gradients, strict=True):
        assert torch.allclose(ours_gradient, expected, atol=1e-11, rtol=1e-11)


@every_kind
@pytest.mark.slow
def test_se_gate_starts_at_identity(options: dict[str, object]) -> None:
    """Every kind starts as the identity in every precision, and learns."""
    torch.manual_seed(0)
    x = torch.randn(2, 16, 7, 9)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        # down to the smallest numbers there are: halving these and adding them up would lose bits
        small = torch.cat([x.to(dtype), x.to(dtype) * torch.finfo(dtype).tiny])
        assert torch.equal(SqueezeExcite(16, dtype=dtype, **options)(small), small)
    torch.manual_seed(1)  # some of the few hidden units are alive
    block = SqueezeExcite(16, **options)
    for _ in range(2):
        block.zero_grad()
        (block(x) - torch.randn_like(x)).square().mean().backward()
        with torch.no_grad():
            for parameter in block.parameters():
                parameter -= parameter.grad
    assert all(parameter.grad.abs().sum() > 0 for parameter in block.parameters())
    moved = block(x)
    assert not torch.equal(moved, x)
    assert torch.equal(torch.jit.script(block)(x), moved)
    assert torch.equal(torch.compile(block, fullgraph=True, backend="aot_eager")(x), moved)
    assert block(x.to(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("act", ["relu", "leaky_relu", "silu", "gelu", "hard_swish"])
@pytest.mark.parametrize(("gate", "of_timm"), [("sigmoid", "sigmoid"), ("hardsigmoid", "hard_sigmoid")])
@pytest.mark.parametrize("max_pool", [False, True])
def test_se_has_options_of_timms_module(act: str, gate: str, of_timm: str, max_pool: bool) -> None:
    """Every option of timm's module is here, bit for bit."""
    torch.manual_seed(0)
    theirs = SEModule(24, rd_channels=6, add_maxpool=max_pool, act_layer=act, gate_layer=of_timm)
    ours = SqueezeExcite(24, width=6, act=act, gate=gate, max_pool=max_pool, start="paper")
    ours.load_state_dict(theirs.state_dict())
    x = 3 * torch.randn(2, 24, 5, 5)
    assert torch.equal(ours(x), theirs(x))
    other = SqueezeExcite(24, width=6, act=act, gate=gate, max_pool=not max_pool, start="paper")
    other.load_state_dict(theirs.state_dict())
    assert not torch.equal(other(x), theirs(x))


def test_se_width_replaces_reduction() -> None:
    """The exact width replaces reduction and rounding."""
    assert SqueezeExcite(24, width=6).fc1.out_channels == 6
    for reduction, rounding in itertools.product((2, 16), ("timm", "floor")):
        assert SqueezeExcite(24, width=6, reduction=reduction, rounding=rounding).fc1.out_channels == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fusion": "max"}, r"fusion='max' joins the two results of kind='scse'; kind='cse' has one"),
        ({"kind": "sse", "max_pool": True}, r"kind='sse' pools nothing. Use 'cse' or 'scse'"),
        ({"kind": "sse", "width": 4}, r"width is that of the two layers .* kind='sse' has none"),
    ],
)
def test_se_option_without_effect_is_refused(options: dict[str, object], message: str) -> None:
    """An option that would do nothing is refused."""
    with pytest.raises(OptionError, match=message):
        SqueezeExcite(16, **options)


def with_se(base: str, at: str = "stage:* branches", **options: object) -> torch.nn.Module:
    """Returns the model after surgery, on the meta device."""
    edits = [{"at": at, "block": "se", "options": options}]
    return attnsurgery.operate(weightless(base), {"version": 1, "name": "se", "base": base, "edits": edits})


def parameters_of(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("base", "parameters"),
    [
        ("resnet50", 28_088_024),
        ("resnet101", 49_326_872),
        ("resnet152", 66_821_848),
        ("resnext50_32x4d", 27_559_896),
        ("resnext101_32x4d", 48_955_416),
    ],
)
@pytest.mark.slow
def test_se_models_have_paper_parameters(base: str, parameters: int) -> None:
    """Models of the paper have the published number of parameters."""
    assert parameters_of(with_se(base)) == parameters


def test_se_resnet50_without_biases() -> None:
    """Without biases SE-ResNet-50 has 28,071,976 parameters."""
    assert parameters_of(with_se("resnet50", bias=False)) == 28_071_976


@pytest.mark.parametrize(("reduction", "millions"), [(2, 45.7), (4, 35.7), (8, 30.7), (16, 28.1), (32, 26.9)])
@pytest.mark.slow
def test_se_parameters_follow_table_10(reduction: int, millions: float) -> None:
    """The paper rounds up: its plain ResNet-50 of 25,557,032 parameters has 25.6 million there."""
    assert math.ceil(parameters_of(with_se("resnet50", reduction=reduction)) / 1e5) / 10 == millions


@pytest.mark.slow
def test_se_resnet50_has_the_papers_gmacs() -> None:
    """The paper's model takes strides in the first 1x1 convolution, and it counts pooling and scaling as well."""
    base = weightless("resnet50")
    for number in (2, 3, 4):
        first = base.get_submodule(f"layer{number}.0")
        first.conv1.stride, first.conv2.stride = (2, 2), (1, 1)
    size = (3, 224, 224)
    before = count_macs(base, size)
    sites = [site for site in attnsurgery.inspect(base).sites if site.role == "branch"]
    recipe = {"version": 1, "name": "se", "base": "resnet50", "edits": [{"at": "stage:* branches", "block": "se"}]}
    after = count_macs(attnsurgery.operate(base, recipe), size)
    pooled_and_scaled = sum(2 * site.channels * site.map_size[0] * site.map_size[1] for site in sites)
    assert round(before / 1e9, 2) == 3.86
    assert round((after + pooled_and_scaled) / 1e9, 2) == 3.87
    assert after - before == sum(2 * site.channels * site.channels // 16 for site in sites)


PLACES = {
    "standard": "stage:* branches",
    "pre": "layer*.*:add.input",
    "post": "layer?.?",
    "identity": "layer*.*:add.shortcut",
    "3x3": "layer*.*.act2",
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.slow
def test_se_paper_places_start_at_identity(place: str) -> None:
    """Every place of the paper's tables 14 and 15 starts as the identity and differs when moved."""
    model = build("resnet50", num_classes=3, layers=(2, 2, 2, 2), channels=(8, 16, 24, 32))
    x = images(64)
    before = model(x)
    edits = [{"at": PLACES[place], "block": "se"}]
    attnsurgery.operate(model, {"version": 1, "name": "se", "base": "resnet50", "edits": edits})
    assert torch.equal(model(x), before)
    report = attnsurgery.verify(model, (3, 64, 64))
    assert report.alive
    assert len(report.blocks) == 8
    blocks = [module for module in model.modules() if isinstance(module, SqueezeExcite)]
    widths = {block.fc1.in_channels for block in blocks}
    assert widths <= ({8, 16, 24, 32} if place == "3x3" else {32, 64, 96, 128})
    with torch.no_grad():
        for block in blocks:
            block.fc2.bias += 1
    assert not torch.allclose(model(x), before)


@pytest.mark.slow
def test_se_fills_a_free_place_of_its_host() -> None:
    """A free place of the host is filled under its own name."""
    model = timm.create_model("darknet21", num_classes=3)
    edits = [{"at": "stages.*.blocks.*.conv1", "block": "se"}]
    attnsurgery.operate(model, {"version": 1, "name": "se", "base": "darknet21", "edits": edits})
    assert isinstance(model.stages[0].blocks[0].attn, SqueezeExcite)
    assert type(model.stages[0].blocks[0]).__module__.startswith("timm.")
