"""Where blocks can stand: sites, their shapes, stages and roles, and the selectors that match them."""

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
from attnsurgery.graph.detect_layout import guess_layout
from attnsurgery.graph.find import input_size_of, survey
from attnsurgery.graph.select import select
from attnsurgery.graph.trace import trace_owner
from tests.conftest import HOSTS, build, images


@pytest.fixture(scope="module")
def resnet50() -> Anatomy:
    return attnsurgery.inspect("resnet50")


def addresses(selector: str, anatomy: Anatomy) -> list[str]:
    return [site.address for site in select(selector, anatomy)]


@pytest.mark.slow
def test_survey_of_resnet_follows_the_paper(resnet50: Anatomy) -> None:
    """The sites of a ResNet have the shapes and stages of the paper."""
    assert resnet50.stages == (1, 2, 3, 4)
    assert [len(resnet50.blocks(stage)) for stage in resnet50.stages] == [3, 4, 6, 3]
    assert resnet50.site("layer3.5").shape == (1024, 14, 14)
    assert resnet50.site("layer3.0.bn1").shape == (256, 28, 28)  # the stride sits in the convolution behind it
    assert resnet50.site("layer3.0.bn1").stage == 3
    assert {site.stage for site in resnet50.sites if site.address.startswith("layer2")} == {2}
    assert [site.depth for site in resnet50.sites] == sorted(site.depth for site in resnet50.sites)


def test_branch_ends_of_resnet_are_bn3(resnet50: Anatomy) -> None:
    """The branches of a ResNet end where squeeze-and-excitation goes."""
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
@pytest.mark.slow
def test_branch_ends_of_residual_families(name: str, branch: str) -> None:
    """Branch ends are found in every kind of residual model."""
    anatomy = attnsurgery.inspect(name)
    assert anatomy.stages == (1, 2, 3, 4)
    assert next(site.address for site in anatomy.sites if site.role == "branch" and site.stage) == branch


def test_stages_of_isotropic_are_quarters() -> None:
    """The stages of an isotropic model are the quarters of its depth."""
    anatomy = attnsurgery.inspect("vit_tiny_patch16_224")
    assert [[s.address for s in anatomy.blocks(stage)] for stage in anatomy.stages] == [
        [f"blocks.{i}" for i in range(3 * quarter, 3 * quarter + 3)] for quarter in range(4)
    ]
    assert anatomy.site("blocks.3").layout == "NLC"
    assert anatomy.site("blocks.3").prefix_tokens == 1


@pytest.mark.slow
def test_survey_of_windows_is_channels_last() -> None:
    """The maps of swin blocks are channels last."""
    site = attnsurgery.inspect("swin_tiny_patch4_window7_224").site("layers.1.blocks.0")
    assert (site.layout, site.shape, site.channels, site.map_size) == ("NHWC", (28, 28, 192), 192, (28, 28))


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.slow
def test_survey_shapes_equal_real_forward(name: str) -> None:
    """The shape of every site is that of a real forward."""
    model, size = build(name), HOSTS[name][0]
    anatomy = survey(model, (3, size, size))
    outputs = {site.address: site.shape for site in anatomy.sites if site.node is None}
    shapes: dict[str, tuple[int, ...]] = {}
    for path, module in model.named_modules():
        if path in outputs:
            module.register_forward_hook(lambda _m, _i, out, path=path: shapes.__setitem__(path, tuple(out.shape[1:])))
    with torch.no_grad():
        model(images(size))
    assert shapes == outputs


def test_survey_leaves_the_model_unchanged() -> None:
    """A survey changes no weight, class, mode or hook of the model."""
    model = build("test_resnet").train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    survey(model)
    assert model.training
    assert [type(module) for module in model.modules()] == classes
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "resnetv2_50x1_bit", "pnasnet5large"])
@pytest.mark.slow
def test_inspect_of_name_equals_built_model(name: str) -> None:
    """A name has the sites of the built model, also where timm cannot build it without weights."""
    assert attnsurgery.inspect(name).sites == attnsurgery.inspect(timm.create_model(name)).sites


def test_input_size_is_that_of_built_model() -> None:
    """The size of images is that of the built model."""
    assert input_size_of(timm.create_model("test_vit", img_size=96, in_chans=1)) == (1, 96, 96)
    assert input_size_of(timm.create_model("test_resnet")) == (3, 160, 160)
    assert attnsurgery.inspect(timm.create_model("test_resnet", in_chans=5)).input_size == (5, 160, 160)


