"""Surgery on models that are not bare: inside a larger model, in wrappers, with hooks and changes of their owner."""

from __future__ import annotations

import copy
import functools
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import register_model, save_for_hf
from timm.models.resnet import BasicBlock
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import prune

import attnsurgery
from attnsurgery.errors import AttnSurgeryError, SiteError, SurgeryError, UsageError
from attnsurgery.graph.find import survey
from attnsurgery.graph.twin import meta_twin, weighted_twin
from attnsurgery.surgery.operate import grafted_blocks, operated
from tests.conftest import build, images, move_gates

SIZE = (3, 64, 64)
REG4 = {"img_size": 56, "depth": 4, "embed_dim": 32, "num_heads": 2}
DISTILLED = {"img_size": 64, "depth": 4, "embed_dim": 32, "num_heads": 2}


def recipe(*edits: tuple[str, str], base: str = "test_resnet") -> dict[str, Any]:
    return {"version": 1, "name": "m", "base": base, "edits": [{"at": at, "block": block} for at, block in edits]}


def cut(model: nn.Module, *edits: tuple[str, str], size: tuple[int, int, int] | None = SIZE) -> nn.Module:
    return attnsurgery.operate(model, recipe(*(edits or (("stage:3 last", "non_local"),))), size)


class Trained(nn.Module):
    """A module that holds a network as a LightningModule does."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.criterion = nn.CrossEntropyLoss()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x)


class Timm(nn.Module):
    """A module that holds a timm model as transformers' TimmWrapperModel does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.timm_model = model

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.timm_model(pixel_values)}


WHOLES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "sequential": lambda model: nn.Sequential(model, nn.Identity()),
    "lightning": Trained,
    "timm wrapper": Timm,
    "two deep": lambda model: Trained(nn.Sequential(model)),
}
every_whole = pytest.mark.parametrize("whole", WHOLES)


# ---- a model inside a larger whole


@every_whole
@pytest.mark.parametrize(
    ("name", "small", "tokens"),
    [
        ("vit_small_patch14_reg4_dinov2", REG4, 5),
        ("deit_tiny_distilled_patch16_224", DISTILLED, 2),
        ("eva02_tiny_patch14_224", {**REG4, "num_heads": 2}, 1),
    ],
)
@pytest.mark.parametrize(("at", "block"), [("stage:3 last", "se"), ("stage:* branches", "non_local")])
@pytest.mark.slow
def test_prefix_tokens_of_a_model_inside(
    name: str, small: dict[str, Any], tokens: int, at: str, block: str, whole: str
) -> None:
    """The trained blocks in the bare model compute what they compute in the whole."""
    torch.manual_seed(0)
    bare = timm.create_model(name, **small).eval()
    model = WHOLES[whole](copy.deepcopy(bare)).eval()
    size = (3, small["img_size"], small["img_size"])
    x = images(small["img_size"])
    for cut_model in (bare, model):
        cut(cut_model, (at, block), size=size)
    move_gates(model)
    bare.load_state_dict(next(part for part in model.modules() if type(part) is type(bare)).state_dict(), strict=True)
    grafts = [[graft for *_, own in operated(cut_model) for graft in own] for cut_model in (bare, model)]
    assert grafts[0] == grafts[1]
    assert {graft.prefix_tokens for graft in grafts[0]} == {tokens}
    output = model(x)
    assert torch.equal(output["logits"] if isinstance(output, dict) else output, bare(x))
    assert attnsurgery.verify(model, size).alive


def test_prefix_tokens_of_feature_extractor() -> None:
    """features_only=True holds the ViT as a child; its root says nothing of tokens."""
    torch.manual_seed(0)
    bare = timm.create_model("vit_small_patch14_reg4_dinov2", **REG4).eval()
    features = timm.create_model("vit_small_patch14_reg4_dinov2", **REG4, features_only=True).eval()
    features.model.load_state_dict(bare.state_dict(), strict=False)
    for model in (bare, features):
        cut(model, ("stage:3 last", "se"), size=(3, 56, 56))
    move_gates(bare)
    ours_state, theirs = features.model.state_dict(), bare.state_dict()
    features.model.load_state_dict({name: theirs[name] for name in ours_state}, strict=True)
    assert [graft.prefix_tokens for *_, own in operated(features) for graft in own] == [5]
    x = images(56)
    ours = bare.forward_intermediates(x, intermediates_only=True)
    assert torch.equal(features(x)[-1], ours[features.out_indices[-1]])


class Unknown(nn.Module):
    """A ViT-like model that says nowhere how many tokens it puts in front, and looks at every second patch alone."""

    def __init__(self, say: int | None = None) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.register_tokens = nn.Parameter(torch.randn(1, 3, 16))
        self.blocks = nn.Sequential(*[nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(4)])
        if say is not None:
            self.num_prefix_tokens = say

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)[:, ::2][:, 1:]
        return self.blocks(torch.cat([self.register_tokens.expand(len(x), -1, -1), tokens], 1))


def test_unknown_prefix_tokens_are_refused() -> None:
    """A number of tokens that cannot be known is refused until the model states it."""
    model = Trained(Unknown()).eval()
    keys = list(model.state_dict())
    for at in ("network.blocks.1", "stage:* every"):
        with pytest.raises(SiteError, match=r"not known how many are class or register tokens.*Set that number"):
            cut(model, (at, "se"))
    assert list(model.state_dict()) == keys
    explicit = cut(Trained(Unknown(say=3)).eval(), ("network.blocks.1", "se"))
    assert [graft.prefix_tokens for *_, own in operated(explicit) for graft in own] == [3]


