"""What is specific to each of timm's attention modules: identity start, options and supported maps.

`timm_attn` generates the blocks from these tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

Options = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Kind:
    """Properties of one of timm's modules that its class does not declare."""

    zero: tuple[str, ...] = ()
    """Paths of the last layers, which start at zero; paths that do not exist with the given options are skipped."""
    gates: tuple[str, ...] = ()
    """Paths of the gates, which are doubled."""
    residual: Callable[[Options], bool] = lambda options: False
    """True if zeros alone give no identity that can learn."""
    hidden: tuple[str, ...] = ()
    """Arguments that are no options, because timm ignores them or they change the shape of the map."""
    odd: tuple[str, ...] = ()
    """Options that are sizes of kernels, which must be odd to keep the shape of the map."""
    relayouts: bool = False
    """True if timm's output has another memory format than the input."""
    attention: Callable[[Any, int, int], int] = lambda block, height, width: 0
    """Number of elements of the largest attention-like activation for one map of H x W."""
    example: Options = field(default_factory=dict)
    """See `TimmAttention.example`."""
    unsupported: Mapping[str, str] = field(default_factory=dict)
    """See `TimmAttention.unsupported`."""
    order_free: bool = False
    """True if the order of positions makes no difference."""


def _always(options: Options) -> bool:
    return True


def _skips(options: Options) -> bool:
    """x + gate * x is the identity only if the gate is 0, and two consecutive gates of 0 never learn."""
    return bool(options["has_skip"])


_KERNEL = ("kernel_size",)
_RESHAPING = ("out_channels", "dim_out", "stride", "padding", "dilation")
_MLP = ("kernel_size", "use_mlp", "rd_ratio", "rd_channels", "rd_divisor")

KINDS: dict[str, Kind] = {
    "se": Kind(order_free=True, zero=("fc2",), gates=("gate",)),
    "ese": Kind(order_free=True, zero=("fc",), gates=("gate",)),
    "eca": Kind(order_free=True, zero=("conv",), gates=("gate",), hidden=_MLP),
    "ecam": Kind(order_free=True, zero=("conv2",), gates=("gate",), hidden=_KERNEL),
    "ceca": Kind(order_free=True, zero=("conv",), gates=("gate",), hidden=_KERNEL),
    "ge": Kind(
        zero=("mlp.fc2",),
        gates=("gate",),
        hidden=("feat_size", "extra_params", "use_mlp"),
    ),
    "gc": Kind(order_free=True, zero=("mlp_scale.fc2", "mlp_add.fc2"), gates=("gate",), hidden=("init_last_zero",)),
    "gca": Kind(order_free=True, zero=("mlp_add.fc2",), hidden=("init_last_zero", "gate_layer")),
    "cbam": Kind(
        zero=("channel.fc2", "spatial.conv.bn"), gates=("channel.gate", "spatial.gate"), odd=("spatial_kernel_size",)
    ),
    "lcbam": Kind(
        example={"rd_channels": 8},
        zero=("channel.fc2", "spatial.conv.bn"),
        gates=("spatial.gate",),
        hidden=("gate_layer",),
        odd=("spatial_kernel_size",),
    ),
    "coord": Kind(zero=("conv_h", "conv_w"), gates=("gate",), residual=_skips),
    "scoord": Kind(zero=("fc_h", "fc_w"), gates=("gate",), residual=_skips),
    "ela": Kind(zero=("norm_h", "norm_w"), gates=("gate",), residual=_skips, odd=_KERNEL),
    "strip": Kind(
        zero=("conv_h", "conv_w"),
        gates=("gate",),
        residual=lambda options: bool(options["has_skip"] or not options["use_conv"]),
        odd=_KERNEL,
    ),
    "sk": Kind(
        residual=_always,
        relayouts=True,
        hidden=(*_RESHAPING[:-1], "kernel_size"),
        unsupported={"one_image": "its batch norm gets one value per channel and image, so training needs two images"},
    ),
    "splat": Kind(residual=_always, relayouts=True, hidden=_RESHAPING, odd=_KERNEL),
    "lambda": Kind(
        residual=_always,
        relayouts=True,
        hidden=(*_RESHAPING, "feat_size", "qk_ratio"),
        odd=("r",),
        attention=lambda block, height, width: height * width * block.dim_qk * block.dim_v,
    ),
    "bottleneck": Kind(
        example={"feat_size": 8},
        unsupported={"any_size": "it learns an embedding of the positions of one square map"},
        residual=_always,
        relayouts=True,
        hidden=_RESHAPING,
        attention=lambda block, height, width: block.num_heads * (height * width) ** 2,
    ),
    "halo": Kind(
        example={"block_size": 4},
        unsupported={"any_size": "height and width must be multiples of block_size"},
        residual=_always,
        relayouts=True,
        hidden=(*_RESHAPING, "feat_size", "avg_down"),
        attention=lambda block, height, width: block.num_heads * height * width * block.win_size**2,
    ),
    "nl": Kind(
        order_free=True,
        relayouts=True,
        attention=lambda block, height, width: (height * width) ** 2,
        unsupported={"linear_memory": "timm stores the N x N weights; the block 'non_local' does not"},
    ),
    "bat": Kind(
        example={"block_size": 4},
        unsupported={"any_size": "height and width must be multiples of block_size"},
        residual=_always,
        relayouts=True,
        attention=lambda block, height, width: block.ba.in_channels * max(height, width) ** 2,
    ),
}


