"""After surgery a model does all that its base does as a model of timm; what raises for the base may raise.

Every host is compared with its own base on the same weights: equal where blocks are the identity, different once they
have moved. Each check is asked of every host with one family of names, another one from check to check;
CITIZEN=full asks all of all.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import os
import pickle
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
from timm.models import generate_default_cfgs, hrnet, metaformer, mlp_mixer, register_model
from timm.optim import param_groups_layer_decay
from timm.utils import ModelEmaV3
from torch import nn

from attnsurgery.blocks import Block
from attnsurgery.errors import SurgeryError
from attnsurgery.surgery.operate import grafted_blocks, operated
from tests.conftest import HOSTS as OTHERS
from tests.conftest import images, move_gates, wake

pytestmark = pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning",
    "ignore:NOTE. The nodes obtained by tracing:UserWarning",
)

FULL = os.environ.get("CITIZEN") == "full"
FAMILIES = ("se", "nonlocal_s3", "dual_s4", "resattn_s3")

default_cfgs = generate_default_cfgs(
    {
        "tiny_mixer": {"input_size": (3, 64, 64), "first_conv": "stem.proj", "classifier": "head", "num_classes": 10},
        "tiny_caformer": {"input_size": (3, 64, 64), "first_conv": "stem.conv", "classifier": "head.fc.fc2"},
    }
)


@register_model
def tiny_mixer(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    sizes = {"img_size": 64, "patch_size": 16, "num_blocks": 4, "embed_dim": 32}
    return mlp_mixer._create_mixer("tiny_mixer", pretrained, **{**sizes, **kwargs})


@register_model
def tiny_caformer(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    mixers = [metaformer.SepConv, metaformer.SepConv, metaformer.Attention, metaformer.Attention]
    norms = [metaformer.LayerNorm2dNoBias] * 2 + [metaformer.LayerNormNoBias] * 2
    sizes = {"depths": [1, 1, 2, 1], "dims": [32, 32, 32, 64], "token_mixers": mixers, "norm_layers": norms}
    return metaformer._create_metaformer("tiny_caformer", pretrained, **{**sizes, **kwargs})


def _branches(count: int) -> dict[str, Any]:
    channels = tuple(8 * 2**index for index in range(count))
    return {
        "num_modules": 1,
        "num_branches": count,
        "block_type": "BASIC",
        "num_blocks": (1,) * count,
        "num_channels": channels,
        "fuse_method": "SUM",
    }


# Side of the images, and the arguments that make the model small.
HOSTS: dict[str, tuple[int, dict[str, Any]]] = {
    "resnet18": (64, {"channels": (16, 24, 32, 48)}),
    "test_convnext": OTHERS["test_convnext"],
    "mobilenetv3_small_050": (64, {}),
    "regnety_002": (64, {"depth": 8}),
    "densenet121": OTHERS["densenet121"],
    "test_vit": OTHERS["test_vit"],
    "vit_small_patch16_dinov3": (64, {"img_size": 64, "depth": 4, "embed_dim": 48, "num_heads": 2}),  # registers
    "tiny_mixer": (64, {}),
    "swin_tiny_patch4_window7_224": OTHERS["swin_tiny_patch4_window7_224"],
    "tiny_caformer": (64, {}),  # channels first in two stages, last in two
    "pvt_v2_b0": (64, {"depths": (1, 1, 2, 1), "embed_dims": (16, 24, 40, 64)}),
    "coatnet_pico_rw_224": (
        64,
        {"img_size": 64, "depths": (1, 1, 2, 1), "embed_dim": (32, 32, 64, 64), "stem_width": 16},
    ),
    "xcit_nano_12_p16_224": (64, {"depth": 4, "cls_attn_layers": 1, "embed_dim": 32, "num_heads": 2}),
    "hrnet_w18_small": (
        64,
        {"stage1": {**_branches(1), "block_type": "BOTTLENECK"}, **{f"stage{n}": _branches(n) for n in (2, 3, 4)}},
    ),
}  # fmt: skip

PAIRS = [(host, family) for host in HOSTS for family in FAMILIES]


def pairs(turn: int) -> list[tuple[str, str]]:
    """Every host with one family, or with all."""
    rotation = [(host, FAMILIES[(number + turn) % len(FAMILIES)]) for number, host in enumerate(HOSTS)]
    return PAIRS if FULL else rotation


def each_pair(turn: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("host", "family"), pairs(turn))


def make(name: str, host: str, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **{"num_classes": 10, **HOSTS[host][1], **kwargs})


def awake_model(host: str, **kwargs: Any) -> nn.Module:
    """The base with moved weights; tables that are no weights are unchanged."""
    model = make(host, host, **kwargs)
    model.load_state_dict(wake(copy.deepcopy(model)).state_dict())
    return model.eval()


@pytest.fixture(scope="module", autouse=True)
def hrnets_as_they_were() -> Iterator[None]:
    """Restores the table of all hrnets, into which timm 1.0.20 writes the arguments of one."""
    before = copy.deepcopy(hrnet.cfg_cls)
    yield
    hrnet.cfg_cls.update(before)


@functools.cache
def _base(host: str) -> nn.Module:
    return awake_model(host)


@functools.cache
def _surgical(host: str, family: str) -> nn.Module:
    model = make(f"{host}_{family}", host)
    model.load_state_dict(_base(host).state_dict())
    return model.eval()


def base_of(host: str) -> nn.Module:
    return copy.deepcopy(_base(host))


def surgical(host: str, family: str) -> nn.Module:
    """The surgical model on the weights of the base, with every block at the identity."""
    return copy.deepcopy(_surgical(host, family))


def moved(host: str, family: str) -> nn.Module:
    return move_gates(surgical(host, family))


def photo(host: str, channels: int = 3, side: int | None = None) -> torch.Tensor:
    return images(side or HOSTS[host][0], channels=channels)


Outputs = list[torch.Tensor]


def tensors(value: Any) -> Outputs:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for part in value for tensor in tensors(part)] if isinstance(value, (list, tuple)) else []


def of_base(host: str, ask: Callable[[nn.Module], Any], model: nn.Module | None = None) -> Outputs:
    """The answer of the base; skips the test where the base raises."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return tensors(ask(model or base_of(host)))
    except Exception as error:
        reason = " ".join(str(error).split())[:100]
        pytest.skip(f"raises for the base: {type(error).__name__} {reason}")


