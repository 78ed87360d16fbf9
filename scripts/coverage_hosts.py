"""The base of one architecture for the coverage run: built small, every weight woken, what it gives written down."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from timm.models import _features as features
from timm.models import _registry
from timm.models._features_fx import FeatureGraphNet
from torch import nn

from attnsurgery.graph import find
from attnsurgery.graph.forward_run import autocast_on_meta
from attnsurgery.timm_plugin.architectures import weightless
from scripts.coverage_weights import fresh, swift, weights_at_load, woken

BATCH = 2
COPIES = 4
"""Of the weights, at most, at one time: base, surgical model, and its checkpoint, which safetensors puts together of a
copy."""

_SMALLEST = """
beit_base_patch16_224 botnet26t_256 test_byobnet cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32 test_convnext
cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s cspnext_tiny davit_tiny deepseek_vit_412m
deit_tiny_patch16_224 densenet121 dla46x_c dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0
test_efficientnet efficientvim_m1 efficientvit_b0 efficientvit_m0 vit_tiny_patch16_dinov3_qkvb fasternet_t0 fastvit_t8
focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m ghostnet_050 hardcorenas_b hgnetv2_b0 hiera_tiny_224 sam2_hiera_tiny
hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small levit_128s
lowformer_b0 test_mambaout test_coatnet poolformerv2_s12 gmlp_ti16_224 mobilenetv3_small_050 mobilenetv5_base
mobilevit_xxs mvitv2_tiny naflexvit_base_patch16_parfac_gap nasnetalarge nest_tiny nextvit_small test_nfnet pit_ti_224
pnasnet5large pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002 repghostnet_050 repvit_m1 res2next50 resnest14d
test_resnet resnetv2_18 rexnet_100 selecsls42 legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18 starnet_s050
swiftformer_xs swin_tiny_patch4_window7_224 swinv2_tiny_window16_256 swinv2_cr_tiny_224 tiny_vit_5m_224
tnt_s_legacy_patch16_224 tresnet_m twins_svt_small vgg11 visformer_tiny test_vit vit_tiny_r_s16_p8_224 test_vit_relpos
samvit_base_patch16_224 vitamin_small_224 volo_d1_224 ese_vovnet19b_slim_dw legacy_xception xception41p
xcit_nano_12_p8_224
"""
SMALLEST = tuple(_SMALLEST.split())
"""The architecture with the fewest parameters of each family, in the order of the families' names; of byoanet one that
runs on small images."""

Tensors = list[torch.Tensor]


class BaseError(Exception):
    """The base itself does not run, or its output says nothing."""


def architectures() -> dict[str, str]:
    """Every architecture of timm by name, with its family: the file of timm.models that it comes from."""
    table = _registry._model_entrypoints
    modules = {name: table[name].__module__ for name in dict.keys(table) if name not in _registry._deprecated_models}
    return {
        name: module.rpartition(".")[2] for name, module in sorted(modules.items()) if module.startswith("timm.models.")
    }


def flat(value: Any) -> Tensors:
    """Every tensor of an output, whether it is one, a list, a tuple or a dictionary."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts: Iterable[Any] = (
        value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    )
    return [tensor for part in parts for tensor in flat(part)]


def equal(ones: Tensors, others: Tensors) -> bool:
    """The same number of tensors, the same shapes and, where there are values, the same bits."""
    if [tensor.shape for tensor in ones] != [tensor.shape for tensor in others]:
        return False
    return all(one.is_meta or torch.equal(one, other) for one, other in zip(ones, others, strict=True))


@contextmanager
def surveyed_once() -> Iterator[None]:
    """Models of one class, the same names and shapes, and the same size of images are surveyed once between them."""
    survey = find.survey
    known: dict[Any, Any] = {}

    def remembered(model: nn.Module, input_size: tuple[int, int, int] | None = None) -> Any:
        shapes = tuple((name, tensor.shape) for name, tensor in model.state_dict().items())
        key = type(model), input_size, shapes
        if key not in known:
            known[key] = survey(model, input_size)
        return known[key]

    find.survey = remembered
    try:
        yield
    finally:
        find.survey = survey


def forward(model: nn.Module, images: torch.Tensor) -> tuple[Tensors, Tensors]:
    """The output and what forward_features gave on the way; that is called by itself where forward does not."""
    inner = getattr(model, "forward_features", None)
    seen: list[Any] = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(inner(*args, **kwargs))
        return seen[-1]

    if inner is None:
        return flat(model(images)), []
    model.forward_features = spy
    try:
        output = flat(model(images))
    finally:
        del model.forward_features
    return output, flat(seen[0] if seen else inner(images))


