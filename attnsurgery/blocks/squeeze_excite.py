"""Squeeze-and-excitation: let each channel see the whole image, then rescale itself.

Paper: Hu, Shen, Sun, "Squeeze-and-Excitation Networks", CVPR 2018, arXiv:1709.01507, section 3.
Names follow the paper: r is `reduction`; equation 2 is the squeeze, equation 3 the excitation, equation 4 the scaling.
Children are named as in timm's SEModule (fc1, fc2), so that weights travel both ways.

Shape letters in this file:  B batch, C channels, R = C / reduction, H W height and width.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from timm.layers import make_divisible
from torch import nn

from attnsurgery.blocks._base import BLOCKS, Block, Cost, Start


@BLOCKS.register("se")
class SqueezeExcite(Block):
    """Scales each channel by a number computed from all channels.

    The paper's gate is a sigmoid, which halves every channel of a fresh block. The identity start uses 2 * sigmoid with
    a zero last layer instead: the gate is then exactly 1, and the factor acts on a (B, C, 1, 1) tensor, which is free.

    Args:
        channels: C of the tensor this block is given and gives back.
        reduction: r of the paper; the width R is never 0.
        bias: biases of the two layers; the authors' released models have them.
        rounding: R = C / r rounded to a multiple of 8 as timm does ('timm'), or plain C // r ('floor').
        start: 'identity', or 'paper' for the plain sigmoid and default initialisation.
    """

    child_name = "se"
    model_suffix = "se"
    model_place = "branches"

    def __init__(
        self,
        channels: int,
        *,
        reduction: Annotated[int, Field(ge=1, le=4096)] = 16,
        bias: bool = True,
        rounding: Literal["timm", "floor"] = "timm",
        start: Start = "identity",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if rounding == "timm":
            squeezed = make_divisible(channels / reduction, 8, round_limit=0.0)
        else:
            squeezed = max(1, channels // reduction)
        self.fc1 = nn.Conv2d(channels, squeezed, 1, bias=bias, device=device, dtype=dtype)
        self.act = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(squeezed, channels, 1, bias=bias, device=device, dtype=dtype)
        self.gate_scale = 2.0 if start == "identity" else 1.0
        if start == "identity":
            nn.init.zeros_(self.fc2.weight)
            if self.fc2.bias is not None:
                nn.init.zeros_(self.fc2.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        squeezed = x.mean((2, 3), keepdim=True)
        excited = self.fc2(self.act(self.fc1(squeezed)))
        return x * (torch.sigmoid(excited) * self.gate_scale)

    def cost(self, height: int, width: int) -> Cost:
        return Cost(macs=self.fc1.weight.numel() + self.fc2.weight.numel(), attention_bytes=0)

    def extra_repr(self) -> str:
        return f"gate={self.gate_scale:g}*sigmoid"
