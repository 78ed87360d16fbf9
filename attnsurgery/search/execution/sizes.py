"""The base at another input size: the same weights, resized where they depend on the size."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import nn

from attnsurgery.errors import UsageError
from attnsurgery.graph.anatomy import Anatomy
from attnsurgery.latency import LatencyBackend
from attnsurgery.search.budgets.calibrate import LatencyCache
from attnsurgery.search.space import Sides
from attnsurgery.timm_plugin.architectures import for_images


@dataclass(frozen=True)
class AtSize:
    """What trials at another input size than the base's own are made on."""

    size: Sides
    """Height and width of an image."""
    anatomy: Anatomy
    """The sites of the base at this size."""
    backend: LatencyBackend
    """Measures latencies at this size."""
    latency_cache: LatencyCache
    """Latencies at this size that this machine has measured before."""


def at_size(base: nn.Module, name: str, own: Sides, size: Sides) -> nn.Module:
    """The base for images of another size: itself if it takes images of any size, otherwise a resized copy.

    Position embeddings are interpolated as timm does it (`set_input_size`).

    Args:
        base: the model, which is not changed.
        name: its timm name.
        own: the size that it was built for.
        size: the size of the images.

    Raises:
        UsageError: its weights depend on the size and cannot be resized.
    """
    if size == own or not (for_images(name, size) or for_images(name, own)):
        return base
    if not hasattr(base, "set_input_size"):
        raise UsageError(
            f"{name} cannot be resized from {own[0]} x {own[1]} to {size[0]} x {size[1]} pixels, because its weights "
            "depend on the size of the images. Choose another MODEL, or a space without input_sizes."
        )
    resized = copy.deepcopy(base)
    resized.set_input_size(img_size=size)  # type: ignore[operator]
    return resized
