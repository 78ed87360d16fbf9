"""Finds images that are in two splits: byte for byte, or nearly, as after another compression or a small shift.

Two images are nearly the same if their difference hashes are close and their thumbnails correlate. The hash alone does
not suffice: it records whether brightness rises from one pixel to the next, which is equal for many drawings on an even
ground. It is known as dHash (N. Krawetz, "Kind of Like That", 2013).

Shape letters in this file:  N later images, M earlier ones, K pairs of them, P pixels of a thumbnail, B images at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from PIL import Image

from attnsurgery.data.scan import THUMB, Scan, Thumbs

_CLOSE_BITS = 14
"""Number of the 64 bits of the hash that may differ."""
_ALIKE = 0.995
"""Smallest correlation of two thumbnails that are nearly the same, one of them shifted if need be."""
_SHIFTABLE = 0.7
"""Smallest correlation from which on a shift is tried."""
_MAX_SHIFT = 1.5
"""Largest shift, in pixels of a thumbnail."""
_SHIFTED_PAIRS = 2**13
"""Number of pairs that are shifted at a time."""
_MAX_LEVEL_DIFFERENCE = 12.0
"""Largest difference of the mean levels, which range from 0 to 255."""
_FLAT = 4.0
"""A thumbnail whose levels have a smaller standard deviation is too plain to be compared."""
_MAX_PAIRS = 2 * 10**9
"""Number of pairs of hashes above which only equal hashes are found."""
_BLOCK = 2**21
"""Number of pairs whose hashes are compared at a time."""
_PAIRS = 2**17
"""Number of pairs whose thumbnails are compared at a time."""
_BITS = np.array([bin(number).count("1") for number in range(256)], np.uint8)
Hashes = np.ndarray[Any, np.dtype[np.uint64]]
Indices = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Shared:
    """Images of one split that are in another one too."""

    split: str
    other: str
    of: int
    """Number of images of `split`."""
    copies: tuple[tuple[str, str], ...] = ()
    """Byte copies: the image of `split`, and its original in `other`."""
    alike: tuple[tuple[str, str], ...] = ()
    """Images that are nearly the same, likewise, without the copies."""

    def lines(self) -> list[str]:
        """A line for the copies and one for the others; none where there are none."""
        lines = []
        for pairs, agreement in ((self.copies, "byte for byte"), (self.alike, "but for small differences")):
            if pairs:
                image, original = pairs[0]
                lines.append(
                    f"the same {agreement}: {len(pairs):,} of {self.of:,} {_adjective(self.split)} images are also "
                    f"among the {_adjective(self.other)} images ({image} is {original})"
                )
        return lines


def shared(scans: Mapping[str, Scan]) -> list[Shared]:
    """The images of each later split that are in an earlier one, in the order train, val, test."""
    results = [
        _between(first, scans[first], second, scans[second])
        for first, second in combinations([name for name in ("train", "val", "test") if name in scans], 2)
    ]
    return [result for result in results if result.copies or result.alike]


def of_two_classes(scans: Mapping[str, Scan], labels: Mapping[str, Sequence[int]]) -> list[tuple[str, str]]:
    """Images that are byte copies of an image of another class, each with that image."""
    first: dict[str, tuple[str, int]] = {}
    pairs = []
    for name, scan in scans.items():
        for image, look, label in zip(scan.ids, scan.looks, labels[name], strict=True):
            if look.digest:
                original, original_label = first.setdefault(look.digest, (image, label))
                if original_label != label:
                    pairs.append((image, original))
    return pairs


def hashes_of(thumbs_NP: Thumbs) -> Hashes:
    """A difference hash of 64 bits of each thumbnail: pixels (N, P) to numbers (N,)."""
    bits_NB = []
    for pixels in thumbs_NP.reshape(-1, THUMB, THUMB):
        small = np.asarray(Image.fromarray(pixels).resize((9, 8), Image.Resampling.BOX), np.int16)
        bits_NB.append((small[:, 1:] > small[:, :-1]).reshape(-1))
    return np.packbits(np.array(bits_NB, bool).reshape(-1, 64), axis=1).view(np.uint64).reshape(-1)


def _between(first: str, earlier: Scan, second: str, later: Scan) -> Shared:
    known = {look.digest: name for name, look in zip(earlier.ids, earlier.looks, strict=True) if look.digest}
    copies = {
        name: known[look.digest] for name, look in zip(later.ids, later.looks, strict=True) if look.digest in known
    }
    alike = {
        later.ids[b]: earlier.ids[a]
        for b, a in _alike(later.thumbs(), earlier.thumbs()).items()
        if later.ids[b] not in copies
    }
    return Shared(second, first, len(later.ids), tuple(copies.items()), tuple(alike.items()))


def _alike(later_NP: Thumbs, earlier_MP: Thumbs) -> dict[int, int]:
    """By the index of each later thumbnail that is nearly equal to an earlier one, the index of that one."""
    unit_NP, level_N, distinct_N = _standard(later_NP)
    unit_MP, level_M, distinct_M = _standard(earlier_MP)
    matches: dict[int, int] = {}
    pairs = _close(hashes_of(later_NP), np.flatnonzero(distinct_N), hashes_of(earlier_MP), np.flatnonzero(distinct_M))
    for b_K, a_K in pairs:
        near_K = np.abs(level_N[b_K] - level_M[a_K]) <= _MAX_LEVEL_DIFFERENCE
        b_K, a_K = b_K[near_K], a_K[near_K]
        alike_K = _agree(unit_NP, b_K, unit_MP, a_K)
        for b, a in zip(b_K[alike_K].tolist(), a_K[alike_K].tolist(), strict=True):
            matches.setdefault(b, a)
    return matches


def _agree(unit_NP: Any, b_K: Indices, unit_MP: Any, a_K: Indices) -> Any:
    """Which pairs of standardised thumbnails are nearly equal, or would be if one were shifted a little: (K,)."""
    correlation_K = np.einsum("kp,kp->k", unit_NP[b_K], unit_MP[a_K])
    agree_K = correlation_K >= _ALIKE
    candidates = np.flatnonzero(~agree_K & (correlation_K >= _SHIFTABLE))
    for start in range(0, len(candidates), _SHIFTED_PAIRS):
        part = candidates[start : start + _SHIFTED_PAIRS]
        agree_K[part] = _agree_when_shifted(unit_NP[b_K[part]], unit_MP[a_K[part]])
    return agree_K


def _agree_when_shifted(first_KP: Any, second_KP: Any) -> Any:
    """Which pairs of thumbnails agree up to a shift: (K,).

    To first order, a shift adds a multiple of each derivative. So the first thumbnail, without its border, is regressed
    on the second and its two derivatives.
    """
    first, second = (pictures.reshape(-1, THUMB, THUMB).astype(np.float64) for pictures in (first_KP, second_KP))
    right = (second[:, 1:-1, 2:] - second[:, 1:-1, :-2]) / 2
    down = (second[:, 2:, 1:-1] - second[:, :-2, 1:-1]) / 2
    parts = [part.reshape(len(part), -1) for part in (second[:, 1:-1, 1:-1], right, down)]
    basis_K3P = np.stack([part - part.mean(axis=1, keepdims=True) for part in parts], axis=1)
    target_KP = first[:, 1:-1, 1:-1].reshape(len(first), -1)
    target_KP = target_KP - target_KP.mean(axis=1, keepdims=True)
    gram_K33 = basis_K3P @ basis_K3P.transpose(0, 2, 1) + 1e-9 * np.eye(3)
    on_K3 = np.einsum("kip,kp->ki", basis_K3P, target_KP)
    share_K3 = np.linalg.solve(gram_K33, on_K3[:, :, None])[:, :, 0]
    explained_K = (share_K3 * on_K3).sum(axis=1) / np.maximum((target_KP**2).sum(axis=1), 1e-9)
    near_K = (np.abs(share_K3[:, 1:]) <= _MAX_SHIFT * share_K3[:, :1]).all(axis=1)
    return near_K & (explained_K >= _ALIKE**2)


def _standard(thumbs_NP: Thumbs) -> tuple[Any, Any, Any]:
    """Thumbnails with mean 0 and length 1, (N, P); their mean levels, (N,); which have enough contrast, (N,)."""
    level_N = thumbs_NP.mean(axis=1)
    centred_NP = thumbs_NP.astype(np.float32) - level_N[:, None].astype(np.float32)
    length_N = np.sqrt((centred_NP**2).sum(axis=1))
    distinct_N = length_N >= _FLAT * THUMB
    return centred_NP / np.maximum(length_N, 1e-6)[:, None], level_N, distinct_N


def _close(later: Hashes, of_later: Indices, earlier: Hashes, of_earlier: Indices) -> Iterator[tuple[Indices, Indices]]:
    """Indices of pairs whose hashes differ in a few bits at most, some pairs at a time."""
    if not (len(of_later) and len(of_earlier)):
        return
    if len(of_later) * len(of_earlier) > _MAX_PAIRS:
        position = {int(earlier[a]): int(a) for a in of_earlier}
        pairs = [(int(b), position[int(later[b])]) for b in of_later if int(later[b]) in position]
        yield np.array([b for b, _ in pairs], np.int64), np.array([a for _, a in pairs], np.int64)
        return
    hashes_M = earlier[of_earlier]
    step = max(1, _BLOCK // len(of_earlier))
    for start in range(0, len(of_later), step):
        part = of_later[start : start + step]
        apart_BM = _bits(later[part][:, None] ^ hashes_M[None, :])
        b_K, a_K = np.nonzero(apart_BM <= _CLOSE_BITS)
        for first in range(0, len(b_K), _PAIRS):
            chunk = slice(first, first + _PAIRS)
            yield part[b_K[chunk]], of_earlier[a_K[chunk]]


def _bits(numbers: Hashes) -> Any:
    """The number of bits of each that are 1."""
    if hasattr(np, "bitwise_count"):  # numpy 2 and later
        return np.bitwise_count(numbers)
    by_byte = _BITS[np.ascontiguousarray(numbers).view(np.uint8)]
    return by_byte.reshape(*numbers.shape, 8).sum(axis=-1)


def _adjective(split: str) -> str:
    return {"train": "training", "val": "validation"}.get(split, split)
