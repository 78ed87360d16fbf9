"""Segmentation models: their maps, names, weights and surgery."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import attnsurgery
from attnsurgery.checkpoint.base import build_base
from attnsurgery.checkpoint.directory import write_directory
from attnsurgery.errors import CheckpointError, UnknownNameError, UsageError
from attnsurgery.models.backbones import build_backbone
from attnsurgery.models.danet import DANetHead
from attnsurgery.models.decoders import DECODERS
from attnsurgery.models.segmenter import Segmenter
from attnsurgery.surgery.operate import grafted_blocks
from attnsurgery.timm_plugin import registry, segmentation
from attnsurgery.timm_plugin.architectures import check_base, for_images, weightless
from tests.conftest import wake

PACKAGE, MISSING = "segmentation_models_pytorch", "the extra 'segmentation' is not installed"
DOCUMENTED = Path(__file__).parents[1] / "docs" / "segmentation.md"


def build(name: str, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return wake(timm.create_model(name, **{"num_classes": 5, **kwargs})).eval()


def images(height: int = 48, width: int = 64, channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(1))


# the backbone's map


@pytest.mark.parametrize(
    ("arch", "stride", "kwargs"),
    [
        ("test_resnet", 8, {}),
        ("test_efficientnet", 16, {}),
        ("test_convnext", 32, {}),
        ("test_vit", 16, {"img_size": (48, 64)}),
        ("test_vit", 16, {"dynamic_img_size": True}),
        ("test_vit2", 16, {"img_size": (48, 64)}),  # register tokens, and the mean of tokens
        ("test_resnet_se", 16, {}),
        (
            "swin_tiny_patch4_window7_224",
            32,
            {
                "img_size": (96, 64),
                "window_size": 2,
                "embed_dim": 24,
                "depths": (1, 1, 1, 1),
                "num_heads": (1, 1, 1, 1),
            },
        ),
    ],
)
@pytest.mark.slow
def test_map_is_where_the_image_is(arch: str, stride: int, kwargs: dict[str, Any]) -> None:
    """Images need not be square; in tokens and channels-last maps, a change of a corner stays at that corner."""
    model = build(f"{arch}_fcn{stride}", **kwargs)
    size = (96, 64) if "swin" in arch else (48, 64)
    x = images(*size)
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, *(side // stride for side in size))
    rows, columns = features.shape[2:]
    assert model(x).shape == (2, 5, *size)
    if model._form.layout == "NCHW":
        return  # nothing was moved
    for row, column in ((0, 0), (0, columns - 1), (rows - 1, 0), (rows - 1, columns - 1)):
        changed = x.clone()
        y, z = row * stride, column * stride
        changed[:, :, y : y + stride, z : z + stride] += 3
        response = (model.forward_features(changed) - features).abs().sum((0, 1))
        assert divmod(int(response.argmax()), columns) == (row, column)


@pytest.mark.parametrize("arch", ["test_convnext", "mobilenetv3_small_050"])
def test_backbone_has_no_unused_parameter(arch: str) -> None:
    """What forward_features does not run is no part of the backbone."""
    backbone, _ = build_backbone(arch, 32, "fcn")
    backbone.forward_features(images()).sum().backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("test_vit_fcn8", "test_vit cannot be the backbone of test_vit_fcn8.*stride of 16.*Use test_vit_fcn16"),
        ("densenet121_danet8", "densenet121 cannot be the backbone.*Use densenet121_danet32"),
        ("vit_small_patch14_dinov2_fcn16", "has a stride of 14.*supports none of the strides 8, 16 and 32"),
    ],
)
@pytest.mark.slow
def test_unsupported_stride_is_refused(name: str, message: str) -> None:
    """A stride that the architecture does not have is refused, and the error names those that it has."""
    for create in (timm.create_model, weightless):
        with pytest.raises(UsageError, match=message):
            create(name)


@pytest.mark.slow
def test_unsupported_pyramid_is_refused() -> None:
    """A decoder refuses a stride that it does not have, and an architecture without a pyramid of maps."""
    pytest.importorskip(PACKAGE, reason=MISSING)
    with pytest.raises(UsageError, match=r"decoder unet has no stride of 8. Use test_resnet_unet32"):
        timm.create_model("test_resnet_unet8")
    with pytest.raises(UsageError, match=r"needs maps of test_vit with strides from 2 or 4 to 32.*fcn and danet"):
        timm.create_model("test_vit_unet32")


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(UsageError, match=r"pip install 'attnsurgery\[segmentation\]'"):
        timm.create_model("test_resnet_unet32")


# names


def test_names_of_segmentation_models() -> None:
    """Names exist for every architecture and decoder, with tags, and for nothing else."""
    assert timm.is_model("resnet50_danet8")
    assert timm.is_model("resnet50_se_fcn16")
    assert timm.is_model("resnet50_fcn16_dual_s4")
    assert timm.is_model("test_efficientnet_fcn16.r160_in1k")
    for name in (
        "test_resnet_fcn", "test_resnet_fcn12", "test_resnet_fnc16", "nonet_fcn16", "_fcn16", "fcn16", "surgery_fcn16",
        "test_resnet_fcn16_fcn16", "test_resnet_fcn16_se_fcn16", "test_resnet_FCN16", "test_resnet_fcn16_",
    ):  # fmt: skip
        assert not timm.is_model(name), name
    assert registry.recipe_by_name("resnet18_fcn16") is None
    assert registry.recipe_by_name("resnet18_fcn16_se").base == "resnet18_fcn16"
    assert "resnet18_fcn16" not in registry.grafted_names()
    with pytest.raises(UnknownNameError, match="Did you mean 'test_resnet_fcn16'"):
        check_base("test_resnet_fcnn16")
    with pytest.raises(UnknownNameError, match="Did you mean 'test_resnet_fcn"):
        check_base("test_resnet_fcn12")
    check_base("test_efficientnet_fcn16.r160_in1k")
    with pytest.raises(UnknownNameError, match="has no tag 'r16'"):
        check_base("test_efficientnet_fcn16.r16")


def test_timms_own_names_are_no_segmentation_models() -> None:
    """No name of timm's own has the form of a segmentation model's, so none can change its meaning."""
    own = set(timm.list_models()) - set(timm.list_models(module="zoo"))
    assert [name for name in own if segmentation.parse(name)] == []


def test_model_follows_timms_conventions() -> None:
    """The model has what timm's own models have."""
    model = build("test_efficientnet_fcn16.r160_in1k", num_classes=11, in_chans=1)
    assert isinstance(model, Segmenter)
    assert (model.num_classes, model.in_chans, model.num_features) == (11, 1, 256)
    assert model.pretrained_cfg is model.default_cfg
    assert model.pretrained_cfg["architecture"] == "test_efficientnet_fcn16"
    assert model.pretrained_cfg["tag"] == "r160_in1k"
    assert model.get_submodule(model.pretrained_cfg["first_conv"]).in_channels == 1
    assert model.get_submodule(model.pretrained_cfg["classifier"]) is model.get_classifier()
    assert model.head_modules() == ("decoder",)
    assert timm.create_model("test_efficientnet_fcn16").num_classes == 21
    assert timm.get_pretrained_cfg("test_efficientnet_fcn16").num_classes == 21
    with pytest.raises(UsageError, match="has no features_only: use that of test_efficientnet"):
        timm.create_model("test_efficientnet_fcn16", features_only=True)


