"""Blocks on spans and on one side of an addition, the two kinds of places that are not simply a tensor."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint_sequential

import attnsurgery
from attnsurgery.errors import SiteError, SurgeryError
from attnsurgery.graph.find import survey
from attnsurgery.graph.select import select
from attnsurgery.surgery.operate import grafted_blocks, remove
from attnsurgery.surgery.verify import verify
from tests.conftest import build, images, move_gates
from tests.lower_end import COMPILES_ATTRIBUTES, KEEPS_ARGUMENTS

SPAN = "stages.2.blocks.0 .. stages.2.blocks.2"


def recipe_of(at: str, block: str) -> dict[str, object]:
    return {"version": 1, "name": "spans", "base": "resnet18", "edits": [{"at": at, "block": block}]}


def operated(model: nn.Module, *edits: tuple[str, str, dict[str, object]], start: str = "identity") -> nn.Module:
    recipe = {
        "version": 1,
        "name": "spans",
        "base": "resnet18",
        "edits": [{"at": at, "block": block, "options": options, "start": start} for at, block, options in edits],
    }
    return attnsurgery.operate(model, recipe, (3, 64, 64))


def with_mask(model: nn.Module, at: str = SPAN) -> nn.Module:
    return operated(model, (at, "residual_attention", {"depth": 1}))


def test_span_is_trunk_times_gate() -> None:
    """A span computes its trunk times the gate of its input."""
    base = build("test_convnext")
    model = move_gates(with_mask(copy.deepcopy(base)))
    block = model.stages[2].blocks[0].residual_attention
    x = torch.randn(2, base.stages[2].blocks[0].conv_dw.in_channels, 8, 8)
    trunk = base.stages[2].blocks[2](base.stages[2].blocks[1](base.stages[2].blocks[0](x)))
    ours = model.stages[2].blocks[2](model.stages[2].blocks[1](model.stages[2].blocks[0](x)))
    assert torch.equal(ours, trunk * block(x))
    assert not torch.equal(ours, trunk)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("host", "at"),
    [
        ("test_convnext", SPAN),
        ("test_convnext", "stages.2.blocks.1"),
        ("resnet18", "stage:* span"),
        ("regnetx_002", "s4.b2 .. s4.b5"),  # a row that is no Sequential
        ("swin_tiny_patch4_window7_224", "layers.1.blocks.0 .. layers.1.blocks.1"),  # channels last
    ],
)
@pytest.mark.slow
def test_span_identity_start_changes_no_bit(host: str, at: str, training: bool) -> None:
    """The identity start changes no bit, and a moved gate does."""
    base = build(host)
    model = operated(copy.deepcopy(base), (at, "residual_attention", {"depth": 0}))
    x = images(64)
    for twin in (base, model):
        twin.train(training)
    torch.manual_seed(0)  # both drop the same paths in training
    expected = base(x)
    torch.manual_seed(0)
    assert torch.equal(model(x), expected)
    assert verify(model.eval(), (3, 64, 64)).alive
    assert not torch.equal(move_gates(model).train(training)(x), base(x))
    remove(model)
    assert list(model.state_dict()) == list(base.state_dict())
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]


@pytest.mark.since(*COMPILES_ATTRIBUTES)
@pytest.mark.slow
def test_span_compiles_exports_and_pickles() -> None:
    """A model with a span can be compiled, exported, copied and pickled."""
    model = move_gates(with_mask(build("test_convnext")))
    x = images(64)
    expected = model(x)
    assert torch.equal(torch.compile(model, fullgraph=True, backend="eager")(x), expected)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    assert torch.allclose(exported.module()(images(64, batch=3)), model(images(64, batch=3)), atol=1e-4)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)


@pytest.mark.slow
def test_span_gate_passes_compiled_modules() -> None:
    """The gate is handed on when each module is compiled by itself."""
    model = move_gates(with_mask(build("test_convnext")))
    x = images(64)
    expected = model(x)
    for index in (0, 1, 2):
        model.stages[2].blocks[index].compile(backend="eager")
    with torch.no_grad():
        assert torch.equal(model(x), expected)


@pytest.mark.slow
def test_span_of_one_module_scripts() -> None:
    """A span of one module can be scripted, and a longer one says why it cannot."""
    model = move_gates(with_mask(build("test_convnext"), "stages.2.blocks.1"))
    x = images(64)
    assert torch.allclose(torch.jit.script(model)(x), model(x), atol=1e-5)
    with pytest.raises(SurgeryError, match="span of several modules cannot be scripted"):
        torch.jit.script(with_mask(build("test_convnext")))


def gradients(model: nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_span_gradients_with_checkpointing() -> None:
    """Gradients with checkpointing are the same, even with two forward passes before one backward pass."""
    model = move_gates(with_mask(build("test_convnext"))).train()
    x, other = images(64), images(64).flip(0) * 2
    expected = gradients(model, model(x).square().sum())
    model.set_grad_checkpointing(True)
    first = model(x)
    model(other)  # a second forward must not change what the first one recomputes
    recomputed = gradients(model, first.square().sum())
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(expected, recomputed, strict=True))


def test_span_lost_gate_is_an_error() -> None:
    """A gate that was lost on the way is an error and never a wrong number."""
    model = with_mask(build("test_convnext")).train()
    blocks = model.stages[2].blocks
    x = torch.randn(2, blocks[0].conv_dw.in_channels, 8, 8, requires_grad=True)
    checkpoint_sequential(blocks, 4, x, use_reentrant=False).sum().backward()
    loss = checkpoint_sequential(blocks, 4, x, use_reentrant=True).sum()
    with pytest.raises(SurgeryError, match=r"the gate 'stages.2.blocks.0.residual_attention' was lost inside its span"):
        loss.backward()


@pytest.mark.slow
def test_spans_nest_overlap_and_share_ends() -> None:
    """Spans may nest, overlap, and share an end with other blocks."""
    base = build("test_convnext")
    outer, inner, single = SPAN, "stages.2.blocks.1 .. stages.2.blocks.3", "stages.2.blocks.2"
    model = operated(
        copy.deepcopy(base),
        (outer, "residual_attention", {"depth": 0}),
        (inner, "residual_attention", {"depth": 0}),
        (single, "se", {}),
        ("stages.2.blocks.2:add.shortcut", "se", {"reduction": 4}),
    )
    assert torch.equal(model(images(64)), base(images(64)))
    move_gates(model)
    b0, b1, b2, b3 = (base.stages[2].blocks[index] for index in range(4))
    m0, m1, m2 = (model.stages[2].blocks[index] for index in range(3))
    x = torch.randn(2, b0.conv_dw.in_channels, 8, 8)
    first = b0(x)
    gate_outer, gate_inner = m0.residual_attention(x), m1.residual_attention(first)
    second = b1(first)
    # the shortcut's block changes only what is added
    third = b2(second) - second + m2.se_2(second)
    third = m2.se(third * gate_outer)
    expected = b3(third) * gate_inner
    output = x
    for block in model.stages[2].blocks:
        output = block(output)
    assert torch.allclose(output, expected, atol=1e-5)
    assert verify(model, (3, 64, 64)).alive


def test_prefix_tokens_pass_a_span_untouched() -> None:
    """Prefix tokens pass a span untouched."""
    base = build("test_vit", dynamic_img_size=False)
    model = operated(copy.deepcopy(base), ("blocks.1 .. blocks.2", "residual_attention", {"depth": 0}))
    x = torch.randn(2, 17, base.embed_dim)
    assert torch.equal(model(images(64)), base(images(64)))
    move_gates(model)
    expected = base.blocks[2](base.blocks[1](x))
    output = model.blocks[2](model.blocks[1](x))
    assert torch.equal(output[:, :1], expected[:, :1])
    assert not torch.equal(output[:, 1:], expected[:, 1:])


@pytest.mark.parametrize(
    ("at", "block", "message"),
    [
        ("layer2.1 .. layer3.1", "residual_attention", "takes 512x28x28 and returns 1024x14x14"),
        ("layer2.2 .. layer2.1", "residual_attention", "'layer2.1' runs before 'layer2.2'"),
        ("layer2.0 .. layer2.2", "residual_attention", "takes 256x56x56 and returns 512x28x28.*Begin it behind"),
        ("layer2.1.bn3 .. layer2.2", "residual_attention", "'layer2.1.bn3' is inside one"),
        ("layer2.1 .. layer2.9", "residual_attention", "'layer2.9' matches none of the"),
        ("layer2.1 ..", "residual_attention", "is not a span. It reads: FIRST .. LAST"),
        ("layer2.1 .. layer2.2", "se", "goes to one site and not on a span. The span's output is the site 'layer2.2'"),
    ],
)
@pytest.mark.slow
def test_span_refusal_gives_the_reason(at: str, block: str, message: str) -> None:
    """A span that cannot be is refused with the reason, and nothing is changed."""
    with torch.device("meta"):
        model = timm.create_model("resnet50")
    recipe = {"version": 1, "name": "n", "base": "resnet50", "edits": [{"at": at, "block": block}]}
    with pytest.raises(SiteError, match=message):
        attnsurgery.operate(model, recipe)
    assert not any(type(module).__name__.startswith("Surgical") for module in model.modules())


def test_span_rules_cover_equal_sizes() -> None:
    """The span rules cover the blocks that keep the size."""
    anatomy = attnsurgery.inspect("resnet50")
    at = {rule: [site.address for site in select(f"stage:3 {rule}", anatomy)] for rule in ("span", "spans:2", "spans")}
    assert at["span"] == ["layer3.1 .. layer3.5"]
    assert at["spans:2"] == ["layer3.2 .. layer3.3", "layer3.4 .. layer3.5"]
    assert at["spans"] == [f"layer3.{n} .. layer3.{n}" for n in range(1, 6)]
    both = select("layer[23].1 .. layer[23].2", anatomy)
    assert [site.address for site in both] == ["layer2.1 .. layer2.2", "layer3.1 .. layer3.2"]


# where Hu et al. 2018 put the block: figure 5 and table 14 (standard, PRE, POST, Identity), table 15 (after the 3x3)
PLACES = ("branches", "branch_inputs", "every", "shortcuts", "spatial")


def by_hand(block: nn.Module, se: nn.Module, place: str, x: torch.Tensor) -> torch.Tensor:
    """Computes a bottleneck with the block in its place, as figure 5 of the paper draws it."""
    y = block.conv1(se(x) if place == "branch_inputs" else x)
    y = block.act2(block.bn2(block.conv2(block.act1(block.bn1(y)))))
    y = block.bn3(block.conv3(se(y) if place == "spatial" else y))
    y = se(y) if place == "branches" else y
    shortcut = x if block.downsample is None else block.downsample(x)
    y = block.act3(y + (se(shortcut) if place == "shortcuts" else shortcut))
    return se(y) if place == "every" else y


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.slow
def test_se_in_all_places_of_its_paper(place: str) -> None:
    """Squeeze-and-excitation computes the paper's formula in all five places of its paper."""
    base = build("resnet50", in_chans=3)
    model = operated(copy.deepcopy(base), (f"stage:1 {place}", "se", {}))
    x = images(64)
    assert torch.equal(model(x), base(x))
    assert verify(model, (3, 64, 64)).alive
    move_gates(model)
    for index in (0, 1):  # with a convolution on the shortcut, and without
        host = base.layer1[index]
        x = torch.randn(2, host.conv1.in_channels, 8, 8)
        (se,) = (block for path, block in grafted_blocks(model).items() if path.startswith(f"layer1.{index}."))
        expected = by_hand(host, se, place, x)
        assert torch.allclose(model.layer1[index](x), expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(model.layer1[index](x), host(x), rtol=1e-4, atol=1e-4)


def test_addition_sides_have_addresses() -> None:
    """Both sides of an addition have addresses in every kind of host."""
    for host, inputs in (("test_convnext", "stages.2.blocks.0:add"), ("test_vit", "blocks.1:add_1")):
        anatomy = survey(build(host), (3, 64, 64))
        assert anatomy.site(f"{inputs}.input").role == "branch_input"
        assert anatomy.site(f"{inputs}.shortcut").role == "shortcut"


@pytest.mark.since(*KEEPS_ARGUMENTS)
def test_mask_depth_is_saved_with_the_model(tmp_path: Path) -> None:
    """At 64 pixels the mask of stage 1 is one scale deep, at the 160 that timm has for the model it would be two."""
    recipe = {
        "version": 1,
        "name": "n",
        "base": "test_resnet",
        "edits": [{"at": "stage:1 span", "block": "residual_attention", "start": "paper"}],
    }
    model = attnsurgery.operate(build("test_resnet"), recipe, (3, 64, 64))
    assert model.layer1[0].residual_attention.depth != depth_in("test_resnet_resattn_s1")
    timm.models.save_for_hf(model, tmp_path / "saved", safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    assert torch.equal(again(images(64)), model(images(64)))


def depth_in(name: str) -> int:
    (block,) = grafted_blocks(timm.create_model(name)).values()
    return int(block.depth)


@pytest.mark.slow
def test_new_input_size_reaches_token_blocks() -> None:
    """A new input size reaches a block on the grid of tokens."""
    base = build("test_vit", dynamic_img_size=False)
    model = attnsurgery.operate(copy.deepcopy(base), recipe_of("blocks.1 .. blocks.2", "residual_attention"))
    with pytest.raises(AssertionError, match="height"):
        model(images(96))
    for twin in (base, model, copied := copy.deepcopy(model)):
        twin.set_input_size((96, 64))
    x = torch.randn(2, 3, 96, 64)
    assert torch.equal(model(x), base(x))
    assert torch.equal(copied(x), base(x))
    assert not torch.equal(move_gates(model)(x), base(x))
    assert attnsurgery.verify(model, (3, 96, 64)).alive
    assert "set_input_size" not in vars(attnsurgery.remove(model))


@pytest.mark.parametrize("at", ["layer2.0", "layer2.1.bn3", "layer2.1:add.input"])
@pytest.mark.slow
def test_mask_without_span_multiplies_input(at: str) -> None:
    """A mask at a place that is no span multiplies what it reads."""
    base = build("resnet50")
    model = operated(copy.deepcopy(base), (at, "residual_attention", {"depth": 1}))
    assert torch.equal(model(images(64)), base(images(64)))
    assert attnsurgery.verify(model, (3, 64, 64)).alive
    assert not torch.equal(move_gates(model)(images(64)), base(images(64)))
    assert torch.equal(attnsurgery.remove(model)(images(64)), base(images(64)))
