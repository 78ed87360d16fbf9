"""Backbones of segmentation models: any timm architecture with a last map of a given stride.

Families differ in what `forward_features` returns: (B, C, h, w), (B, h, w, C) as in Swin, or tokens as in ViT, with
class and register tokens in front. The form and the stride are found by one forward of a twin without weights.

Shape letters in this file:  B batch, C channels, H W height and width of the images, h w of the map.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import timm
import torch
from torch import nn

from attnsurgery.errors import UsageError
from attnsurgery.graph.find import input_size_of

STRIDES = (8, 16, 32)
"""The strides that names of segmentation models may end with."""

_UNSUPPORTED = (TypeError, AssertionError, ValueError, NotImplementedError, RuntimeError, KeyError)
"""What constructors of timm raise for an output stride that they do not have."""


@dataclass(frozen=True, slots=True)
class MapForm:
    """The form of an architecture's last features.

    Args:
        layout: 'NCHW', 'NHWC', or 'NLC' for tokens.
        channels: C.
        stride: pixels of the image per position of the map, along each side.
        prefix_tokens: number of tokens in front of those of the map.
    """

    layout: Literal["NCHW", "NHWC", "NLC"]
    channels: int
    stride: int
    prefix_tokens: int = 0

    def as_map(self, features: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Features as a map (B, C, h, w).

        Args:
            features: what `forward_features` returns for images.
            size: (H, W) of the images.
        """
        if self.layout == "NHWC":
            return features.permute(0, 3, 1, 2)
        if self.layout == "NLC":
            tokens = features[:, self.prefix_tokens :]
            height, width = (-(-side // self.stride) for side in size)
            if height * width != tokens.shape[1]:  # a stem that leaves out the pixels beyond its last patch
                height, width = (side // self.stride for side in size)
            return tokens.transpose(1, 2).reshape(tokens.shape[0], self.channels, height, width)
        return features


def build_backbone(arch: str, stride: int, decoder: str, in_chans: int = 3, **kwargs: Any) -> tuple[nn.Module, MapForm]:
    """A timm model without classifier whose `forward_features` gives a map of a stride.

    Modules that `forward_features` does not run, such as the norm in the head of a ConvNeXt, are replaced by
    nn.Identity, so that every parameter gets a gradient.

    Args:
        arch: the architecture, plain or surgical.
        stride: pixels of the image per position of the map: 8, 16 or 32.
        decoder: the name of the decoder, for messages.
        in_chans: number of channels of the images.
        kwargs: other arguments of the architecture, such as `img_size`.

    Raises:
        UsageError: the architecture has no map of this stride.
    """
    plain = {"num_classes": 0, "global_pool": "", "in_chans": in_chans, **kwargs}
    try:
        twin = on_meta(lambda: timm.create_model(arch, **plain))
    except AssertionError:  # an architecture that cannot be without its pool, which is taken out below
        del plain["global_pool"]
        twin = on_meta(lambda: timm.create_model(arch, **plain))
    features, unused = _run(twin, arch)
    form = _form(twin, features)
    if form is None or form.stride != stride:
        found = _with_output_stride(arch, stride, plain)
        if found is None:
            raise UsageError(_no_stride(arch, stride, decoder, form, plain))
        twin, form, unused = found
        plain["output_stride"] = stride
    backbone: nn.Module = timm.create_model(arch, **plain)
    _take_out(backbone, unused)
    return backbone, form


def nearest_stride(arch: str, decoder: str) -> int:
    """The stride of an architecture's last map that is 16, or else the nearest to it that it can have.

    Args:
        arch: the architecture, plain or surgical.
        decoder: the name of the decoder, for messages.

    Raises:
        UsageError: it has none.
    """
    for stride in (16, 32, 8):
        try:
            on_meta(partial(_backbone, arch, stride, decoder))
        except UsageError as error:
            problem = error
        else:
            return stride
    raise problem


def _backbone(arch: str, stride: int, decoder: str) -> nn.Module:
    return build_backbone(arch, stride, decoder)[0]


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """A model in eval mode on the meta device, for its names and shapes alone."""
    with torch.random.fork_rng(devices=[]):  # a constructor that cannot run on the meta device draws random numbers
        try:
            with torch.device("meta"):
                return build().eval()
        except (NotImplementedError, RuntimeError):  # it computes with values
            return build().to("meta").eval()


def plain_twin(arch: str) -> nn.Module:
    """The complete architecture with its classifier, on the meta device."""
    return on_meta(lambda: timm.create_model(arch))


def stride_of(size: tuple[int, int], map_size: tuple[int, int]) -> int | None:
    """The stride between images and a map, (H, W) each; None if it is none, or not the same along both sides."""
    strides = {round(side / length) for side, length in zip(size, map_size, strict=True) if length}
    stride = strides.pop() if len(strides) == 1 else 0
    if stride and all(m in (s // stride, -(-s // stride)) for s, m in zip(size, map_size, strict=True)):
        return stride
    return None


def _with_output_stride(
    arch: str, stride: int, plain: Mapping[str, Any]
) -> tuple[nn.Module, MapForm, tuple[str, ...]] | None:
    """The twin with dilated stages, if the architecture can have such a map."""
    try:
        twin = on_meta(lambda: timm.create_model(arch, **plain, output_stride=stride))
    except _UNSUPPORTED:
        return None
    features, unused = _run(twin, arch)
    form = _form(twin, features)
    return (twin, form, unused) if form is not None and form.stride == stride else None


def _no_stride(arch: str, stride: int, decoder: str, native: MapForm | None, plain: Mapping[str, Any]) -> str:
    names = [
        f"{arch}_{decoder}{other}"
        for other in STRIDES
        if (native is not None and native.stride == other) or _with_output_stride(arch, other, plain)
    ]
    has = f"its last map has a stride of {native.stride}" if native else "its last features are no map"
    instead = f"Use {' or '.join(names)}." if names else "It supports none of the strides 8, 16 and 32."
    return (
        f"{arch} cannot be the backbone of {arch}_{decoder}{stride}: {has}, and it cannot be built with an output "
        f"stride of {stride}. {instead}"
    )


def _run(twin: nn.Module, arch: str) -> tuple[Any, tuple[str, ...]]:
    """The features of one image on the meta device, and the names of parameters that they do not depend on."""
    forward_features: Callable[..., Any] | None = getattr(twin, "forward_features", None)
    if forward_features is None:
        raise UsageError(f"{arch} cannot be a backbone: it has no method forward_features, which timm's models have.")
    features = forward_features(torch.empty(1, *input_size_of(twin), device="meta"))
    if not isinstance(features, torch.Tensor) or not features.requires_grad:
        return features, ()
    parameters = dict(twin.named_parameters())
    gradients = torch.autograd.grad(features.sum(), list(parameters.values()), allow_unused=True)
    return features, tuple(name for name, grad in zip(parameters, gradients, strict=True) if grad is None)


def _form(twin: nn.Module, features: Any) -> MapForm | None:
    """The form of features; None if they are no map."""
    size = input_size_of(twin)[1:]
    if not isinstance(features, torch.Tensor):
        return None
    if features.ndim == 3:
        prefix = int(getattr(twin, "num_prefix_tokens", 0))
        length = features.shape[1] - prefix
        stride = round((size[0] * size[1] / length) ** 0.5) if length > 0 else 0
        is_grid = stride and length == -(-size[0] // stride) * -(-size[1] // stride)
        return MapForm("NLC", features.shape[2], stride, prefix) if is_grid else None
    if features.ndim != 4:
        return None
    channels = getattr(twin, "num_features", None)
    is_last = features.shape[1] != channels and features.shape[3] == channels
    last = is_last or getattr(twin, "output_fmt", None) == "NHWC"
    height, width = features.shape[1:3] if last else features.shape[2:]
    found = stride_of(size, (height, width))
    return MapForm("NHWC" if last else "NCHW", features.shape[3 if last else 1], found) if found else None


def _take_out(backbone: nn.Module, unused: tuple[str, ...]) -> None:
    """Replace the modules all of whose parameters are unused."""
    names = set(unused)
    for path, module in list(backbone.named_modules()):
        own = {f"{path}.{name}" for name, _ in module.named_parameters()}
        if path and own and own <= names:
            names -= own
            parent, _, child = path.rpartition(".")
            setattr(backbone.get_submodule(parent), child, nn.Identity())