def test_parameters_are_grouped_as_timms() -> None:
    """Names of parameters that are not decayed and layer groups are those of the backbone, with the decoder last."""
    from timm.models import group_parameters

    model, plain = timm.create_model("test_vit_fcn16"), timm.create_model("test_vit")
    assert model.no_weight_decay() == {f"backbone.{name}" for name in plain.no_weight_decay()}
    assert timm.create_model("test_resnet_fcn16").no_weight_decay() == set()
    for arch in ("test_vit", "test_resnet", "test_efficientnet"):
        model, plain = timm.create_model(f"{arch}_fcn16"), timm.create_model(arch)
        groups = list(group_parameters(model, model.group_matcher()).values())
        expected = group_parameters(plain, plain.group_matcher())
        assert len(groups) == len(expected)
        assert groups[0] == [f"backbone.{name}" for name in expected[0]]
        assert {name for name in groups[-1] if name.startswith("decoder.")} == {
            name for name, _ in model.named_parameters() if name.startswith("decoder.")
        }


@pytest.mark.parametrize("decoder", ["fcn16", "unet32"])
def test_checkpointing_keeps_gradients(decoder: str) -> None:
    """Activation checkpointing of the backbone gives the same gradients."""
    if decoder == "unet32":
        pytest.importorskip(PACKAGE, reason=MISSING)
    model, x = build(f"test_resnet_{decoder}"), images(64, 64)
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    model.set_grad_checkpointing()
    actual = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(actual, expected, strict=True))


