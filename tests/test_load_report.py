"""No load loses a block or leaves one as it was silently: a state dict is judged as a whole before it is loaded."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from timm.models import load_checkpoint, load_pretrained, save_for_hf
from timm.optim import create_optimizer_v2
from torch import nn

import attnsurgery
from attnsurgery.blocks._base import build_block
from attnsurgery.checkpoint.base import build_base
from attnsurgery.errors import CheckpointError, LoadError, UsageError
from attnsurgery.surgery.operate import grafted_blocks
from tests.conftest import move_gates

Tensors = dict[str, torch.Tensor]
SE = ["layer1.0.se", "layer2.0.se", "layer3.0.se", "layer4.0.se"]


def make(name: str = "test_resnet_se", **kwargs: object) -> nn.Module:
    return timm.create_model(name, **{"num_classes": 10, **kwargs}).eval()


def trained(name: str = "test_resnet_se", **kwargs: object) -> nn.Module:
    return move_gates(make(name, **kwargs))


def bits(model: nn.Module) -> Tensors:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def without(weights: Tensors, *paths: str) -> Tensors:
    return {key: value for key, value in weights.items() if not key.startswith(tuple(f"{path}." for path in paths))}


@pytest.fixture(scope="module")
def base() -> Tensors:
    return bits(make("test_resnet"))


@pytest.fixture(scope="module")
def weights() -> Tensors:
    return bits(trained())


# ---- what a strict load refuses


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.slow
def test_load_refuses_a_missing_block(strict: bool, weights: Tensors) -> None:
    """A checkpoint that lacks one whole block is refused, strict or not, and the model stays as it was."""
    model = make()
    before = bits(model)
    with pytest.raises(LoadError, match=r"holds 3 of 4 blocks of this model and not layer2\.0\.se"):
        model.load_state_dict(without(weights, "layer2.0.se"), strict=strict)
    assert same(bits(model), before)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.slow
def test_load_refuses_another_recipe(strict: bool) -> None:
    """A checkpoint of a recipe with fewer blocks is refused, strict or not."""
    other = bits(trained("test_resnet_se_s3"))
    with pytest.raises(LoadError, match=r"holds 1 of 4 blocks .* not layer1\.0\.se, layer2\.0\.se, layer4\.0\.se"):
        make().load_state_dict(other, strict=strict)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.slow
def test_load_refuses_base_under_trained(strict: bool, base: Tensors) -> None:
    """A base checkpoint is not loaded under trained blocks; merged with their state dict it is."""
    model = trained()
    before = bits(model)
    with pytest.raises(LoadError, match=r"base alone, and 4 blocks .*layer1\.0\.se.* are not in their initial state"):
        model.load_state_dict(base, strict=strict)
    assert same(bits(model), before)
    model.load_state_dict({**model.state_dict(), **base})  # what the message advises
    assert all(torch.equal(model.state_dict()[key], value) for key, value in base.items())
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in before if ".se." in key)


@pytest.mark.slow
def test_load_refuses_foreign_blocks(weights: Tensors) -> None:
    """Blocks that the model does not have are refused also with strict=False."""
    with pytest.raises(LoadError, match=r"3 blocks that this model does not have \(layer1\.0\.se, layer2\.0\.se, lay"):
        make("test_resnet_se_s3").load_state_dict(weights, strict=False)
    of_stage_3 = bits(trained("test_resnet_se_s3"))
    with pytest.raises(LoadError, match=r"1 block that this model does not have \(layer3\.0\.se\)"):
        make("test_resnet_se_s2").load_state_dict(of_stage_3, strict=False)


@pytest.mark.slow
def test_load_tells_blocks_of_a_host_apart(base: Tensors) -> None:
    """The error names the block that is missing when two stand in one host."""
    model = trained("test_resnet_se_nonlocal_s3")
    absent_paths = [path for path in grafted_blocks(model) if "non_local" in path]
    with pytest.raises(LoadError, match=rf"holds 4 of 5 blocks .* not {absent_paths[0]}"):
        make("test_resnet_se_nonlocal_s3").load_state_dict(without(bits(model), *absent_paths))


@pytest.mark.slow
def test_load_refuses_blocks_on_meta(base: Tensors) -> None:
    """A base checkpoint is refused when it would leave blocks without values on the meta device."""
    with torch.device("meta"):
        model = make()
    with pytest.raises(LoadError, match=r"have no values: they are on the meta device"):
        model.load_state_dict(base, assign=True)
    model.load_state_dict(bits(make()), assign=True)
    assert not any(parameter.is_meta for parameter in model.parameters())


# ---- what is accepted


@pytest.mark.parametrize("start", ["identity", "paper"])
@pytest.mark.slow
def test_load_base_into_untrained_blocks(start: str, base: Tensors) -> None:
    """A base checkpoint is loaded into blocks that are as they were built, as often as one likes."""
    model = make(start=start)
    before = bits(model)
    model.load_state_dict(base)
    assert same(bits(model), {**before, **base})
    model.load_state_dict({**base, "conv1.0.weight": base["conv1.0.weight"] + 1})  # and again
    move_gates(model)
    with pytest.raises(LoadError, match="not in their initial state"):
        model.load_state_dict(base)


@pytest.mark.slow
def test_load_base_under_unmoved_gates(base: Tensors) -> None:
    """Blocks whose gates never moved accept another base wherever they were loaded from."""
    model = make()
    model.load_state_dict(bits(make()))
    model.load_state_dict(base)
    assert attnsurgery.verify(model).max_abs_diff == 0


@pytest.mark.parametrize("start", ["identity", "paper"])
def test_load_ignores_half_precision(start: str, base: Tensors) -> None:
    """Conversion to half precision and back does not count as training."""
    model = make(start=start)
    for dtype in (torch.bfloat16, torch.float32, torch.float16, torch.float32):
        model.to(dtype).load_state_dict(base)
    assert attnsurgery.load_report(move_gates(model), base).changed == tuple(SE)


@pytest.mark.parametrize("name", sorted(attnsurgery.BLOCKS))
@pytest.mark.parametrize("start", ["identity", "paper"])
@pytest.mark.slow
def test_changed_detects_training_per_block(name: str, start: str) -> None:
    """Every block tells whether it was trained, also after a copy or a pickle."""
    from attnsurgery.blocks.loading import changed

    torch.manual_seed(0)
    block = build_block(name, 16, getattr(attnsurgery.BLOCKS[name], "example", {}), start)  # type: ignore[arg-type]
    assert not changed(block)
    assert not changed(copy.deepcopy(block).to(torch.bfloat16))
    x = torch.randn(2, 16, 8, 8)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    (block(x) * torch.randn(2, 16, 8, 8)).sum().backward()
    optimizer.step()
    assert changed(block)
    assert changed(pickle.loads(pickle.dumps(copy.deepcopy(block))))


def test_load_base_without_classifier(base: Tensors) -> None:
    """A base checkpoint without its classifier and counters is still judged as the base."""
    lacking = {key: value for key, value in base.items() if not key.startswith("fc.") and "num_batches" not in key}
    model = make()
    report = attnsurgery.load_report(model, lacking)
    assert (report.kind, report.problem, report.missing) == ("base", None, ("fc.weight", "fc.bias"))
    assert set(model.load_state_dict(lacking, strict=False).missing_keys) == {"fc.weight", "fc.bias"}
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "fc\.weight", "fc\.bias"'):
        model.load_state_dict(lacking)


# ---- a few tensors


def test_load_allows_an_adapter() -> None:
    """A LoRA adapter of a few tensors inside a block is loaded with strict=False."""
    model = make("test_resnet_resattn_s3")
    (path,) = grafted_blocks(model)
    block = grafted_blocks(model)[path]
    inner, layer = next((name, child) for name, child in block.named_modules() if isinstance(child, nn.Conv2d))
    wrapped = nn.Module()  # as PEFT wraps a layer
    wrapped.base_layer, wrapped.lora_A, wrapped.lora_B = layer, nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
    parent, _, last = f"{path}.{inner}".rpartition(".")
    setattr(model.get_submodule(parent), last, wrapped)
    adapter = {key: torch.full_like(value, 3.0) for key, value in model.state_dict().items() if "lora_" in key}
    assert len(adapter) == 4
    result = model.load_state_dict(adapter, strict=False)
    assert not result.unexpected_keys
    counters = [key for key in model.state_dict() if key.endswith("num_batches_tracked")]
    assert len(result.missing_keys) == len(model.state_dict()) - len(counters) - 4
    assert all(torch.equal(model.state_dict()[key], value) for key, value in adapter.items())
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict"):
        model.load_state_dict(adapter)


def test_load_allows_one_tensor_of_a_block(weights: Tensors) -> None:
    """A few keys of the model itself may be set with strict=False."""
    model, key = make(), "layer2.0.se.fc1.weight"
    model.load_state_dict({key: weights[key]}, strict=False)
    assert torch.equal(model.state_dict()[key], weights[key])
    assert attnsurgery.load_report(model, {key: weights[key]}).kind == "part"


# ---- the loaders


@pytest.mark.slow
def test_load_by_timm_refuses_missing_block(weights: Tensors, tmp_path: Path) -> None:
    """timm's own loaders refuse a missing block, also when the number of classes changes."""
    incomplete = without(weights, "layer3.0.se")
    torch.save({"state_dict": incomplete}, tmp_path / "lost.pth")
    overlay = {"file": str(tmp_path / "lost.pth"), "num_classes": 10}
    with pytest.raises(LoadError, match=r"not layer3\.0\.se"):
        timm.create_model("test_resnet_se", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7)
    model = make(num_classes=7)
    with pytest.raises(LoadError, match=r"not layer3\.0\.se"):
        load_pretrained(model, {**model.pretrained_cfg, "state_dict": incomplete, "num_classes": 10}, num_classes=7)
    with pytest.raises(LoadError, match=r"not layer3\.0\.se"):
        load_checkpoint(make(), str(tmp_path / "lost.pth"))


