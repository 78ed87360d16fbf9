"""Digests of data: they depend on its bytes, and not on what it is called or where it lies."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from attnsurgery.errors import SearchError

OnProgress = Callable[[int, int], None]
_THREADS = 8
_REPORT_EVERY = 1000
"""Number of files between two reports of progress."""
_FRESH_S = 2.0
"""The digest of a file that was changed less than these seconds ago is not reused: the file may change once more
without a difference in its modification time."""


def digests_of(
    paths: Sequence[Path], known: dict[str, list[Any]] | None = None, on_progress: OnProgress | None = None
) -> list[str]:
    """The size and digest of each file, in the order of `paths`.

    Args:
        paths: the files.
        known: by path: size, modification time in ns, and digest. A file of the same size and time is not read again;
            new entries are added.
        on_progress: called with the number of files that are done, and of all.

    Raises:
        SearchError: a file cannot be read.
    """
    known = {} if known is None else known
    digests: list[str] = []
    with ThreadPoolExecutor(_THREADS) as pool:
        for index, (path, entry) in enumerate(
            zip(paths, pool.map(lambda path: _entry(path, known), paths), strict=True)
        ):
            size, changed, digest = entry
            if time.time() - changed / 1e9 > _FRESH_S:
                known[os.path.abspath(path)] = entry
            digests.append(f"{size}:{digest}")
            if on_progress and ((index + 1) % _REPORT_EVERY == 0 or index + 1 == len(paths)):
                on_progress(index + 1, len(paths))
    return digests


def load_digests(path: Path) -> dict[str, list[Any]]:
    """The known digests for `digests_of`, from a JSON file; {} where that cannot be read."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    entries = content.items() if isinstance(content, dict) else ()
    return {name: entry for name, entry in entries if isinstance(entry, list) and len(entry) == 3}


def content_of(dataset: Any) -> str:
    """A digest of a data set of timm's that is no folder of images.

    It is the fingerprint of a Hugging Face data set, else the digest of an array in memory, else that of the pixels of
    all images.
    """
    inner = getattr(getattr(dataset, "reader", None), "dataset", dataset)
    if fingerprint := getattr(inner, "_fingerprint", None):
        return str(fingerprint)
    data: Any = getattr(inner, "data", None)
    if hasattr(data, "numpy"):
        data = data.numpy()
    if isinstance(data, np.ndarray):
        return pixels_of([data])
    return pixels_of(np.asarray(dataset[index][0]) for index in range(len(dataset)))


def pixels_of(arrays: Any) -> str:
    """A digest of arrays of pixels and their shapes."""
    sha256 = hashlib.sha256()
    for array in arrays:
        sha256.update(f"{array.shape}{array.dtype}".encode() + np.ascontiguousarray(array).tobytes())
    return sha256.hexdigest()[:32]


def _entry(path: Path, known: dict[str, list[Any]]) -> list[Any]:
    """Size in bytes, modification time in ns, and digest of a file.

    Raises:
        SearchError: it cannot be read.
    """
    try:
        stat = path.stat()
        existing = known.get(os.path.abspath(path))
        if existing and existing[:2] == [stat.st_size, stat.st_mtime_ns]:
            return existing
        with path.open("rb") as file:
            return [stat.st_size, stat.st_mtime_ns, hashlib.file_digest(file, "sha256").hexdigest()[:32]]
    except OSError as error:
        raise SearchError(f"cannot read {path}: {error.strerror}.") from None
