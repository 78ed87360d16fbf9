"""How a Site's tensor becomes the (B, C, H, W) that blocks take, and how it comes back.

The way there and back is a list of tensor methods, so that the same table serves torch.fx graphs and generated text.
None of them copies data.

    NCHW   (B, C, H, W)   as it is
    NHWC   (B, H, W, C)   permuted; a channels-last view
    NLC    (B, N, C)      a map of N x 1; prefix tokens are cut off before and put back after
"""

from __future__ import annotations

import math

from attnsurgery.graph.site import Layout

Steps = tuple[tuple[str, tuple[int, ...]], ...]

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


def guess_layout(shape: tuple[int, ...], image: tuple[int, int], channels_last: bool) -> Layout:
    """The layout of a tensor without batch, from its shape and the (H, W) of the image it was made of.

    A map keeps the proportions of the image, and channels know nothing of them: of the two ways to read three sizes,
    the one that shrinks height and width alike is right. `channels_last` decides where both do.
    """
    if len(shape) == 2:
        return "NLC"
    first, middle, last = shape
    as_nchw = abs(math.log((image[0] / middle) / (image[1] / last)))
    as_nhwc = abs(math.log((image[0] / first) / (image[1] / middle)))
    if as_nchw == as_nhwc:
        return "NHWC" if channels_last else "NCHW"
    return "NCHW" if as_nchw < as_nhwc else "NHWC"
