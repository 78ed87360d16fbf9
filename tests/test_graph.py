"""Where blocks can go: sites, their shapes, stages and roles, and the selectors that mean them."""

from __future__ import annotations

import re
import sys

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import fx, nn

import attnsurgery
from attnsurgery.errors import AttnSurgeryError, SiteError, UnknownNameError
from attnsurgery.graph.anatomy import Anatomy
from attnsurgery.graph.find import input_size_of, survey
from attnsurgery.graph.layout import guess_layout
from attnsurgery.graph.select import select
from attnsurgery.graph.trace import trace_owner
from tests.conftest import HOSTS, build, images


@pytest.fixture(scope="module")
def resnet50() -> Anatomy:
    return attnsurgery.inspect("resnet50")


def addresses(selector: str, anatomy: Anatomy) -> list[str]:
    return [site.address for site in select(selector, anatomy)]


def test_sites_of_a_resnet_have_the_shapes_and_stages_of_the_paper(resnet50: Anatomy) -> None:
    assert resnet50.stages == (1, 2, 3, 4)
    assert [len(resnet50.blocks(stage)) for stage in resnet50.stages] == [3, 4, 6, 3]
    assert resnet50.site("layer3.5").shape == (1024, 14, 14)
    assert resnet50.site("layer3.0.bn1").shape == (256, 28, 28)  # the stride sits in the convolution behind it
    assert resnet50.site("layer3.0.bn1").stage == 3
    assert {site.stage for site in resnet50.sites if site.address.startswith("layer2")} == {2}
    assert [site.depth for site in resnet50.sites] == sorted(site.depth for site in resnet50.sites)


def test_branch_ends_of_a_resnet_are_where_squeeze_and_excitation_goes(resnet50: Anatomy) -> None:
    expected = [f"layer{stage}.{block}.bn3" for stage, n in ((1, 3), (2, 4), (3, 6), (4, 3)) for block in range(n)]
    assert addresses("stage:* branches", resnet50) == expected


@pytest.mark.parametrize(
    ("name", "branch"),
    [
        ("resnet18", "layer1.0.bn2"),
        ("convnext_atto", "stages.0.blocks.0:mul"),
        ("efficientnet_b0", "blocks.1.1.bn3"),
        ("mobilenetv3_small_050", "blocks.1.1.bn3"),
        ("vit_tiny_patch16_224", "blocks.0.attn"),
        ("swin_tiny_patch4_window7_224", "layers.0.blocks.0:contiguous_1"),
        ("regnety_002", "s1.b1.conv3"),
    ],
)
def test_branch_ends_are_found_in_every_kind_of_residual_model(name: str, branch: str) -> None:
    anatomy = attnsurgery.inspect(name)
    assert anatomy.stages == (1, 2, 3, 4)
    assert next(site.address for site in anatomy.sites if site.role == "branch" and site.stage) == branch


def test_stages_of_an_isotropic_model_are_the_quarters_of_its_depth() -> None:
    anatomy = attnsurgery.inspect("vit_tiny_patch16_224")
    assert [[s.address for s in anatomy.blocks(stage)] for stage in anatomy.stages] == [
        [f"blocks.{i}" for i in range(3 * quarter, 3 * quarter + 3)] for quarter in range(4)
    ]
    assert anatomy.site("blocks.3").layout == "NLC"
    assert anatomy.site("blocks.3").prefix_tokens == 1


def test_windows_are_channels_last() -> None:
    site = attnsurgery.inspect("swin_tiny_patch4_window7_224").site("layers.1.blocks.0")
    assert (site.layout, site.shape, site.channels, site.map_size) == ("NHWC", (28, 28, 192), 192, (28, 28))


@pytest.mark.parametrize("name", HOSTS)
def test_shapes_are_those_of_a_real_forward(name: str) -> None:
    model, size = build(name), HOSTS[name][0]
    anatomy = survey(model, (3, size, size))
    outputs = {site.address: site.shape for site in anatomy.sites if site.node is None}
    seen: dict[str, tuple[int, ...]] = {}
    for path, module in model.named_modules():
        if path in outputs:
            module.register_forward_hook(lambda _m, _i, out, path=path: seen.__setitem__(path, tuple(out.shape[1:])))
    with torch.no_grad():
        model(images(size))
    assert seen == outputs


