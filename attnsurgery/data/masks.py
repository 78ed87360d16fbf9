"""Reads masks: for each pixel of an image, the number of its class.

Shape letters in this file:  N images of the split, H W height and width.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from attnsurgery.data.scan import brief
from attnsurgery.data.source import Masks, Source
from attnsurgery.errors import SearchError

_THREADS = 4


def read_mask(masks: Masks, index: int, size: tuple[int, int]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The mask of an image as uint8, (H, W), each pixel of the class of the nearest original one.

    Raises:
        SearchError: it cannot be read.
    """
    try:
        mask = masks.open(index)
    except SearchError:
        raise
    except Exception as error:
        raise SearchError(f"cannot read the mask {masks.paths[index]}: {brief(error)}") from None
    height, width = size
    return np.array(mask.resize((width, height), Image.Resampling.NEAREST), dtype=np.uint8)


def check_masks(source: Source, on_progress: Callable[[int, int], None] | None = None) -> None:
    """Open every mask once, if the images have masks.

    Raises:
        SearchError: masks that cannot be read or used; the message counts them and says what the first one lacks.
    """
    if source.masks is None:
        return
    masks, problems = source.masks, list[SearchError]()

    def check(index: int) -> SearchError | None:
        try:
            read_mask(masks, index, (1, 1))
        except SearchError as error:
            return error
        return None

    with ThreadPoolExecutor(_THREADS) as pool:
        for count, problem in enumerate(pool.map(check, range(len(source.ids))), start=1):
            problems += [] if problem is None else [problem]
            if on_progress and (count % 256 == 0 or count == len(source.ids)):
                on_progress(count, len(source.ids))
    if problems:
        more = f" {len(problems) - 1:,} other masks have problems too." if len(problems) > 1 else ""
        raise SearchError(f"{problems[0]}{more}")


def decode_masks(source: Source, size: tuple[int, int]) -> torch.Tensor:
    """The masks of all images as uint8, (N, H, W).

    Raises:
        SearchError: one cannot be read.
    """
    assert source.masks is not None, "the images have masks"
    masks_NHW = torch.empty((len(source.ids), *size), dtype=torch.uint8)
    read = partial(read_mask, source.masks, size=size)
    with ThreadPoolExecutor(_THREADS) as pool:
        for index, mask_HW in enumerate(pool.map(read, range(len(source.ids)))):
            masks_NHW[index] = torch.from_numpy(mask_HW)
    return masks_NHW
