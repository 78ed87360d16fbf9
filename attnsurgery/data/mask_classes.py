"""The classes of masks: their names in `classes.txt`, and the numbers that the pixels of a mask stand for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from attnsurgery.data.folder import formats
from attnsurgery.data.source import IGNORED
from attnsurgery.errors import SearchError

CLASSES = "classes.txt"
_VOID = ("void", "ignore", "ignored", "unlabelled", "unlabeled", "unlabel")
"""Names of classes whose pixels do not count."""
_MOST_CLASSES = 200
"""Masks with more values than this hold something else than classes."""
_THREADS = 4
Mask = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class NamedClasses:
    """What `classes.txt` says."""

    names: tuple[str, ...]
    void: tuple[str, ...]
    """Names of classes that do not count."""
    values: Mask
    """(256,) by value in a mask, the number of the class, or `IGNORED`."""
    colours: dict[tuple[int, int, int], int]
    """By colour, the value; {} where masks are not in colours."""
    lines: int
    """Number of classes with those that do not count."""

    def convert(self, mask: Image.Image, path: Path) -> Mask:
        """The numbers of classes in a mask, (H, W).

        Raises:
            SearchError: it has a value or a colour that is no class.
        """
        if not self.colours:
            return by_value(self.values, mask, path, self.lines)
        pixels = np.asarray(mask.convert("RGB")).astype(np.int64)
        codes = (pixels[..., 0] << 16) | (pixels[..., 1] << 8) | pixels[..., 2]
        known = {(r << 16) | (g << 8) | b: value for (r, g, b), value in self.colours.items()}
        present, places = np.unique(codes, return_inverse=True)
        if unknown := [code for code in present.tolist() if code not in known]:
            raise SearchError(
                f"{path} has the colour #{unknown[0]:06x} ({len(unknown)} colours in all), which {CLASSES} gives to no "
                "class. Lossy formats such as JPEG change colours: save masks as PNG."
            )
        numbers = np.array([self.values[known[code]] for code in present.tolist()], np.uint8)
        result: Mask = numbers[places].reshape(codes.shape)
        return result


def read_classes(root: Path) -> NamedClasses | None:
    """What `classes.txt` says; None if there is none.

    Raises:
        SearchError: a line is not a name with or without a colour, or only some have one.
    """
    path = root / CLASSES
    if not path.is_file():
        return None
    entries = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    parsed = [_entry(line, path) for line in entries if line and not line.startswith("//")]
    if len(parsed) > IGNORED:
        raise SearchError(f"{path} has {len(parsed)} classes, and a mask of 8 bits can hold {IGNORED}.")
    if len({colour is None for _, colour in parsed}) > 1:
        raise SearchError(f"{path} gives a colour to some classes and none to others. Give one to each or to none.")
    values = np.full(256, IGNORED, np.uint8)
    names: list[str] = []
    void: list[str] = []
    for value, (name, _) in enumerate(parsed):
        if name.lower() in _VOID:
            void.append(name)
        else:
            values[value] = len(names)
            names.append(name)
    colours = {colour: value for value, (_, colour) in enumerate(parsed) if colour is not None}
    return NamedClasses(tuple(names), tuple(void), values, colours, len(parsed))


def _entry(line: str, path: Path) -> tuple[str, tuple[int, int, int] | None]:
    """The name of a class and its colour, if there is one."""
    if match := re.fullmatch(r"(.+?)[\s,;]+#([0-9a-fA-F]{6})", line):
        code = int(match[2], 16)
        return match[1], (code >> 16, code >> 8 & 255, code & 255)
    if match := re.fullmatch(r"(.+?)[\s,;]+(\d{1,3})[\s,;]+(\d{1,3})[\s,;]+(\d{1,3})", line):
        red, green, blue = (int(match[index]) for index in (2, 3, 4))
        if max(red, green, blue) > 255:
            raise SearchError(f"{path}: {line!r}: a colour has three numbers from 0 to 255.")
        return match[1], (red, green, blue)
    return line, None


def classes_in_masks(paths: Sequence[Path]) -> tuple[tuple[str, ...], Mask]:
    """The classes that occur in masks, called by their numbers, and by value in a mask the number of the class.

    Masks with the values 0 and 255 alone are of one thing: background and object.

    Raises:
        SearchError: a mask cannot be read, is in colours, or has more values than there are classes.
    """
    present = list(_values_in(tuple((path, path.stat().st_mtime_ns) for path in paths)))
    if present == [0, IGNORED]:
        values = np.full(256, IGNORED, np.uint8)
        values[0], values[IGNORED] = 0, 1
        return ("background", "object"), values
    numbers = [value for value in present if value != IGNORED]
    if len(numbers) > _MOST_CLASSES:
        raise SearchError(
            f"the masks, such as {paths[0]}, hold {len(numbers)} different values, which are hardly classes. A pixel "
            f"of a mask is the number of its class; {CLASSES} beside the folders may name classes and their colours."
        )
    values = np.full(256, IGNORED, np.uint8)
    last = max(numbers, default=-1)
    values[: last + 1] = np.arange(last + 1)
    return tuple(map(str, range(last + 1))), values


@lru_cache(maxsize=4)
def _values_in(files: tuple[tuple[Path, int], ...]) -> tuple[int, ...]:
    """The values that occur in masks, in ascending order.

    Args:
        files: the masks, with their modification times.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        return tuple(sorted(set().union(*pool.map(_values_of, [path for path, _ in files]))))