def test_survey_leaves_the_model_as_it_was() -> None:
    model = build("test_resnet").train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    survey(model)
    assert model.training
    assert [type(module) for module in model.modules()] == classes
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "resnetv2_50x1_bit", "pnasnet5large"])
def test_a_name_has_the_sites_of_the_built_model(name: str) -> None:
    """Only the second is copied; timm cannot build the last without weights."""
    assert attnsurgery.inspect(name).sites == attnsurgery.inspect(timm.create_model(name)).sites


def test_input_size_is_that_of_the_built_model_and_not_a_constant() -> None:
    assert input_size_of(timm.create_model("test_vit", img_size=96, in_chans=1)) == (1, 96, 96)
    assert input_size_of(timm.create_model("test_resnet")) == (3, 160, 160)
    assert attnsurgery.inspect(timm.create_model("test_resnet", in_chans=5)).input_size == (5, 160, 160)


def test_the_root_and_containers_never_hold_a_site() -> None:
    for name in ("test_resnet", "regnetx_002", "densenet121"):
        anatomy = attnsurgery.inspect(name)
        owners = {site.owner for site in anatomy.sites}
        assert "" not in owners
        loops = {"layer1", "layer2", "s1", "s2", "features", "features.transition1"}
        assert not owners & loops


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("stage:3 before_last_block", ["layer3.4"]),
        ("stage:3 last", ["layer3.5"]),
        ("stage:3", ["layer3.5"]),
        ("stage:-1 last", ["layer4.2"]),
        ("stage:34 last", ["layer3.5", "layer4.2"]),
        ("stage:1,4 last", ["layer1.2", "layer4.2"]),
        ("stage:23 every:2", ["layer2.1", "layer2.3", "layer3.1", "layer3.3", "layer3.5"]),
        ("stage:2 every 3", ["layer2.2"]),
        ("stage:1 every", ["layer1.0", "layer1.1", "layer1.2"]),
        ("layer[34].0.bn3", ["layer3.0.bn3", "layer4.0.bn3"]),
        ("layer[3-4].0.bn?", [f"layer{stage}.0.bn{i}" for stage in (3, 4) for i in (1, 2, 3)]),
        ("layer4.*", ["layer4.0", "layer4.1", "layer4.2"]),
        ("layer4.**.bn3", ["layer4.0.bn3", "layer4.1.bn3", "layer4.2.bn3"]),
    ],
)
def test_selector_means(selector: str, expected: list[str], resnet50: Anatomy) -> None:
    assert addresses(selector, resnet50) == expected


def test_before_the_last_block_of_a_stage_of_one_block_is_behind_it() -> None:
    assert addresses("stage:3 before_last_block", attnsurgery.inspect("test_resnet")) == ["layer3.0"]


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("layer9.*.bn2", r"'layer9.\*.bn2' matches none of the \d+ sites of resnet50. Did you mean 'layer4.\*.bn2'\?"),
        ("layer3.5.bn4", r"Did you mean 'layer3.5.bn\d'\?"),
        ("stage:5 last", r"has no stage 5. Its stages, by stride 4, 8, 16, 32 or by quarters of the depth: 1, 2, 3, 4"),
        ("stage:-9 last", "has no stage -9"),
        ("stage:3 befor_last_block", r"no rule 'befor_last_block'. Did you mean 'before_last_block'\?"),
        ("stage:3 last:2", "is not a stage selector. It reads: stage:<3 or 34 or -1"),
        ("stage:3 every:0", "is not a stage selector"),
        ("stage:x", "is not a stage selector"),
        ("stage:1 every:9", "too few blocks for that step"),
        ("layer[z-a].0", "is not a pattern"),
    ],
)
def test_a_selector_that_matches_nothing_names_the_nearest_that_would(
    selector: str, message: str, resnet50: Anatomy
) -> None:
    with pytest.raises(SiteError, match=message):
        select(selector, resnet50)


