"""The base of one architecture for the coverage run: a small model with random weights, and its outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import MappingProxyType
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
from scripts.coverage_weights import randomise_weights, reset_to_eval, skip_initial_values, weights_at_load

BATCH = 2
COPIES = 4
"""Number of copies of the weights in memory at a time: base, surgical model, its checkpoint, and a copy of this that
safetensors makes."""

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
"""The architecture with the fewest parameters of each family, in the order of the families; of byoanet one that runs on
small images."""

Tensors = list[torch.Tensor]


class BaseError(Exception):
    """The base itself does not run, or its output is not informative."""


def architectures() -> dict[str, str]:
    """Every architecture of timm by name, with its family: the module in timm.models that defines it."""
    table = _registry._model_entrypoints
    modules = {name: table[name].__module__ for name in dict.keys(table) if name not in _registry._deprecated_models}
    return {
        name: module.rpartition(".")[2] for name, module in sorted(modules.items()) if module.startswith("timm.models.")
    }


def flat(value: Any) -> Tensors:
    """All tensors of an output that is a tensor, a list, a tuple or a dictionary."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts: Iterable[Any] = (
        value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    )
    return [tensor for part in parts for tensor in flat(part)]


def equal(first: Tensors, second: Tensors) -> bool:
    """Whether two lists of tensors have the same shapes and, except on meta, the same bits."""
    if [tensor.shape for tensor in first] != [tensor.shape for tensor in second]:
        return False
    return all(a.is_meta or torch.equal(a, b) for a, b in zip(first, second, strict=True))


@contextmanager
def cached_surveys() -> Iterator[None]:
    """A context in which models of the same class, names, shapes and size of images are surveyed only once."""
    survey = find.survey
    cache: dict[Any, Any] = {}

    def cached_survey(model: nn.Module, input_size: tuple[int, int, int] | None = None) -> Any:
        shapes = tuple((name, tensor.shape) for name, tensor in model.state_dict().items())
        key = type(model), input_size, shapes
        if key not in cache:
            cache[key] = survey(model, input_size)
        return cache[key]

    find.survey = cached_survey
    try:
        yield
    finally:
        find.survey = survey


def forward(model: nn.Module, images: torch.Tensor) -> tuple[Tensors, Tensors]:
    """The output, and that of forward_features, which is called separately if forward does not call it."""
    inner = getattr(model, "forward_features", None)
    features: list[Any] = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        features.append(inner(*args, **kwargs))
        return features[-1]

    if inner is None:
        return flat(model(images)), []
    model.forward_features = spy
    try:
        output = flat(model(images))
    finally:
        del model.forward_features
    return output, flat(features[0] if features else inner(images))


