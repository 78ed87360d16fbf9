"""Architectures of timm by name, built without weights."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models import get_arch_pretrained_cfgs, split_model_name_tag
from torch import nn

from attnsurgery.errors import UnknownNameError, UsageError, did_you_mean
from attnsurgery.graph.find import input_size_of


def check_base(name: str, field: str = "base") -> None:
    """Make sure that timm knows the architecture and its tag.

    Args:
        field: where the name stands, for the message.

    Raises:
        UnknownNameError: names the nearest architecture, or the tags that there are.
    """
    arch, tag = split_model_name_tag(name)
    if not timm.is_model(arch):
        near = did_you_mean(arch, timm.list_models())
        raise UnknownNameError(f"{field}: timm has no architecture {arch!r}.{near} All: timm.list_models().")
    tags = [cfg.partition(".")[2] for cfg in get_arch_pretrained_cfgs(arch)]
    if tag and tag not in tags:
        known = ", ".join(sorted(filter(None, tags))) or "none"
        raise UnknownNameError(f"{field}: {arch} has no tag {tag!r}.{did_you_mean(tag, tags)} Known: {known}.")


def for_images(name: str, img_size: tuple[int, int] | None) -> dict[str, Any]:
    """The arguments with which an architecture is built for images of (H, W); none where it takes them as it is.

    Raises:
        UsageError: it cannot be built for them.
    """
    if img_size is None or input_size_of(weightless(name))[1:] == tuple(img_size):
        return {}
    try:
        twin = _weightless(name, img_size=img_size).to("meta").eval()
        twin(torch.empty(1, input_size_of(twin)[0], *img_size, device="meta"))
    except TypeError:  # most families take images of any size, and no such argument
        return {}
    except (AssertionError, ValueError) as error:  # what constructors and forwards think of the size
        height, width = img_size
        said = f": {error}" if str(error) else ""
        raise UsageError(
            f"{name} cannot be built for images of {height} x {width}{said.rstrip('.')}. Choose a multiple of its "
            "patch size, and of its windows if it has such."
        ) from None
    return {"img_size": tuple(img_size)}


def weightless(name: str, img_size: tuple[int, int] | None = None) -> nn.Module:
    """The architecture, for its names and shapes; without memory where it can be.

    Args:
        img_size: (H, W) of the images, where its constructor wants to know; by default what it is made for.
    """
    if img_size is not None:
        try:
            return _weightless(name, img_size=img_size)
        except TypeError:  # most families take images of any size, and no such argument
            pass
    return _weightless(name)


def _weightless(name: str, **sizes: Any) -> nn.Module:
    try:
        with torch.device("meta"):
            twin: nn.Module = timm.create_model(name, **sizes)
            return twin
    except (NotImplementedError, RuntimeError):  # a constructor that looks at numbers
        model: nn.Module = timm.create_model(name, **sizes)
        return model
