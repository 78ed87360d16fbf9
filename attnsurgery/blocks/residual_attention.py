"""Residual attention: a small encoder-decoder computes a mask from the whole map, which rescales the trunk's output.

Paper: Wang, Jiang, Qian, Yang, Li, Zhang, Wang, Tang, "Residual Attention Network for Image Classification",
CVPR 2017, arXiv:1704.06904. Names follow the paper: equation 3 is H = (1 + M) * T with the trunk T and the mask M,
figure 3 the mask, equations 4 to 6 the three ways to normalize it, and r is the number of units per scale.

Shape letters in this file:  B batch, C channels, K = width * C channels inside the mask, H W height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import fx, nn
from torch._jit_internal import is_scripting

from attnsurgery.blocks._base import BLOCKS, Block, Cost, Start
from attnsurgery.blocks.sizes import at_most
from attnsurgery.errors import OptionError

_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # new in 2.7

SMALLEST_AUTO = 4
"""Smallest side of the lowest map if the depth is 'auto'."""


class PreActUnit(nn.Module):
    """Residual unit with norm and activation before each convolution: 1x1 to K / 4, 3x3, and 1x1 to K, without biases.

    He, Zhang, Ren, Sun, "Identity Mappings in Deep Residual Networks", ECCV 2016, arXiv:1603.05027, figure 4 (e).

    Args:
        channels: number of channels of the input.
        out_channels: number of channels of the output; by default that of the input.
        stride: stride of the 3x3 convolution and of the shortcut.
        dilation: dilation of the 3x3 convolution.
        device: device of the parameters.
        dtype: dtype of the parameters.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        stride: int = 1,
        dilation: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        out_channels = out_channels or channels
        inner = max(1, out_channels // 4)
        self.norm1 = nn.BatchNorm2d(channels, device=device, dtype=dtype)
        self.conv1 = nn.Conv2d(channels, inner, 1, bias=False, device=device, dtype=dtype)
        self.norm2 = nn.BatchNorm2d(inner, device=device, dtype=dtype)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, dilation, dilation, bias=False, device=device, dtype=dtype)
        self.norm3 = nn.BatchNorm2d(inner, device=device, dtype=dtype)
        self.conv3 = nn.Conv2d(inner, out_channels, 1, bias=False, device=device, dtype=dtype)
        # one module for each use, because pt2e quantization expects a module to have one place in the graph
        self.act1, self.act2, self.act3 = (nn.ReLU(inplace=True) for _ in range(3))
        self.downsample = None
        if stride > 1 or out_channels != channels:
            self.downsample = nn.Conv2d(channels, out_channels, 1, stride, bias=False, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.act1(self.norm1(x))
        shortcut = x if self.downsample is None else self.downsample(y)
        y = self.conv1(y)
        y = self.conv2(self.act2(self.norm2(y)))
        y = self.conv3(self.act3(self.norm3(y)))
        return (
            shortcut + y
        )  # shortcut first: a sum has the memory format of its first term, and y can have a single channel


class _Units(nn.Sequential):
    """Units in a row; a class of its own, because plain Sequentials count as stages of a host."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for unit in self:
            x = unit(x)
        return x


def _units(count: int, channels: int, device: torch.device | str | None, dtype: torch.dtype | None) -> _Units:
    return _Units(*(PreActUnit(channels, device=device, dtype=dtype) for _ in range(count)))


def _halved(x: torch.Tensor) -> torch.Tensor:
    """Max pooling, 3x3 with stride 2 in ceil mode: (B, C, H, W) to (B, C, H // 2, W // 2); a side of 1 stays 1."""
    if not is_scripting():  # noqa: SIM102 (TorchScript needs two conditions)
        if _exporting():
            # the same for symbolic sizes; ceil mode would need to know whether they are odd
            below, right = 1 + at_most(x.shape[2], 1), 1 + at_most(x.shape[3], 1)
            return F.max_pool2d(F.pad(x, (0, right, 0, below), value=float("-inf")), 3, 2)
    return F.max_pool2d(x, [min(3, x.shape[2]), min(3, x.shape[3])], 2, ceil_mode=True)


def _unit_length(logits: torch.Tensor, eps: float) -> torch.Tensor:
    """Each position of (B, C, H, W) divided by its L2 norm over the channels."""
    # squares in half precision overflow from 256 on
    full = logits if logits.dtype == torch.float64 else logits.float()
    return (full * torch.rsqrt(full.square().sum(1, keepdim=True) + eps)).to(logits.dtype)


def _factor(mask: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """1 + alpha * mask."""
    factor = mask * alpha.to(mask.dtype)
    factor += 1.0
    return factor


# These depend on sizes and dtypes, which are unknown in a symbolic trace, so each stays one call.
for _name in ("_halved", "_unit_length", "_factor"):
    fx.wrap(_name)


class _Scale(nn.Module):
    """One scale of the mask: halve the map, apply units and all lower scales, and resize to the size of the input.

    Max pooling is 3x3 with stride 2, ceil mode and no padding, so n becomes n // 2. Upsampling is bilinear with aligned
    corners, to the size of the input. Each scale but the lowest has a skip connection of one unit.

    Args:
        channels: C of the input.
        width: K of the output; if it is less than C, a 1x1 convolution after the pooling reduces the channels.
        depth: number of scales from this one down, at least 1.
        r: number of units before and after the next scale; the lowest scale has 2r.
        device: device of the parameters.
        dtype: dtype of the parameters.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        depth: int,
        r: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.narrow = _narrowing(channels, width, device, dtype)
        self.down = _units(r, width, device, dtype)
        self.skip = _units(1, width, device, dtype) if depth > 1 else None
        self.below = _Scale(width, width, depth - 1, r, device, dtype) if depth > 1 else None
        self.up = _units(r, width, device, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down(self.narrow(_halved(x)))
        if self.below is not None and self.skip is not None:
            y = self.skip(y) + self.below(y)
        y = self.up(y)
        return F.interpolate(y, size=(x.shape[2], x.shape[3]), mode="bilinear", align_corners=True)


def _narrowing(channels: int, width: int, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Module:
    if width == channels:
        return nn.Identity()
    return nn.Conv2d(channels, width, 1, bias=False, device=device, dtype=dtype)


@BLOCKS.register("residual_attention")
class ResidualAttention(Block):
    """The factor 1 + alpha * M(x) of a span's output, where x is the span's input.

    The identity start has alpha = 0, so the factor is exactly 1, and the mask learns as soon as alpha is not 0.
    `start='paper'` is 1 + M without alpha. Convolutions are initialized as in He et al. 2015, arXiv:1502.01852.

    In the paper, each mask has a lowest map of 7 x 7: depth 3, 2 and 1 for maps of 56, 28 and 14. The depth 'auto'
    gives the same depths, and goes down to 4 x 4 for small images. The `t` of the paper, the number of units in the
    trunk, is the length of the span.

    The default backward of bilinear interpolation on CUDA is not deterministic; under
    `torch.use_deterministic_algorithms(True)` torch uses a slower one that is.

    Args:
        channels: C of the input and the output.
        depth: how often the map is halved; more than one position must remain. 0 applies 2r units at full size. 'auto'
            is the largest depth with a lowest map of at least 4 x 4, at the site where a recipe puts the block, and 1
            outside of a recipe.
        r: number of units per scale on the way down, and again on the way up.
        norm: how logits become the mask: 'mixed' is a sigmoid, 'channel' divides each position by its L2 norm over the
            channels, 'spatial' is a sigmoid of each channel standardized over the map.
        width: K / C, less than 1 for a narrower mask; 1 in the paper. K is rounded down and at least 1.
        start: 'identity' or 'paper'.
    """

    child_name = "residual_attention"
    model_suffix = "resattn"
    model_place = "trunk"
    gates = True

    def __init__(
        self,
        channels: int,
        *,
        depth: Annotated[int, Field(ge=0, le=8)] | Literal["auto"] = "auto",
        r: Annotated[int, Field(ge=1, le=16)] = 1,
        norm: Literal["mixed", "channel", "spatial"] = "mixed",
        width: Annotated[float, Field(gt=0, le=1)] = 1.0,
        start: Start = "identity",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        inner = max(1, int(channels * width))
        self.depth = 1 if depth == "auto" else depth
        self.r = r
        self.norm = norm
        self.eps = 1e-6  # added to norms and variances, which may be 0
        if self.depth > 0:
            self.mask: nn.Module = _Scale(channels, inner, self.depth, r, device, dtype)
        else:
            narrow = _narrowing(channels, inner, device, dtype)
            self.mask = _Units(narrow, *_units(2 * r, inner, device, dtype))
        self.norm1 = nn.BatchNorm2d(inner, device=device, dtype=dtype)
        self.conv1 = nn.Conv2d(inner, inner, 1, bias=False, device=device, dtype=dtype)
        self.norm2 = nn.BatchNorm2d(inner, device=device, dtype=dtype)
        self.conv2 = nn.Conv2d(inner, channels, 1, bias=False, device=device, dtype=dtype)
        self.act1, self.act2 = nn.ReLU(inplace=True), nn.ReLU(inplace=True)
        self.alpha = nn.Parameter(torch.zeros(1, device=device, dtype=dtype)) if start == "identity" else None
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = self.gates_of(x)
        if self.alpha is None:
            return mask + 1.0
        return _factor(mask, self.alpha)

    def gates_of(self, x: torch.Tensor) -> torch.Tensor:
        """The mask M of x, (B, C, H, W)."""
        y = self.conv1(self.act1(self.norm1(self.mask(x))))
        return self._normalized(self.conv2(self.act2(self.norm2(y))))

    def _normalized(self, logits: torch.Tensor) -> torch.Tensor:
        """Equations 4 to 6; a norm or deviation of 0 gives 0, or 1/2 after a sigmoid."""
        if self.norm == "channel":
            return _unit_length(logits, self.eps)
        if self.norm == "spatial":
            logits = torch.group_norm(logits, logits.shape[1], eps=self.eps)
        return torch.sigmoid(logits)

    @classmethod
    def fittings(cls, options: Mapping[str, Any], height: int, width: int) -> tuple[dict[str, Any], ...]:
        depth = options.get("depth", "auto")
        if depth == "auto":
            depth = max(0, (min(height, width) // SMALLEST_AUTO).bit_length() - 1)
        return ({**options, "depth": depth},)

    def check_map(self, height: int, width: int) -> None:
        if _lowest_positions(height, width, self.depth) > 1:
            return
        depths = [depth for depth in range(self.depth) if _lowest_positions(height, width, depth) > 1]
        advice = f"use depth: {depths[-1]} or an earlier stage" if depths else "use an earlier stage"
        raise OptionError(
            f"block 'residual_attention' with depth={self.depth} halves a map of {height} x {width} to "
            f"{height >> self.depth} x {width >> self.depth}, and needs two positions at least there: {advice}."
        )

    def cost(self, height: int, width: int) -> Cost:
        inner, channels = self.conv2.in_channels, self.conv2.out_channels
        unit = 2 * inner * max(1, inner // 4) + 9 * max(1, inner // 4) ** 2
        macs = height * width * (inner * inner + inner * channels)
        for scale in range(min(1, self.depth), self.depth + 1):
            units = 2 * self.r if scale == self.depth else 2 * self.r + 1
            macs += (height >> scale) * (width >> scale) * units * unit
        if inner != channels:
            first = min(1, self.depth)
            macs += (height >> first) * (width >> first) * channels * inner
        return Cost(macs=macs, attention_bytes=0)


def _lowest_positions(height: int, width: int, depth: int) -> int:
    return (height >> depth) * (width >> depth)
