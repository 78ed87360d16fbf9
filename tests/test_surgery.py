"""The operation and its traps: each fault that was seen in a host has a test."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn

import attnsurgery
from attnsurgery.blocks._base import check_options
from attnsurgery.errors import SiteError, SurgeryError
from attnsurgery.graph.find import survey
from attnsurgery.graph.select import select
from attnsurgery.surgery.insertion import Insertion, Insertions
from attnsurgery.surgery.operate import grafted_blocks, operate, operated, remove
from attnsurgery.surgery.verify import verify
from tests.conftest import HOSTS, build, images, move_gates
from tests.lower_end import EXPORTS_HOSTED_MEANS, KEEPS_ARGUMENTS

every_host = pytest.mark.parametrize("host", HOSTS)
EVERYWHERE = (("stage:* branches", "se"), ("stage:3 before_last_block", "non_local"))


def plan_for(model: nn.Module, size: int, *edits: tuple[str, str]) -> Insertions:
    anatomy = survey(model, (3, size, size))
    return tuple(
        Insertion(site, block, check_options(block, {})) for at, block in edits for site in select(at, anatomy)
    )


def cut(model: nn.Module, *edits: tuple[str, str], size: int = 64) -> nn.Module:
    return operate(model, plan_for(model, size, *(edits or EVERYWHERE)))


def forward(model: nn.Module, x: torch.Tensor, training: bool = False) -> torch.Tensor:
    torch.manual_seed(0)
    model.train(training)
    output = model(x)
    model.eval()
    return output


@every_host
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.slow
def test_surgery_identity_until_gate_moves(host: str, training: bool) -> None:
    """The identity start changes no bit, and a moved gate does, in training and in eval mode."""
    size = HOSTS[host][0]
    base = build(host, drop_rate=0.1)
    model = cut(copy.deepcopy(base), size=size)
    x = images(size)
    expected = forward(base, x, training)
    assert torch.equal(forward(model, x, training), expected)
    assert not torch.equal(forward(move_gates(model), x, training), expected)


@every_host
@pytest.mark.slow
def test_surgery_keeps_keys_remove_undoes_it(host: str) -> None:
    """Surgery adds keys and renames none, and `remove` restores the base."""
    size = HOSTS[host][0]
    base = build(host)
    model = cut(copy.deepcopy(base), size=size)
    report = verify(model, (3, size, size))
    assert report.alive
    assert report.max_abs_diff == 0
    assert report.keys_added
    assert report.params_after - report.params_before == sum(
        p.numel() for block in grafted_blocks(model).values() for p in block.parameters()
    )
    assert report.macs_after > report.macs_before
    move_gates(model)
    assert remove(model) is model
    assert list(model.state_dict()) == list(base.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), base.state_dict().values(), strict=True))
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert [name for name, _ in model.named_modules()] == [name for name, _ in base.named_modules()]
    assert torch.equal(model(images(size)), base(images(size)))


@every_host
@pytest.mark.slow
def test_surgery_blocks_all_get_gradients(host: str) -> None:
    """Every new parameter gets a gradient in one backward pass."""
    size = HOSTS[host][0]
    model = move_gates(cut(build(host), size=size)).train()
    model(images(size)).square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert not without


@every_host
@pytest.mark.slow
def test_surgery_survives_copy_and_pickle(host: str) -> None:
    """Surgical models survive copy, pickle and torch.save."""
    size = HOSTS[host][0]
    model = move_gates(cut(build(host), size=size))
    x = images(size)
    expected = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(twin(x), expected)
    assert verify(copy.deepcopy(model), (3, size, size)).alive


@pytest.mark.parametrize("host", ["test_resnet", "test_convnext", "test_efficientnet", "test_vit", "vgg11"])
@pytest.mark.since(*EXPORTS_HOSTED_MEANS, cases=("vgg11",))
@pytest.mark.slow
def test_surgery_compiles_scripts_exports(host: str) -> None:
    """Surgical models can be compiled, scripted and exported."""
    size = HOSTS[host][0]
    model = move_gates(cut(build(host), size=size))
    x = images(size)
    expected = model(x)
    assert torch.equal(torch.compile(model, fullgraph=True, backend="eager")(x), expected)
    assert torch.allclose(torch.jit.script(model)(x), expected, atol=1e-5)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    assert torch.allclose(exported.module()(images(size, batch=3)), model(images(size, batch=3)), atol=1e-4)


def test_copy_shares_no_block_with_original() -> None:
    """A copy and its original do not share blocks."""
    model = cut(build("test_resnet"))
    twin = copy.deepcopy(model)
    x = images(64)
    before = model(x)
    move_gates(twin)
    assert torch.equal(model(x), before)
    assert not torch.equal(twin(x), before)


@pytest.mark.slow
def test_owners_share_a_generated_class() -> None:
    """Owners with the same forward share one generated class."""
    model = cut(build("resnet18"), ("stage:* every", "non_local"))
    classes = {type(owner) for _, owner, _ in operated(model)}
    assert len(classes) == 1
    assert issubclass(classes.pop(), timm.models.resnet.BasicBlock)


def test_free_place_of_host_is_filled() -> None:
    """The place that a host keeps free is filled, and its class stays."""
    model = cut(build("test_resnet"), ("stage:* branches", "se"))
    assert "layer1.0.se" in grafted_blocks(model)
    assert type(model.layer1[0]) is timm.models.resnet.BasicBlock
    remove(model)
    assert model.layer1[0].se is None
    assert "se" not in model.layer1[0]._modules


@pytest.mark.slow
def test_identity_of_host_is_replaced() -> None:
    """An identity that the host calls is replaced, and restored by `remove`."""
    model = build("regnetx_002")
    names = [name for name, _ in model.named_modules()]
    cut(model, ("s1.b1.conv2", "se"))
    assert list(grafted_blocks(model)) == ["s1.b1.se"]
    assert [name for name, _ in model.named_modules() if not name.startswith("s1.b1.se.")] == names
    assert verify(model, (3, 64, 64)).blocks[0].calls == 1
    remove(model)
    assert type(model.s1.b1.se) is nn.Identity


@pytest.mark.slow
def test_name_used_elsewhere_is_left_alone() -> None:
    """regnetx calls its Identity `se` behind conv2; a block behind conv3 under that name would run twice."""
    model = cut(build("regnetx_002"), ("s1.b1.conv3", "se"))
    assert list(grafted_blocks(model)) == ["s1.b1.se_2"]
    assert type(model.s1.b1.se) is nn.Identity
    assert verify(model, (3, 64, 64)).blocks[0].calls == 1


def order_of_calls(model: nn.Module, x: torch.Tensor) -> list[str]:
    order: list[str] = []
    for path, block in grafted_blocks(model).items():
        block.register_forward_hook(lambda *_a, path=path: order.append(path))
    model(x)
    return order


@pytest.mark.parametrize("first", ["se", "non_local"])
@pytest.mark.slow
def test_blocks_run_in_the_order_written(first: str) -> None:
    """Two blocks at one address run in the order in which they are written."""
    second = {"se": "non_local", "non_local": "se"}[first]
    for at in ("layer3.0", "layer3.0.bn3", "layer3.0.conv2"):
        in_one = cut(build("test_resnet"), (at, first), (at, second))
        in_two = cut(cut(build("test_resnet"), (at, first)), (at, second))
        for model in (in_one, in_two):
            assert [path.split(".")[2][:2] for path in order_of_calls(model, images(64))] == [first[:2], second[:2]]


@pytest.mark.slow
def test_operations_add_up_remove_undoes_all() -> None:
    """A second operation adds to the first, and `remove` undoes both."""
    base = build("test_resnet")
    model = cut(copy.deepcopy(base), ("layer3.0.bn3", "se"))
    cut(model, ("layer3.0.bn2", "se"), ("layer3.0", "non_local"))
    assert sorted(grafted_blocks(model)) == ["layer3.0.non_local", "layer3.0.se", "layer3.0.se_2"]
    x = images(64)
    assert torch.equal(model(x), base(x))
    assert verify(model, (3, 64, 64)).alive
    remove(model)
    assert list(model.state_dict()) == list(base.state_dict())


def test_addresses_are_stable_under_surgery() -> None:
    """Addresses stay the same after surgery."""
    model = build("test_convnext")
    before = survey(model, (3, 64, 64))
    cut(model, ("stage:* every", "non_local"), ("stages.1.blocks.0.norm", "se"))
    assert survey(model, (3, 64, 64)).sites == before.sites


def test_operate_restores_model_after_error() -> None:
    """After an error the model is as it was."""
    model = build("test_resnet")
    good, bad = plan_for(model, 64, ("layer1.0.bn2", "se"), ("layer2.0.bn2", "se"))
    broken = Insertion(
        type(bad.site)(**{**{f: getattr(bad.site, f) for f in bad.site.__slots__}, "node": "bn9"}), "se", {}
    )
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(SiteError, match=r"'layer2.0': BasicBlock has no single tensor at bn9"):
        operate(model, (good, broken))
    assert [(name, type(module)) for name, module in model.named_modules()] == before


def test_operate_refuses_plan_of_other_model() -> None:
    """A plan of another model is refused with the nearest owner."""
    plan = plan_for(build("resnet18"), 64, ("layer4.1", "non_local"))
    with pytest.raises(SiteError, match=r"into 'layer4.1', which ResNet does not have. Did you mean 'layer4.0'\?"):
        operate(build("test_resnet"), plan)


@pytest.mark.slow
def test_dropout_in_traced_forward_has_modes() -> None:
    """A ViT attention asks self.training in Python; a trace in one mode would keep that answer for ever."""
    base = build("test_vit", attn_drop_rate=0.5, proj_drop_rate=0.5, drop_path_rate=0.5)
    model = cut(copy.deepcopy(base), ("blocks.*.attn.proj", "se"))
    x = images(64)
    for training in (True, False, True):
        assert torch.equal(forward(model, x, training), forward(base, x, training))
    assert not torch.equal(forward(model, x, True), forward(model, x, False))


def test_checkpointing_works_after_surgery() -> None:
    """Checkpointing that is switched on after surgery gives the same gradients."""
    model = move_gates(cut(build("test_convnext"), ("stages.2", "se"), ("stage:3 last", "non_local"))).train()
    x = images(64)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        assert model.stages[2].grad_checkpointing is enable
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients, strict=True))


@pytest.mark.filterwarnings("ignore::UserWarning:timm.layers.interpolate")
@pytest.mark.slow
def test_new_input_size_reaches_windows() -> None:
    """A new input size reaches the windows that a traced forward has recorded."""
    base = build("swin_tiny_patch4_window7_224")
    model = cut(copy.deepcopy(base), ("stage:* branches", "se"))
    for twin in (base, model):
        twin.set_input_size((96, 96), window_size=3)
    assert torch.equal(model(images(96)), base(images(96)))
    assert not torch.equal(move_gates(model)(images(96)), base(images(96)))
    assert verify(model, (3, 96, 96)).alive
    assert type(remove(model).layers[0].blocks[0]) is type(base.layers[0].blocks[0])


@pytest.mark.slow
def test_sync_batch_norm_keeps_blocks_alive() -> None:
    """Conversion to synchronised batch norms keeps every block alive."""
    # torch's own conversion does not know timm's batch norms with an activation inside
    conversions = {
        "test_resnet": nn.SyncBatchNorm.convert_sync_batchnorm,
        "test_efficientnet": timm.layers.convert_sync_batchnorm,
    }
    for host, convert in conversions.items():
        model = move_gates(cut(build(host)))
        x = images(64)
        expected = model(x)
        converted = convert(copy.deepcopy(model))
        assert any(isinstance(module, nn.SyncBatchNorm) for module in converted.modules())
        assert verify(converted, (3, 64, 64)).alive
        assert torch.allclose(converted(x), expected, atol=1e-6)


@pytest.mark.slow
def test_ema_follows_the_blocks() -> None:
    """An exponential moving average follows the blocks."""
    model = cut(build("test_resnet"))
    ema = ModelEmaV3(model, decay=0.5)
    move_gates(model)
    ema.update(model)
    key = next(key for key in model.state_dict() if "se.fc2.weight" in key)
    assert torch.allclose(ema.module.state_dict()[key], model.state_dict()[key] / 2, atol=1e-6)
    assert not torch.equal(ema.module(images(64)), model(images(64)))


@pytest.mark.slow
def test_blocks_show_in_all_forward_methods() -> None:
    """What a block changes shows in every forward method of the model."""
    base = build("test_resnet")
    model = move_gates(cut(copy.deepcopy(base)))
    x = images(64)
    assert not torch.equal(model.forward_features(x), base.forward_features(x))
    assert torch.equal(model.forward_head(model.forward_features(x)), model(x))
    final, intermediates = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x))
    assert len(intermediates) == len(base.forward_intermediates(x)[1])
    model.reset_classifier(5)
    assert model(x).shape == (2, 5)


def test_blocks_share_their_layers_group() -> None:
    """A block is in the learning-rate group of the layer that it stands in."""
    from timm.models import group_parameters

    model = cut(build("test_resnet"))
    groups = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    assert groups["layer3.0.se.fc1.weight"] == groups["layer3.0.conv1.weight"]
    assert groups["layer3.0.non_local.theta.weight"] == groups["layer3.0.conv1.weight"]


@pytest.mark.slow
def test_blocks_take_dtype_of_their_host() -> None:
    """New blocks take device, dtype and mode of their host."""
    model = cut(build("test_resnet").bfloat16().train())
    for block in grafted_blocks(model).values():
        assert block.training
        assert {p.dtype for p in block.parameters()} == {torch.bfloat16}
    with torch.device("meta"):
        plain = timm.create_model("test_resnet")
    on_meta = cut(plain)
    assert all(p.device.type == "meta" for p in on_meta.parameters())


@pytest.mark.parametrize("calls", [0, 2])
@pytest.mark.slow
def test_verify_counts_calls_of_a_block(calls: int) -> None:
    """`verify` sees a block that never runs or that runs twice."""
    model = cut(build("test_resnet"), ("layer3.0", "non_local"))
    owner = model.layer3[0]

    class Tampered(type(owner)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self._uncut_forward(x)
            for _ in range(calls):
                y = self.non_local(y)
            return y

    owner.__class__ = Tampered
    report = verify(model, (3, 64, 64))
    assert report.blocks[0].calls == calls
    assert not report.alive


class Tampering(nn.Module):
    """A host that goes on with its convolution's result in different ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)
        self.way = way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        whole = self.conv(x)
        y = whole[:]
        if self.way == "drops":
            return x * 2 + y.shape[1]
        if self.way == "overwrites":
            y.copy_(x)
        if self.way == "writes behind":
            whole.mul_(2)
        return y + x