def test_prefix_tokens_of_several_kinds() -> None:
    """As in transformers' DINOv2 with registers: one parameter for the class token, one for four registers."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 16, 8, 8)
            self.cls_token = nn.Parameter(torch.randn(1, 1, 16))
            self.register_tokens = nn.Parameter(torch.randn(1, 4, 16))
            self.blocks = nn.Sequential(*[nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(4)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tokens = self.patches(x).flatten(2).transpose(1, 2)
            extra = torch.cat([self.cls_token, self.register_tokens], 1).expand(len(x), -1, -1)
            return self.blocks(torch.cat([extra, tokens], 1))

    site = survey(nn.Sequential(Tokens()), SIZE).site("0.blocks.1")
    assert (site.prefix_tokens, site.grid, site.refused) == (5, (8, 8), "")


@every_whole
@pytest.mark.parametrize(
    "name", ["test_resnet", "test_vit", "test_convnext", "hiera_tiny_224", "coat_tiny", "iformer_t"]
)
@pytest.mark.slow
def test_places_inside_equal_the_models(name: str, whole: str) -> None:
    """Stages, roles, layouts, grids; and tokens of a Hiera are reordered also where it is not the root."""
    small = {"img_size": 64} if name == "test_vit" else {}
    with torch.device("meta"):
        bare = timm.create_model(name, **small)
    model = WHOLES[whole](bare)
    prefix = next(path for path, module in model.named_modules() if module is bare) + "."
    ours, theirs = survey(model), survey(bare)
    assert ours.stages == theirs.stages == (1, 2, 3, 4)
    assert ours.input_size == theirs.input_size
    assert [[site.address for site in ours.blocks(stage)] for stage in ours.stages] == [
        [prefix + site.address for site in theirs.blocks(stage)] for stage in theirs.stages
    ]
    for mine, site in zip(ours._outputs, theirs._outputs, strict=True):
        for name in ("shape", "layout", "stage", "role", "prefix_tokens", "grid", "ordered"):
            assert getattr(mine, name) == getattr(site, name), site.address


@pytest.mark.parametrize("indices", [None, (0, 3), (1,)])
@pytest.mark.slow
def test_stages_of_feature_extractor(indices: tuple[int, ...] | None) -> None:
    """timm cuts off the blocks behind the last feature; what is left is still at the start of the depth."""
    more = {} if indices is None else {"out_indices": indices}
    with torch.device("meta"):
        features = timm.create_model("test_vit", img_size=64, features_only=True, **more)
        whole = survey(timm.create_model("test_vit", img_size=64))
    stages = {site.address: site.stage for stage in whole.stages for site in whole.blocks(stage)}
    anatomy = survey(features)
    there = {
        site.address.removeprefix("model."): site.stage for stage in anatomy.stages for site in anatomy.blocks(stage)
    }
    assert there == {address: stages[address] for address in there}
    assert len(there) == 1 + (5 if indices is None else max(indices))


def test_stages_of_a_vit_of_two_blocks() -> None:
    """A ViT of two blocks has two of four stages, and the error for the others says so."""
    with torch.device("meta"):
        model = timm.create_model("test_vit_nonlocal_s3", img_size=64, depth=2)
        assert list(grafted_blocks(model)) == ["blocks.1.non_local"]
        with pytest.raises(SiteError, match=r"no stage 4\..* quarters of the depth: 1, 3\. It has 2 blocks, too few"):
            timm.create_model("test_vit_nonlocal_s4", img_size=64, depth=2)


class Decoded(nn.Module):
    """A model as smp's Unet: the image, a feature without channels, the encoder's features, and then a decoder."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.encoder = timm.create_model(name, features_only=True)
        self.decoder = BasicBlock(self.encoder.feature_info.channels()[-1], self.encoder.feature_info.channels()[-1])

    def encode(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x, x.new_empty((len(x), 0, 32, 32)), *self.encoder(x)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encode(x)[-1])


