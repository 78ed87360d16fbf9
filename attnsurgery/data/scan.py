"""Opens every image once before anything is trained, and says which are unreadable and which have to be converted.

A damaged file is found in the first minute and not after the last trial. A digest of each image's bytes and a thumbnail
serve to find copies in other splits (`attnsurgery.data.duplicates`).
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from attnsurgery.data.folder import formats
from attnsurgery.data.picture import Depth, Rendering, has_transparency, is_deep, is_turned, upright, values_of
from attnsurgery.data.source import Source
from attnsurgery.errors import SearchError

OnProgress = Callable[[int, int], None]

THUMB = 16
"""Pixels a side of the thumbnails."""
_THREADS = 4
_LISTED = 3
"""Number of unreadable images that the message lists."""
_MAYBE_DEEP = (".png", ".apng", ".tif", ".tiff", ".pgm", ".pnm", ".pfm", ".jp2", ".j2k", ".jpx", ".fits", ".fit", ".im")
"""Endings of files that may have more than 8 bits a channel."""
_THUMB_RENDERING = Rendering("L")
_POINTERS = {
    b"version https://git-lfs": "a Git LFS pointer and not the image itself; fetch it with 'git lfs pull'",
    b"/annex/objects/": "a pointer of git-annex and not the image itself; fetch it with 'git annex get'",
}
Thumbs = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, slots=True)
class Look:
    """Properties of one image, found by opening it."""

    digest: str = ""
    """Digest of the file's bytes; '' where there is no file."""
    thumb: bytes = b""
    """The thumbnail: THUMB x THUMB pixels in grey."""
    mode: str = ""
    """PIL's name of the colours."""
    turned: bool = False
    """Whether its EXIF data asks for another orientation than that of the pixels."""
    transparent: bool = False
    """Whether any pixel is transparent."""
    frames: int = 1
    """Number of frames of an animation."""
    values: Depth | None = None
    """The range of values of an image of more than 8 bits a channel."""
    problem: str = ""
    """Why it cannot be read; '' if it can."""


@dataclass(frozen=True)
class Scan:
    """Properties of all images of a source, in its order."""

    ids: tuple[str, ...]
    """Their names, as in the source."""
    looks: tuple[Look, ...]

    def thumbs(self) -> Thumbs:
        """The thumbnails as pixels, (N, THUMB * THUMB)."""
        flat = np.frombuffer(b"".join(look.thumb for look in self.looks), np.uint8)
        return flat.reshape(len(self.looks), -1)


def scan(source: Source, on_progress: OnProgress | None = None) -> Scan:
    """Open and decode every image once.

    Raises:
        SearchError: images that cannot be read; the message counts them and names the first.
    """
    looks: list[Look] = []
    with ThreadPoolExecutor(_THREADS) as pool:
        for count, look in enumerate(pool.map(lambda index: _look(source, index), range(len(source.ids))), start=1):
            looks.append(look)
            if on_progress and (count % 256 == 0 or count == len(source.ids)):
                on_progress(count, len(source.ids))
    outcomes = zip(source.ids, looks, strict=True)
    refuse_unreadable([f"{name} ({look.problem})" for name, look in outcomes if look.problem], len(looks))
    return Scan(source.ids, tuple(looks))


def refuse_unreadable(unreadable: Sequence[str], total: int) -> None:
    """
    Args:
        unreadable: names of images, with the reasons.
        total: number of images, for the message.

    Raises:
        SearchError: there is an unreadable image; the message counts them and lists the first.
    """
    if unreadable:
        listed = "; ".join(unreadable[:_LISTED]) + (" ..." if len(unreadable) > _LISTED else "")
        raise SearchError(f"{len(unreadable)} of {total} images cannot be read: {listed}. Remove or replace them.")