def test_danet_has_the_papers_parameters() -> None:
    """The head of the authors' release on a ResNet-101 for 19 classes of Cityscapes, layer by layer."""
    channels, width, classes = 2048, 512, 19
    convolutions = 2 * (9 * channels * width) + 2 * (9 * width * width)
    norms = 4 * 2 * width
    position = 2 * (width * (width // 8) + width // 8) + width * width + width + 1
    classifiers = 3 * (width * classes + classes)
    with torch.device("meta"):
        head = DANetHead(channels, classes)
        model = timm.create_model("resnet101_danet8", num_classes=classes)
    expected = convolutions + norms + position + 1 + classifiers
    assert sum(p.numel() for p in head.parameters()) == expected == 23_954_619
    assert sum(p.numel() for p in model.decoder.parameters()) == expected


# weights


def plain_of(arch: str, **kwargs: Any) -> Any:
    torch.manual_seed(3)
    return wake(timm.create_model(arch, **kwargs)).eval()


PLAIN = ["test_resnet_fcn16", "test_convnext_fcn32", "test_vit_fcn16", "test_vit2_fcn16", "test_efficientnet_danet8"]
PYRAMIDS = ["test_resnet_unet32", "test_convnext_unet32", "test_efficientnet_deeplabv3plus16"]


def deepest(plain: Any, name: str, x: torch.Tensor) -> torch.Tensor:
    """The last features of a plain model with the output stride of a segmentation model."""
    arch, _, decoder = name.rpartition("_")
    stride = {} if "vit" in name or decoder.endswith("32") else {"output_stride": 8 if decoder.endswith("8") else 16}
    if name in PYRAMIDS:
        same = timm.create_model(arch, features_only=True, **stride).eval()
        names = {key.replace(".", "_", 1): key for key in plain.state_dict()} | {key: key for key in plain.state_dict()}
        same.load_state_dict({key: plain.state_dict()[names[key]] for key in same.state_dict()})
        return same(x)[-1]
    same = timm.create_model(arch, **stride).eval()
    same.load_state_dict(plain.state_dict())
    features = same.forward_features(x)
    if features.ndim == 3:
        tokens = features[:, same.num_prefix_tokens :]
        return tokens.transpose(1, 2).reshape(2, -1, 10, 10)
    return features


@pytest.mark.parametrize("name", [*PLAIN, *PYRAMIDS])
@pytest.mark.slow
def test_weights_of_the_architecture_fill_the_backbone(name: str, tmp_path: Path) -> None:
    """By timm's own loading and by build_base, the backbone computes as the plain model; the decoder is random."""
    if name in PYRAMIDS:
        pytest.importorskip(PACKAGE, reason=MISSING)
    arch = name.rpartition("_")[0]
    plain, x = plain_of(arch), images(160, 160)
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    overlay = {"file": str(tmp_path / "plain.pth")}
    loaded = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5).eval()
    based = build_base(name, plain.state_dict())
    assert (loaded.num_classes, based.num_classes) == (5, 21)
    if arch != "test_vit2":  # its norm is behind the mean of tokens, and here in front of the decoder
        expected = deepest(plain, name, x)
        assert torch.equal(loaded.forward_features(x), expected)
        assert torch.equal(based.forward_features(x), expected)
    assert torch.equal(loaded.forward_features(x), based.forward_features(x))
    gray = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1).eval()
    assert gray(x[:, :1]).shape == (2, 21, 160, 160)


