"""Squeeze-and-excitation: let each channel, or each position, see the rest of the image, then rescale itself.

Papers: Hu, Shen, Sun, "Squeeze-and-Excitation Networks", CVPR 2018, arXiv:1709.01507, section 3;
Roy, Navab, Wachinger, "Concurrent Spatial and Channel Squeeze & Excitation", MICCAI 2018, arXiv:1803.02579.
Names follow the first: r is `reduction`; equation 2 is the squeeze, equation 3 the excitation, equation 4 the scaling.
Children are named as in timm's SEModule (fc1, fc2), so that weights travel both ways.

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
    """Scales each channel by a number computed from all channels, each position by one computed at it, or both.

    The paper's gate is a sigmoid, which halves every channel of a fresh block. The identity start uses 2 * sigmoid with
    a zero last layer instead: the gate is then exactly 1, and the factor acts on a (B, C, 1, 1) or (B, 1, H, W) tensor,
    which is free. The sum of the two halves in `kind='scse'` is exactly 1 as it stands.

    Args:
        channels: C of the tensor this block is given and gives back.
        kind: 'cse' gates channels (Hu et al.), 'sse' gates positions by a 1x1 convolution to one map, 'scse' does both
            (Roy et al., with a reduction of 2).
        fusion: how 'scse' joins its two results: their sum, or elementwise the larger.
        reduction: r of the paper; the width R is never 0.
        width: R itself, for models that derive it from something other than C; replaces `reduction` and `rounding`.
        bias: biases of the layers; the authors' released models have them.
        rounding: R = C / r rounded to a multiple of 8 as timm does ('timm'), or plain C // r ('floor').
        act: the activation between the two layers; the paper's is 'relu'.
        gate: 'sigmoid' as in the paper, or the piecewise linear 'hardsigmoid' of MobileNetV3 (arXiv:1905.02244).
        max_pool: squeeze by the mean of average and maximum, as timm's add_maxpool does.
        start: 'identity', or 'paper' for the plain gate and default initialisation.

    Raises:
        OptionError: `fusion`, `width` or `max_pool` where the kind has no use for it.
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
        # not a plain `if`: torch.jit.script leaves out a branch that cannot be taken, but not what comes after it
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
        """What x, (B, C, H, W), is multiplied with: (B, C) of kind 'cse', (B, H, W) of 'sse', (B, C, H, W) of both."""
        if self.spatial is None:
            return self._channel_gate(x).flatten(1)
        if self.fc1 is None:
            return self._gate(self.spatial(x)).squeeze(1)
        channel, spatial = self._channel_gate(x), self._gate(self.spatial(x))
        if self.larger:  # of the products, so where x is negative the smaller gate
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