def gradients(
    model: nn.Module, images: torch.Tensor, of: Callable[[nn.Module, torch.Tensor], Tensors]
) -> tuple[set[str], set[str]]:
    """Names of the parameters that one backward reaches at all, and of those it would move.

    Gradients are let go as they come, so that none but the largest is held.
    """
    fresh(model)
    reached: set[str] = set()
    moved: set[str] = set()

    def note(name: str) -> Any:
        def hook(parameter: torch.Tensor) -> None:
            reached.add(name)
            if parameter.grad is not None and (parameter.grad.is_meta or bool(parameter.grad.any())):
                moved.add(name)
            parameter.grad = None

        return hook

    handles = [
        parameter.register_post_accumulate_grad_hook(note(name))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    try:
        with torch.enable_grad():
            outputs = of(model, images)
            generator = torch.Generator().manual_seed(3)
            loss = sum(
                (tensor * torch.randn(tensor.shape, generator=generator).to(tensor.device)).sum()
                for tensor in outputs
                if tensor.requires_grad
            )
            if isinstance(loss, torch.Tensor):
                loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    return reached, moved


def wrapped(model: nn.Module, kind: str) -> nn.Module:
    """The model in one of timm's feature classes, at all of its indices; weights are shared, modules are not."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    learns = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    twin = copy.deepcopy(model, shared)
    indices = tuple(range(len(model.feature_info)))
    try:
        if kind == "flat list":
            return features.FeatureListNet(twin, out_indices=indices, flatten_sequential=True).eval()
        return _CLASSES[kind](twin, out_indices=indices).eval()
    finally:
        for parameter, was in learns:  # efficientvim freezes one where its head is taken off
            parameter.requires_grad_(was)


_CLASSES: dict[str, Callable[..., nn.Module]] = {
    "list": features.FeatureListNet,
    "hook": features.FeatureHookNet,
    "getter": features.FeatureGetterNet,
    "fx": FeatureGraphNet,
}
KINDS = ("hook", "list", "flat list", "getter", "fx")
"""timm's feature classes, lists with and without their sequences taken apart."""
QUICK = KINDS[:-1]
"""Those that cost no more than a copy. A graph of a whole model can take torchvision longer than all other checks."""


@dataclass
class Base:
    """A woken base in eval mode and what it gives for its images."""

    arch: str
    kwargs: dict[str, Any]
    images: torch.Tensor
    model: nn.Module
    state: dict[str, torch.Tensor]
    output: Tensors
    features: Tensors
    reached: set[str]
    parameters: int
    features_only: Tensors | None = None
    """What `features_only=True` gives; None where timm has no such thing for the architecture."""
    kinds: dict[str, Tensors] = field(default_factory=dict)

    @property
    def meta(self) -> bool:
        return self.images.is_meta

    def build(self, name: str, **more: Any) -> nn.Module:
        """A model by name, of the same size of images and on the same device; its weights say nothing yet."""
        with torch.device("meta") if self.meta else nullcontext():
            return timm.create_model(name, **self.kwargs, **more).eval()


def sizes(model: nn.Module) -> Iterator[tuple[int, int]]:
    """Heights and widths to try, smallest first: not square, three patches a side or more, or two positions at last."""
    infos = [dict(info) for info in getattr(model, "feature_info", None) or [{"reduction": 32}]]
    strides = {int(info["reduction"]) for info in infos}
    stride = min(max(strides), 64)
    if len(strides) == 1 and len(infos) > 1:
        yield from ((4 * stride, 3 * stride), (4 * stride, 4 * stride), (8 * stride, 8 * stride))
    else:
        yield from ((3 * stride, 2 * stride), (3 * stride, 3 * stride), (4 * stride, 4 * stride))
    yield from ((128, 96), (128, 128), (160, 160), (192, 192), (224, 224), (256, 256))
    yield tuple(model.pretrained_cfg["input_size"][1:])


def find_base(arch: str, max_bytes: float, kinds: tuple[str, ...] = KINDS) -> Base:
    """The base at the smallest size it takes, on real tensors where COPIES of them fit into `max_bytes`, else on meta.

    Args:
        kinds: the feature classes to try it in.

    Raises:
        BaseError: at no size does it run and tell images apart.
    """
    plain = weightless(arch).eval()
    parameters = sum(parameter.numel() for parameter in plain.parameters())
    meta = parameters * 4 * COPIES > max_bytes
    said: list[str] = []
    sized = _takes_img_size(arch)
    for size in dict.fromkeys(sizes(plain)):
        # what is built for these images: maps that blocks are fitted to, and positions that are learned
        shape = (channels_of(plain), *size)
        kwargs = {"img_size": size} if sized else {"pretrained_cfg_overlay": {"input_size": shape}}
        try:
            _try_on_meta(arch, plain, kwargs, size)
            return _measured(arch, kwargs, size, meta, parameters, kinds)
        except Exception as error:  # the architecture's own, of any kind: this size is not for it
            said.append(f"{size[0]}x{size[1]}: {type(error).__name__}: {' '.join(str(error).split())[:120]}")
    raise BaseError(f"runs at no size; {said[0]}; {said[-1]}")


def _takes_img_size(arch: str) -> bool:
    try:
        with torch.device("meta"):
            timm.create_model(arch, img_size=224)
    except TypeError as error:
        return "img_size" not in str(error)
    except Exception:
        return True
    return True


def _try_on_meta(arch: str, plain: nn.Module, kwargs: dict[str, Any], size: tuple[int, int]) -> None:
    with torch.no_grad(), autocast_on_meta():
        model = weightless(arch, kwargs["img_size"]).eval() if "img_size" in kwargs else plain
        model(torch.zeros(BATCH, channels_of(model), *size, device=next(model.parameters()).device))


def channels_of(model: nn.Module) -> int:
    return int(model.pretrained_cfg["input_size"][0])


def _measured(
    arch: str, kwargs: dict[str, Any], size: tuple[int, int], meta: bool, parameters: int, kinds: tuple[str, ...]
) -> Base:
    with swift(poison=not meta), torch.device("meta") if meta else nullcontext():
        model = timm.create_model(arch, **kwargs).eval()
    shape = (BATCH, channels_of(model), *size)
    if meta:
        images = torch.empty(shape, device="meta")
    else:
        images = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        woken(model, images)
    reached, _ = gradients(model, images, lambda model, images: forward(model, images)[0])
    with torch.no_grad():  # with gradients, torch takes other kernels, which round otherwise
        output, inner = forward(fresh(model), images)
    if not meta:
        _check_telling([*output, *inner])
    base = Base(arch, kwargs, images, model, model.state_dict(), output, inner, reached, parameters)
    _note_features(base, kinds)
    return base


def _check_telling(tensors: Tensors) -> None:
    """Raises BaseError where equality of such outputs would prove nothing."""
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise BaseError("its output is not finite")
    telling = [t for t in tensors if t.is_floating_point() and t.shape[0] == BATCH and t.numel() > BATCH]
    if not telling or any(float((t[0] - t[1]).abs().max()) < 1e-3 * float(t.abs().max()) for t in telling):
        raise BaseError("its output hardly depends on the image")


@torch.no_grad()
def _note_features(base: Base, kinds: tuple[str, ...]) -> None:
    try:
        with swift(), weights_at_load(base.state):
            model = base.build(base.arch, features_only=True, pretrained=True)
        base.features_only = flat(model(base.images))
    except Exception:  # timm has no such model, and says so in many ways
        base.features_only = None
    for kind in kinds:
        if kind == "flat list" and "list" in base.kinds:
            continue
        try:
            found = flat(wrapped(base.model, kind)(base.images))
        except Exception:
            continue
        # a hook on tnt gets the first of the two tensors that its blocks return: pixels of patches, not of images,
        # and nothing that happens to the tokens is ever heard there
        of_images = all(tensor.shape[:1] == (BATCH,) for tensor in found)
        # a list runs children in a row, also where forward does more: a ViT's then lack position and class token
        faithful = "list" not in kind or "hook" not in base.kinds or equal(found, base.kinds["hook"])
        if found and of_images and faithful:  # on coat a hook waits for lists that nobody calls, and gets nothing
            base.kinds[kind] = found


def describe(base: Base) -> dict[str, Any]:
    """What of a base goes into a row of the results."""
    return {
        "tensors": "meta" if base.meta else "real",
        "size": list(base.images.shape[2:]),
        "parameters": base.parameters,
        "features": [*(["default"] if base.features_only is not None else []), *base.kinds],
    }
