"""Dual attention: every position attends to all positions, and every channel to all channels.

Paper: Fu, Liu, Tian, Li, Bao, Fang, Lu, "Dual Attention Network for Scene Segmentation", CVPR 2019, arXiv:1809.02983.
Names follow the paper: section 3.2 is position attention (equations 1 and 2), section 3.3 channel attention (equations
3 and 4); alpha and beta are the two `gamma`. Children are named as in the authors' release, so that its weights load.

Shape letters in this file:  B batch, C channels, H W height and width, N = H * W positions, M = positions left after
sub-sampling.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import fx, nn

from attnsurgery.blocks._base import BLOCKS, LARGEST_SUBSAMPLE, Block, Cost, Start, subsamplings
from attnsurgery.blocks.functional import attend, attend_channels
from attnsurgery.blocks.sizes import Pool
from attnsurgery.errors import OptionError

Energy = Literal["code", "paper"]


class PositionAttention(nn.Module):
    """The position attention module: of x and y, both (B, C, H, W), y + gamma * attention(x).

    The softmax is over q . k without a scale. The N x M matrix is not stored on large maps.

    Args:
        channels: C.
        reduction: C divided by the width of queries and keys.
        subsample: side of the max pooling window before keys and values; 1 attends to all positions.
        device: device of the parameters.
        dtype: dtype of the parameters.
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 8,
        subsample: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        width = channels // reduction
        self.query_conv = nn.Conv2d(channels, width, 1, device=device, dtype=dtype)
        self.key_conv = nn.Conv2d(channels, width, 1, device=device, dtype=dtype)
        self.value_conv = nn.Conv2d(channels, channels, 1, device=device, dtype=dtype)
        self.pool = Pool(subsample) if subsample > 1 else nn.Identity()
        self.gamma = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        pooled = self.pool(x)
        query = self.query_conv(x).flatten(2).transpose(1, 2)
        key = self.key_conv(pooled).flatten(2).transpose(1, 2)
        value = self.value_conv(pooled).flatten(2).transpose(1, 2)
        return add_weighted(y, self.gamma, attend(query, key, value).transpose(1, 2).reshape(x.shape))

    def attention_from(self, x: torch.Tensor, row: int, column: int) -> torch.Tensor:
        """The weights of all positions in the sum of one position of (B, C, H, W): (B, H, W), pooled by `subsample`."""
        pooled = self.pool(x)
        query = self.query_conv(x[:, :, row : row + 1, column : column + 1]).flatten(2).transpose(1, 2)
        weights = torch.softmax(torch.bmm(query, self.key_conv(pooled).flatten(2)), dim=-1)
        return weights.reshape(len(x), *pooled.shape[2:])