@pytest.mark.parametrize(
    ("way", "fault"),
    [
        ("plain", None),
        ("drops", "what layer3.0.bn3.se returns never reaches the output"),
        ("overwrites", "what layer3.0.bn3.se returns never reaches the output"),
        ("writes behind", "the host writes in place to what layer3.0.bn3.se has read, and that write is lost"),
    ],
)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.slow
def test_verify_detects_unread_blocks(way: str, fault: str | None, trained: bool) -> None:
    """`verify` finds a block that no output reads, and a host that writes in place to the block's input."""
    model = build("test_resnet")
    host = model.layer3[0]
    width = host.bn3.num_features
    host.bn3 = Tampering(way)
    host.bn3.conv = nn.Conv2d(width, width, 1)
    host.add_module("act3", nn.ReLU())
    cut(model, ("layer3.0.bn3:getitem", "se"))
    if trained:
        move_gates(model)
    report = verify(model, (3, 64, 64))
    assert report.faults == ((fault,) if fault else ())
    assert report.alive is (fault is None)


@pytest.mark.slow
def test_verify_tells_unread_patch_blocks() -> None:
    """`verify` tells blocks that a head on the class token does not read."""
    model = cut(build("test_vit"), ("stage:4 branches", "se"))
    report = verify(model, (3, 64, 64))
    assert report.alive
    reach_by_path = {block.path: block.reaches for block in report.blocks}
    # behind the last attention, nothing takes a patch's token to the class token any more
    assert [path for path, how in reach_by_path.items() if how == "features"] == ["blocks.5.se", "blocks.5.se_2"]
    pooled = cut(build("test_vit", global_pool="avg"), ("stage:4 branches", "se"))
    assert {block.reaches for block in verify(pooled, (3, 64, 64)).blocks} == {"output"}


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.slow
def test_verify_detects_a_frozen_gate() -> None:
    """`verify` finds a gate that was frozen with the norms of its host."""
    from timm.layers import freeze_batch_norm_2d

    model = freeze_batch_norm_2d(cut(build("test_resnet"), ("layer3.0", "non_local")))
    (fault,) = verify(model, (3, 64, 64)).faults
    assert fault.startswith("nothing in layer3.0.non_local gets a gradient: its gate is frozen")
    by_hand = cut(build("test_resnet"), ("layer3.0", "non_local"))
    for module in by_hand.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)
    assert verify(by_hand, (3, 64, 64)).faults == (fault,)
    assert verify(by_hand.requires_grad_(False), (3, 64, 64)).alive  # nobody means to train it
    frozen_first = cut(freeze_batch_norm_2d(build("test_resnet")), ("layer3.0", "non_local"))
    assert verify(frozen_first, (3, 64, 64)).alive