class Dummy(nn.Module):
    """A module that returns a list with a feature without channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.body = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        y = self.stem(x)
        return [y, y.new_empty((len(x), 0, 16, 16)), self.body(y)]


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
@pytest.mark.slow
def test_feature_without_channels_no_place(name: str) -> None:
    """A feature without channels is no place."""
    model = cut(Decoded(name).eval(), ("stage:3 last", "se"))
    assert all(path.startswith("encoder.") for path in grafted_blocks(model))  # stages are the encoder's
    assert cut(model, ("decoder.bn2", "se")) is model
    assert attnsurgery.verify(model, SIZE).alive
    inner = cut(nn.Sequential(Dummy()).eval(), ("0.body.1", "se"))
    assert attnsurgery.verify(inner, SIZE).alive
    sites = survey(nn.Sequential(Dummy()), SIZE).sites
    assert all(all(site.shape) for site in sites)


# ---- hooks, pruning, kept tensors


@pytest.mark.slow
def test_hooks_of_the_user_are_not_run() -> None:
    """Hooks of a user are not run by any function of the package, and stay in place."""
    model = build("test_resnet")
    calls: list[Any] = []

    def finite(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        assert not torch.isnan(output).any().item()
        calls.append(output)

    class Collector:
        def save(self, module: nn.Module, args: Any, *output: Any) -> None:
            calls.append(output)

    everywhere = nn.modules.module.register_module_forward_hook(finite)
    try:
        model.layer1.register_forward_hook(finite)
        model.layer2.register_forward_hook(lambda *hook_args: calls.append(hook_args[-1].mean().item()))
        model.layer2[0].register_forward_pre_hook(Collector().save)
        model.layer3.register_forward_hook(
            functools.partial(lambda record, *hook_args: record.append(hook_args), calls)
        )
        model.layer4.register_full_backward_hook(Collector().save)
        attnsurgery.inspect(model, SIZE)
        attnsurgery.plan(model, recipe(("stage:3 last", "se")), SIZE)
        cut(model)
        assert attnsurgery.verify(model, SIZE).alive
        assert calls == []
        model(images(64))
        assert len(calls) > 4  # and they are still there
    finally:
        everywhere.remove()


class Hooked(nn.Module):
    """Takes its result from a hook on its child, which is a bound method or a closure over its storage."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, 4)
        self.body = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8))
        self.kept: dict[str, torch.Tensor] = {}
        if how == "bound":
            self.body.register_forward_hook(self.keep)
        else:
            stored = self.kept
            self.body.register_forward_hook(lambda module, args, output: stored.update(out=output))

    def keep(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        self.kept["out"] = output

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.body(self.conv(x))
        return self.kept.pop("out")


@pytest.mark.parametrize("how", ["bound", "closure"])
@pytest.mark.slow
def test_hooks_of_the_model_run_on_the_twin(how: str) -> None:
    """Hooks that belong to the model are run, on the twin's own tensors."""
    model = nn.Sequential(Hooked(how)).eval()
    expected = model(images(64))
    cut(model, ("0.body.1", "se"))
    assert attnsurgery.verify(model, SIZE).alive
    assert model[0].kept == {}
    assert torch.equal(model(images(64)), expected)
    features = timm.create_model("test_resnet", features_only=True, feature_cls="hook").eval()
    assert attnsurgery.verify(cut(features), SIZE).alive


def test_needed_hooks_are_named_in_the_error() -> None:
    """Hooks that a model cannot do without are named in the error."""
    model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), BasicBlock(8, 8)).eval()
    model[0].register_forward_hook(lambda module, args, output: output[:, :8])
    model[0] = nn.Sequential(model[0], nn.Conv2d(8, 4, 1))
    model[0][1].register_forward_hook(lambda module, args, output: output.repeat(1, 2, 1, 1))
    with pytest.raises(SurgeryError, match=r"does not run on images of 3x64x64.*Hooks .*Conv2d.* are not run here"):
        survey(model, SIZE)


@pytest.mark.slow
def test_pruned_models_can_be_operated_on() -> None:
    """Surgery on a model with pruned weights changes no output."""
    model = build("test_resnet")
    for conv in (model.layer3[0].conv1, model.layer4[0].conv1):
        prune.l1_unstructured(conv, "weight", 0.5)
    expected = model(images(64))
    cut(model, ("stage:* branches", "se"))
    report = attnsurgery.verify(model, SIZE)
    assert report.alive
    assert report.max_abs_diff == 0
    assert torch.equal(model(images(64)), expected)


class Keeping(BasicBlock):
    """Stores the tensor that it has computed, with its graph, in several containers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.feat = super().forward(x)
        self.feats = {"all": [self.feat], "pair": (self.feat, x)}
        self.record = types.SimpleNamespace(feat=self.feat)
        return self.feat


@pytest.mark.parametrize("wrap", [lambda module: module, nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.slow
def test_tensors_that_are_no_parameters(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """Also those that hooks of torch compute, of which torch.fx knows nothing: they run as before."""
    model = nn.Sequential(nn.Sequential(wrap(nn.Conv2d(3, 8, 4, 4)), Keeping(8, 8), Keeping(8, 8)))
    model(images(64))
    feature = model[0][1].feat
    assert not feature.is_leaf
    twin = meta_twin(model)
    assert {twin[0][1].feat.device.type, twin[0][1].feats["all"][0].device.type} == {"meta"}
    assert twin[0][1].record.feat is twin[0][1].feat
    expected = model.eval()(images(64))
    feature = model[0][1].feat
    cut(model, ("0.1", "se"))
    report = attnsurgery.verify(model, SIZE)
    assert report.alive
    assert report.max_abs_diff == 0
    assert model[0][1].feat is feature
    assert torch.equal(model(images(64)), expected)


@pytest.mark.slow
def test_twin_shares_what_cannot_be_copied() -> None:
    """A module may hold a generator, an open file, a lock: nothing of that is part of its numbers."""
    model = build("test_resnet")
    model.log = open(__file__)  # noqa: SIM115
    model.rows = (number for number in range(3))
    try:
        assert meta_twin(model).log is model.log
        assert attnsurgery.verify(cut(model), SIZE).alive
        assert next(model.rows) == 0
    finally:
        model.log.close()


def test_twin_shares_no_tensor_with_model() -> None:
    """A twin shares no tensor with the model, and ties inside it stay."""
    model = build("test_vit")
    model.tied = [model.head, model.head.weight]
    twin = weighted_twin(model)
    assert twin.tied[0] is twin.head
    assert twin.tied[1] is twin.head.weight
    assert torch.equal(twin(images(160)), model(images(160)))
    own = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    assert not own & {tensor.data_ptr() for tensor in (*twin.parameters(), *twin.buffers())}


# ---- forwards that were replaced


def patched(block: Any, how: str) -> None:
    before = block.forward
    if how == "method":
        block.forward = types.MethodType(lambda self, x: type(self).forward(self, x) * 1, block)
    elif how == "closure":
        block.forward = lambda x: before(x)
    else:
        block.forward = functools.partial(type(block).forward, block)


@pytest.mark.parametrize("how", ["method", "closure", "partial"])
@pytest.mark.slow
def test_replaced_forward_holds_no_block(how: str) -> None:
    """As attention rollouts do it with the blocks or attentions of a ViT."""
    model = build("test_resnet")
    patched(model.layer3[0], how)
    keys = list(model.state_dict())
    for at in ("layer3.0", "layer3.0.bn2", "stage:* branches", "stage:* every"):
        with pytest.raises(SiteError, match=r"the forward of 'layer3\.0' was replaced on the object"):
            cut(model, (at, "se"))
        with pytest.raises(SiteError, match=r"'layer3\.0' was replaced"):
            attnsurgery.plan(model, recipe((at, "se")), SIZE)
    assert list(model.state_dict()) == keys
    assert attnsurgery.verify(cut(model, ("stage:12 branches", "se")), SIZE).alive


@pytest.mark.slow
def test_replaced_forward_inside_is_allowed() -> None:
    """A replaced forward inside a block of the host is no hindrance."""
    model = build("test_vit")
    attention = model.blocks[3].attn

    def remembering(x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        attention.seen = type(attention).forward(attention, x, attn_mask=attn_mask)
        return attention.seen

    attention.forward = remembering
    size = (3, 160, 160)
    cut(model, ("stage:3 branches", "se"), size=size)
    assert attnsurgery.verify(model, size).alive
    assert not hasattr(attention, "seen")
    model(images(160))
    assert attention.seen.device.type == "cpu"


# ---- wrappers


class Fake:
    """Makes classes that look like those of libraries which are not installed here."""

    @staticmethod
    def of(package: str, name: str, base: type = nn.Module, **body: Any) -> Any:
        return type(name, (base,), {**body, "__module__": f"{package}.some.file"})


def saved_twice(module: nn.Module) -> nn.Module:
    """PEFT's modules_to_save: the module as it was, and the copy of it that is trained and run."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.modules_to_save[self.active_adapters[0]](x)

    wrapper = Fake.of("peft", "ModulesToSaveWrapper", forward=forward)()
    wrapper.original_module = module
    wrapper.modules_to_save = nn.ModuleDict({"default": copy.deepcopy(module)})
    wrapper.active_adapters = ["default"]
    return wrapper