@given(text=st.text(max_size=30))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_is_a_selector_that_matches_or_a_clear_error(text: str, resnet50: Anatomy) -> None:
    try:
        found = select(text, resnet50)
    except SiteError as error:
        found, message = (), str(error)
    assert found or "resnet50" in message or re.search(r"is not a (stage selector|pattern|span)\b", message)


def test_an_address_that_is_not_there_names_the_nearest(resnet50: Anatomy) -> None:
    with pytest.raises(SiteError, match=r"resnet50 has no site 'layer3.9'. Did you mean 'layer3.\d'\?"):
        resnet50.site("layer3.9")


def test_inspecting_an_unknown_name_suggests_one() -> None:
    with pytest.raises(UnknownNameError, match=r"no architecture 'resnt50'. Did you mean 'resnet50'\?"):
        attnsurgery.inspect("resnt50")


@pytest.mark.parametrize(
    ("shape", "image", "channels_last", "layout"),
    [
        ((64, 7, 7), (224, 224), False, "NCHW"),
        ((7, 7, 64), (224, 224), False, "NHWC"),
        ((7, 7, 7), (224, 224), False, "NCHW"),
        ((7, 7, 7), (224, 224), True, "NHWC"),
        ((64, 64, 32), (256, 128), False, "NCHW"),
        ((64, 32, 64), (256, 128), False, "NHWC"),
        ((49, 64), (224, 224), False, "NLC"),
    ],
)
def test_layout_is_the_reading_that_keeps_the_images_proportions(
    shape: tuple[int, ...], image: tuple[int, int], channels_last: bool, layout: str
) -> None:
    assert guess_layout(shape, image, channels_last) == layout


def test_sites_of_images_that_are_not_square_have_their_channels_in_place() -> None:
    site = survey(build("test_resnet"), (3, 128, 64)).site("layer1.0")
    assert (site.layout, site.shape, site.channels) == ("NCHW", (32, 32, 16), 32)


def test_stages_belong_to_the_architecture_and_not_to_its_dilation() -> None:
    plain, dilated = (attnsurgery.inspect(timm.create_model("resnet18", output_stride=s)) for s in (32, 8))
    assert dilated.site("layer4.1").shape[1:] == (28, 28)
    for stage in (1, 2, 3, 4):
        assert [s.address for s in dilated.blocks(stage)] == [s.address for s in plain.blocks(stage)]


def test_patches_are_no_class_tokens_where_the_class_token_comes_late() -> None:
    assert attnsurgery.inspect("cait_xxs24_224").site("blocks.0").prefix_tokens == 0
    assert attnsurgery.inspect("vit_tiny_patch16_224").site("blocks.0").prefix_tokens == 1


def test_what_rebuilds_itself_for_deployment_holds_no_site_inside() -> None:
    anatomy = attnsurgery.inspect("mobileone_s0")
    assert {site.address.rpartition(".")[0] for site in anatomy.blocks(1)} == {"stages.0"}
    assert not any("conv_kxk" in site.address for site in anatomy.sites)


class Asking(nn.Module):
    """Asks about types as dual path networks do: of what it is given, or only of what it was made with."""

    def __init__(self, of_input: bool) -> None:
        super().__init__()
        self.of_input = of_input
        self.sizes = (2, 2)
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
        if isinstance(x if self.of_input else self.sizes, tuple):
            x = torch.cat(x, dim=1) if self.of_input else x
        height, width = x.shape[-2:]
        return self.conv(x).reshape(-1, 4, height * width)


def test_a_forward_that_asks_for_the_type_of_its_input_is_not_frozen() -> None:
    assert trace_owner(Asking(of_input=True)) is None
    graph = trace_owner(Asking(of_input=False))
    assert graph is not None
    x = torch.randn(2, 4, 3, 5)
    assert fx.GraphModule(Asking(of_input=False), graph)(x).shape == (2, 4, 15)
    assert not hasattr(sys.modules[__name__], "isinstance")


@pytest.mark.parametrize("size", [(64, 64), (1, 64, 64), (3, 0, 64)])
def test_an_input_size_that_cannot_be_is_refused(size: tuple[int, ...]) -> None:
    with pytest.raises(AttnSurgeryError, match=r"input_size is|does not run on images"):
        survey(build("test_resnet"), size)