def same(ours: Outputs, theirs: Outputs) -> bool:
    return len(ours) == len(theirs) > 0 and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def must(ok: bool, otherwise: str) -> None:
    """An assert that does not print tensors."""
    if not ok:
        pytest.fail(otherwise, pytrace=False)


@each_pair(0)
@pytest.mark.slow
def test_surgical_model_has_blocks(host: str, family: str) -> None:
    """Every pair of host and family has a place for the block."""
    assert grafted_blocks(surgical(host, family))


# ---- every way through the model


def forward(model: nn.Module, host: str) -> Any:
    return model(photo(host))


def features(model: nn.Module, host: str) -> Any:
    return model.forward_features(photo(host))


def head_of_features(model: nn.Module, host: str) -> Any:
    return [model.forward_features(photo(host)), model.forward_head(model.forward_features(photo(host)))]


def intermediates(model: nn.Module, host: str) -> Any:
    return model.forward_intermediates(photo(host))


def two_intermediates(model: nn.Module, host: str) -> Any:
    return model.forward_intermediates(photo(host), indices=2, intermediates_only=True, norm=True)


def other_classes(model: nn.Module, host: str) -> Any:
    torch.manual_seed(0)
    model.reset_classifier(3)
    assert model.num_classes == 3
    return [model(photo(host)), *model.get_classifier().parameters()]


def no_classes(model: nn.Module, host: str) -> Any:
    model.reset_classifier(0)
    pooled = model(photo(host))
    assert pooled.shape[1] == model.head_hidden_size
    return pooled


def no_pooling(model: nn.Module, host: str) -> Any:
    model.reset_classifier(0, "")
    return model(photo(host))


def training(model: nn.Module, host: str) -> Any:
    torch.manual_seed(0)
    return [model.train()(photo(host)), *model.eval().state_dict().values()][0]