def _values_of(path: Path) -> set[int]:
    return set(np.unique(_plane(read(path), path)).tolist())


def by_value(values: Mask, mask: Image.Image, path: Path, classes: int = 256) -> Mask:
    """The numbers of classes in a mask whose pixels are values.

    Args:
        values: (256,) by value, the number of the class.
        mask: of one channel, or with a palette.
        path: of the mask, for messages.
        classes: number of values that are known, besides `IGNORED`.

    Raises:
        SearchError: the mask is in colours, or has another value.
    """
    plane = _plane(mask, path)
    counts = Counter[int](dict(zip(*(array.tolist() for array in np.unique(plane, return_counts=True)), strict=True)))
    if unknown := sorted(value for value in counts if value >= classes and value != IGNORED):
        raise SearchError(
            f"{path} has the value {unknown[0]} in {counts[unknown[0]]:,} pixels, and {CLASSES} names the values 0 to "
            f"{classes - 1}; {IGNORED} is not counted. Name each value, with 'void' for one that does not count."
        )
    result: Mask = values[plane]
    return result


def _plane(mask: Image.Image, path: Path) -> Mask:
    """The values of a mask, (H, W).

    Raises:
        SearchError: it is in colours, or its values have more than 8 bits.
    """
    if mask.mode == "1":
        mask = mask.convert("L")
    if mask.mode in ("L", "P"):
        return np.asarray(mask, np.uint8)
    values: npt.NDArray[Any] = np.asarray(mask)
    if mask.mode in ("RGB", "RGBA") and _is_grey(values):
        return np.ascontiguousarray(values[..., 0]).astype(np.uint8)
    if mask.mode.startswith("I") and int(values.max(initial=0)) < 256 and int(values.min(initial=0)) >= 0:
        return values.astype(np.uint8)
    if mask.mode in ("RGB", "RGBA"):
        raise SearchError(
            f"{path} is in colours. Give {CLASSES}, beside the folders, a line for each class with its name and "
            "colour: 'road #804080' or 'road 128 64 128'."
        )
    raise SearchError(f"{path} is an image of mode {mask.mode}, and a mask has values from 0 to 255 in one channel.")


def _is_grey(values: npt.NDArray[Any]) -> bool:
    return bool((values[..., 0] == values[..., 1]).all() and (values[..., 0] == values[..., 2]).all())


def read(path: Path) -> Image.Image:
    """A decoded mask.

    Raises:
        SearchError: it cannot be read.
    """
    try:
        with Image.open(path, formats=formats()) as image:
            image.load()
            return image.copy()
    except Exception as error:  # decoders raise anything for damaged files
        raise SearchError(f"cannot read the mask {path}: {str(error).splitlines()[0]}.") from None


def size_of(path: Path) -> tuple[int, int]:
    """Height and width of an image file, of which the head alone is read."""
    try:
        with Image.open(path, formats=formats()) as image:
            return image.height, image.width
    except Exception as error:
        raise SearchError(f"cannot read the mask {path}: {str(error).splitlines()[0]}.") from None