def compiled(module: nn.Module) -> nn.Module:
    wrapped: nn.Module = torch.compile(module, backend="eager")  # type: ignore[assignment]
    return wrapped


AROUND_PARTS = {"modules_to_save": saved_twice, "checkpoint_wrapper": checkpoint_wrapper, "compile": compiled}


@pytest.mark.parametrize("around", AROUND_PARTS)
@pytest.mark.parametrize("what", ["the block", "its owner"])
@pytest.mark.slow
def test_verify_follows_later_wrappers(around: str, what: str) -> None:
    """`verify` follows wrappers that were put on after surgery."""
    model = cut(build("test_resnet"))
    wrap = AROUND_PARTS[around]
    if what == "the block":
        model.layer3[0].non_local = wrap(model.layer3[0].non_local)
    else:
        model.layer3[0] = wrap(model.layer3[0])
    report = attnsurgery.verify(model, SIZE)
    assert report.faults == ()
    assert [block.path for block in report.blocks] == ["layer3.0.non_local"]
    assert report.max_abs_diff == 0
    move_gates(model)
    assert attnsurgery.verify(model, SIZE).max_abs_diff > 0  # of two copies, the one that runs has moved
    # and a block that is really gone is missed there, too
    inside = model.layer3[0] if what == "the block" else next(owner for _, owner, _ in operated(model))
    inside.non_local = nn.Identity()
    with pytest.raises(SurgeryError, match=r"the block '(layer3\.0\.)?non_local'.* is missing"):
        attnsurgery.verify(model, SIZE)


def test_remove_goes_through_wrappers() -> None:
    """`remove` finds blocks inside wrappers."""
    base = build("test_resnet")
    model = cut(copy.deepcopy(base))
    model.layer3[0] = checkpoint_wrapper(model.layer3[0])
    move_gates(model)
    attnsurgery.remove(model)
    assert grafted_blocks(model) == {}
    assert torch.equal(model(images(64)), base(images(64)))


@pytest.mark.slow
def test_checkpoint_wrapper_keeps_addresses() -> None:
    """Surgery inside checkpoint wrappers has the addresses of the bare model."""
    base = build("test_resnet")
    model = copy.deepcopy(base)
    model.layer3[0] = checkpoint_wrapper(model.layer3[0])
    cut(model, ("layer3.0", "non_local"), ("layer3.0.bn3", "se"))
    assert list(grafted_blocks(model)) == ["layer3.0.non_local", "layer3.0.se"]
    assert torch.equal(model(images(64)), base(images(64)))
    assert attnsurgery.verify(model, SIZE).alive
    model.train()(images(64)).sum().backward()
    assert all(p.grad is not None for p in attnsurgery.block_parameters(model).values())


def test_data_parallel_is_operated_on_inside() -> None:
    """Surgery on a DataParallel model changes the model inside."""
    base = build("test_resnet")
    model = nn.DataParallel(copy.deepcopy(base))
    assert cut(model) is model
    assert list(grafted_blocks(model.module)) == ["layer3.0.non_local"]
    assert torch.equal(model(images(64)), base(images(64)))
    assert attnsurgery.verify(model, SIZE).alive
    assert attnsurgery.recipe_of(model) is not None
    attnsurgery.remove(model)
    assert attnsurgery.recipe_of(model) is None
    assert list(model.module.state_dict()) == list(base.state_dict())


def as_ddp(model: nn.Module) -> nn.Module:
    """Wraps the model without a group of processes."""
    wrapped: Any = object.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = model
    return wrapped


def as_peft(model: nn.Module) -> nn.Module:
    tuner = Fake.of("peft", "BaseTuner")()
    tuner.model = model
    wrapped = Fake.of("peft", "PeftModel")()
    wrapped.base_model = tuner
    return wrapped