def in_bfloat16(model: nn.Module, host: str) -> Any:
    return model.bfloat16()(photo(host).bfloat16())


def in_double(model: nn.Module, host: str) -> Any:
    return model.double()(photo(host).double())


def larger_images(model: nn.Module, host: str) -> Any:
    model.set_input_size((128, 128))
    return model(photo(host, side=128))


def without_tail(model: nn.Module, host: str) -> Any:
    """Prunes the head and keeps all intermediate features."""
    model.prune_intermediate_layers(1, prune_norm=True, prune_head=True)
    return model.forward_intermediates(photo(host), indices=1, intermediates_only=True)


WAYS = [
    forward,
    features,
    head_of_features,
    intermediates,
    two_intermediates,
    other_classes,
    no_classes,
    no_pooling,
    training,
    in_bfloat16,
    in_double,
    larger_images,
    without_tail,
]


THROUGH_THE_HEAD = {forward, other_classes, no_classes, training, in_bfloat16, in_double, larger_images}
HEARD_BY_FEATURES_ALONE = {("test_vit", "dual_s4")}
"""The head reads the class token alone, and behind the last attention no patch reaches that."""


@functools.cache
def _answer(host: str, way: int) -> Outputs | str:
    try:
        with torch.no_grad():  # with gradients, torch takes other kernels
            return of_base(host, lambda model: WAYS[way](model, host))
    except pytest.skip.Exception as skipped:
        return str(skipped)


@pytest.mark.parametrize(
    ("way", "host", "family"),
    [(way, *pair) for way in range(len(WAYS)) for pair in pairs(way)],
    ids=[f"{WAYS[way].__name__}-{'-'.join(pair)}" for way in range(len(WAYS)) for pair in pairs(way)],
)
@pytest.mark.filterwarnings("ignore::UserWarning:timm.layers.interpolate")
@pytest.mark.slow
def test_outputs_equal_base_at_start(host: str, family: str, way: int) -> None:
    """At the identity start every way of calling gives the base's outputs, and moved blocks change them."""
    model, other = surgical(host, family), moved(host, family)
    expected = _answer(host, way)
    if isinstance(expected, str):
        pytest.skip(expected)
    with torch.no_grad():
        must(same(tensors(WAYS[way](model, host)), expected), "at the identity start it differs")
        changed = not same(tensors(WAYS[way](other, host)), expected)
    if (host, family) in HEARD_BY_FEATURES_ALONE and WAYS[way] in THROUGH_THE_HEAD:
        must(not changed, "the head hears the block after all")
    else:
        must(changed, "moved blocks change nothing")


# ---- features


FEATURE_CLASSES = (None, "list", "dict", "hook", "getter", "fx")


@functools.cache
def _features_of_base(host: str, how: str | None) -> tuple[nn.Module, Outputs] | str:
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            model = awake_model(host, **_features(how))
            return model, tensors(model(photo(host)))
    except Exception as error:
        return f"raises for the base: {type(error).__name__} {str(error)[:100]}"


def _features(how: str | None) -> dict[str, Any]:
    return {"features_only": True, "num_classes": 1000, **({"feature_cls": how} if how else {})}


@pytest.mark.parametrize(
    ("how", "host", "family"), [(how, *pair) for turn, how in enumerate(FEATURE_CLASSES) for pair in pairs(turn)]
)
@pytest.mark.slow
def test_features_equal_base_at_start(how: str | None, host: str, family: str) -> None:
    """The features of every class of timm are the base's until a block moves."""
    surgical(host, family)
    base_features = _features_of_base(host, how)
    if isinstance(base_features, str):
        pytest.skip(base_features)
    base, expected = base_features
    model = make(f"{host}_{family}", host, **_features(how)).eval()
    assert type(model).__name__ == type(base).__name__
    model.load_state_dict(base.state_dict())
    assert model.feature_info.channels() == base.feature_info.channels()
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, Block)}
    assert blocks
    calls: Counter[str] = Counter()
    for name, block in blocks.items():
        block.register_forward_hook(lambda *_, name=name: calls.update([name]))
    with torch.no_grad():
        must(same(tensors(model(photo(host))), expected), "at the identity start it differs")
        assert calls == dict.fromkeys(blocks, 1)
        torch.manual_seed(0)
        for block in blocks.values():
            for parameter in block.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        must(not same(tensors(model(photo(host))), expected), "moved blocks change nothing")