class ChannelAttention(nn.Module):
    """The channel attention module: of x and y, both (B, C, H, W), y + gamma * attention(x).

    Args:
        energy: 'code' for softmax(max(E) - E) as in the authors' release, or 'paper' for softmax(E).
        device: device of the parameter.
        dtype: dtype of the parameter.
    """

    def __init__(
        self,
        energy: Energy = "code",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.paper = energy == "paper"
        self.gamma = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return add_weighted(y, self.gamma, attend_channels(x.flatten(2), self.paper).reshape(x.shape))


def add_weighted(x: torch.Tensor, gamma: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
    """x + gamma * branch in one pass; exactly x at gamma = 0."""
    return torch.addcmul(x, gamma.to(x.dtype), branch.to(x.dtype))


# These depend on sizes and dtypes, which are unknown in a symbolic trace, so each stays one call.
for _name in ("attend", "attend_channels", "add_weighted"):
    fx.wrap(_name)


@BLOCKS.register("dual")
class DualAttention(Block):
    """Adds position attention and channel attention to a map, each through a weight that starts at 0.

    y = x + gamma_p * position(x) + gamma_c * channel(x). At gamma = 0 it is the identity, and only the gammas learn.

    Args:
        channels: C of the input and the output.
        parts: 'both', 'position' or 'channel'.
        fusion: 'shared_residual', the sum above; 'sequential', channel attention on the result of position attention;
            'paper_sum', the sum of the paper's two residual modules, which is 2 x at gamma = 0.
        reduction: C divided by the width of position attention's queries and keys; 8 in the authors' release.
        subsample: side of the max pooling window before position attention's keys and values; 1 attends to all
            positions. A remainder of the map is cut off; on a map smaller than the window, it is as large as the map.
            'auto' is the first of 1, 2, 4, 8 ... with which a recipe is within its `max_attention_mb`, and 1 without a
            limit or outside of a recipe.
        cam_energy: energy of channel attention: 'code' for the authors' softmax(max(E) - E), 'paper' for softmax(E).
        start: 'identity', or 'paper', which is the same start and allows 'paper_sum'.

    Raises:
        OptionError: `reduction` leaves no channel, or 'paper_sum' has an identity start.
    """

    child_name = "dual"
    model_suffix = "dual"
    model_place = "last"

    def __init__(
        self,
        channels: int,
        *,
        parts: Literal["both", "position", "channel"] = "both",
        fusion: Literal["shared_residual", "sequential", "paper_sum"] = "shared_residual",
        reduction: Annotated[int, Field(ge=1, le=4096)] = 8,
        subsample: Annotated[int, Field(ge=1, le=LARGEST_SUBSAMPLE)] | Literal["auto"] = 1,
        cam_energy: Energy = "code",
        start: Start = "identity",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if fusion == "paper_sum" and start == "identity":
            raise OptionError(
                "block 'dual' cannot take fusion='paper_sum' with start='identity': the sum of two residual modules is "
                "2 x at gamma = 0, which no host in front of its own convolutions expects. Use fusion: shared_residual "
                "(x is added once) or start: paper."
            )
        if parts != "channel" and channels // reduction < 1:
            raise OptionError(
                f"block 'dual' cannot take reduction={reduction} on {channels} channels: "
                f"no channel is left. The largest that works here is {channels}."
            )
        self.channels = channels
        self.subsample = window = 1 if subsample == "auto" else subsample
        self.sequential = fusion == "sequential"
        self.twice = fusion == "paper_sum" and parts == "both"
        with_position, with_channel = parts != "channel", parts != "position"
        self.sa = PositionAttention(channels, reduction, window, device, dtype) if with_position else None
        self.sc = ChannelAttention(cam_energy, device, dtype) if with_channel else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x + x if self.twice else x
        if self.sa is not None:
            y = self.sa(x, y)
        if self.sc is not None:
            y = self.sc(y if self.sequential else x, y)
        return y

    def attention_from(self, x: torch.Tensor, row: int, column: int) -> torch.Tensor:
        """The weights of the position attention; see `PositionAttention.attention_from`.

        Raises:
            OptionError: the block has no position attention.
        """
        if self.sa is None:
            raise OptionError("block 'dual' with parts: channel attends to channels, and to no position.")
        weights: torch.Tensor = self.sa.attention_from(x, row, column)
        return weights

    @classmethod
    def fittings(cls, options: Mapping[str, Any], height: int, width: int) -> tuple[dict[str, Any], ...]:
        return subsamplings(options, height, width)

    @classmethod
    def order_free(cls, options: Mapping[str, Any]) -> bool:
        return bool(options["parts"] == "channel" or options["subsample"] == 1)

    def check_map(self, height: int, width: int) -> None:
        if self.sa is None:
            return
        if height * width == 1:
            raise OptionError(
                "block 'dual' has no position to attend to on a map of 1 x 1. "
                "Use parts: channel, an earlier stage or a larger image."
            )
        if min(height, width) < self.subsample:
            raise OptionError(
                f"block 'dual' with subsample={self.subsample} needs a map of at least "
                f"{self.subsample} x {self.subsample}, and this one is {height} x {width}: "
                f"use subsample: {min(height, width)} or less, or an earlier stage."
            )

    def cost(self, height: int, width: int) -> Cost:
        positions, channels = height * width, self.channels
        macs = attention = 0
        if self.sa is not None:
            narrow = self.sa.query_conv.out_channels
            summed = (height // self.subsample) * (width // self.subsample)
            macs += positions * channels * narrow + summed * channels * (narrow + channels)
            macs += positions * summed * (narrow + channels)
            attention = positions * summed
        if self.sc is not None:
            macs += 2 * channels * channels * positions
            attention = max(attention, channels * channels)
        return Cost(macs=macs, attention_bytes=4 * attention)
