"""Segmentation models: any timm architecture as the backbone of any decoder, with the conventions of timm's own models.

The names `<arch>_<decoder><stride>`, such as `resnet50_fcn16`, are resolved by `attnsurgery.timm_plugin`.

Shape letters in this file:  B batch, C channels, H W height and width of the images, h w of the map, K classes.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import timm
import torch
from torch import nn
from torch.nn import functional as F

from attnsurgery.errors import CheckpointError
from attnsurgery.models.backbones import plain_twin
from attnsurgery.models.decoders import DECODERS

CLASSES = 21
"""K by default: the classes of PASCAL VOC with the background, as in torchvision and in the decoders' papers."""


class Segmenter(nn.Module):
    """Images (B, C, H, W) to class scores (B, K, H, W), by a backbone, a decoder and bilinear resizing.

    In training, a decoder with several outputs gives a tuple of (B, K, H, W), the prediction first.

    Args:
        arch: the timm architecture of the backbone, plain or surgical.
        decoder: name of the decoder in `DECODERS`.
        stride: output stride of the backbone: 8, 16 or 32.
        num_classes: K; 0 for the maps in front of the classifiers.
        in_chans: number of channels of the images.
        kwargs: other arguments of the architecture, such as `img_size` or `drop_path_rate`.

    Raises:
        UsageError: the architecture or the decoder does not support the stride, or a package is missing.
        UnknownNameError: there is no such decoder.
    """

    def __init__(
        self,
        arch: str,
        decoder: str = "fcn",
        stride: int = 16,
        num_classes: int = CLASSES,
        in_chans: int = 3,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        parts = DECODERS[decoder].assemble(decoder, arch, stride, num_classes or 1, in_chans, **kwargs)
        self.arch = arch
        self.stride = stride
        self.num_classes = num_classes or 1
        self.in_chans = in_chans
        self.num_features = parts.channels
        self.backbone = parts.backbone
        self.decoder = parts.decoder
        self.arguments = kwargs
        self._form = parts.form
        layers: list[Any] = [self.decoder.get_submodule(path) for path in self.decoder.classifiers]
        self._layers = [(layer.in_channels, layer.kernel_size[0]) for layer in layers]
        self.head_hidden_size: int = self._layers[0][0]
        if num_classes == 0:
            self.reset_classifier(0)

    def head_modules(self) -> tuple[str, ...]:
        """Paths of the modules that published weights of the architecture do not have: the decoder."""
        return ("decoder",)

    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]:
        """The layer that gives the class scores; several where training has several outputs, the prediction's first."""
        layers = tuple(self.decoder.get_submodule(path) for path in self.decoder.classifiers)
        return layers if len(layers) > 1 else layers[0]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the layers that give class scores by new ones for `num_classes` classes; 0 for none.

        `global_pool` has no effect: a segmentation model pools nothing. timm passes it.
        """
        old = next(self.decoder.parameters())
        for path, (in_channels, kernel_size) in zip(self.decoder.classifiers, self._layers, strict=True):
            layer: nn.Module = nn.Identity()
            if num_classes:
                layer = self.decoder.new_classifier(in_channels, kernel_size, num_classes)
            parent, _, child = path.rpartition(".")
            setattr(self.decoder.get_submodule(parent), child, layer.to(old.device, old.dtype))
        self.num_classes = num_classes

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Set whether backward recomputes the backbone's blocks instead of storing their activations."""
        for module in (self.backbone, getattr(self.backbone, "model", None)):
            set_checkpointing: Any = getattr(module, "set_grad_checkpointing", None)
            if set_checkpointing is not None:
                set_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that an optimizer should not decay: those of the backbone."""
        names: Any = getattr(self.backbone, "no_weight_decay", set)
        return {f"backbone.{name}" for name in names()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter groups for layer-wise learning rates: the backbone's, and the decoder as the last."""
        matcher: Any = getattr(self.backbone, "group_matcher", None)
        patterns: dict[str, Any] = matcher(coarse=coarse) if matcher else {"backbone": r".*"}
        return {
            group: [(_inside_backbone(pattern), order) for pattern, order in entry]
            if isinstance(entry, list | tuple)
            else entry and _inside_backbone(entry)
            for group, entry in patterns.items()
        }

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """The backbone's deepest map (B, C, h, w) of images, with h = H / stride."""
        features: torch.Tensor | list[torch.Tensor] = self._features(x)
        return features[-1] if isinstance(features, list) else features

    def _features(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """What the decoder takes."""
        if self._form is None:
            maps: list[torch.Tensor] = self.backbone(x)
            return maps
        features = self.backbone.forward_features(x)  # type: ignore[operator]
        return self._form.as_map(features, (x.shape[-2], x.shape[-1]))

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        height, width = x.shape[-2], x.shape[-1]
        multiple = self.decoder.multiple
        if height % multiple or width % multiple:
            x = F.pad(x, (0, -width % multiple, 0, -height % multiple))
        size = (x.shape[-2], x.shape[-1])
        outputs = self.decoder(self._features(x))
        if isinstance(outputs, tuple):
            if self.training:
                return tuple(_resized(scores, size, height, width) for scores in outputs)
            outputs = outputs[0]
        return _resized(outputs, size, height, width)


def _resized(scores: torch.Tensor, size: tuple[int, int], height: int, width: int) -> torch.Tensor:
    """Scores at each pixel of an image of a size that was padded from `height` and `width`."""
    scores = F.interpolate(scores, size=size, mode="bilinear", align_corners=False)
    return scores if size == (height, width) else scores[:, :, :height, :width]


def _inside_backbone(pattern: str) -> str:
    """A pattern for names of the backbone as one for names of the whole model."""
    unanchored = re.sub(r"(?<![\[\\])\^", "", pattern)
    return rf"^backbone\.(?:{unanchored})"


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: Segmenter) -> dict[str, torch.Tensor]:
    """Weights of the plain architecture under the names of a segmentation model; others unchanged.

    The weights of a classifier are left out. The decoder is not among the tensors; see `with_new_decoder`. Position
    embeddings of a segmentation model for another size of images are interpolated as the backbone's family does.

    Args:
        state_dict: weights of either kind.
        model: the segmentation model, which may be on the meta device.
    """
    state = dict(state_dict)
    twin = plain_twin(model.arch)
    convert = getattr(sys.modules[type(twin).__module__], "checkpoint_filter_fn", None)
    if any(name.startswith("backbone.") for name in state):
        return _resized_positions(state, model, convert)
    if convert is not None and not len(twin.state_dict().keys() & state.keys()) * 2 > len(state):
        try:
            state = dict(convert(dict(state), twin))
        except Exception:  # weights of another model, whose names the strict load reports
            return dict(state_dict)
    return _renamed(state, model, twin.state_dict().keys()) or dict(state_dict)