# ---- what a model says of itself


@each_pair(0)
@pytest.mark.slow
def test_surgical_model_attributes_stay_true(host: str, family: str) -> None:
    """The attributes and configuration by which a model describes itself are the base's."""
    model, base = surgical(host, family), base_of(host)
    for name in ("num_classes", "num_features", "head_hidden_size"):
        assert getattr(model, name) == getattr(base, name)
    assert model.feature_info is not None
    assert type(model.get_classifier()) is type(base.get_classifier())
    for field in ("first_conv", "classifier", "input_size", "mean"):
        assert model.pretrained_cfg.get(field) == base.pretrained_cfg.get(field)
    assert model.pretrained_cfg["architecture"] == f"{host}_{family}"
    skip = getattr(base, "no_weight_decay", set)
    assert set(getattr(model, "no_weight_decay", set)()) == set(skip())
    assert isinstance(model, type(base))


@each_pair(1)
@pytest.mark.slow
def test_layer_decay_puts_blocks_with_host(host: str, family: str) -> None:
    """Layer decay gives each parameter one group, and a block that of its host."""

    def groups(model: nn.Module) -> dict[str, float]:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        scales: dict[str, float] = {}
        for group in param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5):
            for parameter in group["params"]:
                assert names[id(parameter)] not in scales
                scales[names[id(parameter)]] = group["lr_scale"]
        return scales

    of_base(host, groups)
    theirs, ours = groups(base_of(host)), groups(model := surgical(host, family))
    assert ours.keys() == dict(model.named_parameters()).keys()
    assert len(set(theirs.values())) > 2
    if not hasattr(_base(host), "group_matcher"):
        return  # timm then cuts the list of parameters into equal parts
    assert {name: ours[name] for name in theirs} == theirs
    for path, block in grafted_blocks(model).items():
        own = {ours[f"{path}.{name}"] for name, _ in block.named_parameters()}
        home = path.rpartition(".")[0]
        while not (around := {scale for name, scale in theirs.items() if name.startswith(f"{home}.")}):
            home = home.rpartition(".")[0]
        assert len(own) == 1
        assert own <= around


# ---- training


def gradients(model: nn.Module, host: str, checkpointing: bool) -> Outputs:
    model.train().zero_grad()
    model.set_grad_checkpointing(checkpointing)
    torch.manual_seed(0)
    model.forward_features(photo(host)).square().sum().backward()
    return [torch.zeros(()) if p.grad is None else p.grad.clone() for p in model.parameters()]


@each_pair(2)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.slow
def test_gradients_equal_under_checkpointing(host: str, family: str) -> None:
    """Gradients are the same with and without gradient checkpointing."""
    of_base(host, lambda base: gradients(base, host, True))
    model = moved(host, family)
    plain, saved = gradients(copy.deepcopy(model), host, False), gradients(model, host, True)
    largest = max(float(slope.abs().max()) for slope in plain)
    close = [torch.allclose(a, b, atol=1e-5 * largest) for a, b in zip(plain, saved, strict=True)]
    must(all(close), f"{close.count(False)} of {len(close)} gradients differ")
    own = {id(p) for block in grafted_blocks(model).values() for p in block.parameters()}
    mine = [slope for p, slope in zip(model.parameters(), saved, strict=True) if id(p) in own]
    assert mine
    assert any(bool(slope.any()) for slope in mine)


@each_pair(3)
@pytest.mark.slow
def test_dropout_works_and_follows_a_change(host: str, family: str) -> None:
    """Drop path and dropout work, and follow a change of their rate."""
    rates = {"drop_path_rate": 0.5} if "densenet" not in host and "hrnet" not in host else {"drop_rate": 0.5}
    of_base(host, lambda _: make(host, host, **rates)(photo(host)))
    surgical(host, family)
    model = wake(make(f"{host}_{family}", host, **rates)).train()
    x = photo(host)
    for module in model.modules():  # statistics that move would make any two forwards differ
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    with torch.no_grad():
        must(not torch.equal(model(x), model(x)), "two forwards in train mode are equal")
        for module in model.modules():
            if hasattr(module, "drop_prob"):
                module.drop_prob = 0.0
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if hasattr(model, "drop_rate"):
            model.drop_rate = 0.0
        must(torch.equal(model(x), model(x)), "a rate changed to 0 does not reach the modules")


