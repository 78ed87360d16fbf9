"""Non-local block: every position of the map takes a weighted sum over all positions.

Paper: Wang, Girshick, Gupta, He, "Non-local Neural Networks", CVPR 2018, arXiv:1711.07971. Names follow the paper:
equation 1 is the weighted sum, equation 4 its embedded Gaussian weights, equation 6 the residual z = W_z y + x;
"sub-sampling" (section 3.3) pools what is summed over.

Shape letters in this file:  B batch, C channels, D = C / reduction, H W height and width, N = H * W positions,
M = positions left after sub-sampling.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from attnsurgery.blocks._base import BLOCKS, Block, Cost, Start
from attnsurgery.errors import OptionError


@BLOCKS.register("non_local")
class NonLocal(Block):
    """Softmax attention over positions, without ever holding the N x M matrix of weights.

    Embedded Gaussian weights are a softmax of theta . phi without the 1 / sqrt(D) of transformers, so the fused
    attention kernel of torch computes them exactly when it is told `scale=1`.

    The residual goes through a batch norm whose gamma is 0 at the start, as in the paper (section 4.1), so the block
    begins as the identity; W_z itself is not 0, for two zeros in a row never learn. `start='paper'` differs in
    the Gaussian(0, 0.01) weights only.

    Args:
        channels: C of the tensor this block is given and gives back.
        reduction: C / D, how much narrower the embeddings theta, phi and g are; 2 in the paper.
        subsample: side of the pooling window on phi and g; 1 sums over every position. Odd maps floor.
        subsample_op: the pooling, 'max' as in the paper or 'avg'.
        start: 'identity' or 'paper'.

    Raises:
        OptionError: `reduction` leaves no channel.
    """

    child_name = "non_local"
    model_suffix = "nonlocal"
    model_place = "before_last_block"

    def __init__(
        self,
        channels: int,
        *,
        reduction: Annotated[int, Field(ge=1, le=4096)] = 2,
        subsample: Annotated[int, Field(ge=1, le=64)] = 1,
        subsample_op: Literal["max", "avg"] = "max",
        start: Start = "identity",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        width = channels // reduction
        if width < 1:
            raise OptionError(
                f"block 'non_local' cannot take reduction={reduction} on {channels} channels: "
                f"no channel is left. The largest that works here is {channels}."
            )
        self.subsample = subsample
        self.theta = nn.Conv2d(channels, width, 1, device=device, dtype=dtype)
        self.phi = nn.Conv2d(channels, width, 1, device=device, dtype=dtype)
        self.g = nn.Conv2d(channels, width, 1, device=device, dtype=dtype)
        pool = nn.MaxPool2d if subsample_op == "max" else nn.AvgPool2d
        self.pool = pool(subsample) if subsample > 1 else nn.Identity()
        self.w_z = nn.Conv2d(width, channels, 1, device=device, dtype=dtype)
        self.norm = nn.BatchNorm2d(channels, device=device, dtype=dtype)
        nn.init.zeros_(self.norm.weight)
        if start == "paper":
            for conv in (self.theta, self.phi, self.g, self.w_z):
                nn.init.normal_(conv.weight, std=0.01)
                if conv.bias is not None:
                    nn.init.zeros_(conv.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # (B, D, h, w) -> (B, 1, h * w, D): the kernel is fused only where D is the contiguous dimension
        query = self.theta(x).flatten(2).transpose(1, 2).contiguous().unsqueeze(1)
        key = self.pool(self.phi(x)).flatten(2).transpose(1, 2).contiguous().unsqueeze(1)
        value = self.pool(self.g(x)).flatten(2).transpose(1, 2).contiguous().unsqueeze(1)
        y = F.scaled_dot_product_attention(query, key, value, scale=1.0)
        y = y.squeeze(1).transpose(1, 2).reshape(x.shape[0], -1, x.shape[2], x.shape[3])
        z: torch.Tensor = self.norm(self.w_z(y))
        return x + z

    def check_map(self, height: int, width: int) -> None:
        smallest = min(height, width)
        if height // self.subsample < 1 or width // self.subsample < 1:
            raise OptionError(
                f"block 'non_local' with subsample={self.subsample} needs a map of at least "
                f"{self.subsample} x {self.subsample}, and this one is {height} x {width}: "
                f"use subsample: {smallest} or less, or an earlier stage."
            )

    def cost(self, height: int, width: int) -> Cost:
        positions = height * width
        summed = (height // self.subsample) * (width // self.subsample)
        embedding = self.theta.weight.numel()
        return Cost(
            macs=positions * 4 * embedding + 2 * positions * summed * self.theta.out_channels,
            attention_bytes=4 * positions * summed,
        )
