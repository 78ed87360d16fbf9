"""Turns decoded image files into upright images of 8 bits a channel without transparency.

A plain conversion to RGB makes three mistakes. It ignores the orientation that cameras store in the EXIF data. It clips
images of more than 8 bits a channel at 255. And it shows the colours of transparent pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

_ORIENTATION = 0x0112
_WHITE = (255, 255, 255)


@dataclass(frozen=True, slots=True)
class Depth:
    """The range of values of images of more than 8 bits a channel, the same for all images of a data set."""

    low: float
    """The value that becomes 0."""
    high: float
    """The value that becomes 255."""

    @classmethod
    def over(cls, ranges: Iterable[Depth], integers: bool = True) -> Depth | None:
        """A range that contains those of all images; None if there are no images.

        Args:
            ranges: the range of each image.
            integers: integers range from 0 to the largest number of as many bits as the largest value has, and
                floating-point numbers from 0 to 1 or 0 to 255 where they are within that.
        """
        depths = list(ranges)
        if not depths:
            return None
        low, high = min(depth.low for depth in depths), max(depth.high for depth in depths)
        if integers and low >= 0:
            return cls(0.0, float(2 ** max(8, math.ceil(math.log2(high + 1))) - 1))
        if not integers and low >= 0 and high <= 255:
            return cls(0.0, 1.0 if high <= 1 else 255.0)
        return cls(low, high)

    def describe(self) -> str:
        """Both ends of the range, in words."""
        return f"{self.low:g} to {self.high:g}"


@dataclass(frozen=True, slots=True)
class Rendering:
    """Converts decoded images to 8-bit ones in the colours that a model takes.

    Args:
        mode: PIL's name of these colours: L, RGB or RGBA.
        integers: the range of images of integers of more than 8 bits; None for the range of each image.
        floats: the range of images of floating-point numbers, likewise.
    """

    mode: str = "RGB"
    integers: Depth | None = None
    floats: Depth | None = None

    def __call__(self, image: Image.Image) -> Image.Image:
        """The image in `mode`; the original is unchanged."""
        if is_deep(image):
            image = self._scale(image)
        if self.mode == "RGBA":
            return image.convert("RGBA")
        if has_transparency(image):
            layer = image.convert("RGBA")
            ground = Image.new("RGBA", layer.size, (*_WHITE, 255))
            image = Image.alpha_composite(ground, layer).convert("RGB")
        elif image.mode == "LAB":
            image = _from_lab(image)
        return image.convert(self.mode)

    def _scale(self, image: Image.Image) -> Image.Image:
        integers = image.mode != "F"
        depth = (self.integers if integers else self.floats) or Depth.over([values_of(image)], integers)
        assert depth is not None, "an image has values"
        values_HW = np.nan_to_num(_array(image), nan=depth.low, posinf=depth.high, neginf=depth.low)
        shares_HW = (values_HW - depth.low) / ((depth.high - depth.low) or 1.0)
        return Image.fromarray(np.round(np.clip(shares_HW, 0.0, 1.0) * 255.0).astype(np.uint8))


def upright(image: Image.Image) -> Image.Image:
    """The image rotated and mirrored as its EXIF orientation says; unchanged where the EXIF data is damaged."""
    try:
        rotated = ImageOps.exif_transpose(image)
    except Exception:  # the parser raises anything for damaged tags, and the pixels are intact
        return image
    return rotated if rotated is not None else image


def is_turned(image: Image.Image) -> bool:
    """Whether the EXIF data asks for another orientation than that of the pixels."""
    try:
        return image.getexif().get(_ORIENTATION, 1) not in (0, 1)
    except Exception:
        return False


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of the image once it is `upright`; the pixels are not read."""
    try:
        swapped = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
    except Exception:  # as for `upright`
        swapped = False
    return (image.height, image.width) if swapped else image.size


def is_deep(image: Image.Image) -> bool:
    """Whether an image has one channel of more than 8 bits. PIL reads several such channels in 8 bits by itself."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def has_transparency(image: Image.Image) -> bool:
    """Whether pixels may be transparent, by an alpha channel or by a colour that is declared transparent."""
    return "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa")


def values_of(image: Image.Image) -> Depth:
    """The smallest and the largest finite value of an image that `is_deep`."""
    values_HW = _array(image)
    finite = values_HW[np.isfinite(values_HW)]
    return Depth(float(finite.min()), float(finite.max())) if len(finite) else Depth(0.0, 0.0)


def _array(image: Image.Image) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.asarray(image).astype(np.float64)


def _from_lab(image: Image.Image) -> Image.Image:
    """An RGB image from one in LAB, which PIL converts only by colour profiles."""
    from PIL import ImageCms

    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    assert converted is not None, "None is returned only for a conversion in place"
    return converted