# ---- copies


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_a_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = copy.deepcopy(model)
    for parameter in fresh.parameters():
        parameter.data.zero_()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


def averaged(model: nn.Module) -> nn.Module:
    ema = ModelEmaV3(model, decay=0.0)
    for parameter in ema.module.parameters():
        parameter.data.zero_()
    ema.update(model)
    return ema.module.eval()


@pytest.mark.parametrize(
    ("twin_of", "host", "family"),
    [
        (twin_of, *pair)
        for turn, twin_of in enumerate((copy.deepcopy, pickled, through_a_file, averaged))
        for pair in pairs(turn)
    ],
)
@pytest.mark.slow
def test_copy_is_equal_and_shares_no_memory(twin_of: Callable[[nn.Module], nn.Module], host: str, family: str) -> None:
    """A copy of a model computes the same and shares no memory with it."""
    model = moved(host, family)
    twin = twin_of(model)
    with torch.no_grad():
        expected = model(photo(host))
        must(torch.equal(twin(photo(host)), expected), "the copy computes something else")
        wake(twin)
        must(torch.equal(model(photo(host)), expected), "the copy shares memory")
        must(not torch.equal(twin(photo(host)), expected), "the copy has nothing to move")


# ---- other builds


@each_pair(1)
@pytest.mark.parametrize("arguments", [{"in_chans": 1}, {"exportable": True}], ids=str)
@pytest.mark.slow
def test_surgical_model_takes_base_arguments(host: str, family: str, arguments: dict[str, Any]) -> None:
    """Arguments with which timm builds the base build the surgical model too."""
    surgical(host, family)
    x = photo(host, channels=arguments.get("in_chans", 3))
    base = awake_model(host, **arguments)
    model = make(f"{host}_{family}", host, **arguments).eval()
    model.load_state_dict(base.state_dict())
    with torch.no_grad():
        expected = of_base(host, lambda base: [base(x), base.forward_features(x)], base)
        must(same([model(x), model.forward_features(x)], expected), "at the identity start it differs")
        move_gates(model)
        must(not same([model(x), model.forward_features(x)], expected), "moved blocks change nothing")


# ---- compilers


def compiled(model: nn.Module, x: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    return torch.compile(model, fullgraph=True, backend="aot_eager")


def exported(model: nn.Module, x: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    return torch.export.export(model, (x,)).module()


def scripted(model: nn.Module, x: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    return torch.jit.script(model)


@pytest.mark.parametrize(
    ("how", "host", "family"),
    [
        (how, *pair)
        for turn, how in enumerate((compiled, exported, scripted))
        for pair in pairs(turn)
        # unless all is asked, a host is either compiled or exported: these take longest
        if FULL or how is scripted or list(HOSTS).index(pair[0]) % 2 == turn
    ],
)
@pytest.mark.slow
def test_surgical_model_compiles_as_base(how: Any, host: str, family: str) -> None:
    """Whatever compiles the base compiles the surgical model, or refuses a span with the reason."""
    x = photo(host)
    model = moved(host, family)
    scripting = timm.layers.set_scriptable(True) if how is scripted else contextlib.nullcontext()
    with scripting, torch.no_grad():
        if how is scripted and any(len(graft.span) > 1 for *_, grafts in operated(model) for graft in grafts):
            with pytest.raises(SurgeryError, match="a span of several modules cannot be scripted"):
                how(model, x)
            return
        try:
            output = how(model, x)(x)
        except Exception:
            of_base(host, lambda base: how(base, x)(x))
            raise
        expected = model(x)
    must(torch.allclose(output, expected, atol=1e-5), "it computes something else")
    if (host, family) not in HEARD_BY_FEATURES_ALONE:
        must(not torch.allclose(output, _base(host)(x), atol=1e-5), "the blocks are not in it")
