"""Convert a site's tensor to the (B, C, H, W) that blocks take, and back.

    NCHW   (B, C, H, W)   unchanged
    NHWC   (B, H, W, C)   permuted; a channels-last view
    NLC    (B, N, C)      a map of N x 1, or of H x W where the block needs the grid; prefix tokens are cut off before
                          and put back after

Each conversion is a list of tensor methods or one function of this file, so torch.fx graphs and generated source share
one table. None of them copies data.
"""

from __future__ import annotations

import torch
from timm.layers import register_notrace_function
from torch import fx

from attnsurgery.errors import SurgeryError
from attnsurgery.graph.site import Layout

Steps = tuple[tuple[str, tuple[int, ...]], ...]
"""Names of tensor methods with their arguments, applied in order."""

TO_NCHW: dict[Layout, Steps] = {
    "NCHW": (),
    "NHWC": (("permute", (0, 3, 1, 2)),),
    "NLC": (("transpose", (1, 2)), ("unsqueeze", (3,))),
}
FROM_NCHW: dict[Layout, Steps] = {
    "NCHW": (),
    "NHWC": (("permute", (0, 2, 3, 1)),),
    "NLC": (("squeeze", (3,)), ("transpose", (1, 2))),
}


def tokens_to_map(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, H * W, C) to (B, C, H, W), a channels-last view.

    Raises:
        SurgeryError: the number of tokens is not `height * width`.
    """
    return _tokens_to_map(tokens, height, width)


def _tokens_to_map(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    if tokens.shape[1] != height * width:
        raise SurgeryError(
            f"a block was put on a grid of {height}x{width}, and there are {tokens.shape[1]} tokens: the size of the "
            "images has changed since. Build the model at that size, by its name or recipe."
        )
    return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], height, width)


register_notrace_function(tokens_to_map)
fx.wrap("_tokens_to_map")  # any symbolic trace keeps it as one call, because it depends on the number of tokens


def map_to_tokens(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) to (B, H * W, C)."""
    return x.flatten(2).transpose(1, 2)


class Grid:
    """Height and width of a map in the current forward.

    The module that makes the map sets them, and modules that work on its tokens read them.
    """

    def __init__(self, height: int, width: int) -> None:
        self.height = height
        self.width = width
