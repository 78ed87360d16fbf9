"""Shifts and mirrors images of a batch, by whole pixels, and masks with them.

Shape letters in this file:  B images of a batch, C channels, H W height and width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from attnsurgery.data.augment import SHIFT


def augment_images(pixels_BCHW: torch.Tensor, flip: bool, generator: torch.Generator) -> torch.Tensor:
    """Each image shifted by its own random offset and, if `flip`, mirrored with probability 1/2."""
    batch, _, *size = pixels_BCHW.shape
    return apply_moves(
        pixels_BCHW, *(moves_B.to(pixels_BCHW.device) for moves_B in draw_moves(batch, size, flip, generator))
    )


def draw_moves(batch: int, size: Sequence[int], flip: bool, generator: torch.Generator) -> list[torch.Tensor]:
    """Random shifts and mirrorings of a batch.

    Returns:
        Row offset, column offset, and 1 where an image is mirrored, else 0; each (B,), on the host.
    """
    top_B, left_B = (torch.randint(2 * (side // SHIFT) + 1, (batch,), generator=generator) for side in size)
    mirror_B = torch.rand(batch, generator=generator) < (0.5 if flip else 0.0)
    return [top_B, left_B, mirror_B.long()]


def apply_moves(
    pixels_BCHW: torch.Tensor, top_B: torch.Tensor, left_B: torch.Tensor, mirror_B: torch.Tensor
) -> torch.Tensor:
    """Images shifted, with reflected borders, and mirrored, as `draw_moves` returns; (B, C, H, W) in float."""
    batch, _, height, width = pixels_BCHW.shape
    device = pixels_BCHW.device
    reach_h, reach_w = height // SHIFT, width // SHIFT
    columns_BW = torch.arange(width, device=device).expand(batch, -1)
    columns_BW = torch.where(mirror_B[:, None] > 0, width - 1 - columns_BW, columns_BW) + left_B[:, None]
    rows_BH = torch.arange(height, device=device) + top_B[:, None]
    padded = F.pad(pixels_BCHW.float(), (reach_w, reach_w, reach_h, reach_h), mode="reflect")
    index_B = torch.arange(batch, device=device)[:, None, None]
    shifted_BHWC = padded.permute(0, 2, 3, 1)[index_B, rows_BH[:, :, None], columns_BW[:, None, :]]
    return shifted_BHWC.permute(0, 3, 1, 2).contiguous()