@pytest.mark.slow
def test_weights_of_a_trained_classifier_fill_the_backbone(tmp_path: Path) -> None:
    """A plain model of another number of classes is as good, and another model's weights are refused."""
    plain = plain_of("test_resnet", num_classes=7)
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    overlay = {"file": str(tmp_path / "plain.pth")}
    for name in ("test_resnet_fcn16", "test_resnet_se_fcn16", "test_resnet_fcn16_se_s3"):
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5)
        state = model.state_dict()
        assert all(
            torch.equal(state[f"backbone.{k}"], v) for k, v in plain.state_dict().items() if not k.startswith("fc")
        )
    with pytest.raises(CheckpointError, match="no weights of test_efficientnet"):
        timm.create_model("test_efficientnet_fcn16", pretrained=True, pretrained_cfg_overlay=overlay)


@pytest.mark.parametrize("name", ["test_resnet_fcn16", "test_vit_fcn16", "test_resnet_danet8", "test_convnext_unet32"])
@pytest.mark.slow
def test_build_base_takes_weights_of_the_whole(name: str) -> None:
    """Weights of the segmentation model give its classes and channels; those of another model the usual error."""
    if "unet" in name:
        pytest.importorskip(PACKAGE, reason=MISSING)
    model = build(name, in_chans=1)
    again = build_base(name, {f"module.{key}": value for key, value in model.state_dict().items()})
    assert (again.num_classes, again.in_chans) == (5, 1)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    other = timm.create_model("test_byobnet").state_dict()
    with pytest.raises(CheckpointError, match=f"does not hold the weights of {name}: .* missing"):
        build_base(name, other)
    half = {key: value for key, value in model.state_dict().items() if "decoder" not in key or "bias" in key}
    with pytest.raises(CheckpointError, match=f"does not hold the weights of {name}: .* missing"):
        build_base(name, half)


def test_build_base_resizes_positions() -> None:
    """Position embeddings are interpolated for another size of images, in both kinds of weights."""
    assert for_images("test_vit_fcn16", (48, 64)) == {"img_size": (48, 64)}
    assert for_images("test_resnet_fcn16", (48, 64)) == {}
    plain, whole = plain_of("test_vit"), build("test_vit_fcn16")
    for weights in (plain.state_dict(), whole.state_dict()):
        model = build_base("test_vit_fcn16", weights, img_size=(48, 64))
        assert model(images()).shape[2:] == (48, 64)


@pytest.mark.parametrize(
    "name",
    [
        "test_resnet_fcn16",
        "test_resnet_danet8",
        "test_vit_fcn16",
        "test_resnet_se_fcn16",
        "test_resnet_fcn16_se_s3",
        "test_convnext_unet32",
        "test_convnext_unet32_se_s3",
    ],
)
@pytest.mark.slow
def test_saved_model_is_built_again(name: str, tmp_path: Path) -> None:
    """A directory has all weights, those of the decoder and of blocks included, also for another process."""
    if "unet" in name:
        pytest.importorskip(PACKAGE, reason=MISSING)
    model, x = build(name, in_chans=1), images(160, 160, channels=1)
    write_directory(model, tmp_path / "saved")
    again = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    assert torch.equal(again(x), model(x))
    assert len(grafted_blocks(again)) == len(grafted_blocks(model))
    other = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True, num_classes=2).eval()
    assert torch.equal(other.forward_features(x), model.forward_features(x))
    program = (
        "import sys, timm, torch, attnsurgery\n"
        "model = timm.create_model('local-dir:' + sys.argv[1], pretrained=True)\n"
        "torch.save(model.state_dict(), sys.argv[1] + '/state.pt')"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "saved")], check=True)
    state = torch.load(tmp_path / "saved" / "state.pt")
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