def test_verify_detects_an_only_block_unrun() -> None:
    """`verify` sees that the only block of a model does not run."""
    model = cut(build("test_resnet"), ("layer3.0", "non_local"))
    model.layer3[0].__class__ = type(model.layer3[0]).uncut_class
    assert verify(model, (3, 64, 64)).faults == ("layer3.0.non_local ran 0 times",)


def test_verify_detects_a_replaced_block() -> None:
    """`verify` says so when a block was replaced by another module."""
    model = cut(build("test_resnet"), ("layer3.0.bn3", "se"))
    model.layer3[0].se = nn.Identity()
    with pytest.raises(SurgeryError, match=r"the block 'se' of 'layer3.0' is missing"):
        verify(model, (3, 64, 64))


def test_verify_detects_a_rebuilt_module() -> None:
    """`verify` misses blocks that went with a module that was rebuilt."""
    model = cut(build("test_resnet"), ("stage:3 last", "non_local"), ("stage:4 branches", "se"))
    model.layer3[0] = copy.deepcopy(build("test_resnet").layer3[0])
    with pytest.raises(SurgeryError, match=r"the block 'layer3.0.non_local' is missing"):
        verify(model, (3, 64, 64))
    remove(model)
    assert verify(model, (3, 64, 64)).alive


@pytest.mark.slow
def test_reparameterisation_keeps_blocks() -> None:
    """Reparameterisation keeps the blocks behind the modules that it rebuilds."""
    from timm.utils.model import reparameterize_model

    torch.manual_seed(0)
    model = timm.create_model("mobileone_s0").double().eval()
    cut(model, ("stage:3 before_last_block", "non_local"), ("stage:1 branches", "se"))
    x = images(64).double()
    expected = move_gates(model)(x)
    deployed = reparameterize_model(model)
    assert verify(deployed, (3, 64, 64)).alive
    assert len(grafted_blocks(deployed)) == len(grafted_blocks(model))
    assert torch.allclose(deployed(x) / expected.abs().max(), expected / expected.abs().max(), atol=1e-9)


