"""Workers that share a device stand still while one of them measures on it.

A lock on a file: whoever measures holds it alone, and whoever trains passes it before every step. It goes with the
process that holds it, however that ends.
"""

from __future__ import annotations

import getpass
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # no such locks on this system; then measurements are as noisy as they are
    fcntl = None  # type: ignore[assignment]


class Quiet:
    """The silence on one device.

    Args:
        device: that several workers share; None where none do, and nothing is locked.
    """

    def __init__(self, device: str | None) -> None:
        self._file: Any = None
        if device is not None and fcntl is not None:
            # cuda:0 is not the same for everyone
            seen = os.environ.get("CUDA_VISIBLE_DEVICES", "") if device.startswith("cuda") else ""
            which = "".join(letter for letter in f"{device}-{seen}" if letter.isalnum() or letter in "-,")
            name = f"attnsurgery-{getpass.getuser()}-{which.rstrip('-')}.lock"
            self._file = (Path(tempfile.gettempdir()) / name).open("a")

    @contextmanager
    def keep(self) -> Iterator[None]:
        """Alone on the device meanwhile, as soon as all others have come to their next step."""
        if self._file is None:
            yield
            return
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def give_way(self) -> None:
        """Wait while another one measures."""
        if self._file is not None:
            fcntl.flock(self._file, fcntl.LOCK_SH)
            fcntl.flock(self._file, fcntl.LOCK_UN)
