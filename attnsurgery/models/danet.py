"""The head of the dual attention network for segmentation.

Paper: Fu et al., "Dual Attention Network for Scene Segmentation", CVPR 2019, arXiv:1809.02983, figure 2. Widths,
dropout and the names of the children are those of the authors' release, so that its weights load.

Shape letters in this file:  B batch, C channels, H W height and width, K classes.
"""

from __future__ import annotations

import torch
from torch import nn

from attnsurgery.blocks.dual_attention import ChannelAttention, PositionAttention


class DANetHead(nn.Module):
    """(B, C, H, W) to three (B, K, H, W): the class scores of the fused map, of position and of channel attention.

    There are two branches, each with a 3x3 convolution to C / 4, attention with its residual, and another 3x3
    convolution; their sum is classified. The authors train on all three outputs and predict by the first.

    Args:
        in_channels: C of the backbone's last map, at least 32.
        classes: K.
        subsample: side of the max pooling window before position attention's keys and values.

    Raises:
        ValueError: C is less than 32, so no channel is left for position attention, whose width is C / 32.
    """

    def __init__(self, in_channels: int, classes: int, subsample: int = 1) -> None:
        super().__init__()
        width = in_channels // 4
        if width < 8:
            raise ValueError(f"DANetHead needs 32 channels at least, and was given {in_channels}.")
        self.conv5a, self.conv5c = _conv(in_channels, width), _conv(in_channels, width)
        self.sa, self.sc = PositionAttention(width, subsample=subsample), ChannelAttention()
        self.conv51, self.conv52 = _conv(width, width), _conv(width, width)
        self.conv6, self.conv7, self.conv8 = (
            nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(width, classes, 1)) for _ in range(3)
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        position, channel = self.conv5a(x), self.conv5c(x)
        position = self.conv51(self.sa(position, position))
        channel = self.conv52(self.sc(channel, channel))
        return self.conv8(position + channel), self.conv6(position), self.conv7(channel)


def _conv(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