@pytest.mark.slow
def test_load_of_directory_names_lost_block(weights: Tensors, tmp_path: Path) -> None:
    """A saved directory that lacks a block is refused with an error that names the block."""
    save_for_hf(trained(), tmp_path, safe_serialization=True)
    safetensors.torch.save_file(without(weights, "layer3.0.se"), tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoadError, match=r"not layer3\.0\.se"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


class Wrapper(nn.Module):
    """A module that holds its model as a LightningModule does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.scale = nn.Parameter(torch.ones(1))


@pytest.mark.parametrize(
    "wrap",
    [Wrapper, nn.Sequential, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), torch.compile],
    ids=["module", "sequential", "copy", "pickle", "compile"],
)
@pytest.mark.slow
def test_load_sees_blocks_in_wrappers(wrap: Callable[[nn.Module], nn.Module], base: Tensors) -> None:
    """Blocks inside a wrapper, a copy, a pickle or a compiled model are judged as well."""
    fresh, moved = wrap(make()), wrap(trained())
    weights = bits(moved)
    (prefix,) = {key[: key.index("layer1")] for key in weights if "layer1" in key}
    incomplete = without(weights, f"{prefix}layer3.0.se")
    with pytest.raises(LoadError, match=r"not layer3\.0\.se"):
        fresh.load_state_dict(incomplete)
    around = {key: value for key, value in weights.items() if key == "scale"}
    only_base = {**{f"{prefix}{key}": value for key, value in base.items()}, **around}
    with pytest.raises(LoadError, match="not in their initial state"):
        moved.load_state_dict(only_base)
    fresh.load_state_dict(only_base)
    fresh.load_state_dict(weights)
    assert same(bits(fresh), weights)


def test_load_under_checkpoint_wrapper(weights: Tensors, base: Tensors) -> None:
    """Blocks inside a layer that activation checkpointing wraps keep their names."""
    wrapper = pytest.importorskip("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    model = make()
    model.layer3[0] = wrapper.checkpoint_wrapper(model.layer3[0])
    model.load_state_dict(base)
    model.load_state_dict(weights)
    assert same(bits(model), weights)
    with pytest.raises(LoadError, match=r"not layer3\.0\.se"):
        model.load_state_dict(without(weights, "layer3.0.se"))


def test_load_judges_nested_models_once(base: Tensors) -> None:
    """A model with operations of its own inside another one is judged once, as a whole."""
    inner = attnsurgery.operate(make("test_resnet"), recipe("layer3.0.bn2"))
    outer = nn.Sequential(inner)
    weights = bits(outer)
    attnsurgery.operate(outer, recipe("0.layer2.0.bn2"))
    with pytest.raises(LoadError, match=r"holds 1 of 2 blocks of this model and not 0\.layer2\.0\.se"):
        outer.load_state_dict(weights)


def recipe(at: str) -> dict[str, object]:
    return {"version": 1, "name": "x", "base": "test_resnet", "edits": [{"at": at, "block": "se"}]}


def test_load_after_removal_judges_nothing(weights: Tensors, base: Tensors) -> None:
    """After `remove` no hook is left, and a load is judged by torch alone."""
    model = attnsurgery.remove(trained())
    assert not model._load_state_dict_pre_hooks
    assert len(model.load_state_dict(weights, strict=False).unexpected_keys) == 16
    model.load_state_dict(base)


# ---- the report


@pytest.mark.slow
def test_load_report_names_every_block(weights: Tensors) -> None:
    """The report lists the blocks that are held, partial, absent and foreign."""
    there = without(weights, "layer4.0.se")
    del there["layer2.0.se.fc1.weight"]
    report = attnsurgery.load_report(make(), {**there, "layer4.0.non_local.g.weight": torch.ones(1)})
    assert report.kind == "mixed"
    assert report.held == ("layer1.0.se", "layer3.0.se")
    assert report.partial == {"layer2.0.se": ("layer2.0.se.fc1.weight",)}
    assert report.absent == ("layer4.0.se",)
    assert report.foreign == ("layer4.0.non_local",)
    assert report.problem is not None
    assert "only a part of the block 'layer2.0.se'" in report.problem
    assert attnsurgery.load_report(make(), {"a": torch.ones(1)}).kind == "other"
    under = {f"model.{key}": value for key, value in weights.items()}
    assert attnsurgery.load_report(make(), under, "model.").kind == "whole"


@pytest.mark.slow
def test_base_build_refuses_mixed_weights(base: Tensors, weights: Tensors) -> None:
    """A surgical base takes the weights of its own base, and no mixture of base and blocks."""
    model = build_base("test_resnet_se", dict(base))
    assert set(grafted_blocks(model)) == set(SE)
    assert torch.equal(model.state_dict()["fc.weight"], base["fc.weight"])
    with pytest.raises(CheckpointError, match=r"w\.pth: the checkpoint holds 3 of 4 blocks .* not layer1\.0\.se"):
        build_base("test_resnet_se", without(weights, "layer1.0.se"), "w.pth")


# ---- the optimizer's state


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, nesterov=True),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-4, momentum=0.9, centered=True),
}


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> nn.Module:
    model.train()
    for step in range(count):
        x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.slow
def test_optimizer_state_survives_surgery(kind: str) -> None:
    """Training with frozen blocks goes on after surgery bit for bit as if there had been none."""
    make_optimizer = OPTIMIZERS[kind]
    torch.manual_seed(0)
    model = make("test_resnet")
    optimizer = make_optimizer(model.parameters())
    steps(model, optimizer, 3)
    names, state = attnsurgery.optimizer_names(optimizer, model), copy.deepcopy(optimizer.state_dict())
    operated = attnsurgery.operate(copy.deepcopy(model), recipe("layer3.0.bn2"))
    expected = bits(steps(model, optimizer, 3))

    for name, parameter in operated.named_parameters():
        parameter.requires_grad_(".se_2." not in name)
    forgetful = copy.deepcopy(operated)
    fresh, forgetting = (
        make_optimizer([p for p in one.parameters() if p.requires_grad]) for one in (operated, forgetful)
    )
    moved = attnsurgery.carry_optimizer_state(state, names, fresh, operated)
    assert (set(moved.carried), moved.fresh, moved.dropped) == (set(names), (), ())
    result, other = bits(steps(operated, fresh, 3)), bits(steps(forgetful, forgetting, 3))
    assert all(torch.equal(result[key], value) for key, value in expected.items())
    assert not torch.equal(other["fc.weight"], expected["fc.weight"])


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.slow
def test_optimizer_new_blocks_start_fresh(kind: str) -> None:
    """Parameters of new blocks start without moments; those of a new classifier as well."""
    torch.manual_seed(0)
    model = make("test_resnet")
    optimizer = OPTIMIZERS[kind](model.parameters())
    steps(model, optimizer, 2)
    names, state = attnsurgery.optimizer_names(optimizer, model), optimizer.state_dict()
    attnsurgery.operate(model, recipe("layer2.0.bn2"))
    model.reset_classifier(3)
    new = OPTIMIZERS[kind](list(model.parameters()))
    rate = new.param_groups[0]["lr"] = 0.5
    moved = attnsurgery.carry_optimizer_state(state, names, new, nn.DataParallel(model))
    blocks = {f"{path}.{name}" for path, block in grafted_blocks(model).items() for name, _ in block.named_parameters()}
    assert set(moved.fresh) == blocks | {"fc.weight", "fc.bias"}
    assert set(moved.dropped) == {"fc.weight", "fc.bias"}
    assert new.param_groups[0]["lr"] == rate
    for name, parameter in model.named_parameters():
        assert (parameter in new.state) == (name in moved.carried)
        if name in moved.carried:
            old_state = optimizer.state[dict(zip(names, optimizer.param_groups[0]["params"], strict=True))[name]]
            assert all(
                torch.equal(torch.as_tensor(new.state[parameter][key]), torch.as_tensor(old_state[key]))
                for key in old_state
            )
    steps(model, new, 1)


def test_optimizer_state_goes_by_names() -> None:
    """Moments are carried by parameter names, whatever the groups and the order are."""
    torch.manual_seed(0)
    model = make("test_resnet")
    before = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    steps(model, before, 1)
    names, state = attnsurgery.optimizer_names(before, model), before.state_dict()
    attnsurgery.operate(model, recipe("layer2.0.bn2"))
    after = torch.optim.AdamW(reversed(list(model.parameters())), lr=1e-3)
    moved = attnsurgery.carry_optimizer_state(state, names, after, model)
    assert set(moved.carried) == set(names)
    for name, parameter in model.named_parameters():
        if name in moved.carried:
            assert torch.equal(after.state[parameter]["exp_avg"], before.state[parameter]["exp_avg"])
            assert after.state[parameter]["exp_avg"].shape == parameter.shape


def test_optimizer_state_with_own_names() -> None:
    """A state that holds parameter names needs no others."""
    model = make("test_resnet")
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
    steps(model, optimizer, 1)
    state = optimizer.state_dict()
    attnsurgery.operate(model, recipe("layer2.0.bn2"))
    new = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
    assert len(attnsurgery.carry_optimizer_state(state, None, new, model).carried) == len(state["state"])


def test_optimizer_refuses_foreign_state() -> None:
    """A state of another optimizer, of too few names or of another model is refused."""
    model, other = make("test_resnet"), make("test_resnet")
    optimizer = torch.optim.AdamW(model.parameters())
    steps(model, optimizer, 1)
    names = attnsurgery.optimizer_names(optimizer, model)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(UsageError, match="the old optimizer has betas, and SGD has momentum: they are of different"):
        attnsurgery.carry_optimizer_state(optimizer.state_dict(), names, sgd, model)
    with pytest.raises(UsageError, match=r"has \d+ parameters, and 2 names are given"):
        attnsurgery.carry_optimizer_state(optimizer.state_dict(), names[:2], optimizer, model)
    with pytest.raises(UsageError, match=r"parameters of the optimizer are not in this model"):
        attnsurgery.carry_optimizer_state(optimizer.state_dict(), names, optimizer, other)
    assert not sgd.state