@pytest.mark.slow
def test_verify_keeps_modes_reads_outputs() -> None:
    """`verify` leaves frozen norms frozen and compares every output."""
    model = cut(build("test_resnet"), ("stage:4 branches", "se")).train()
    model.bn1.eval()
    verify(model, (3, 64, 64))
    assert model.training
    assert not model.bn1.training
    features = timm.create_model("test_resnet_se_s4", features_only=True)
    assert verify(features, (3, 64, 64)).max_abs_diff == 0
    torch.nn.init.normal_(features.layer4[0].se.fc2.bias)
    torch.nn.init.normal_(features.layer4[0].bn2.weight)
    assert verify(features, (3, 64, 64)).max_abs_diff > 0


def test_dropout_rate_can_change_later() -> None:
    """A dropout rate that is changed after surgery counts."""
    base = build("test_vit", attn_drop_rate=0.1)
    model = cut(copy.deepcopy(base), ("blocks.*.attn.proj", "se"))
    x = images(64)
    before = forward(model, x, training=True)
    for twin in (base, model):
        for block in twin.blocks:
            block.attn.attn_drop.p = 0.8
    assert torch.equal(forward(model, x, training=True), forward(base, x, training=True))
    assert not torch.equal(forward(model, x, training=True), before)


def test_traced_constants_are_no_sites() -> None:
    """Constants that torch computed while it traced are no part of a forward."""
    anatomy = survey(build("swin_tiny_patch4_window7_224"), (3, 64, 64))
    assert not any(site.address.endswith("attn.qkv") for site in anatomy.sites)


