"""timm's attention modules as blocks: the same numbers, strict options, and identity starts that learn."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from typing import Any

import pytest
import timm
import torch
from timm.layers import SEModule, create_attn, get_attn
from torch import nn

import attnsurgery
from attnsurgery.blocks import BLOCKS
from attnsurgery.blocks._base import build_block, options_model
from attnsurgery.blocks.timm_attn import KINDS, TimmAttention
from attnsurgery.errors import OptionError
from tests.conftest import build, images
from tests.lower_end import BUILDS_ON_META, GATHER_EXCITE_FAULT, HAS_ATTENTIONS

NAMES = re.findall(r"attn_type == '(\w+)'", inspect.getsource(get_attn))
every_name = pytest.mark.parametrize("name", NAMES)

# options beyond the defaults that change how a block can start as the identity
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("se", {"gate_layer": "hard_sigmoid", "add_maxpool": True, "bias": False}),
    ("ese", {"gate_layer": "sigmoid", "add_maxpool": True}),
    ("eca", {"gate_layer": "hard_sigmoid", "gamma": 1.0}),
    ("ecam", {"rd_channels": 4}),
    ("ge", {"extent": 4, "rd_channels": 8}),
    ("ge", {"add_maxpool": True, "rd_channels": 8}),
    ("gc", {"fuse_add": True}),
    ("gc", {"fuse_add": True, "fuse_scale": False, "use_attn": False}),
    ("cbam", {"mlp_bias": True, "rd_channels": 8, "spatial_kernel_size": 3}),
    ("lcbam", {"mlp_bias": True, "rd_channels": 8}),
    ("coord", {"has_skip": True}),
    ("coord", {"bias": True, "gate_layer": "hard_sigmoid"}),
    ("scoord", {"has_skip": True}),
    ("ela", {"has_skip": True}),
    ("ela", {"kernel_size": 3, "bias": True}),
    ("strip", {"use_conv": False}),
    ("strip", {"has_skip": True}),
    ("nl", {"use_scale": False, "rd_channels": 4}),
    ("sk", {"split_input": False, "keep_3x3": False, "groups": 4}),
    ("splat", {"radix": 1, "kernel_size": 5, "groups": 2}),
    ("lambda", {"num_heads": 2, "r": 3}),
    ("bottleneck", {"feat_size": 8, "qkv_bias": True, "dim_head": 4}),
    ("halo", {"block_size": 2, "halo_size": 1, "num_heads": 4}),
    ("bat", {"block_size": 8, "rd_channels": 8, "drop_rate": 0.5}),
]


def build_timm_block(name: str, start: str = "identity", **options: Any) -> TimmAttention:
    torch.manual_seed(0)
    block = build_block(f"timm:{name}", 16, options or BLOCKS[f"timm:{name}"].example, start)
    assert isinstance(block, TimmAttention)
    return block


@pytest.mark.since(*HAS_ATTENTIONS)
def test_timm_names_are_all_blocks() -> None:
    """Every name that timm knows is a block, and none makes model names."""
    assert NAMES
    assert set(NAMES) == set(KINDS) == {name.removeprefix("timm:") for name in BLOCKS if name.startswith("timm:")}
    assert not any(BLOCKS[f"timm:{name}"].model_suffix for name in NAMES)


@every_name
@pytest.mark.since(*GATHER_EXCITE_FAULT, cases=("ge",))
def test_timm_block_paper_start_is_timms(name: str) -> None:
    """The paper's start is timm's module with its weights and numbers."""
    options = dict(BLOCKS[f"timm:{name}"].example)
    ours = build_timm_block(name, "paper")
    x = images(8, channels=16)
    if name == "ge":  # timm 1.0.31 cannot build it: the device lands in the place of another argument
        with pytest.raises(TypeError):
            create_attn(name, 16)
        theirs = SEModule(16, rd_channels=1)  # what timm's own note says it equals
        keys = dict(zip(ours.state_dict(), theirs.state_dict(), strict=True))
        theirs.load_state_dict({keys[key]: value for key, value in ours.state_dict().items()})
    else:
        theirs = create_attn(name, 16, **options)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        assert isinstance(ours, type(theirs))
    for training in (False, True):
        outputs = []
        for module in (ours, theirs):
            torch.manual_seed(0)
            outputs.append(module.train(training)(x))
        assert torch.equal(*outputs)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter += 1
    assert not torch.equal(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
@pytest.mark.since(*HAS_ATTENTIONS, cases=("coord", "scoord", "ela", "strip"))
@pytest.mark.slow
def test_timm_block_starts_at_identity(name: str, options: dict[str, Any]) -> None:
    """Every way to start is the identity in every precision, and learns."""
    x = images(8, channels=16)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for training in (False, True):
            block = build_timm_block(name, **options).to(dtype).train(training)
            assert torch.equal(block(x.to(dtype)), x.to(dtype))
    block = build_timm_block(name, **options).train()
    parts: dict[str, float] = {}
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(7))
    for _ in range(3):
        block.zero_grad()
        (block(x) - target).square().mean().backward()
        for key, parameter in block.named_parameters():
            parts[key] = parts.get(key, 0.0) + float(parameter.grad.abs().sum())
            with torch.no_grad():
                parameter -= 0.1 * parameter.grad
    dead = [key for key, moved in parts.items() if not moved]
    # a bias under a softmax or in front of a batch norm provably has no effect
    assert all(key.endswith("bias") for key in dead), dead
    assert not torch.equal(block.eval()(x), x)


@every_name
def test_timm_block_refuses_unknown_options(name: str) -> None:
    """An option that timm would swallow or ignore is refused with the list of options."""
    fields = options_model(BLOCKS[f"timm:{name}"]).model_fields
    for option in ("nonsense", "stride", "out_channels", "act_layer", *KINDS[name].hidden):
        assert option not in fields
        with pytest.raises(OptionError, match=f"has no option '{option}'.*defaults: {next(iter(fields))}="):
            build_block(f"timm:{name}", 16, {option: 1}, "identity")
        with pytest.raises(OptionError, match=f"has no option '{option}'. It has: {next(iter(fields))}"):
            BLOCKS[f"timm:{name}"](16, **{option: 1})


def test_timm_swallows_unknown_options() -> None:
    """timm itself accepts options that it does not know."""
    assert isinstance(create_attn("nl", 16, nonsense=1), nn.Module)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ela", {"kernel_size": 4}, r"keeps the size of the map only with an odd kernel_size: 4"),
        ("lambda", {"r": 2}, r"only with an odd r: 2"),
        ("lambda", {"num_heads": 3}, r"timm cannot build 'lambda' of 16 channels"),
        ("splat", {"groups": 3}, r"timm cannot build 'splat' of 16 channels .* must be divisible by groups"),
        ("gc", {"fuse_scale": False}, r"does nothing with neither fuse_add nor fuse_scale"),
        ("bottleneck", {"num_heads": 2}, r"give the square map's side as feat_size"),
        ("se", {"gate_layer": "relu"}, r"cannot take gate_layer='relu'"),
        ("ge", {"extent": 3}, r"cannot take extent=3"),
    ],
)
@pytest.mark.since(*HAS_ATTENTIONS, cases=("ela",))
def test_timm_block_refuses_unfit_options(name: str, options: dict[str, Any], message: str) -> None:
    """Options that cannot work are refused with the reason."""
    with pytest.raises(OptionError, match=message):
        build_block(f"timm:{name}", 16, options, "identity")


@pytest.mark.parametrize(
    ("name", "options", "size", "message"),
    [
        ("halo", {}, (14, 28), r"blocks of 8, and 14 x 28 is no multiple of that: use block_size: 14"),
        ("bat", {}, (8, 8), r"blocks of 7, and 8 x 8 is no multiple of that: use block_size: 8"),
        ("bat", {}, (8, 9), r"and no other size divides both sides"),
        ("bottleneck", {"feat_size": 8}, (7, 7), r"built for maps of 8 x 8, and this one is 7 x 7: use feat_size: 7"),
        ("bottleneck", {"feat_size": 8}, (7, 8), r"only square maps"),
    ],
)
def test_timm_block_refuses_unfit_maps(name: str, options: dict[str, Any], size: tuple[int, int], message: str) -> None:
    """Maps that do not fit are refused with the option that would fit."""
    block = build_block(f"timm:{name}", 16, options, "identity")
    with pytest.raises(OptionError, match=message):
        block.check_map(*size)
    with pytest.raises(AssertionError):
        block(torch.randn(1, 16, *size))


def test_timm_block_learns_its_map_size() -> None:
    """A recipe tells the position embedding how large its map is."""
    model = build("resnet18", num_classes=3)
    x = images(224, batch=1)
    before = model(x)
    edits = [{"at": "stage:4 last", "block": "timm:bottleneck"}]
    attnsurgery.operate(model, {"version": 1, "name": "b", "base": "resnet18", "edits": edits})
    assert torch.equal(model(x), before)
    (block,) = [module for module in model.modules() if isinstance(module, TimmAttention)]
    assert block.pos_embed.height == 7


def test_timm_block_copies_and_pickles() -> None:
    """Blocks are copied and pickled by their generated class."""
    for name in NAMES:
        block, x = build_timm_block(name).eval(), images(8, channels=16)
        for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
            assert type(twin) is type(block)
            assert torch.equal(twin(x), block(x))


def test_doubled_gate_costs_nothing() -> None:
    """The doubled gate adds no key and costs no pass over the map."""
    identity, paper = build_timm_block("eca"), build_timm_block("eca", "paper")
    assert identity.state_dict().keys() == paper.state_dict().keys()
    shapes: list[tuple[int, ...]] = []
    identity.gate.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    identity(images(8, channels=16))
    assert shapes == [(2, 1, 16)]


@pytest.mark.since(*BUILDS_ON_META)
@pytest.mark.slow
def test_timm_block_fills_a_free_place() -> None:
    """Hosts get the block in the place that they keep free, and no class is generated."""
    for base, at, path in (
        ("resnet18", "layer1.*.bn2", "layer1.0.se"),
        ("resnext26ts", "stages.0.*.conv2b_kxk", "stages.0.0.attn"),
        ("darknet21", "stages.0.blocks.*.conv1", "stages.0.blocks.0.attn"),
        ("regnetx_002", "s1.*.conv2", "s1.b1.se"),
    ):
        with torch.device("meta"):
            model = timm.create_model(base)
        kinds = {type(module) for module in model.modules()}
        edits = [{"at": at, "block": "timm:eca"}]
        attnsurgery.operate(model, {"version": 1, "name": "e", "base": base, "edits": edits})
        assert model.get_submodule(path).timm_name == "eca"
        hosts = {type(model.get_submodule(path.rpartition(".")[0]))}
        assert hosts <= kinds  # no class was generated: the host's own forward calls it