def averaged(model: nn.Module) -> nn.Module:
    return torch.optim.swa_utils.AveragedModel(model)


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def scripted(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(model, images(64))  # type: ignore[no-any-return]


def offloaded(model: Any) -> nn.Module:
    """accelerate's cpu_offload: the forward is replaced and the weights are on the meta device."""
    conv = model.layer1[0].conv1
    conv._hf_hook = object()
    conv._old_forward = conv.forward
    conv.forward = functools.partial(lambda module, x: module._old_forward(x), conv)
    conv.weight = nn.Parameter(conv.weight.to("meta"))
    return model  # type: ignore[no-any-return]


def sharded(model: Any) -> nn.Module:
    """FSDP2 changes the class of a module in place."""
    layer = model.layer3
    layer.__class__ = type("FSDPSequential", (Fake.of("torch", "FSDPModule", object), type(layer)), {})
    return model  # type: ignore[no-any-return]


def quantised(model: Any) -> nn.Module:
    from torch.testing._internal.two_tensor import TwoTensor

    weight = model.layer1[0].conv1.weight
    model.layer1[0].conv1.weight = nn.Parameter(TwoTensor(weight.data, weight.data))
    return model  # type: ignore[no-any-return]


def packed(model: Any) -> nn.Module:
    model.act = Fake.of("torch.ao.nn.quantized", "ReLU6", nn.ReLU)()
    return model  # type: ignore[no-any-return]


def in_four_bits(model: Any) -> nn.Module:
    weight = model.fc.weight.data.to(torch.uint8)[:, :1]
    packed = Fake.of("bitsandbytes", "Params4bit", nn.Parameter)
    model.fc.weight = packed(weight, requires_grad=False)
    return model  # type: ignore[no-any-return]


def lazy(model: Any) -> nn.Module:
    model.fc = nn.LazyLinear(10)
    return model  # type: ignore[no-any-return]


# What each wrapper lets through; the rest is refused with the words on the right.
ROUND = {
    "ddp": (as_ddp, {"inspect", "verify", "bypass"}, r"change model\.module"),
    "peft": (as_peft, {"inspect", "verify", "bypass", "freeze"}, r"modules_to_save"),
    "averaged": (averaged, {"inspect", "verify", "bypass", "freeze"}, r"start a new average"),
    "compile": (compiled, {"inspect", "verify", "freeze"}, r"_orig_mod"),
    "compile in place": (in_place, {"inspect", "verify", "freeze"}, r"before that part is compiled"),
    "script": (scripted, set(), r"before torch\.jit\.script"),
    "accelerate": (offloaded, {"inspect", "freeze"}, r"remove_hook_from_module"),
    "fsdp2": (sharded, set(), r"before it is sharded"),
    "tensor subclass": (quantised, {"inspect", "freeze"}, r"quantise or shard it afterwards"),
    "bitsandbytes": (in_four_bits, set(), r"bitsandbytes's Params4bit"),
    "quantised": (packed, set(), r"quantise it afterwards"),
    "lazy": (lazy, set(), r"run the model once"),
}


def bypassed(model: nn.Module) -> None:
    with attnsurgery.bypass(model):
        pass


VERBS: dict[str, Callable[[nn.Module], Any]] = {
    "inspect": lambda model: attnsurgery.inspect(model, SIZE),
    "operate": lambda model: cut(model, ("layer2.0", "se")),
    "verify": lambda model: attnsurgery.verify(model, SIZE),
    "remove": attnsurgery.remove,
    "bypass": bypassed,
    "freeze": attnsurgery.freeze_base,
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:Lazy modules:UserWarning")
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("around", ROUND)
@pytest.mark.slow
def test_wrapper_is_followed_or_refused(around: str, verb: str) -> None:
    """A wrapper is followed or is refused in one sentence."""
    wrap, allowed, words = ROUND[around]
    model = wrap(cut(build("test_resnet")))
    keys = sorted(model.state_dict()) if around != "script" else []
    if verb in allowed:
        VERBS[verb](model)
        return
    with pytest.raises(UsageError, match=words) as error:
        VERBS[verb](model)
    assert str(error.value).startswith("cannot ")
    assert str(error.value).count(". ") == 0
    if keys:
        assert sorted(model.state_dict()) == keys


def test_compiled_part_hinders_itself_alone() -> None:
    """A compiled part hinders only operations that would change that part."""
    model = build("test_resnet")
    model.layer3[0] = compiled(model.layer3[0])
    with pytest.raises(UsageError, match=r"compiled 'layer3\.0' as it was"):
        cut(model)
    assert attnsurgery.verify(cut(model, ("layer2.0", "se")), SIZE).alive


def test_docs_have_a_row_for_every_wrapper() -> None:
    """docs/wrappers.md has a row for every wrapper."""
    from attnsurgery.graph.wrappers import KINDS

    text = (Path(__file__).resolve().parents[1] / "docs" / "wrappers.md").read_text(encoding="utf-8")
    assert [kind.cls for kind in KINDS if f"`{kind.cls}" not in text] == []


# ---- modes, sizes, weights


@pytest.mark.slow
def test_inference_mode_is_supported() -> None:
    """verify counts versions, which tensors of that mode do not have; parameters made in it could not be trained."""
    with torch.inference_mode():
        base = build("test_resnet")
        model = cut(build("test_resnet"))
        assert attnsurgery.verify(model, SIZE).alive
        assert attnsurgery.verify(cut(base), SIZE).alive
        attnsurgery.plan(model, recipe(("layer2.0", "se")), SIZE)
    assert not any(p.is_inference() for p in attnsurgery.block_parameters(model).values())


def test_first_convolution_of_other_channels(tmp_path: Path) -> None:
    """The size is read off that convolution, and the saved directory builds it again."""
    base = build("resnet18", channels=(8, 16, 16, 24))
    base.conv1 = nn.Conv2d(4, 64, 7, 2, 3, bias=False)
    model = copy.deepcopy(base)
    attnsurgery.operate(model, recipe(("stage:3 last", "se"), base="resnet18"))
    move_gates(model)
    save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = images(64, channels=4)
    assert torch.equal(again(x), model(x))
    attnsurgery.remove(model)
    assert model.in_chans == base.in_chans
    stem = nn.Sequential(nn.Conv2d(6, 8, 4, 4), BasicBlock(8, 8))
    with pytest.raises(SurgeryError, match=r"say input_size=\(channels, height, width\)"):
        survey(nn.Sequential(stem))
    assert survey(nn.Sequential(stem), (6, 64, 64)).sites


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_verify_refuses_non_finite_weights(value: float) -> None:
    """`verify` refuses weights that are NaN or infinite, and names the tensor."""
    model = cut(build("test_resnet"))
    with torch.no_grad():
        model.layer2[0].conv1.weight[0, 0, 0, 0] = value
    with pytest.raises(SurgeryError, match=r"1 of the \d+ numbers of 'layer2\.0\.conv1\.weight' are NaN or infinite"):
        attnsurgery.verify(model, SIZE)


def test_non_finite_outputs_are_a_fault() -> None:
    """Outputs that are not finite are a fault."""
    model = cut(build("test_resnet"))
    with torch.no_grad():
        model.fc.weight.fill_(3e38)
    report = attnsurgery.verify(model, SIZE)
    assert not report.alive
    assert report.faults[0] == "the outputs are not finite, so that nothing can be compared"


# ---- architectures of the user's own


class Van(nn.Module):
    def __init__(self, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_features = 8
        self.stem = nn.Conv2d(in_chans, 8, 4, 4)
        self.blocks = nn.Sequential(*[BasicBlock(8, 8) for _ in range(4)])
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


VAN = {"url": "", "num_classes": 10, "input_size": (3, 64, 64), "first_conv": "stem", "classifier": "head"}


@pytest.fixture
def vanlike() -> Iterator[str]:
    """Registers a model as VAN's repository does: an entry point that sets a default_cfg, without pretrained tags."""
    from timm.models import _registry

    def vanlike(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        model: Any = Van(**{name: kwargs[name] for name in ("num_classes", "in_chans") if name in kwargs})
        model.default_cfg = dict(VAN)
        return model  # type: ignore[no-any-return]

    before = set(dict.keys(_registry._model_entrypoints))
    exported = list(getattr(sys.modules[__name__], "__all__", []))
    register_model(vanlike)
    yield "vanlike"
    sys.modules[__name__].__dict__["__all__"] = exported
    for name in set(dict.keys(_registry._model_entrypoints)) - before:
        dict.pop(_registry._model_entrypoints, name)
        _registry._model_to_module.pop(name, None)
        for names in _registry._module_to_models.values():
            names.discard(name)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_users_architecture_has_names(vanlike: str, tmp_path: Path) -> None:
    """An architecture that a user has registered has surgical names, and is saved and built again."""
    assert timm.is_model(f"{vanlike}_se")
    model = timm.create_model(f"{vanlike}_se", num_classes=7).eval()
    assert len(grafted_blocks(model)) == 4
    move_gates(model)
    save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(images(64)), model(images(64)))


@pytest.mark.parametrize("described", ["default_cfg", "neither", "apart"])
@pytest.mark.slow
def test_remove_restores_the_description(described: str) -> None:
    """`remove` restores the description that a model had of itself."""
    model: Any = Van().eval()
    if described != "neither":
        model.default_cfg = dict(VAN)
    if described == "apart":
        model.pretrained_cfg = {"architecture": "van", "url": "elsewhere"}
    before = {name: copy.deepcopy(value) for name, value in vars(model).items() if not name.startswith("_")}
    names = set(vars(model))
    for _ in range(2):
        attnsurgery.operate(model, recipe(("blocks.1", "se")), SIZE)
        attnsurgery.operate(model, recipe(("blocks.2", "se")), SIZE)
        assert model.pretrained_cfg["architecture"] == "surgery"
        if described != "neither":
            assert model.default_cfg["input_size"] == (3, 64, 64)
        attnsurgery.remove(model)
        assert {name: value for name, value in vars(model).items() if not name.startswith("_")} == before
        assert set(vars(model)) == names


# ---- some of the blocks


def operated_on() -> tuple[nn.Module, nn.Module]:
    base = build("test_resnet")
    edits = ("stage:* branches", "se"), ("layer3.0.bn2", "se"), ("layer3.0", "non_local"), ("stage:4", "non_local")
    return base, move_gates(cut(copy.deepcopy(base), *edits))


@pytest.mark.parametrize(
    ("names", "removed_paths"),
    [
        (("layer3.0.non_local",), {"layer3.0.non_local"}),
        (("layer*.0.se",), {f"layer{stage}.0.se" for stage in (1, 2, 3, 4)}),
        (("stage:4 branches", "stage:4 last"), {"layer4.0.se", "layer4.0.non_local"}),
        (("layer3.0.bn2",), {"layer3.0.se_2"}),
    ],
)
@pytest.mark.slow
def test_remove_of_some_leaves_no_trace(names: tuple[str, ...], removed_paths: set[str]) -> None:
    """Some blocks are removed as if they had never been there."""
    base, model = operated_on()
    blocks = grafted_blocks(model)
    remaining = {id(block) for path, block in blocks.items() if path not in removed_paths}
    with attnsurgery.bypass(model, *names) as meant:
        assert set(meant) == removed_paths
        expected = model(images(64))
    assert not torch.equal(model(images(64)), expected)
    assert attnsurgery.remove(model, *names) is model
    assert {id(block) for block in grafted_blocks(model).values()} == remaining
    assert torch.equal(model(images(64)), expected)
    assert attnsurgery.verify(model, SIZE).alive
    # the description builds the very same names, so the weights load
    again = timm.create_model("surgery", recipe=attnsurgery.recipe_of(model)).eval()
    again.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(again(images(64)), expected)
    attnsurgery.remove(model)
    assert torch.equal(model(images(64)), base(images(64)))
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]


@pytest.mark.slow
def test_remove_takes_span_from_all_modules() -> None:
    """A block on a span is removed from all of its modules."""
    base = build("resnet18", channels=(64, 8, 16, 16))
    model = copy.deepcopy(base)
    edits = [{"at": "layer1.0 .. layer1.1", "block": "residual_attention", "options": {"depth": 0}}]
    edits += [{"at": "layer1.1", "block": "se"}]
    attnsurgery.operate(model, {"version": 1, "name": "m", "base": "resnet18", "edits": edits}, SIZE)
    move_gates(model)
    with attnsurgery.bypass(model, "**.residual_attention"):
        expected = model(images(64))
    attnsurgery.remove(model, "layer1.0.residual_attention")
    assert torch.equal(model(images(64)), expected)
    assert type(model.layer1[0]) is BasicBlock
    assert list(grafted_blocks(model)) == ["layer1.1.se_2"] or list(grafted_blocks(model)) == ["layer1.1.se"]
    assert attnsurgery.verify(model, SIZE).alive


@pytest.mark.slow
def test_remove_keeps_the_grid_of_others() -> None:
    """A block that asks how tokens lie is told by the module that makes the map; it stays told."""
    base = timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1), embed_dims=(8, 16, 40, 64)).eval()
    model = copy.deepcopy(base)
    edits = [{"at": f"stages.{n}.blocks.0", "block": "residual_attention", "options": {"depth": 0}} for n in (0, 1)]
    attnsurgery.operate(model, {"version": 1, "name": "m", "base": "pvt_v2_b0", "edits": edits}, SIZE)
    move_gates(model)
    with attnsurgery.bypass(model, "stages.0.**"):
        expected = model(images(64)), model(images(96))
    attnsurgery.remove(model, "stages.0.**")
    assert len(grafted_blocks(model)) == 1
    assert torch.equal(model(images(64)), expected[0])
    assert torch.equal(model(images(96)), expected[1])
    attnsurgery.remove(model)
    assert not any("attnsurgery" in name for module in model.modules() for name in vars(module))


