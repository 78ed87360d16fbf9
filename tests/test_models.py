"""Attention-56 and -92 have the paper's numbers, and everything that timm expects of a model of its own."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import attnsurgery
from attnsurgery.blocks.residual_attention import PreActUnit, ResidualAttention
from attnsurgery.models.residual_attention_net import AttentionModule, ResidualAttentionNet
from tests.conftest import wake
from tests.lower_end import BUILDS_ON_META

NAMES = ["residual_attention_56", "residual_attention_92"]


@pytest.fixture(scope="module")
def net() -> Any:
    """Attention-56, every parameter and statistic of which has left its start."""
    torch.manual_seed(0)
    return wake(timm.create_model("residual_attention_56", num_classes=10)).eval()


def images(*size: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "params", "gmacs"),
    [("residual_attention_56", 31_810_728, 6.27), ("residual_attention_92", 52_466_344, 10.53)],
)
@pytest.mark.slow
def test_networks_cost_as_in_the_paper(name: str, params: int, gmacs: float) -> None:
    """The networks have the parameters and multiply-adds of the paper."""
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert sum(p.numel() for p in model.parameters()) == params
    assert round(counter.get_total_flops() / 2e9, 2) == gmacs


@pytest.mark.parametrize(("name", "layers", "modules"), [(NAMES[0], 56, [1, 1, 1]), (NAMES[1], 92, [1, 2, 3])])
@pytest.mark.slow
def test_networks_have_depth_of_their_name(name: str, layers: int, modules: list[int]) -> None:
    """The networks have as many layers as their name says, and masks of the paper's depths."""
    with torch.device("meta"):
        model = timm.create_model(name)
    trunk = [m for path, m in model.named_modules() if isinstance(m, PreActUnit) and "mask" not in path]
    assert 3 * len(trunk) + 2 == layers  # and the first convolution and the classifier
    assert [sum(isinstance(m, AttentionModule) for m in stage) for stage in model.stages[:3]] == modules
    masks = [m for m in model.modules() if isinstance(m, ResidualAttention)]
    assert [mask.depth for mask in masks] == [3 - stage for stage, count in enumerate(modules) for _ in range(count)]
    assert all(mask.alpha is None for mask in masks)


def test_attention_module_scales_its_trunk() -> None:
    """The module multiplies the trunk by 1 plus a mask that does not depend on the trunk."""
    torch.manual_seed(0)
    module = wake(AttentionModule(16, mask_depth=2, t=3)).double().eval()
    x = torch.randn(2, 16, 12, 9, dtype=torch.float64)
    trunk_input = module.before(x)
    mask = module.mask(trunk_input) - 1
    assert torch.allclose(module(x), module.after((1 + mask) * module.trunk(trunk_input)), atol=1e-12)
    wake(module.trunk, seed=1)
    assert torch.allclose(module(x), module.after((1 + mask) * module.trunk(trunk_input)), atol=1e-12)
    assert (mask > 0).all()
    assert (mask < 1).all()