def brief(error: Exception) -> str:
    """The first line of a decoder's message, or else the class of the exception."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def depths(scans: Sequence[Scan]) -> tuple[Depth | None, Depth | None]:
    """The ranges of values of images of more than 8 bits, over all scans: of integers, and of floating-point numbers.

    Each is None where there are no such images.
    """
    looks = [look for scan in scans for look in scan.looks]
    return _depths((look.mode, look.values) for look in looks if look.values is not None)


def depths_of(sources: Sequence[Source]) -> tuple[Depth | None, Depth | None]:
    """As `depths`, without a scan: only files that may have more than 8 bits a channel are opened.

    Files that cannot be read are skipped; decoding reports them.
    """
    ranges: list[tuple[str, Depth]] = []
    for source, index in ((one, index) for one in sources for index in _maybe_deep(one)):
        try:
            with source.file(index) as file, Image.open(file, formats=formats()) as image:
                if is_deep(image):
                    ranges.append((image.mode, values_of(image)))
        except Exception:
            continue
    return _depths(ranges)


def _maybe_deep(source: Source) -> list[int]:
    """Indices of the images in files that may have more than 8 bits a channel, by their names."""
    names = [path.name for path in source.paths] or (source.ids if source.is_encoded else ())
    return [index for index, name in enumerate(names) if name.lower().endswith(_MAYBE_DEEP)]


def _depths(ranges: Any) -> tuple[Depth | None, Depth | None]:
    integers: list[Depth] = []
    floats: list[Depth] = []
    for mode, values in ranges:
        (floats if mode == "F" else integers).append(values)
    return Depth.over(integers), Depth.over(floats, integers=False)


def conversion_notes(scans: Sequence[Scan]) -> list[str]:
    """How images are converted on the way to the model's input, a line for each conversion; [] where there is none."""
    looks = [look for scan in scans for look in scan.looks]
    lines = []
    if turned := sum(look.turned for look in looks):
        lines.append(f"turned upright: {_image_count(turned, looks)}, as their EXIF data says")
    for depth, kind, is_float in zip(depths(scans), ("whole", "floating-point"), (False, True), strict=True):
        if depth is not None:
            count = sum(look.values is not None and (look.mode == "F") == is_float for look in looks)
            lines.append(
                f"scaled to 8 bits: {_image_count(count, looks)} of {kind} numbers, "
                f"{depth.describe()} becoming 0 to 255"
            )
    if transparent := sum(look.transparent for look in looks):
        lines.append(f"laid on white: {_image_count(transparent, looks)} with transparency")
    modes = Counter(look.mode for look in looks if look.mode in ("CMYK", "LAB", "YCbCr", "HSV"))
    lines += [f"converted to RGB: {_image_count(count, looks)} in {mode}" for mode, count in modes.items()]
    if several := sum(look.frames > 1 for look in looks):
        lines.append(f"first frame only: {_image_count(several, looks)} with several frames")
    return lines


def _image_count(count: int, looks: Sequence[Look]) -> str:
    return "all images" if count == len(looks) else f"{count:,} image{'s' if count > 1 else ''}"


def _look(source: Source, index: int) -> Look:
    try:
        if not source.is_encoded:
            return _look_at(source.open(index), "", turned=False)
        with source.file(index) as file:
            data = file.read()
        if pointer := next((problem for start, problem in _POINTERS.items() if data.startswith(start)), None):
            return Look(problem=pointer)
        digest = hashlib.blake2b(data, digest_size=16).hexdigest()
        with Image.open(io.BytesIO(data), formats=formats()) as image:
            turned = is_turned(image)
            image.draft("L", (4 * THUMB, 4 * THUMB))  # a JPEG file is read to its end, but not computed in full size
            frames = 1 if image.format == "MPO" else int(getattr(image, "n_frames", 1))  # a photo with a preview in it
            image.load()
            return _look_at(upright(image), digest, turned, frames)
    except UnidentifiedImageError:
        return Look(problem="its bytes are no image that PIL knows, whatever it is called")
    except Exception as error:  # whatever a decoder throws at a damaged file
        return Look(problem=brief(error))


def _look_at(image: Image.Image, digest: str, turned: bool, frames: int = 1) -> Look:
    small = _THUMB_RENDERING(image).resize((THUMB, THUMB), Image.Resampling.BOX)
    values = values_of(image) if is_deep(image) else None
    transparent = has_transparency(image) and _shows_through(image)
    return Look(digest, small.tobytes(), image.mode, turned, transparent, frames, values)


def _shows_through(image: Image.Image) -> bool:
    """Whether any pixel is transparent; an image may have an alpha channel that is opaque everywhere."""
    return bool(np.asarray(image.convert("RGBA").getchannel("A")).min() < 255)