_COUNT = Annotated[int, Field(ge=1, le=65536)]
_SHARE = Annotated[float, Field(gt=0, le=16)]
_RATE = Annotated[float, Field(ge=0, lt=1)]

OPTIONS: dict[str, tuple[Any, str]] = {
    "rd_ratio": (_SHARE, "the reduced width as a share of C."),
    "rd_channels": (_COUNT | None, "the reduced width itself; replaces `rd_ratio`."),
    "rd_divisor": (_COUNT, "the reduced width is rounded to a multiple of this."),
    "add_maxpool": (bool, "pool by the mean of average and maximum."),
    "bias": (bool, "biases of the layers."),
    "mlp_bias": (bool, "biases of the channel attention's layers."),
    "gate_layer": (Literal["sigmoid", "hard_sigmoid"], "the gate: 'sigmoid' or 'hard_sigmoid'."),
    "gamma": (_SHARE, "divisor in the kernel size, (log2(C) + beta) / gamma."),
    "beta": (Annotated[float, Field(ge=0, le=64)], "see `gamma`."),
    "extent": (Annotated[int, Field(ge=0, le=64, multiple_of=2)], "side of the gathered area; 0 is the whole map."),
    "use_attn": (bool, "pool by attention instead of the mean."),
    "fuse_add": (bool, "add the transformed context."),
    "fuse_scale": (bool, "multiply by a gate of the transformed context."),
    "spatial_kernel_size": (_COUNT, "kernel of the spatial attention; odd."),
    "kernel_size": (_COUNT, "size of the kernels; odd."),
    "se_factor": (_SHARE, "factor of `rd_ratio`."),
    "has_skip": (bool, "add the input to the output."),
    "use_conv": (bool, "refine the pooled strips by depthwise convolutions."),
    "use_scale": (bool, "divide the dot products by the square root of C."),
    "block_size": (_COUNT, "side of a block of positions; divides height and width."),
    "halo_size": (
        Annotated[int, Field(ge=0, le=256)],
        "by how much the neighbourhood of a block is wider on each side.",
    ),
    "groups": (_COUNT, "groups of channels."),
    "drop_rate": (_RATE, "dropout of the residual."),
    "dilation": (_COUNT, "dilation of the convolutions."),
    "keep_3x3": (bool, "replace larger kernels by dilated 3x3 ones."),
    "split_input": (bool, "split the channels over the paths."),
    "radix": (_COUNT, "number of splits."),
    "num_heads": (_COUNT, "number of heads; divides C."),
    "dim_head": (_COUNT | None, "width of a head's queries and keys."),
    "qk_ratio": (_SHARE, "width of queries and keys as a share of C, if `dim_head` is not set."),
    "qkv_bias": (bool, "biases of queries, keys and values."),
    "scale_pos_embed": (bool, "scale the position embedding as well."),
    "feat_size": (_COUNT | None, "side of the square map; a recipe sets it by the site."),
    "r": (_COUNT, "side of the local neighbourhood; odd."),
}