def test_same_block_at_site_refused_later() -> None:
    """The same block twice at one site is refused in a second operation too."""
    model = cut(build("test_resnet"), ("layer3.0.bn3", "se"))
    before = list(model.state_dict())
    with pytest.raises(SiteError, match=r"there is a 'se' at 'layer3.0.bn3' already"):
        cut(model, ("layer4.0.bn2", "se"), ("layer3.0.bn3", "se"))
    assert list(model.state_dict()) == before


@pytest.mark.parametrize("architecture", [None, "my-net", "unknown_net"])
@pytest.mark.slow
def test_surgery_on_models_of_unknown_name(architecture: str | None) -> None:
    """Models whose name timm does not know can be operated on and restored."""
    model = build("test_resnet")
    model.pretrained_cfg = dict(model.pretrained_cfg, architecture=architecture)
    keys = list(model.state_dict())
    recipe = {"version": 1, "name": "m", "base": "test_resnet", "edits": [{"at": "layer1.0.bn2", "block": "se"}]}
    attnsurgery.operate(model, recipe)
    attnsurgery.operate(model, recipe | {"edits": [{"at": "layer2.0.bn2", "block": "se"}]})
    assert attnsurgery.verify(model).alive
    assert list(attnsurgery.remove(model).state_dict()) == keys


