"""Non-local block: each position of the map gets a weighted sum over all positions.

Paper: Wang, Girshick, Gupta, He, "Non-local Neural Networks", CVPR 2018, arXiv:1711.07971. Names follow the paper:
equation 1 is the weighted sum, equations 2, 4, 5 and 6 its four kinds of weights, z = W_z y + x the residual;
"sub-sampling" (section 3.3) pools the positions that the sum runs over. `blocks/functional.py` computes the sums.

Shape letters in this file:  B batch, C channels, D = C / reduction, H W height and width, N = H * W positions,
M = positions left after sub-sampling.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from timm.layers import LayerNorm2d
from torch import fx, nn

from attnsurgery.blocks._base import BLOCKS, LARGEST_SUBSAMPLE, Block, Cost, Start, subsamplings
from attnsurgery.blocks.functional import (
    CONCATENATION_PRODUCT,
    attend,
    concatenate,
    dot_product,
    dot_product_by_matrix,
    softmax_by_matrix,
)
from attnsurgery.blocks.sizes import Pool
from attnsurgery.errors import OptionError

Mode = Literal["embedded_gaussian", "gaussian", "dot_product", "concatenation"]


@BLOCKS.register("non_local")
class NonLocal(Block):
    """Attention over positions in the paper's four modes, without storing the N x M weight matrix on large maps.

    Gaussian weights are a softmax of theta . phi, or of x . x, without the 1 / sqrt(D) of transformers. The other two
    modes divide by the number of positions in the sum.

    The residual branch ends in a norm whose gamma is 0 at the start, as in the paper (section 4.1), so the block starts
    as the identity. W_z is not 0, because two consecutive zeros never learn; it is 0 only without a norm.
    `start='paper'` differs only in the Gaussian(0, 0.01) weights.

    Args:
        channels: C of the input and the output.
        mode: 'embedded_gaussian', 'gaussian', 'dot_product' or 'concatenation'.
        reduction: C / D, by which the embeddings theta, phi and g are narrower; 2 in the paper.
        subsample: side of the pooling window on phi and g; 1 sums over all positions. A remainder of the map is cut
            off; on a map smaller than the window, it is as large as the map. 'auto' is the first of 1, 2, 4, 8 ... with
            which a recipe is within its `max_attention_mb`, and 1 without a limit or outside of a recipe.
        subsample_op: 'max' pooling as in the paper, or 'avg'.
        subsample_order: 'project_first', the paper's text, pools phi and g; 'pool_first', the authors' code, computes
            them from the pooled map, at a fraction of the cost. With 'avg' both are the same function.
        scale: factor of theta . phi in the softmax: 'none' is 1 as in the paper, 'inner' is D ** -0.5 as in the
            authors' code. In mode 'embedded_gaussian' only.
        norm: the norm after W_z: 'batch', 'layer' (over the channels of a position) or 'none'.
        start: 'identity' or 'paper'.

    Raises:
        OptionError: `reduction` leaves no channel, or the mode has no scale.
    """

    child_name = "non_local"
    model_suffix = "nonlocal"
    model_place = "before_last_block"

    def __init__(
        self,
        channels: int,
        *,
        mode: Mode = "embedded_gaussian",
        reduction: Annotated[int, Field(ge=1, le=4096)] = 2,
        subsample: Annotated[int, Field(ge=1, le=LARGEST_SUBSAMPLE)] | Literal["auto"] = 1,
        subsample_op: Literal["max", "avg"] = "max",
        subsample_order: Literal["project_first", "pool_first"] = "project_first",
        scale: Literal["none", "inner"] = "none",
        norm: Literal["batch", "layer", "none"] = "batch",
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
        if scale == "inner" and mode != "embedded_gaussian":
            raise OptionError(
                f"block 'non_local' cannot take scale='inner' with mode={mode!r}: only theta . phi under a softmax is "
                "scaled. Use scale: none, or mode: embedded_gaussian."
            )
        self.mode = mode
        self.subsample = window = 1 if subsample == "auto" else subsample
        # averages and 1x1 convolutions commute, so the cheaper order gives the same result
        self.pool_first = subsample_order == "pool_first" or subsample_op == "avg"
        self.scale = width**-0.5 if scale == "inner" else 1.0
        embedded = mode != "gaussian"
        concatenated = mode == "concatenation"
        conv = _FoldableConv if concatenated else nn.Conv2d
        self.theta: Any = conv(channels, width, 1, device=device, dtype=dtype) if embedded else nn.Identity()
        self.phi: Any = conv(channels, width, 1, device=device, dtype=dtype) if embedded else nn.Identity()
        self.g = nn.Conv2d(channels, width, 1, device=device, dtype=dtype)
        self.w_f: Any = _ReadableConv(2 * width, 1, 1, bias=False, device=device, dtype=dtype) if concatenated else None
        self.pool = Pool(window, average=subsample_op == "avg") if window > 1 else nn.Identity()
        self.w_z = nn.Conv2d(width, channels, 1, device=device, dtype=dtype)
        self.norm: nn.Module = nn.Identity()
        if norm != "none":
            norm_class = nn.BatchNorm2d if norm == "batch" else LayerNorm2d
            self.norm = norm_class(channels, device=device, dtype=dtype)
            nn.init.zeros_(self.norm.weight)
        if start == "paper":
            for child in self.children():
                if isinstance(child, nn.Conv2d):
                    nn.init.normal_(child.weight, std=0.01)
                    if child.bias is not None:
                        nn.init.zeros_(child.bias)
        if norm == "none":
            for parameter in self.w_z.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z: torch.Tensor = self.norm(self.w_z(self._weighted_sum(x)))
        return x + z

    def _weighted_sum(self, x: torch.Tensor) -> torch.Tensor:
        """y of equation 1, (B, D, H, W)."""
        summed = self.pool(x) if self.pool_first else x
        g = self._rows(self.g(summed) if self.pool_first else self.pool(self.g(summed)))
        if self.w_f is not None:
            a, b = self._scores(x, summed)
            y = concatenate(a, b, g)
        else:
            phi = self._rows(self.phi(summed) if self.pool_first else self.pool(self.phi(summed)))
            if self.mode == "dot_product":
                y = _dot_product(self._rows(self.theta(x)), phi, g)
            else:
                y = _gaussian(self._rows(self.theta(x)), phi, g, self.scale)
        return y.transpose(1, 2).reshape(x.shape[0], y.shape[2], x.shape[2], x.shape[3])

    def _rows(self, embedded: torch.Tensor) -> torch.Tensor:
        """(B, D, h, w) as (B, h * w, D)."""
        return embedded.flatten(2).transpose(1, 2)

    def _scores(self, x: torch.Tensor, summed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """a = w_theta . theta, (B, N), and b = w_phi . phi, (B, M); relu(a_i + b_j) is the weight of a pair."""
        w_theta, w_phi = self.w_f().chunk(2, dim=1)
        a = self.theta(x, w_theta)
        if self.pool_first or self.subsample == 1:
            return a, self.phi(summed, w_phi)
        return a, _to_one_channel(self.pool(self.phi(summed)), w_phi)

    def attention_from(self, x: torch.Tensor, row: int, column: int) -> torch.Tensor:
        """The weights of all positions in the sum of one position of (B, C, H, W): (B, H, W), pooled by `subsample`."""
        query = x[:, :, row : row + 1, column : column + 1]
        summed = self.pool(x) if self.pool_first else x
        size = (self.pool(x) if self.subsample > 1 else x).shape[2:]
        if self.w_f is not None:
            a, b = self._scores(query, summed)
            return (torch.relu(a + b) / b.shape[1]).reshape(len(x), *size)
        phi = self._rows(self.phi(summed) if self.pool_first else self.pool(self.phi(summed)))
        scores = torch.bmm(self._rows(self.theta(query)), phi.transpose(1, 2)).squeeze(1)
        weights = scores / phi.shape[1] if self.mode == "dot_product" else torch.softmax(scores * self.scale, dim=-1)
        return weights.reshape(len(x), *size)

    @classmethod
    def fittings(cls, options: Mapping[str, Any], height: int, width: int) -> tuple[dict[str, Any], ...]:
        return subsamplings(options, height, width)

    @classmethod
    def order_free(cls, options: Mapping[str, Any]) -> bool:
        return bool(options["subsample"] == 1)

    def check_map(self, height: int, width: int) -> None:
        if height * width == 1:
            raise OptionError(
                "block 'non_local' has no meaning on a map of 1 x 1: there is a single position, and nothing else to "
                "attend to. Use an earlier stage or a larger image."
            )
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
        narrow, channels = self.g.out_channels, self.g.in_channels
        embedding = narrow * channels
        pooled = summed if self.pool_first else positions  # number of positions for which phi and g are computed
        macs = (pooled + positions) * embedding  # g and w_z
        if self.mode == "gaussian":
            macs += positions * summed * (channels + narrow)
        elif self.mode == "concatenation":
            macs += embedding + positions * channels  # theta, folded into one map
            if pooled == summed:
                macs += embedding + summed * channels
            else:
                macs += pooled * embedding + summed * narrow
            if positions * summed <= CONCATENATION_PRODUCT:
                macs += positions * summed * narrow
        else:
            macs += (positions + pooled) * embedding
            if self.mode == "embedded_gaussian" or dot_product_by_matrix(positions, summed, narrow, narrow):
                macs += positions * summed * 2 * narrow
            else:
                macs += (positions + summed) * narrow * narrow
        return Cost(macs=macs, attention_bytes=4 * positions * summed)


# Parameters are only read in the forward of the module that holds them, because sharding and offloading wrappers
# provide them only while that forward runs.


class _FoldableConv(nn.Conv2d):
    """A 1x1 convolution from C to D channels that can be merged with a weighted sum over the D channels."""

    def forward(self, x: torch.Tensor, w: torch.Tensor | None = None) -> torch.Tensor:
        """(B, D, H, W), or with weights w (1, D) the weighted sum over channels, (B, H * W)."""
        if w is None:
            return self._conv_forward(x, self.weight, self.bias)  # type: ignore[no-any-return]
        return _fold(x, w, self.weight, self.bias)


class _ReadableConv(nn.Conv2d):
    """A 1x1 convolution that can also return its weights."""

    def forward(self, x: torch.Tensor | None = None) -> torch.Tensor:
        """The convolution of x; without x, a copy of the weights, (channels out, channels in)."""
        if x is None:
            return self.weight.flatten(1).clone()
        return self._conv_forward(x, self.weight, self.bias)  # type: ignore[no-any-return]


def _gaussian(theta: torch.Tensor, phi: torch.Tensor, g: torch.Tensor, scale: float) -> torch.Tensor:
    """`attend` in the dtype of g; under autocast, theta = phi = x in mode 'gaussian' may have another."""
    if not softmax_by_matrix(theta.shape[1], phi.shape[1]):
        phi, g = phi.to(g.dtype).contiguous(), g.contiguous()  # copied here, so that the originals can be freed
    return attend(theta.to(g.dtype), phi.to(g.dtype), g, scale)


def _dot_product(theta: torch.Tensor, phi: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return dot_product(theta, phi.to(g.dtype), g)


def _fold(x: torch.Tensor, w: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """w (1, D) times a 1x1 convolution of x to D channels, as one convolution to a single channel: (B, N)."""
    folded = torch.mm(w, weight.flatten(1)).reshape(1, -1, 1, 1)
    offset = None if bias is None else (w.flatten() * bias).sum().reshape(1)
    return F.conv2d(x, folded, offset).flatten(1)


def _to_one_channel(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """w (1, D) times x (B, D, H, W): (B, H * W)."""
    return F.conv2d(x, w.reshape(1, -1, 1, 1)).flatten(1)


# These depend on sizes and dtypes, which are unknown in a symbolic trace, so each stays one call.
for _name in ("_gaussian", "_dot_product", "_fold", "_to_one_channel", "concatenate"):
    fx.wrap(_name)