@pytest.mark.slow
def test_remove_keeps_settled_options() -> None:
    """Less attention in all must not make the blocks that stay larger when the model is built again."""
    model = build("resnet18", channels=(8, 8, 16, 16))
    edits = [{"at": "stage:34 last", "block": "non_local", "options": {"subsample": "auto"}}]
    limited = {"version": 1, "name": "m", "base": "resnet18", "max_attention_mb": 0.05, "edits": edits}
    attnsurgery.operate(model, limited)
    sizes = {path: block.subsample for path, block in grafted_blocks(model).items()}
    attnsurgery.remove(model, "layer4.1.non_local")
    again = timm.create_model("surgery", recipe=attnsurgery.recipe_of(model))
    assert {path: block.subsample for path, block in grafted_blocks(again).items()} == {
        "layer3.1.non_local": sizes["layer3.1.non_local"]
    }


@pytest.mark.parametrize("verb", ["remove", "bypass"])
@pytest.mark.slow
def test_remove_unknown_name_names_nearest(verb: str) -> None:
    """A name that means no block is refused with the nearest name."""
    _, model = operated_on()
    keys = list(model.state_dict())

    def ask(*names: str) -> None:
        if verb == "remove":
            attnsurgery.remove(model, *names)
        else:
            with attnsurgery.bypass(model, *names):
                pass

    for names in (("layer3.0.nonlocal",), ("layer3.0.non_local", "stage:2 last"), ("[z-a]",), ("layer9",)):
        with pytest.raises(SiteError, match="names no block, and no place with a block"):
            ask(*names)
    with pytest.raises(SiteError, match=r"Did you mean 'layer3\.0\.non_local'"):
        ask("layer3.0.nonlocal")
    assert list(model.state_dict()) == keys
    with pytest.raises(AttnSurgeryError):
        attnsurgery.bypass(build("test_resnet")).__enter__()


