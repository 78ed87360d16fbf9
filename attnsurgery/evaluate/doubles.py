"""The same image in two splits: byte by byte, or nearly, as after another compression, a small shift or a moment later.

Nearly the same are images whose difference hashes are close and whose small pictures agree: the hash alone, which holds
whether it gets lighter from one pixel to the next, is the same for many drawings on an even ground. The hash is the one
that is known as dHash (N. Krawetz, "Kind of Like That", 2013).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from PIL import Image

from attnsurgery.evaluate.scan import THUMB, Scan, Thumbs

_CLOSE_BITS = 14
"""Of 64 bits of the hash, so many may differ."""
_ALIKE = 0.995
"""Least correlation of two small pictures, one of them moved by a fraction of a pixel if need be."""
_WORTH_MOVING = 0.7
"""Least correlation before that."""
_FARTHEST = 1.5
"""Pixels of a small picture that one may be moved by."""
_FITS = 2**13
"""At a time."""
_LEVEL = 12.0
"""Most difference of their mean levels, of 255."""
_FLAT = 4.0
"""A small picture whose levels have a smaller standard deviation has nothing to be known by."""
_MOST_PAIRS = 2 * 10**9
"""Of hashes that are compared; of more images, only equal hashes are found."""
_BLOCK = 2**21
_PAIRS = 2**17
"""At a time."""
_BITS = np.array([bin(number).count("1") for number in range(256)], np.uint8)
Hashes = np.ndarray[Any, np.dtype[np.uint64]]
Indices = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Shared:
    """What one split has of another."""

    split: str
    other: str
    of: int
    """Images of `split`."""
    copies: tuple[tuple[str, str], ...] = ()
    """Byte by byte: the image of `split`, and one of `other`."""
    alike: tuple[tuple[str, str], ...] = ()
    """Nearly the same, without the copies."""

    def lines(self) -> list[str]:
        """For people; nothing where nothing is shared."""
        said = []
        for pairs, what in ((self.copies, "byte for byte"), (self.alike, "but for small differences")):
            if pairs:
                one, other = pairs[0]
                said.append(
                    f"the same {what}: {len(pairs):,} of {self.of:,} {_word(self.split)} images are also among the "
                    f"{_word(self.other)} images ({one} is {other})"
                )
        return said


def shared(scans: Mapping[str, Scan]) -> list[Shared]:
    """What each later split has of each earlier one, in the order train, val, test, if there is anything."""
    found = [
        _between(first, scans[first], second, scans[second])
        for first, second in combinations([name for name in ("train", "val", "test") if name in scans], 2)
    ]
    return [one for one in found if one.copies or one.alike]


def of_two_classes(scans: Mapping[str, Scan], labels: Mapping[str, Sequence[int]]) -> list[tuple[str, str]]:
    """Images that are byte copies of one of another class, with one such."""
    first: dict[str, tuple[str, int]] = {}
    found = []
    for name, scan in scans.items():
        for image, look, label in zip(scan.ids, scan.looks, labels[name], strict=True):
            if look.digest:
                known, known_label = first.setdefault(look.digest, (image, label))
                if known_label != label:
                    found.append((image, known))
    return found


def hashes_of(thumbs_NP: Thumbs) -> Hashes:
    """A difference hash of 64 bits of each small picture: (N, THUMB * THUMB) pixels to (N,) numbers."""
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
    """Of each later small picture that one of the earlier ones is nearly equal to, that one."""
    unit_NP, level_N, told_N = _standard(later_NP)
    unit_MP, level_M, told_M = _standard(earlier_MP)
    found: dict[int, int] = {}
    pairs = _close(hashes_of(later_NP), np.flatnonzero(told_N), hashes_of(earlier_MP), np.flatnonzero(told_M))
    for b_K, a_K in pairs:
        near_K = np.abs(level_N[b_K] - level_M[a_K]) <= _LEVEL
        b_K, a_K = b_K[near_K], a_K[near_K]
        alike_K = _agree(unit_NP, b_K, unit_MP, a_K)
        for b, a in zip(b_K[alike_K].tolist(), a_K[alike_K].tolist(), strict=True):
            found.setdefault(b, a)
    return found


def _agree(unit_NP: Any, b_K: Indices, unit_MP: Any, a_K: Indices) -> Any:
    """Which pairs of standardised small pictures are nearly equal, or would be if one were moved a little."""
    correlation_K = np.einsum("kp,kp->k", unit_NP[b_K], unit_MP[a_K])
    found_K = correlation_K >= _ALIKE
    left = np.flatnonzero(~found_K & (correlation_K >= _WORTH_MOVING))
    for start in range(0, len(left), _FITS):
        some = left[start : start + _FITS]
        found_K[some] = _equal_but_moved(unit_NP[b_K[some]], unit_MP[a_K[some]])
    return found_K


def _equal_but_moved(one_KP: Any, other_KP: Any) -> Any:
    """The one, without its edge, against the other and its slopes: to first order a move adds a share of each slope."""
    one, other = (pictures.reshape(-1, THUMB, THUMB).astype(np.float64) for pictures in (one_KP, other_KP))
    right = (other[:, 1:-1, 2:] - other[:, 1:-1, :-2]) / 2
    down = (other[:, 2:, 1:-1] - other[:, :-2, 1:-1]) / 2
    parts = [part.reshape(len(part), -1) for part in (other[:, 1:-1, 1:-1], right, down)]
    basis_K3P = np.stack([part - part.mean(axis=1, keepdims=True) for part in parts], axis=1)
    target_KP = one[:, 1:-1, 1:-1].reshape(len(one), -1)
    target_KP = target_KP - target_KP.mean(axis=1, keepdims=True)
    gram_K33 = basis_K3P @ basis_K3P.transpose(0, 2, 1) + 1e-9 * np.eye(3)
    on_K3 = np.einsum("kip,kp->ki", basis_K3P, target_KP)
    share_K3 = np.linalg.solve(gram_K33, on_K3[:, :, None])[:, :, 0]
    explained_K = (share_K3 * on_K3).sum(axis=1) / np.maximum((target_KP**2).sum(axis=1), 1e-9)
    near_K = (np.abs(share_K3[:, 1:]) <= _FARTHEST * share_K3[:, :1]).all(axis=1)
    return near_K & (explained_K >= _ALIKE**2)


def _standard(thumbs_NP: Thumbs) -> tuple[Any, Any, Any]:
    """Of mean 0 and length 1; the mean levels; and which have anything to be known by."""
    level_N = thumbs_NP.mean(axis=1)
    centred_NP = thumbs_NP.astype(np.float32) - level_N[:, None].astype(np.float32)
    length_N = np.sqrt((centred_NP**2).sum(axis=1))
    told_N = length_N >= _FLAT * THUMB
    return centred_NP / np.maximum(length_N, 1e-6)[:, None], level_N, told_N


def _close(later: Hashes, of_later: Indices, earlier: Hashes, of_earlier: Indices) -> Iterator[tuple[Indices, Indices]]:
    """Positions of pairs whose hashes differ in a few bits at most, some at a time."""
    if not (len(of_later) and len(of_earlier)):
        return
    if len(of_later) * len(of_earlier) > _MOST_PAIRS:
        known = {int(earlier[a]): int(a) for a in of_earlier}
        pairs = [(int(b), known[int(later[b])]) for b in of_later if int(later[b]) in known]
        yield np.array([b for b, _ in pairs], np.int64), np.array([a for _, a in pairs], np.int64)
        return
    hashes_M = earlier[of_earlier]
    step = max(1, _BLOCK // len(of_earlier))
    for start in range(0, len(of_later), step):
        some = of_later[start : start + step]
        apart_BM = _bits(later[some][:, None] ^ hashes_M[None, :])
        b_K, a_K = np.nonzero(apart_BM <= _CLOSE_BITS)
        for first in range(0, len(b_K), _PAIRS):
            chunk = slice(first, first + _PAIRS)
            yield some[b_K[chunk]], of_earlier[a_K[chunk]]


def _bits(numbers: Hashes) -> Any:
    """How many bits of each are 1."""
    if hasattr(np, "bitwise_count"):  # numpy 2 and later
        return np.bitwise_count(numbers)
    by_byte = _BITS[np.ascontiguousarray(numbers).view(np.uint8)]
    return by_byte.reshape(*numbers.shape, 8).sum(axis=-1)


def _word(split: str) -> str:
    return {"train": "training", "val": "validation"}.get(split, split)
