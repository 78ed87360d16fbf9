"""Every image opened once, before anything is trained: what cannot be read, and what is not as it seems.

A damaged file is found in the first minute and not after the last trial; and of each image a digest of its bytes and a
small picture are kept, by which copies in other splits are found (`attnsurgery.evaluate.doubles`).
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

from attnsurgery.errors import SearchError
from attnsurgery.evaluate.folder import formats
from attnsurgery.evaluate.picture import Depth, Rendering, has_transparency, is_deep, is_turned, upright, values_of
from attnsurgery.evaluate.source import Source

OnProgress = Callable[[int, int], None]

THUMB = 16
"""Pixels a side of the small pictures."""
_THREADS = 4
_NAMED = 3
_MAYBE_DEEP = (".png", ".apng", ".tif", ".tiff", ".pgm", ".pnm", ".pfm", ".jp2", ".j2k", ".jpx", ".fits", ".fit", ".im")
_THUMB_RENDERING = Rendering("L")
_POINTERS = {
    b"version https://git-lfs": "a Git LFS pointer and not the image itself; fetch it with 'git lfs pull'",
    b"/annex/objects/": "a pointer of git-annex and not the image itself; fetch it with 'git annex get'",
}
Thumbs = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, slots=True)
class Look:
    """What is known of one image after it was opened."""

    digest: str = ""
    """Of the file's bytes; '' where there is no file."""
    thumb: bytes = b""
    """THUMB x THUMB pixels in grey."""
    mode: str = ""
    """PIL's name of its colours."""
    turned: bool = False
    transparent: bool = False
    frames: int = 1
    values: Depth | None = None
    """Of an image of more than 8 bits."""
    problem: str = ""
    """Why it cannot be read."""


@dataclass(frozen=True)
class Scan:
    """What is known of all images of a source, in its order."""

    ids: tuple[str, ...]
    looks: tuple[Look, ...]

    def thumbs(self) -> Thumbs:
        """(N, THUMB * THUMB) pixels."""
        flat = np.frombuffer(b"".join(look.thumb for look in self.looks), np.uint8)
        return flat.reshape(len(self.looks), -1)


def scan(source: Source, on_progress: OnProgress | None = None) -> Scan:
    """Open and decode every image once.

    Raises:
        SearchError: images that cannot be read; the message counts them and names the first.
    """
    looks: list[Look] = []
    with ThreadPoolExecutor(_THREADS) as pool:
        for done, look in enumerate(pool.map(lambda index: _look(source, index), range(len(source.ids))), start=1):
            looks.append(look)
            if on_progress and (done % 256 == 0 or done == len(source.ids)):
                on_progress(done, len(source.ids))
    named = zip(source.ids, looks, strict=True)
    refuse_unreadable([f"{name} ({look.problem})" for name, look in named if look.problem], len(looks))
    return Scan(source.ids, tuple(looks))


def refuse_unreadable(bad: Sequence[str], of: int) -> None:
    """
    Raises:
        SearchError: there is one.
    """
    if bad:
        listed = "; ".join(bad[:_NAMED]) + (" ..." if len(bad) > _NAMED else "")
        raise SearchError(f"{len(bad)} of {of} images cannot be read: {listed}. Remove or replace them.")


def why(error: Exception) -> str:
    """What a decoder says, in one line."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def depths(scans: Sequence[Scan]) -> tuple[Depth | None, Depth | None]:
    """The ranges of images of whole and of real numbers of more than 8 bits, over all scans."""
    looks = [look for one in scans for look in one.looks]
    return _depths((look.mode, look.values) for look in looks if look.values is not None)


def depths_of(sources: Sequence[Source]) -> tuple[Depth | None, Depth | None]:
    """The same without a scan: only files that may have more than 8 bits are opened, and only those that have decoded.

    What cannot be read is left to whoever decodes it.
    """
    found: list[tuple[str, Depth]] = []
    for path in (path for source in sources for path in source.paths if path.suffix.lower() in _MAYBE_DEEP):
        try:
            with Image.open(path, formats=formats()) as image:
                if is_deep(image):
                    found.append((image.mode, values_of(image)))
        except Exception:
            continue
    return _depths(found)


def _depths(found: Any) -> tuple[Depth | None, Depth | None]:
    whole: list[Depth] = []
    real: list[Depth] = []
    for mode, values in found:
        (real if mode == "F" else whole).append(values)
    return Depth.over(whole), Depth.over(real, whole=False)


def told(scans: Sequence[Scan]) -> list[str]:
    """What happens to images on the way to the model's input, a line each; nothing of images that are as they seem."""
    looks = [look for one in scans for look in one.looks]
    lines = []
    if turned := sum(look.turned for look in looks):
        lines.append(f"turned upright: {_some(turned, looks)}, as their EXIF data says")
    for depth, what, real in zip(depths(scans), ("whole", "floating-point"), (False, True), strict=True):
        if depth is not None:
            count = sum(look.values is not None and (look.mode == "F") == real for look in looks)
            lines.append(
                f"scaled to 8 bits: {_some(count, looks)} of {what} numbers, {depth.describe()} becoming 0 to 255"
            )
    if transparent := sum(look.transparent for look in looks):
        lines.append(f"laid on white: {_some(transparent, looks)} with transparency")
    others = Counter(look.mode for look in looks if look.mode in ("CMYK", "LAB", "YCbCr", "HSV"))
    lines += [f"converted to RGB: {_some(count, looks)} in {mode}" for mode, count in others.items()]
    if several := sum(look.frames > 1 for look in looks):
        lines.append(f"first frame only: {_some(several, looks)} with several frames")
    return lines


def _some(count: int, looks: Sequence[Look]) -> str:
    return "all images" if count == len(looks) else f"{count:,} image{'s' if count > 1 else ''}"


def _look(source: Source, index: int) -> Look:
    try:
        if not source.paths:
            return _seen(source.open(index), "", turned=False)
        data = source.paths[index].read_bytes()
        if pointer := next((what for start, what in _POINTERS.items() if data.startswith(start)), None):
            return Look(problem=pointer)
        digest = hashlib.blake2b(data, digest_size=16).hexdigest()
        with Image.open(io.BytesIO(data), formats=formats()) as image:
            turned = is_turned(image)
            image.draft("L", (4 * THUMB, 4 * THUMB))  # a JPEG file is read to its end, but not computed in full size
            frames = 1 if image.format == "MPO" else int(getattr(image, "n_frames", 1))  # a photo with a preview in it
            image.load()
            return _seen(upright(image), digest, turned, frames)
    except UnidentifiedImageError:
        return Look(problem="its bytes are no image that PIL knows, whatever it is called")
    except Exception as error:  # whatever a decoder throws at a damaged file
        return Look(problem=why(error))


def _seen(image: Image.Image, digest: str, turned: bool, frames: int = 1) -> Look:
    small = _THUMB_RENDERING(image).resize((THUMB, THUMB), Image.Resampling.BOX)
    values = values_of(image) if is_deep(image) else None
    transparent = has_transparency(image) and _shows_through(image)
    return Look(digest, small.tobytes(), image.mode, turned, transparent, frames, values)


def _shows_through(image: Image.Image) -> bool:
    """Whether any pixel is transparent in fact."""
    return bool(np.asarray(image.convert("RGBA").getchannel("A")).min() < 255)
