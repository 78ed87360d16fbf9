"""Augmentations of training images by name; they do not depend on whether the images are in memory."""

from __future__ import annotations

from attnsurgery.settings import Augment

SHIFT = 8
"""A training image is shifted by at most 1/8 of its side, as is usual for small images."""
_DESCRIPTIONS: dict[Augment, str] = {
    "none": "as they are",
    "shift": f"shifted by up to 1/{SHIFT} of a side",
    "light": f"shifted by up to 1/{SHIFT} of a side, half of them mirrored left to right",
    "timm": "timm's random resized crops, half of them mirrored left to right",
}
NAMES: tuple[Augment, ...] = tuple(_DESCRIPTIONS)


def mirrors(augment: Augment) -> bool:
    """Whether this augmentation mirrors images left to right."""
    return augment in ("light", "timm")


def describe(augment: Augment) -> str:
    """What the augmentation does to training images, in words."""
    return _DESCRIPTIONS[augment]
