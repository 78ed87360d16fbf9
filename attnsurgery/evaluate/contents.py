"""What tells the contents of data from others: digests of bytes, whatever the data is called and wherever it lies."""

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
_TOLD_EACH = 1000
_FRESH_S = 2.0
"""A file that was written so shortly before may be written again without another time of change."""


def digests_of(
    paths: Sequence[Path], known: dict[str, list[Any]] | None = None, on_progress: OnProgress | None = None
) -> list[str]:
    """Of the bytes of each file, in their order.

    Args:
        known: by path: size, time of the last change in ns, and digest. A file of the same size and time is not read
            again; what is read is added.
        on_progress: called with the files done, and all.

    Raises:
        SearchError: a file cannot be read.
    """
    known = {} if known is None else known
    found: list[str] = []
    with ThreadPoolExecutor(_THREADS) as pool:
        for done, (path, entry) in enumerate(
            zip(paths, pool.map(lambda path: _entry(path, known), paths), strict=True)
        ):
            size, changed, digest = entry
            if time.time() - changed / 1e9 > _FRESH_S:
                known[os.path.abspath(path)] = entry
            found.append(f"{size}:{digest}")
            if on_progress and ((done + 1) % _TOLD_EACH == 0 or done + 1 == len(paths)):
                on_progress(done + 1, len(paths))
    return found


def kept_in(path: Path) -> dict[str, list[Any]]:
    """What `digests_of` knew, from a JSON file of it; nothing where that does not read."""
    try:
        read = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    entries = read.items() if isinstance(read, dict) else ()
    return {name: entry for name, entry in entries if isinstance(entry, list) and len(entry) == 3}


def content_of(dataset: Any) -> str:
    """Of a data set of timm's that is no folder of images.

    A data set of Hugging Face has a fingerprint of its own; of arrays in memory the bytes are taken; of all else the
    pixels, image by image.
    """
    held = getattr(getattr(dataset, "reader", None), "dataset", dataset)
    if own := getattr(held, "_fingerprint", None):
        return str(own)
    data: Any = getattr(held, "data", None)
    if hasattr(data, "numpy"):
        data = data.numpy()
    if isinstance(data, np.ndarray):
        return pixels_of([data])
    return pixels_of(np.asarray(dataset[index][0]) for index in range(len(dataset)))


def pixels_of(arrays: Any) -> str:
    """Of arrays of pixels, with their shapes."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(f"{array.shape}{array.dtype}".encode() + np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:32]


def _entry(path: Path, known: dict[str, list[Any]]) -> list[Any]:
    """Size, time of the last change, and digest."""
    try:
        stat = path.stat()
        before = known.get(os.path.abspath(path))
        if before and before[:2] == [stat.st_size, stat.st_mtime_ns]:
            return before
        with path.open("rb") as file:
            return [stat.st_size, stat.st_mtime_ns, hashlib.file_digest(file, "sha256").hexdigest()[:32]]
    except OSError as error:
        raise SearchError(f"cannot read {path}: {error.strerror}.") from None