@pytest.mark.slow
def test_bypass_computes_the_base() -> None:
    """Bypassed blocks compute what the base does, and come back."""
    for host, size in (("test_vit", 160), ("test_convnext", 64)):
        base = build(host, **({"img_size": 160} if host == "test_vit" else {}))
        model = copy.deepcopy(base)
        for block in ("se", "non_local", "residual_attention"):
            attnsurgery.operate(model, recipe(("stage:23 last", block), base=host), (3, size, size))
        move_gates(model)
        x = images(size)
        moved = model(x)
        with attnsurgery.bypass(model):
            assert torch.equal(model(x), base(x))
            with attnsurgery.bypass(model, "**.se"):
                pass
            assert torch.equal(model(x), base(x))
            pruned = copy.deepcopy(model)
        assert torch.equal(model(x), moved)
        assert not torch.equal(moved, base(x))
        assert torch.equal(pruned(x), base(x))


def test_block_parameters_and_frozen_base() -> None:
    """The parameters of blocks are those that learn after freeze_base."""
    _, model = operated_on()
    whole = Trained(model)
    own = attnsurgery.block_parameters(whole)
    assert own.keys() == {
        f"network.{path}.{name}"
        for path, block in grafted_blocks(model).items()
        for name, _ in block.named_parameters()
    }
    assert all(dict(whole.named_parameters())[name] is parameter for name, parameter in own.items())
    assert attnsurgery.block_parameters(build("test_resnet")) == {}
    assert attnsurgery.freeze_base(whole) == len(list(whole.parameters())) - len(own)
    assert {name for name, parameter in whole.named_parameters() if parameter.requires_grad} == own.keys()
    before = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    whole.train()(images(64)).square().mean().backward()
    torch.optim.SGD(whole.parameters(), 0.1).step()
    moved = {name for name, tensor in whole.state_dict().items() if not torch.equal(tensor, before[name])}
    assert own.keys() & moved
    assert all(name in own or "running" in name or "tracked" in name for name in moved)
    with pytest.raises(SurgeryError, match="no block with parameters"):
        attnsurgery.freeze_base(build("test_resnet"))