def test_fx_features_cannot_be_verified() -> None:
    """A model that torch.fx rebuilt can be neither verified nor restored, and the error says so."""
    features = timm.create_model("test_resnet_se", features_only=True, feature_cls="fx")
    for verb in (attnsurgery.verify, attnsurgery.remove):
        with pytest.raises(SurgeryError, match="rebuilt since"):
            verb(features)


@pytest.mark.parametrize("model", [None, "resnet18", 3])
def test_operate_refuses_what_is_no_model(model: object) -> None:
    """An argument that is no built model is refused."""
    recipe = {"version": 1, "name": "m", "base": "test_resnet", "edits": [{"at": "layer1.0.bn2", "block": "se"}]}
    with pytest.raises(attnsurgery.AttnSurgeryError, match="surgery needs a built model"):
        attnsurgery.operate(model, recipe)  # type: ignore[arg-type]


def test_verify_without_surgery_adds_nothing() -> None:
    """`verify` of a model without surgery reports nothing added."""
    report = verify(build("test_resnet"), (3, 64, 64))
    assert (report.keys_added, report.blocks, report.macs_after) == ((), (), report.macs_before)


@pytest.mark.since(*KEEPS_ARGUMENTS)
def test_operate_makes_model_describe_itself(tmp_path: Any) -> None:
    """A model that `operate` has changed describes itself, and is saved and built again."""
    from timm.models import save_for_hf

    base = build("test_resnet", num_classes=7)
    model = copy.deepcopy(base)
    recipe = {"version": 1, "name": "mine", "base": "test_resnet", "edits": [{"at": "layer[34].*.bn?", "block": "se"}]}
    assert attnsurgery.operate(model, recipe) is model
    attnsurgery.operate(model, recipe | {"edits": [{"at": "stage:3 last", "block": "non_local"}]})
    move_gates(model)
    save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = images(64)
    assert torch.equal(again(x), model(x))
    assert [edit.block for edit in attnsurgery.recipe_of(again).edits] == ["se", "non_local"]
    attnsurgery.remove(model)
    assert attnsurgery.recipe_of(model) is None
    assert model.pretrained_cfg["architecture"] == "test_resnet"
    assert torch.equal(model(x), base(x))


@pytest.mark.slow
def test_timms_fast_norms_are_supported() -> None:
    """Models that were built with timm's fast norms are inspected and verified."""
    timm.layers.set_fast_norm(True)  # tests/conftest.py sets it back
    model = cut(build("test_convnext"), ("stage:3 last", "se"))
    assert any(vars(module).get("_fast_norm") for module in model.modules())
    assert verify(model, (3, 64, 64)).alive
