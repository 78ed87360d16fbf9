"""Data that comes with the package: pictures of two digits, "same or different?", and the single digits themselves.

Both are made of the 1,797 handwritten digits of scikit-learn. `pairs`, the default of a search, is a task in which
distance matters: two digits from 0 to 4 stand at the ends of a strip of 8 x 192 pixels with nothing between them. No
position of the last feature map of `test_resnet`, the default base, sees both of them, so its convolutions can hardly
tell; a block that relates distant positions can. Such relations motivate non-local blocks (Wang et al.,
arXiv:1711.07971). scripts/bench/relation_sweep.py measures how much depends on the distance.

A network that learns the relation from scratch first has to learn to read. Therefore a base without weights is first
trained to read one digit at either end (`Sources.first`).

Shape letters in this file:  N digits, P pairs, H W height and width of a picture.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from attnsurgery.data.contents import pixels_of
from attnsurgery.data.source import Source, Sources

PAIRS, DIGITS = "pairs", "digits"
DEFAULT = PAIRS
"""The embedded data of a search without `--data`."""
SIZES: dict[str, tuple[tuple[int, int], ...]] = {PAIRS: ((8, 192), (32, 256)), DIGITS: ((48, 48),)}
"""Height and width at which a search shows embedded data, in pixels: the first that the base can process."""
_KINDS = 5
"""Pairs consist of the digits 0 to 4: the more kinds, the longer it takes to learn what 'same' means."""
_PARTS = {"train": (400, 16), "val": (150, 4), "test": (351, 1)}
"""Number of digits that are in this split only, and number of pairs that each digit is in."""

Array = np.ndarray[Any, np.dtype[Any]]


def embedded_name(spec: str | None) -> str | None:
    """The name of the embedded data that `--data` stands for; None for other data, such as a folder of this name."""
    if spec is None:
        return DEFAULT
    return spec if spec in SIZES and not Path(spec).is_dir() else None


def embedded_sources(name: str, size: tuple[int, int]) -> Sources:
    """Embedded data, drawn for an input.

    Args:
        name: 'pairs' or 'digits'.
        size: height and width of the input, in pixels. Pairs are drawn for it; digits are enlarged later.
    """
    return _digits() if name == DIGITS else _pairs(size)


@functools.cache
def _load() -> tuple[Array, Array]:
    """All digits, uint8 (N, 8, 8), and what they are, (N,)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return np.round(bunch.images * (255 / 16)).astype(np.uint8), bunch.target


def _digits() -> Sources:
    pixels_NHW, kinds_N = _load()
    source = Source(
        ids=tuple(f"digits/{index}" for index in range(len(pixels_NHW))),
        labels=tuple(int(kind) for kind in kinds_N),
        open=lambda index: Image.fromarray(pixels_NHW[index]),
        content=lambda: pixels_of([pixels_NHW]),
    )
    return Sources(DIGITS, tuple(map(str, range(10))), source, augment="shift")


def _pairs(size: tuple[int, int]) -> Sources:
    _, kinds_N = _load()
    order_N = np.random.default_rng(0).permutation(np.flatnonzero(kinds_N < _KINDS))
    parts, start = {}, 0
    for seed, (name, (count, uses)) in enumerate(_PARTS.items()):
        digits = order_N[start : start + count]
        pairs_P2 = np.concatenate([_paired(digits, np.random.default_rng([seed, use])) for use in range(uses)])
        same_P = kinds_N[pairs_P2[:, 0]] == kinds_N[pairs_P2[:, 1]]
        parts[name] = _pictures(f"{PAIRS}/{name}", pairs_P2, same_P.astype(int), size)
        start += count
    alone = order_N[: _PARTS["train"][0]]
    nothing = np.full_like(alone, -1)
    ends_P2 = np.concatenate([np.stack([alone, nothing], axis=1), np.stack([nothing, alone], axis=1)])
    first = _pictures(f"{PAIRS}/first", ends_P2, np.concatenate([kinds_N[alone]] * 2), size)
    return Sources(
        PAIRS,
        ("different", "same"),
        parts["train"],
        parts["val"],
        parts["test"],
        augment="none",
        notes=(
            "two digits at the ends of each picture: the same one or not? No digit is in two splits, "
            "and none in two test pictures",
        ),
        first=Sources("one digit at either end", tuple(map(str, range(_KINDS))), first, augment="none"),
    )


def _paired(digits: Array, rng: np.random.Generator) -> Array:
    """Pairs in which each digit is once at most, half of them of one kind, (P, 2).

    Args:
        digits: indices of the digits.
        rng: of the pairing.
    """
    _, kinds_N = _load()
    same: list[Array] = []
    others: list[Array] = []
    for kind in range(_KINDS):
        of_kind = rng.permutation(digits[kinds_N[digits] == kind])
        count = len(of_kind) // 4
        same.append(of_kind[: 2 * count].reshape(-1, 2))
        others.append(of_kind[2 * count :])
    left, right = rng.permutation(np.concatenate(others))[: 2 * sum(map(len, same))].reshape(2, -1)
    while len(clashes := np.flatnonzero(kinds_N[left] == kinds_N[right])):
        for clash, other in zip(clashes, rng.integers(len(right), size=len(clashes)), strict=True):
            right[[clash, other]] = right[[other, clash]]
    return rng.permutation(np.concatenate([*same, np.stack([left, right], axis=1)]))


def _pictures(name: str, ends_P2: Array, labels_P: Array, size: tuple[int, int]) -> Source:
    """Pictures with a digit at either end.

    Args:
        name: beginning of the pictures' names.
        ends_P2: indices of the digits on the left and on the right; -1 for none.
        labels_P: the classes.
        size: height and width, in pixels.
    """
    pixels_NHW, _ = _load()
    content = json.dumps(ends_P2.tolist()) + pixels_of([pixels_NHW])
    return Source(
        ids=tuple(f"{name}/{index}" for index in range(len(ends_P2))),
        labels=tuple(int(label) for label in labels_P),
        open=_drawing(ends_P2, size),
        content=lambda: hashlib.sha256(content.encode()).hexdigest()[:32],
    )


def _drawing(ends_P2: Array, size: tuple[int, int]) -> Callable[[int], Image.Image]:
    """Draws the picture at an index. A digit is as high as the picture, but takes a third of its width at most."""
    pixels_NHW, _ = _load()
    height, width = size
    side = max(1, min(height, width // 3))

    def draw(index: int) -> Image.Image:
        picture = Image.new("L", (width, height))
        for digit, left in zip(ends_P2[index], (0, width - side), strict=True):
            if digit >= 0:
                small = Image.fromarray(pixels_NHW[digit])
                picture.paste(small.resize((side, side), Image.Resampling.BILINEAR), (left, (height - side) // 2))
        return picture

    return draw