@pytest.mark.slow
def test_sites_are_never_in_containers() -> None:
    """Neither the root nor a container that is looped over holds a site."""
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
def test_selector_selects_addresses(selector: str, expected: list[str], resnet50: Anatomy) -> None:
    """Each form of a selector means the sites that are written beside it."""
    assert addresses(selector, resnet50) == expected


def test_selector_before_last_of_one_block() -> None:
    """In a stage of one block, "before the last block" is that block."""
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
def test_selector_sans_match_names_nearest(selector: str, message: str, resnet50: Anatomy) -> None:
    """A selector that matches nothing is refused with the nearest one that does."""
    with pytest.raises(SiteError, match=message):
        select(selector, resnet50)


@given(text=st.text(max_size=30))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_selector_of_any_text_is_safe(text: str, resnet50: Anatomy) -> None:
    """Any text is a selector that matches, or a clear error."""
    try:
        sites = select(text, resnet50)
    except SiteError as error:
        sites, message = (), str(error)
    assert sites or "resnet50" in message or re.search(r"is not a (stage selector|pattern|span)\b", message)


def test_site_unknown_names_nearest(resnet50: Anatomy) -> None:
    """An address that does not exist is refused with the nearest one."""
    with pytest.raises(SiteError, match=r"resnet50 has no site 'layer3.9'. Did you mean 'layer3.\d'\?"):
        resnet50.site("layer3.9")


def test_inspect_unknown_name_suggests_one() -> None:
    """Inspecting an unknown name suggests the nearest one."""
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
def test_layout_keeps_proportions_of_image(
    shape: tuple[int, ...], image: tuple[int, int], channels_last: bool, layout: str
) -> None:
    """The layout is the reading of a shape that keeps the proportions of the image."""
    assert guess_layout(shape, image, channels_last) == layout


def test_layout_of_oblong_images_is_right() -> None:
    """With images that are not square, sites have their channels in place."""
    site = survey(build("test_resnet"), (3, 128, 64)).site("layer1.0")
    assert (site.layout, site.shape, site.channels) == ("NCHW", (32, 32, 16), 32)


@pytest.mark.slow
def test_stages_ignore_dilation() -> None:
    """Stages belong to the architecture and not to its dilation."""
    plain, dilated = (attnsurgery.inspect(timm.create_model("resnet18", output_stride=s)) for s in (32, 8))
    assert dilated.site("layer4.1").shape[1:] == (28, 28)
    for stage in (1, 2, 3, 4):
        assert [s.address for s in dilated.blocks(stage)] == [s.address for s in plain.blocks(stage)]


@pytest.mark.slow
def test_prefix_tokens_sans_late_class_token() -> None:
    """Where the class token comes late, patches are not counted as prefix tokens."""
    assert attnsurgery.inspect("cait_xxs24_224").site("blocks.0").prefix_tokens == 0
    assert attnsurgery.inspect("vit_tiny_patch16_224").site("blocks.0").prefix_tokens == 1


def test_sites_skip_reparametrized_modules() -> None:
    """A module that rebuilds itself for deployment has no site inside."""
    anatomy = attnsurgery.inspect("mobileone_s0")
    assert {site.address.rpartition(".")[0] for site in anatomy.blocks(1)} == {"stages.0"}
    assert not any("conv_kxk" in site.address for site in anatomy.sites)


class TypeChecking(nn.Module):
    """Asks for types as dual path networks do: of its input, or only of its own attribute."""

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


def test_trace_owner_refuses_type_of_input() -> None:
    """A forward that asks for the type of its input is not traced; one that asks for another type is."""
    assert trace_owner(TypeChecking(of_input=True)) is None
    graph = trace_owner(TypeChecking(of_input=False))
    assert graph is not None
    x = torch.randn(2, 4, 3, 5)
    assert fx.GraphModule(TypeChecking(of_input=False), graph)(x).shape == (2, 4, 15)
    assert not hasattr(sys.modules[__name__], "isinstance")


@pytest.mark.parametrize("size", [(64, 64), (1, 64, 64), (3, 0, 64)])
def test_survey_refuses_impossible_size(size: tuple[int, ...]) -> None:
    """A size of images that cannot be is refused."""
    with pytest.raises(AttnSurgeryError, match=r"input_size is|does not run on images"):
        survey(build("test_resnet"), size)