@pytest.mark.slow
def test_networks_registered_without_import() -> None:
    """timm knows the names, and nothing of the models is imported before one is built."""
    assert timm.list_models("residual_attention*") == NAMES
    assert timm.list_models(module="models") == [*NAMES, "test_resnet_deeper"]
    assert timm.list_pretrained("residual_attention*") == []
    program = (
        "import timm, attnsurgery, sys; assert timm.is_model('residual_attention_92'); "
        "assert 'attnsurgery.models.residual_attention_net' not in sys.modules; "
        "assert 'attnsurgery.blocks' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.slow
def test_networks_promise_no_weights() -> None:
    """The networks have no pretrained weights and say so."""
    cfg = timm.get_pretrained_cfg("residual_attention_56")
    assert cfg is not None
    assert cfg.input_size == (3, 224, 224)
    assert not cfg.has_weights
    with pytest.raises((RuntimeError, ValueError)):
        timm.create_model("residual_attention_56", pretrained=True)


@pytest.mark.parametrize("size", [(32, 32), (65, 65), (96, 70)])
@pytest.mark.slow
def test_network_takes_sizes_from_32_pixels(net: Any, size: tuple[int, int]) -> None:
    """Images of any size from 32 pixels go in."""
    features = net.forward_features(images(*size))
    assert features.shape == (2, 2048, *(-(-side // 32) for side in size))
    assert torch.equal(net.forward_head(features), net(images(*size)))
    assert torch.isfinite(features).all()


@pytest.mark.slow
def test_intermediates_equal_features_only(net: Any) -> None:
    """The intermediate maps are the ones that `features_only` gives."""
    x = images(64, 64)
    backbone = timm.create_model("residual_attention_56", features_only=True).eval()
    assert backbone.feature_info.channels() == [64, 256, 512, 1024, 2048]
    assert backbone.feature_info.reduction() == [2, 4, 8, 16, 32]
    state = {k.replace("stages.", "stages_").replace("stem.", "stem_"): v for k, v in net.state_dict().items()}
    backbone.load_state_dict({k: v for k, v in state.items() if not k.startswith(("norm", "head"))})
    maps = backbone(x)
    last, intermediates = net.forward_intermediates(x)
    assert [tuple(t.shape[1:]) for t in maps] == [(64, 32, 32), (256, 16, 16), (512, 8, 8), (1024, 4, 4), (2048, 2, 2)]
    assert all(torch.equal(a, b) for a, b in zip(maps, intermediates, strict=True))
    assert torch.equal(last, net.forward_features(x))
    (second,) = net.forward_intermediates(x, indices=[2], stop_early=True, intermediates_only=True)
    assert torch.equal(second, intermediates[2])
    (normalised,) = net.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
    assert torch.equal(normalised, last)
    with pytest.raises(ValueError, match="output_fmt is 'NCHW', and not 'NLC'"):
        net.forward_intermediates(x, output_fmt="NLC")


@pytest.mark.parametrize(("stride", "sides"), [(8, [16, 8, 8, 8]), (16, [16, 8, 4, 4])])
@pytest.mark.slow
def test_output_stride_sets_dilation(stride: int, sides: list[int]) -> None:
    """An output stride of 8 or 16 is reached by dilation, and another one is refused."""
    with torch.device("meta"):
        backbone = timm.create_model(
            "residual_attention_56", features_only=True, output_stride=stride, out_indices=(1, 2, 3, 4)
        )
    maps = backbone.eval()(torch.empty(1, 3, 64, 64, device="meta"))
    assert [t.shape[-1] for t in maps] == sides
    with pytest.raises(ValueError, match="output_stride is 8, 16 or 32"):
        timm.create_model("residual_attention_56", output_stride=4)


@pytest.mark.slow
def test_dilated_network_computes_densely() -> None:
    """The dilated network computes the same features at more positions."""
    torch.manual_seed(0)
    plain = wake(ResidualAttentionNet((0, 0, 0))).double().eval()
    dilated = ResidualAttentionNet((0, 0, 0), output_stride=16).double().eval()
    dilated.load_state_dict(plain.state_dict())
    x = images(96, 96, batch=1).double()
    assert torch.allclose(dilated.forward_features(x)[:, :, ::2, ::2], plain.forward_features(x), atol=1e-10)


@pytest.mark.since(*BUILDS_ON_META)
@pytest.mark.slow
def test_classifier_is_exchangeable() -> None:
    """The classifier can be replaced and left out, and layers can be pruned."""
    with torch.device("meta"):
        model = timm.create_model("residual_attention_56", in_chans=1, drop_rate=0.25)
    x = torch.empty(2, 1, 64, 64, device="meta")
    assert isinstance(model.get_classifier(), nn.Linear)
    assert model.head.drop.p == 0.25
    model.reset_classifier(7, "catavgmax")
    assert model(x).shape == (2, 7)
    assert model.num_classes == 7
    assert model.head_hidden_size == 4096
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 2048, 2, 2)
    assert model.prune_intermediate_layers([1], prune_norm=True) == [1]
    assert len(model.stages) == 1


def test_group_matcher_covers_parameters(net: Any) -> None:
    """Every parameter belongs to one group of layers."""
    from timm.models import group_parameters

    for coarse, groups in ((True, 6), (False, 11)):
        groups_by_layer = group_parameters(net, net.group_matcher(coarse=coarse))
        names = [name for group in groups_by_layer.values() for name in group]
        assert sorted(names) == sorted(name for name, _ in net.named_parameters())
        assert len(groups_by_layer) == groups


@pytest.mark.slow
def test_checkpointing_keeps_gradients(net: Any) -> None:
    """Activation checkpointing gives the same gradients, bit for bit."""
    x = images(32, 32)
    expected = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    net.set_grad_checkpointing()
    try:
        net.zero_grad()
        net(x).square().sum().backward()
    finally:
        net.set_grad_checkpointing(False)
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), expected, strict=True))
    net.zero_grad(set_to_none=True)