def gradients(
    model: nn.Module, images: torch.Tensor, outputs_of: Callable[[nn.Module, torch.Tensor], Tensors]
) -> tuple[set[str], set[str]]:
    """Names of the parameters that get a gradient in one backward pass, and of those whose gradient is not zero.

    Gradients are freed as they are computed, to save memory.
    """
    reset_to_eval(model)
    reached: set[str] = set()
    nonzero: set[str] = set()

    def note(name: str) -> Any:
        def hook(parameter: torch.Tensor) -> None:
            reached.add(name)
            if parameter.grad is not None and (parameter.grad.is_meta or bool(parameter.grad.any())):
                nonzero.add(name)
            parameter.grad = None

        return hook

    handles = [
        parameter.register_post_accumulate_grad_hook(note(name))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    try:
        with torch.enable_grad():
            outputs = outputs_of(model, images)
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
    return reached, nonzero


def wrap(model: nn.Module, kind: str) -> nn.Module:
    """A copy of the model, with shared weights, in one of timm's feature classes, with all feature indices."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    learns = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    twin = copy.deepcopy(model, shared)
    indices = tuple(range(len(model.feature_info)))
    try:
        if kind == "flat list":
            return features.FeatureListNet(twin, out_indices=indices, flatten_sequential=True).eval()
        return _CLASSES[kind](twin, out_indices=indices).eval()
    finally:
        for parameter, flag in learns:  # efficientvim freezes a parameter when its head is removed
            parameter.requires_grad_(flag)


_CLASSES: dict[str, Callable[..., nn.Module]] = {
    "list": features.FeatureListNet,
    "hook": features.FeatureHookNet,
    "getter": features.FeatureGetterNet,
    "fx": FeatureGraphNet,
}
KINDS = ("hook", "list", "flat list", "getter", "fx")
"""timm's feature classes, lists with and without flattened sequences."""
QUICK = KINDS[:-1]
"""Those that are as fast as a copy. Tracing a whole model can take torchvision longer than all other checks."""


@dataclass
class Base:
    """A base with random weights in eval mode, its images and its outputs."""

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
    """The features of `features_only=True`; None where timm does not support it for the architecture."""
    kinds: dict[str, Tensors] = field(default_factory=dict)

    @property
    def meta(self) -> bool:
        return self.images.is_meta

    def build(self, name: str, **more: Any) -> nn.Module:
        """A model by name, for the same size of images and on the same device; its weights are not set."""
        with torch.device("meta") if self.meta else nullcontext():
            return timm.create_model(name, **self.kwargs, **more).eval()


def sizes(model: nn.Module) -> Iterator[tuple[int, int]]:
    """Heights and widths to try, the smallest first: mostly not square, with at least two final positions a side."""
    infos = [dict(info) for info in getattr(model, "feature_info", None) or [{"reduction": 32}]]
    strides = {int(info["reduction"]) for info in infos}
    stride = min(max(strides), 64)
    if len(strides) == 1 and len(infos) > 1:
        yield from ((4 * stride, 3 * stride), (4 * stride, 4 * stride), (8 * stride, 8 * stride))
    else:
        yield from ((3 * stride, 2 * stride), (3 * stride, 3 * stride), (4 * stride, 4 * stride))
    yield from ((128, 96), (128, 128), (160, 160), (192, 192), (224, 224), (256, 256))
    yield tuple(model.pretrained_cfg["input_size"][1:])


def find_base(
    arch: str, max_bytes: float, kinds: tuple[str, ...] = KINDS, arguments: Mapping[str, Any] = MappingProxyType({})
) -> Base:
    """The base at the smallest possible size of images.

    Args:
        arch: the architecture.
        max_bytes: memory for the weights; if COPIES of them do not fit, the base is on the meta device.
        kinds: the feature classes to try.
        arguments: of `timm.create_model`, such as a smaller depth.

    Raises:
        BaseError: it runs at no size, or its output does not depend on the image.
    """
    plain = weightless(arch).eval()
    with torch.device("meta"):
        shallow = timm.create_model(arch, **arguments) if arguments else plain
    parameters = sum(parameter.numel() for parameter in shallow.parameters())
    meta = parameters * 4 * COPIES > max_bytes
    errors: list[str] = []
    sized = _takes_img_size(arch)
    for size in dict.fromkeys(sizes(plain)):
        # the model is built for these images: blocks are fitted to its maps, and it has position embeddings
        shape = (channels_of(plain), *size)
        kwargs = {"img_size": size} if sized else {"pretrained_cfg_overlay": {"input_size": shape}}
        try:
            _try_on_meta(arch, plain, kwargs, size)
            return _measured(arch, {**kwargs, **arguments}, size, meta, parameters, kinds)
        except Exception as error:  # architectures raise exceptions of any class for sizes that they do not support
            errors.append(f"{size[0]}x{size[1]}: {type(error).__name__}: {' '.join(str(error).split())[:120]}")
    raise BaseError(f"runs at no size; {errors[0]}; {errors[-1]}")


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
    with skip_initial_values(poison=not meta), torch.device("meta") if meta else nullcontext():
        model = timm.create_model(arch, **kwargs).eval()
    shape = (BATCH, channels_of(model), *size)
    if meta:
        images = torch.empty(shape, device="meta")
    else:
        images = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        randomise_weights(model, images)
    reached, _ = gradients(model, images, lambda model, images: forward(model, images)[0])
    with torch.no_grad():  # with gradients, torch uses other kernels, whose rounding differs
        output, inner = forward(reset_to_eval(model), images)
    if not meta:
        _check_informative([*output, *inner])
    base = Base(arch, kwargs, images, model, model.state_dict(), output, inner, reached, parameters)
    _note_features(base, kinds)
    return base


def _check_informative(tensors: Tensors) -> None:
    """Check that equality of such outputs is meaningful.

    Raises:
        BaseError: they are not finite, or hardly depend on the image.
    """
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise BaseError("its output is not finite")
    informative = [t for t in tensors if t.is_floating_point() and t.shape[0] == BATCH and t.numel() > BATCH]
    if not informative or any(float((t[0] - t[1]).abs().max()) < 1e-3 * float(t.abs().max()) for t in informative):
        raise BaseError("its output hardly depends on the image")


@torch.no_grad()
def _note_features(base: Base, kinds: tuple[str, ...]) -> None:
    try:
        with skip_initial_values(), weights_at_load(base.state):
            model = base.build(base.arch, features_only=True, pretrained=True)
        base.features_only = flat(model(base.images))
    except Exception:  # timm raises exceptions of many classes where it has no such model
        base.features_only = None
    for kind in kinds:
        if kind == "flat list" and "list" in base.kinds:
            continue
        try:
            class_features = flat(wrap(base.model, kind)(base.images))
        except Exception:
            continue
        # a hook on tnt gets the first of the two tensors that its blocks return: pixels of patches and not of images,
        # which do not depend on the tokens
        of_images = all(tensor.shape[:1] == (BATCH,) for tensor in class_features)
        # a list runs children in sequence, also where forward does more: those of a ViT lack position and class token
        faithful = "list" not in kind or "hook" not in base.kinds or equal(class_features, base.kinds["hook"])
        if class_features and of_images and faithful:  # hooks on coat get nothing: its lists are never called
            base.kinds[kind] = class_features


def describe(base: Base) -> dict[str, Any]:
    """The fields of a row of results that describe the base."""
    return {
        "tensors": "meta" if base.meta else "real",
        "size": list(base.images.shape[2:]),
        "parameters": base.parameters,
        "features": [*(["default"] if base.features_only is not None else []), *base.kinds],
    }
