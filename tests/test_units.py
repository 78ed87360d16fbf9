"""Blocks, stages, layouts and grids are read off families that write their rows in different ways."""

from __future__ import annotations

import copy

import pytest
import timm
import torch

import attnsurgery
from attnsurgery.errors import SiteError
from attnsurgery.graph.channel_layout import map_to_tokens, tokens_to_map
from attnsurgery.graph.detect_layout import guess_layout
from tests.conftest import move_gates, wake


def recipe(at: str, block: str, **options: object) -> dict[str, object]:
    return {"version": 1, "name": "n", "base": "resnet18", "edits": [{"at": at, "block": block, "options": options}]}


def small(name: str, **kwargs: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return wake(timm.create_model(name, **kwargs)).eval()


@pytest.mark.parametrize(
    ("arch", "blocks"),
    [
        ("skresnet18", {1: "layer1.0 layer1.1", 4: "layer4.0 layer4.1"}),  # selective kernels hold rows of their own
        ("regnetx_002", {1: "s1.b1", 2: "s2.b1"}),  # stages that loop over their children
        ("repvit_m0_9", {2: "stages.1.blocks.0 stages.1.blocks.1"}),  # downsampling beside the row is no block
        ("inception_v4", {4: "features.18 features.19 features.20 features.21"}),  # the root's own row
        ("twins_svt_small", {1: "blocks.0.0 blocks.0.1"}),  # lists that only the root runs
        ("mvitv2_tiny", {1: "stages.0.blocks.0:0"}),  # a map and its size
        ("densenet121", {3: "features.denseblock3"}),  # what a dense block returns, and not its last few channels
        ("cs3darknet_s", {1: "stages.0.blocks.0"}),  # residual blocks on one of two paths
        ("coat_lite_tiny", {1: "serial_blocks1.0 serial_blocks1.1"}),
        ("efficientformerv2_s0", {1: "stages.0.blocks.0 stages.0.blocks.1"}),  # the stem has convolutions, too
    ],
)
@pytest.mark.slow
def test_blocks_are_what_stands_in_a_row(arch: str, blocks: dict[int, str]) -> None:
    """The blocks of a stage are the modules that stand in a row."""
    anatomy = attnsurgery.inspect(arch)
    assert {stage: " ".join(site.address for site in anatomy.blocks(stage)) for stage in blocks} == blocks


def test_branch_stages_follow_own_strides() -> None:
    """Branches of several strides are counted by their own stride."""
    anatomy = attnsurgery.inspect("hrnet_w18_small")
    assert anatomy.stages == (1, 2, 3, 4)
    assert "stage4.0.branches.3.1" in {site.address for site in anatomy.blocks(4)}
    assert "stage4.0.branches.0.1" in {site.address for site in anatomy.blocks(1)}
    assert anatomy.site("stage4.0:2").shape == (64, 14, 14)


@pytest.mark.parametrize(
    ("arch", "at", "layout", "prefix", "grid"),
    [
        ("vit_tiny_patch16_224", "blocks.3", "NLC", 1, (14, 14)),
        ("deit_tiny_distilled_patch16_224", "blocks.3", "NLC", 2, (14, 14)),
        ("pit_ti_224", "transformers.0.blocks.0", "NLC", 1, (27, 27)),
        ("pit_ti_distilled_224", "transformers.0.blocks.0", "NLC", 2, (27, 27)),  # and it says nowhere how many
        ("coat_lite_tiny", "serial_blocks2.0", "NLC", 1, (28, 28)),
        ("xcit_nano_12_p16_224", "blocks.0", "NLC", 0, (14, 14)),
        ("levit_128s", "stages.1.blocks.0", "NLC", 0, (7, 7)),
        ("crossvit_tiny_240", "blocks.0.blocks.1.0", "NLC", 1, (14, 14)),
        ("tnt_s_patch16_224", "blocks.2:1", "NLC", 1, (14, 14)),
        ("hiera_tiny_224", "blocks.0", "NLC", 0, None),  # a sequence in another order
        ("naflexvit_base_patch16_gap", "blocks.0", "NLC", 4, None),  # as many tokens as there are
        ("swin_tiny_patch4_window7_224", "layers.1.blocks.0", "NHWC", 0, None),
        ("poolformerv2_s12", "stages.0.blocks.0", "NCHW", 0, None),
        ("caformer_s18", "stages.2.blocks.0", "NLC", 0, (14, 14)),
        ("test_vit", "blocks.0", "NLC", 1, (10, 10)),  # built for images of any size
    ],
)
@pytest.mark.slow
def test_layouts_prefixes_and_grids(arch: str, at: str, layout: str, prefix: int, grid: tuple[int, int] | None) -> None:
    """A site has the layout, the number of prefix tokens and the grid of its family."""
    site = attnsurgery.inspect(arch).site(at)
    assert (site.layout, site.prefix_tokens, site.grid) == (layout, prefix, grid)
    assert site.ordered is (layout != "NLC" or grid is not None)


@pytest.mark.slow
def test_windows_are_maps_without_order() -> None:
    """Windows that are cut apart are maps without an order of positions."""
    site = attnsurgery.inspect("nest_tiny").site("levels.0.transformer_encoder.0")
    assert (site.layout, site.shape, site.ordered) == ("NHWC", (16, 196, 96), False)
    with pytest.raises(SiteError, match="positions do not lie as in the image"):
        attnsurgery.plan("nest_tiny", recipe("stage:1 last", "residual_attention"))
    assert attnsurgery.plan("nest_tiny", recipe("stage:1 last", "dual"))


def test_guess_layout_by_proportions() -> None:
    """Proportions decide on the layout where no layer tells."""
    assert guess_layout((8, 4, 2), (64, 32), False) == "NCHW"
    assert guess_layout((4, 2, 8), (64, 32), False) == "NHWC"


def test_tokens_to_map_keeps_image_rows() -> None:
    """A map of tokens has the rows of the image."""
    tokens = torch.arange(2 * 6 * 3.0).reshape(2, 6, 3)
    x = tokens_to_map(tokens, 2, 3)
    assert x.shape == (2, 3, 2, 3)
    assert x[1, 2, 1, 0] == tokens[1, 3, 2]
    assert torch.equal(map_to_tokens(x), tokens)
    with pytest.raises(attnsurgery.AttnSurgeryError, match="grid of 2x2, and there are 6 tokens"):
        tokens_to_map(tokens, 2, 2)


CASES = [
    ("vit_tiny_patch16_224", {"img_size": (48, 64)}, (48, 64), "blocks.2"),  # a grid that is not square
    ("pvt_v2_b0", {}, (64, 96), "stages.1.blocks.1"),  # the size goes along with the tokens
    ("xcit_nano_12_p8_224", {}, (32, 48), "blocks.3"),
    ("mvitv2_tiny", {"img_size": 64}, (64, 64), "stages.2.blocks.2:0"),  # a tuple, and the grid in it
    ("tnt_s_patch16_224", {"img_size": 64}, (64, 64), "blocks.2:1"),
    ("hrnet_w18_small", {}, (64, 64), "stage3.0:1"),  # a list
    ("selecsls42", {}, (64, 64), "features.1:0"),
    ("densenet121", {}, (64, 64), "features.denseblock2"),  # a module that loops over its children
]


@pytest.mark.parametrize("block", ["non_local", "residual_attention"])
@pytest.mark.parametrize(("arch", "kwargs", "size", "at"), CASES, ids=[case[0] for case in CASES])
@pytest.mark.slow
def test_block_anywhere_starts_at_identity(
    arch: str, kwargs: dict[str, object], size: tuple[int, int], at: str, block: str
) -> None:
    """A block anywhere is the identity until its gate moves."""
    base = small(arch, **kwargs)
    x = torch.randn(2, 3, *size)
    expected = base(x)
    options = {"subsample": 2} if block == "non_local" else {"depth": 1}
    model = attnsurgery.operate(copy.deepcopy(base), recipe(at, block, **options), (3, *size))
    assert torch.equal(model(x), expected)
    assert list(attnsurgery.remove(copy.deepcopy(model)).state_dict()) == list(base.state_dict())
    assert attnsurgery.verify(model, (3, *size)).faults == ()
    assert not torch.equal(move_gates(model)(x), expected)
    assert torch.equal(copy.deepcopy(model)(x), model(x))


# who says how large the map is: an argument of each block, or the module that made the map of which the tokens are
ANY_SIZE = {
    "pvt_v2_b0": "stages.2.blocks.1",
    "xcit_nano_12_p8_224": "blocks.3",
    "caformer_s18": "stages.2.blocks.1",
    "test_vit": "blocks.1",
}


@pytest.mark.parametrize("arch", ANY_SIZE)
@pytest.mark.slow
def test_block_follows_any_image_size(arch: str) -> None:
    """Images of any size work where the size is told in each forward."""
    base = small(arch)
    model = attnsurgery.operate(copy.deepcopy(base), recipe(ANY_SIZE[arch], "non_local", subsample=2), (3, 64, 64))
    moved = move_gates(copy.deepcopy(model))
    upright, lying = torch.randn(2, 3, 96, 64), torch.randn(2, 3, 64, 96)
    for x in (torch.randn(2, 3, 64, 64), upright, lying, upright):
        assert torch.equal(model(x), base(x))
        assert not torch.equal(moved(x), base(x))
    assert attnsurgery.verify(moved, (3, 64, 96)).faults == ()
    assert not any("_attnsurgery" in name for m in attnsurgery.remove(moved).modules() for name in vars(m))


@pytest.mark.slow
def test_map_of_own_size_compiles_exports() -> None:
    """A model whose map tells its size can be compiled and exported."""
    model = move_gates(
        attnsurgery.operate(small("test_vit"), recipe("blocks.1", "non_local", subsample=2), (3, 64, 64))
    )
    x = torch.randn(2, 3, 96, 64)
    expected = model(x)
    assert torch.allclose(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected, atol=1e-5)
    assert torch.allclose(torch.export.export(model, (x,)).module()(x), expected, atol=1e-5)


@pytest.mark.slow
def test_prefix_tokens_are_no_part_of_grid() -> None:
    """Prefix tokens are no part of the grid."""
    base = small("vit_tiny_patch16_224", img_size=48)
    model = attnsurgery.operate(copy.deepcopy(base), recipe("blocks.1", "non_local", subsample=3))
    move_gates(model)
    x = torch.randn(2, 10, 192)
    ours, theirs = model.blocks[1](x), base.blocks[1](x)
    assert torch.equal(ours[:, :1], theirs[:, :1])
    assert not torch.equal(ours[:, 1:], theirs[:, 1:])


@pytest.mark.slow
def test_dense_block_keeps_its_children() -> None:
    """A dense block keeps its children, and the block stands in the last of them."""
    model = attnsurgery.operate(small("densenet121"), recipe("features.denseblock1", "se"), (3, 64, 64))
    assert len(model.features.denseblock1) == 6
    assert {key for key in model.state_dict() if ".se." in key} == {
        f"features.denseblock1.denselayer6.se.{name}" for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    }


@pytest.mark.slow
def test_trunk_is_last_two_equal_blocks() -> None:
    """The trunk of a mask is the last two blocks that keep the size."""

    def places(arch: str) -> list[str]:
        forecast = attnsurgery.plan(arch, recipe("stage:* trunk", "residual_attention"))
        return [planned.address for planned in forecast.blocks]

    assert places("resnet50")[2] == "layer3.4 .. layer3.5"
    assert places("resnet18")[3] == "layer4.1 .. layer4.1"
    assert places("densenet121") == [f"features.denseblock{stage}" for stage in (1, 2, 3, 4)]
    assert places("mvitv2_tiny")[2] == "stages.2.blocks.3:0 .. stages.2.blocks.4:0"


@pytest.mark.slow
def test_trunk_holds_windows_and_patches() -> None:
    """Where windows or patches are cut apart, the mask is for the module that holds them."""
    for arch, at in (("nest_tiny", "levels.1"), ("mobilevitv2_050", "stages.2.1 .. stages.2.1")):
        (planned,) = attnsurgery.plan(arch, recipe("stage:2 trunk", "residual_attention")).blocks
        assert planned.address == at


@pytest.mark.slow
def test_branches_without_feature_modules() -> None:
    """Blocks go into residual branches also where feature_info names no modules."""
    anatomy = attnsurgery.inspect("twins_svt_small")
    assert {site.owner for site in anatomy.sides(1, "branch")} == {"blocks.0.0", "blocks.0.1"}
    assert not any(site.owner.startswith("head") for site in anatomy.sites)