@pytest.mark.slow
def test_network_scripts_in_channels_last(net: Any) -> None:
    """The network can be scripted and keeps the memory format."""
    x = images(64, 64)
    assert torch.equal(torch.jit.script(net)(x), net(x))
    expected = net.forward_features(x)
    features = net.to(memory_format=torch.channels_last).forward_features(x.to(memory_format=torch.channels_last))
    net.to(memory_format=torch.contiguous_format)
    assert features.is_contiguous(memory_format=torch.channels_last)
    assert (features - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.slow
def test_surgery_enters_trunk_not_masks() -> None:
    """Surgery finds the units of the trunk and leaves the masks alone."""
    anatomy = attnsurgery.inspect("residual_attention_56")
    blocks = [site.address for site in anatomy.sites if site.role == "block" and site.stage == 1]
    assert blocks == [f"stages.0.{unit}" for unit in ("0", "1.before.0", "1.trunk.0", "1.trunk.1", "1.after.0")]
    with torch.device("meta"):
        model = timm.create_model("residual_attention_56_se_s3")
    added = {key.partition(".se.")[0] for key in model.state_dict() if ".se." in key}
    assert added == {f"stages.2.{unit}" for unit in ("0", "1.before.0", "1.trunk.0", "1.trunk.1", "1.after.0")}


@pytest.mark.slow
def test_surgery_on_network_is_identity() -> None:
    """Surgery on the network changes no output until a gate moves."""
    torch.manual_seed(0)
    model = wake(timm.create_model("residual_attention_56", num_classes=4)).eval()
    x = images(64, 64)
    expected = model(x)
    edit = {"at": "stage:2 branches", "block": "se"}
    attnsurgery.operate(model, {"version": 1, "name": "with_se", "base": NAMES[0], "edits": [edit]})
    assert torch.equal(model(x), expected)
    assert attnsurgery.verify(model, (3, 64, 64)).max_abs_diff == 0
    wake(model.stages[1][1].trunk[0].se)
    assert not torch.equal(model(x), expected)


@pytest.mark.slow
def test_pruned_network_still_runs() -> None:
    """A network that is pruned to an earlier map still runs and computes the same maps."""
    model = timm.create_model("residual_attention_56", num_classes=3).eval()
    x = torch.randn(1, 3, 64, 64)
    before = model.forward_intermediates(x, indices=[1, 2], intermediates_only=True)
    model.prune_intermediate_layers([1, 2])
    after = model.forward_intermediates(x, indices=[1, 2], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert model(x).shape == before[-1].shape


def test_deeper_sibling_is_test_resnet_twice() -> None:
    """Its stages begin like those of test_resnet and have a second block each, which is like the first without a change
    of size; its preprocessing is the same."""
    base, deeper = timm.create_model("test_resnet"), timm.create_model("test_resnet_deeper")
    same = timm.create_model("test_resnet", layers=(2, 2, 2, 2))
    assert {key: value.shape for key, value in deeper.state_dict().items()} == {
        key: value.shape for key, value in same.state_dict().items()
    }
    assert base.state_dict().keys() < deeper.state_dict().keys()
    for field in ("input_size", "mean", "std", "crop_pct", "interpolation", "classifier", "first_conv"):
        assert deeper.pretrained_cfg[field] == base.pretrained_cfg[field], field
    assert deeper.pretrained_cfg["architecture"] == "test_resnet_deeper"
    assert timm.create_model("test_resnet_deeper_se_s3", num_classes=2)(torch.zeros(1, 3, 8, 192)).shape == (1, 2)