# surgery


@pytest.mark.parametrize(
    "build_surgical",
    [
        lambda edits: timm.create_model("test_efficientnet_fcn16_dual_s4", num_classes=5),
        lambda edits: timm.create_model("surgery", recipe=recipe_of(edits), num_classes=5),
        lambda edits: timm.create_model(
            "surgery", base="test_efficientnet_fcn16", recipe=recipe_of(edits), num_classes=5
        ),
        lambda edits: attnsurgery.operate(
            timm.create_model("test_efficientnet_fcn16", num_classes=5), recipe_of(edits)
        ),
    ],
)
@pytest.mark.slow
def test_surgery_on_segmentation_model(build_surgical: Callable[[Any], nn.Module], tmp_path: Path) -> None:
    """Blocks stand in the backbone and in the decoder, start as the identity, and are saved."""
    edits = [{"at": "backbone.blocks.1.0", "block": "se"}, {"at": "decoder.conv", "block": "dual"}]
    base, x = build("test_efficientnet_fcn16"), images(64, 64)
    model = build_surgical(edits)
    model.load_state_dict(base.state_dict())
    model.eval()
    assert torch.equal(model(x), base(x))
    blocks = list(grafted_blocks(model))
    assert all(path.startswith(("backbone.", "decoder")) for path in blocks)
    assert len(blocks) in (1, 2)
    wake(model, seed=4)
    write_directory(model, tmp_path / "saved")
    again = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    assert torch.equal(again(x), model(x))


def recipe_of(edits: Any) -> dict[str, Any]:
    return {"version": 1, "name": "segmented", "base": "test_efficientnet_fcn16", "edits": edits}


def test_sites_are_those_of_backbone_and_decoder() -> None:
    """The backbone has the stages and sites that it has by itself, and the decoder has its own."""
    anatomy, plain = attnsurgery.inspect("test_resnet_fcn32"), attnsurgery.inspect("test_resnet")
    of_backbone = {
        (site.address.removeprefix("backbone."), site.stage, site.role)
        for site in anatomy.sites
        if site.address.startswith("backbone.")
    }
    assert {(site.address, site.stage, site.role) for site in plain.sites} == of_backbone
    assert any(site.address == "decoder.conv" and site.layout == "NCHW" for site in anatomy.sites)
    assert anatomy.name == "test_resnet_fcn32"


def test_commands_take_segmentation_models(capsys: pytest.CaptureFixture[str]) -> None:
    """`attnsurgery inspect` lists the sites, and reports an unsupported stride."""
    from attnsurgery.cli import main

    with pytest.raises(SystemExit) as stopped:
        main(["inspect", "test_efficientnet_fcn16", "--all"])
    printed = capsys.readouterr().out
    assert not stopped.value.code
    assert "backbone.blocks.1.0" in printed
    assert "decoder.conv" in printed


@pytest.mark.slow
def test_example_of_the_documentation_runs() -> None:
    """The example of docs/segmentation.md runs, and its table has every decoder with its strides."""
    text = DOCUMENTED.read_text()
    code = text.partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(code, names)
    assert len(grafted_blocks(names["also_attended"])) == 2
    assert grafted_blocks(names["attended"])
    for decoder in DECODERS:
        strides = ", ".join(map(str, DECODERS[decoder].strides))
        assert f"| `{decoder}` | {strides} |" in text