# ---- several models, several calls, several inputs


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = timm.create_model("test_resnet", num_classes=10)
        self.second = timm.create_model("test_vit", img_size=64, num_classes=10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + self.second(x)


@pytest.mark.slow
def test_stages_of_several_models_inside() -> None:
    """The stages of several models in one are those of each."""
    alone = survey(timm.create_model("test_vit", img_size=64))
    model = cut(Two().eval(), ("stage:3 last", "non_local"), ("stage:4 branches", "se"))
    of_vit = [f"second.{site.address}" for site in alone.blocks(3)][-1:]
    assert {path.rpartition(".")[0] for path in grafted_blocks(model) if path.endswith("non_local")} == {
        "first.layer3.0",
        *of_vit,
    }
    assert {path.partition(".")[0] for path in grafted_blocks(model) if ".se" in path} == {"first", "second"}
    assert attnsurgery.verify(model, SIZE).alive


class Twice(nn.Module):
    """A siamese network."""

    def __init__(self) -> None:
        super().__init__()
        self.network = timm.create_model("test_resnet")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x) + self.network(x.flip(-1))


@pytest.mark.parametrize("at", ["stage:3 last", "network.layer3.0"])
@pytest.mark.slow
def test_model_run_twice_is_refused(at: str) -> None:
    """A model that runs twice in one forward is refused with the reason."""
    model = Twice().eval()
    with pytest.raises(SiteError, match=r"run more than once in one forward \('network.* 2 times\)"):
        cut(model, (at, "se"))
    attnsurgery.operate(model.network, recipe((at.removeprefix("network."), "se")), SIZE)
    assert attnsurgery.verify(model.network, SIZE).alive


def test_model_of_more_inputs_is_refused() -> None:
    """A model that takes more than images is refused with the reason."""

    class Masked(Trained):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return self.network(x) * mask

    with pytest.raises(SurgeryError, match=r"argument: 'mask'\. Where a model takes more than images"):
        survey(Masked(timm.create_model("test_resnet")))


@pytest.mark.slow
def test_models_that_say_how_they_are_copied() -> None:
    """torch.fx graphs and parametrisations have a __deepcopy__ of their own."""
    model = build("test_resnet")
    model.layer2 = torch.fx.symbolic_trace(model.layer2)
    nn.utils.parametrizations.spectral_norm(model.layer3[0].conv1)
    nn.utils.parametrizations.weight_norm(model.layer4[0].conv1)
    report = attnsurgery.verify(cut(model, ("stage:* branches", "se")), SIZE)
    assert report.alive
    assert report.max_abs_diff == 0


@pytest.mark.filterwarnings("ignore::UserWarning:timm.layers.interpolate")
@pytest.mark.slow
def test_new_input_size_reaches_inner_blocks() -> None:
    """Residual attention asks how tokens lie, and is told when the ViT inside is set to another size."""
    base = build("test_vit", img_size=64)
    model = nn.Sequential(copy.deepcopy(base)).eval()
    edits = [{"at": at, "block": "residual_attention"} for at in ("stage:2 last", "0.blocks.3 .. 0.blocks.4")]
    attnsurgery.operate(model, {"version": 1, "name": "m", "base": "test_vit", "edits": edits}, SIZE)
    for vit in (base, model[0]):
        vit.set_input_size((96, 96))
    assert torch.equal(model(images(96)), base(images(96)))
    move_gates(model)
    with attnsurgery.bypass(model, "0.blocks.3.residual_attention"):
        attnsurgery.remove(copy.deepcopy(model), "0.blocks.3.residual_attention")
    assert attnsurgery.verify(model, (3, 96, 96)).alive
    attnsurgery.remove(model)
    assert "set_input_size" not in vars(model[0])


def test_remove_all_despite_a_lost_block() -> None:
    """Some blocks cannot be removed where another is lost, but all can."""
    base = build("test_resnet")
    model = cut(copy.deepcopy(base), ("stage:34 branches", "se"), ("layer2.0", "se"))
    model.layer3[0] = copy.deepcopy(base.layer3[0])
    del model.layer4[0]._modules["se"]
    with pytest.raises(SurgeryError, match=r"'layer3\.0\.bn3', and there is none: the model was changed"):
        attnsurgery.remove(model, "layer2.0.*")
    attnsurgery.remove(model)
    assert list(model.state_dict()) == list(base.state_dict())
    assert torch.equal(model(images(64)), base(images(64)))