def name_first_convolution(model: nn.Module) -> None:
    """Enter the first convolution of a feature extractor in the model's configuration; other backbones have theirs.

    This follows the loading of weights, since timm may not know the name in weights of the architecture.
    """
    config: Any = model.pretrained_cfg
    plain: Any = timm.get_pretrained_cfg(str(model.arch))
    first = plain and plain.first_conv
    if first and not config.get("first_conv"):
        paths = {path for path, _ in model.named_modules()}
        names = (first,) if isinstance(first, str) else first
        found = [alias for name in names for alias in _aliases(name) if f"backbone.{alias}" in paths]
        config["first_conv"] = f"backbone.{found[0]}" if found else None


def has_decoder(model: Segmenter, state_dict: Mapping[str, torch.Tensor]) -> bool:
    """True if weights have any tensor of the decoder."""
    return any(name.startswith(tuple(f"{path}." for path in model.head_modules())) for name in state_dict)


def with_new_decoder(model: Segmenter, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of a backbone with the tensors that the model's decoder has now; weights with a decoder unchanged."""
    if has_decoder(model, state_dict):
        return dict(state_dict)
    inserted = tuple(f"{path}." for path, module in model.named_modules() if hasattr(type(module), "grafted"))
    own = {name: value for name, value in model.state_dict().items() if not name.startswith(inserted)}
    return {**{name: value for name, value in own.items() if has_decoder(model, {name: value})}, **state_dict}


def published_weights(state_dict: Mapping[str, torch.Tensor], model: Segmenter) -> dict[str, torch.Tensor]:
    """The filter with which timm loads weights: those of the plain architecture as timm loads them into it.

    Raises:
        CheckpointError: they are those of another model.
    """
    if any(name.startswith("backbone.") for name in state_dict):
        return checkpoint_filter_fn(state_dict, model)
    config: Any = getattr(model, "pretrained_cfg", {})
    plain: Any = timm.get_pretrained_cfg(model.arch)
    overlay: dict[str, Any] = {"state_dict": dict(state_dict), "source": ""}
    classifier = plain and plain.classifier
    for name in (classifier,) if isinstance(classifier, str) else classifier or ():
        if f"{name}.weight" in state_dict:
            overlay["num_classes"] = state_dict[f"{name}.weight"].shape[0]
    # of a backbone with one map, timm adapts the first convolution to the channels of the images afterwards
    channels = {"in_chans": model.in_chans} if model.decoder.pyramid else {}
    try:
        built = timm.create_model(
            _tagged(model.arch, config.get("tag")),
            pretrained=True,
            pretrained_cfg_overlay=overlay,
            **{**model.arguments, **channels},
        )
    except RuntimeError as error:
        raise CheckpointError(f"these are no weights of {model.arch}: {' '.join(str(error).split())[:300]}") from error
    tensors = built.state_dict()
    return with_new_decoder(model, _renamed(tensors, model, tensors.keys()) or tensors)


def _tagged(arch: str, tag: str | None) -> str:
    """The name of an architecture with a tag, if it has one of that name."""
    return f"{arch}.{tag}" if tag and f"{arch}.{tag}" in timm.models.get_arch_pretrained_cfgs(arch) else arch


def _renamed(
    state: Mapping[str, torch.Tensor], model: Segmenter, plain_names: Iterable[str]
) -> dict[str, torch.Tensor] | None:
    """Weights of the plain architecture under the names of the backbone; None if they fill less than half of it.

    Tensors that neither the backbone nor the plain architecture has stay, so that a strict load reports them.
    """
    own = model.backbone.state_dict()
    sources = {alias: name for name in state for alias in _aliases(name)}
    for name in own:  # a ViT that pools its tokens has its last norm behind the pool, and now in front of the decoder
        if name.startswith("norm.") and f"fc_{name}" in state:
            sources.setdefault(name, f"fc_{name}")
    found = {name: sources[name] for name in own if name in sources}
    if len(found) * 2 < len(own):
        return None
    unknown = state.keys() - set(found.values()) - set(plain_names)
    return {f"backbone.{name}": state[source] for name, source in found.items()} | {
        f"backbone.{name}": state[name] for name in unknown
    }


def _aliases(name: str) -> Iterator[str]:
    """Names of a part of a timm model in its feature extractors, which may flatten sequences, and by itself."""
    yield from (f"model.{name.replace('.', '_', 1)}", f"model.{name}", f"model.model.{name}", name)


def _resized_positions(
    state: dict[str, torch.Tensor], model: Segmenter, convert: Callable[..., Any] | None
) -> dict[str, torch.Tensor]:
    own = model.backbone.state_dict()
    inner = {name.removeprefix("backbone."): value for name, value in state.items() if name.startswith("backbone.")}
    if convert is None or all(own[name].shape == value.shape for name, value in inner.items() if name in own):
        return state
    try:
        converted = {f"backbone.{name}": value for name, value in convert(dict(inner), model.backbone).items()}
    except Exception:  # the strict load reports what does not fit
        return state
    return {**state, **converted} if converted.keys() == {f"backbone.{name}" for name in inner} else state
