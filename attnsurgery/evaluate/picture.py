"""A decoded image file as the pixels that its owner sees: upright, in 8 bits a channel, without transparency.

Three things go wrong where an image is simply converted to RGB. Cameras store a photo as the sensor saw it and its
orientation beside it, in the EXIF tag. Images of more than 8 bits a channel are cut off at 255. And of what is
transparent there are pixels too, whose colours nobody was meant to see.
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
    """Which values of images of more than 8 bits a channel become 0 and 255; the same for all images of a data set."""

    low: float
    high: float

    @classmethod
    def over(cls, ranges: Iterable[Depth], whole: bool = True) -> Depth | None:
        """One that holds the values of all images; None if there are none.

        Args:
            whole: values are whole numbers: from 0 to the largest number of as many bits as the largest value has.
                Else they are taken as 0 to 1 or 0 to 255 where they are within that.
        """
        found = list(ranges)
        if not found:
            return None
        low, high = min(one.low for one in found), max(one.high for one in found)
        if whole and low >= 0:
            return cls(0.0, float(2 ** max(8, math.ceil(math.log2(high + 1))) - 1))
        if not whole and low >= 0 and high <= 255:
            return cls(0.0, 1.0 if high <= 1 else 255.0)
        return cls(low, high)

    def describe(self) -> str:
        return f"{self.low:g} to {self.high:g}"


@dataclass(frozen=True, slots=True)
class Rendering:
    """How decoded images become 8-bit ones in the colours that a model takes.

    Args:
        mode: PIL's name of these colours: L, RGB or RGBA.
        whole: for images of whole numbers of more than 8 bits; None where it is not known: the image's own range.
        real: for images of floating-point numbers, likewise.
    """

    mode: str = "RGB"
    whole: Depth | None = None
    real: Depth | None = None

    def __call__(self, image: Image.Image) -> Image.Image:
        """An image of `mode`; the one given is left alone."""
        if is_deep(image):
            image = self._scaled(image)
        if self.mode == "RGBA":
            return image.convert("RGBA")
        if has_transparency(image):
            layer = image.convert("RGBA")
            ground = Image.new("RGBA", layer.size, (*_WHITE, 255))
            image = Image.alpha_composite(ground, layer).convert("RGB")
        elif image.mode == "LAB":
            image = _from_lab(image)
        return image.convert(self.mode)

    def _scaled(self, image: Image.Image) -> Image.Image:
        whole = image.mode != "F"
        depth = (self.whole if whole else self.real) or Depth.over([values_of(image)], whole)
        assert depth is not None, "an image has values"
        values_HW = np.nan_to_num(_array(image), nan=depth.low, posinf=depth.high, neginf=depth.low)
        shares_HW = (values_HW - depth.low) / ((depth.high - depth.low) or 1.0)
        return Image.fromarray(np.round(np.clip(shares_HW, 0.0, 1.0) * 255.0).astype(np.uint8))


def upright(image: Image.Image) -> Image.Image:
    """Turned and mirrored as its EXIF orientation says; an image whose EXIF data is damaged is taken as it is."""
    try:
        turned = ImageOps.exif_transpose(image)
    except Exception:  # whatever a parser throws at damaged tags; the pixels are sound all the same
        return image
    return turned if turned is not None else image


def is_turned(image: Image.Image) -> bool:
    """Whether its EXIF data asks for another orientation than that of the pixels."""
    try:
        return image.getexif().get(_ORIENTATION, 1) not in (0, 1)
    except Exception:
        return False


def is_deep(image: Image.Image) -> bool:
    """Whether it has one channel of more than 8 bits. PIL itself reads several of them in 8 bits."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def has_transparency(image: Image.Image) -> bool:
    """Whether pixels may be transparent, by a channel of their own or by a colour that stands for it."""
    return "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa")


def values_of(image: Image.Image) -> Depth:
    """The least and the largest finite value of an image that `is_deep`."""
    values_HW = _array(image)
    finite = values_HW[np.isfinite(values_HW)]
    return Depth(float(finite.min()), float(finite.max())) if len(finite) else Depth(0.0, 0.0)


def _array(image: Image.Image) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.asarray(image).astype(np.float64)


def _from_lab(image: Image.Image) -> Image.Image:
    """PIL converts this one mode by colour profiles alone."""
    from PIL import ImageCms

    there, here = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    turned = ImageCms.profileToProfile(image, there, here, outputMode="RGB")
    assert turned is not None, "it is not done in place"
    return turned
