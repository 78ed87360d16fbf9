"""Architectures of timm by name, built without weights."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models import get_arch_pretrained_cfgs, split_model_name_tag
from torch import nn

from attnsurgery.errors import UnknownNameError, UsageError, did_you_mean
from attnsurgery.graph.find import input_size_of
from attnsurgery.timm_plugin import segmentation


def check_base(name: str, field: str = "base") -> None:
    """Check that timm knows an architecture and its tag.

    Args:
        name: the architecture, with or without a tag.
        field: the origin of the name, for the message.

    Raises:
        UnknownNameError: the message has the nearest architecture, or the existing tags.
    """
    arch, tag = split_model_name_tag(name)
    if not timm.is_model(arch):
        near = segmentation.hint(arch) or did_you_mean(arch, timm.list_models())
        raise UnknownNameError(f"{field}: timm has no architecture {arch!r}.{near} All: timm.list_models().")
    tags = [cfg.partition(".")[2] for cfg in get_arch_pretrained_cfgs(arch)]
    if tag and tag not in tags:
        known = ", ".join(sorted(filter(None, tags))) or "none"
        raise UnknownNameError(f"{field}: {arch} has no tag {tag!r}.{did_you_mean(tag, tags)} Known: {known}.")


def for_images(name: str, img_size: tuple[int, int] | None) -> dict[str, Any]:
    """The arguments to build an architecture for images of a size; {} where it needs none.

    Args:
        name: the architecture.
        img_size: (H, W) of the images; None for the architecture's own size.

    Raises:
        UsageError: it cannot be built for such images.
    """
    if img_size is None or input_size_of(weightless(name))[1:] == tuple(img_size):
        return {}
    try:
        twin = _weightless(name, img_size=img_size).to("meta").eval()
        twin(torch.empty(1, input_size_of(twin)[0], *img_size, device="meta"))
    except TypeError:  # most families take images of any size and do not have this argument
        return {}
    except (AssertionError, ValueError) as error:  # a constructor or forward pass rejects the size
        height, width = img_size
        detail = f": {error}" if str(error) else ""
        raise UsageError(
            f"{name} cannot be built for images of {height} x {width}{detail.rstrip('.')}. Choose a multiple of its "
            "patch size, and of its window size if it has windows."
        ) from None
    return {"img_size": tuple(img_size)}


def weightless(name: str, img_size: tuple[int, int] | None = None) -> nn.Module:
    """A model for its names and shapes alone: on the meta device if possible.

    Args:
        name: the architecture.
        img_size: (H, W) of the images, for constructors with this argument; by default the architecture's own size.
    """
    if img_size is not None:
        try:
            return _weightless(name, img_size=img_size)
        except TypeError:  # most families take images of any size and do not have this argument
            pass
    return _weightless(name)


def _weightless(name: str, **sizes: Any) -> nn.Module:
    try:
        with torch.device("meta"):
            twin: nn.Module = timm.create_model(name, **sizes)
            return twin
    except (NotImplementedError, RuntimeError):  # a constructor that computes with values
        model: nn.Module = timm.create_model(name, **sizes)
        return model
