"""Squeeze-and-excitation: rescale each channel, or each position, by a gate computed from the image.

Papers: Hu, Shen, Sun, "Squeeze-and-Excitation Networks", CVPR 2018, arXiv:1709.01507, section 3;
Roy, Navab, Wachinger, "Concurrent Spatial and Channel Squeeze & Excitation", MICCAI 2018, arXiv:1803.02579.
Names follow the first: r is `reduction`; equation 2 is the squeeze, equation 3 the excitation, equation 4 the scaling.
Children are named as in timm's SEModule (fc1, fc2), so each loads the other's weights.

Shape letters in this file:  B batch, C channels, R = C / reduction, H W height and width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from timm.layers import create_act_layer, make_divisible
from torch import nn

from attnsurgery.blocks._base import BLOCKS, Block, Cost, Start
from attnsurgery.errors import OptionError

Activation = Literal["relu", "leaky_relu", "silu", "gelu", "hard_swish"]


@BLOCKS.register("se")
class SqueezeExcite(Block):
    """Scales each channel by a gate computed from all channels, each position by a gate computed from it, or both.

    The paper's gate is a sigmoid, which halves each channel of a new block. The identity start uses 2 * sigmoid with a
    zero last layer instead, so the gate is exactly 1. The factor 2 acts on a (B, C, 1, 1) or (B, 1, H, W) tensor, at a
    negligible cost. In `kind='scse'` the sum of the two gates is exactly 1 without it.

    Args:
        channels: C of the input and the output.
        kind: 'cse' gates channels (Hu et al.), 'sse' gates positions by a 1x1 convolution to one map, 'scse' does both
            (Roy et al., with a reduction of 2).
        fusion: how 'scse' combines its two results: 'add' for the sum, 'max' for the elementwise maximum.
        reduction: r of the paper; the width R is never 0.
        width: R itself, for models that do not derive it from C; it replaces `reduction` and `rounding`.
        bias: True for layers with biases, as in the authors' released models.
        rounding: 'timm' rounds R = C / r to a multiple of 8 as timm does; 'floor' is C // r.
        act: the activation between the two layers, 'relu' in the paper.
        gate: 'sigmoid' as in the paper, or the piecewise linear 'hardsigmoid' of MobileNetV3 (arXiv:1905.02244).
        max_pool: True squeezes by the mean of average and maximum, as timm's add_maxpool.
        start: 'identity', or 'paper' for the plain gate and default initialization.

    Raises:
        OptionError: `fusion`, `width` or `max_pool` has no meaning for the kind.
    """

    child_name = "se"
    slots = ("attn", "attn_last", "attn2", "attn3")
    model_suffix = "se"
    model_place = "branches"

    def __init__(
        self,
        channels: int,
        *,
        kind: Literal["cse", "sse", "scse"] = "cse",
        fusion: Literal["add", "max"] = "add",
        reduction: Annotated[int, Field(ge=1, le=4096)] = 16,
        width: Annotated[int, Field(ge=1, le=65536)] | None = None,
        bias: bool = True,
        rounding: Literal["timm", "floor"] = "timm",
        act: Activation = "relu",
        gate: Literal["sigmoid", "hardsigmoid"] = "sigmoid",
        max_pool: bool = False,
        start: Start = "identity",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if fusion != "add" and kind != "scse":
            raise OptionError(f"fusion={fusion!r} joins the two results of kind='scse'; kind={kind!r} has one.")
        if max_pool and kind == "sse":
            raise OptionError("max_pool=True pools over positions, and kind='sse' pools nothing. Use 'cse' or 'scse'.")
        if width and kind == "sse":
            raise OptionError("width is that of the two layers of kind='cse' or 'scse'; kind='sse' has none.")
        self.fc1 = self.act = self.fc2 = self.spatial = None
        if kind != "sse":
            squeezed = width or _width(channels, reduction, rounding)
            self.fc1 = nn.Conv2d(channels, squeezed, 1, bias=bias, device=device, dtype=dtype)
            self.act = create_act_layer(act, inplace=True)
            self.fc2 = nn.Conv2d(squeezed, channels, 1, bias=bias, device=device, dtype=dtype)
        if kind != "cse":
            self.spatial = nn.Conv2d(channels, 1, 1, bias=bias, device=device, dtype=dtype)
        self.max_pool = max_pool
        self.hard = gate == "hardsigmoid"
        self.larger = fusion == "max"
        self.gate_scale = 2.0 if start == "identity" and (kind != "scse" or fusion == "max") else 1.0
        if start == "identity":
            for last in (self.fc2, self.spatial):
                if last is not None:
                    for parameter in last.parameters():
                        nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.spatial is None:
            return x * self._channel_gate(x)
        # elif and else, because torch.jit.script drops a branch that is never taken, but not the code after an `if`
        elif self.fc1 is None:
            return x * self._gate(self.spatial(x))
        else:
            channel, spatial = self._channel_gate(x), self._gate(self.spatial(x))
            if self.larger:
                return torch.maximum(x * channel, x * spatial)
            return x * (channel + spatial)

    def _channel_gate(self, x: torch.Tensor) -> torch.Tensor:
        squeezed = x.mean((2, 3), keepdim=True)
        if self.max_pool:
            squeezed = 0.5 * squeezed + 0.5 * x.amax((2, 3), keepdim=True)
        return self._gate(self.fc2(self.act(self.fc1(squeezed))))  # type: ignore[misc]

    def _gate(self, excited: torch.Tensor) -> torch.Tensor:
        opened = nn.functional.hardsigmoid(excited) if self.hard else torch.sigmoid(excited)
        return opened * self.gate_scale

    def gates_of(self, x: torch.Tensor) -> torch.Tensor:
        """The gate of x, (B, C, H, W): (B, C) for kind 'cse', (B, H, W) for 'sse', (B, C, H, W) for 'scse'."""
        if self.spatial is None:
            return self._channel_gate(x).flatten(1)
        if self.fc1 is None:
            return self._gate(self.spatial(x)).squeeze(1)
        channel, spatial = self._channel_gate(x), self._gate(self.spatial(x))
        if self.larger:  # the maximum of the products, which for a negative x has the smaller gate
            return torch.where(x < 0, torch.minimum(channel, spatial), torch.maximum(channel, spatial))
        return channel + spatial

    @classmethod
    def order_free(cls, options: Mapping[str, Any]) -> bool:
        return True

    def cost(self, height: int, width: int) -> Cost:
        macs = 0
        if self.fc1 is not None and self.fc2 is not None:
            macs += self.fc1.weight.numel() + self.fc2.weight.numel()
        if self.spatial is not None:
            macs += self.spatial.weight.numel() * height * width
        return Cost(macs=macs, attention_bytes=0)

    def extra_repr(self) -> str:
        return f"gate={self.gate_scale:g}*{'hardsigmoid' if self.hard else 'sigmoid'}"


def _width(channels: int, reduction: int, rounding: str) -> int:
    if rounding == "timm":
        return int(make_divisible(channels / reduction, 8, round_limit=0.0))
    return max(1, channels // reduction)
