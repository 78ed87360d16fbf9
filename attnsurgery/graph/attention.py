"""The attention that a model has of its own: which of its modules are attention, and what they cost.

Modules are recognized by the names of their classes, those of timm and of this package. A recipe can put another block
in place of such a module (`replace: true`) if its parent calls it once, with one tensor, and gets a tensor of the same
shape back. Modules that contain the convolution they attend to, such as selective kernels, are not of that kind, and
neither is the attention of a transformer, without which its blocks would mix no positions.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from attnsurgery.graph.trace import uncut_class
from attnsurgery.graph.twin import without_side_effects

OVER_CHANNELS = re.compile(
    r"SE[A-Z]|Squeeze|EffectiveS|Eca|Ceca|GlobalContext$|GatherExcite|(Light)?Cbam|(Simple)?CoordAttn|StripAttn|"
    r"EfficientLocalAttn|SelectiveKernel|SplitAttn"
)
OVER_POSITIONS = re.compile(
    r"(?!ChannelAtt|CrossCovariance)(\w*Attention|\w*Attn|\w*Lambda|NonLocal|MHSA|GPSA|LiteMLA)"
)
"""Beginnings of the class names of attention modules, of timm and of this package. The first takes precedence. Products
of queries and keys over channels (DaViT, XCiT) are neither: they do not scale channels as a gate does."""
_OTHER = re.compile(r"SelectiveKernel|SplitAttn|\w*Attention")
"""Beginnings of the names of those that have the convolution in them, or that work on tokens or windows."""


@dataclass(frozen=True, slots=True)
class OwnAttention:
    """An attention module of a model, whose place a block can take."""

    path: str
    """Path of the module."""
    kind: str
    """Name of its class."""
    params: int
    """Number of its parameters."""
    macs: int
    """Its multiply-accumulates for one image."""


def is_attention(module: nn.Module) -> bool:
    """Whether a module is attention that another block, or none, can stand in for."""
    name = uncut_class(module).__name__
    known = OVER_CHANNELS.match(name) or OVER_POSITIONS.match(name)
    return bool(known) and not _OTHER.match(name)


def own_attention(path: str, module: nn.Module, args: tuple[Any, ...]) -> OwnAttention:
    """What is known of an attention module.

    Args:
        path: of the module.
        module: the module, on the meta device.
        args: the arguments of its call on a batch of images.
    """
    params = sum(parameter.numel() for parameter in module.parameters())
    return OwnAttention(path, uncut_class(module).__name__, params, _macs(module, args))


def _macs(module: nn.Module, args: tuple[Any, ...]) -> int:
    """Multiply-accumulates of a module for one image, counted on a copy without the hooks of a recording."""
    twin = copy.deepcopy(module).requires_grad_(False)
    for part in twin.modules():
        part.__dict__.pop("forward", None)
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    counter = FlopCounterMode(display=False)
    with without_side_effects(), counter, torch.no_grad():
        twin(*(value[:1] if isinstance(value, torch.Tensor) else value for value in args))
    return int(counter.get_total_flops()) // 2
