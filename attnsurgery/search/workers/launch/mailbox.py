"""The line to a worker as files of a folder that both see, for where no pipe leads.

Each side adds whole lines to a file of its own and reads the other's, opening it anew every time: that is when network
file systems look whether there is more. The search shows that it lives by counting in a third file; a worker that does
not see it count for a while ends, and so does one whose folder is gone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

ORDERS, ANSWERS, BEAT = "orders.jsonl", "answers.jsonl", "beat"
BEAT_S = 5.0
"""The search counts that often."""
GONE_S = 120.0
"""It is gone when it has not counted for so long: network file systems may show a change as late as after a minute."""
POLL_S = 0.2


class Lines:
    """The lines of a file that grows."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0

    def new(self) -> list[str]:
        """Whole lines that were not there before.

        Raises:
            FileNotFoundError: the file is not there.
        """
        with self._path.open("rb") as file:
            file.seek(self._read)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        return whole.decode().splitlines()


class Inbox:
    """A worker's orders, waited for; ends when the search is gone."""

    def __init__(self, folder: Path, gone_s: float = GONE_S) -> None:
        self._orders, self._beat, self._gone_s = Lines(folder / ORDERS), folder / BEAT, gone_s

    def __iter__(self) -> Iterator[str]:
        count, since = "", time.monotonic()
        looked = 0.0
        while True:
            try:
                yield from self._orders.new()
                if time.monotonic() - looked > BEAT_S / 2:
                    looked, now = time.monotonic(), self._beat.read_text()
                    if now != count:
                        count, since = now, time.monotonic()
            except FileNotFoundError:
                return
            except OSError:  # a file server that is away for a moment
                pass
            if time.monotonic() - since > self._gone_s:
                return
            time.sleep(POLL_S)


class Outbox:
    """A worker's answers."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / ANSWERS
        self._text = ""

    def write(self, text: str) -> None:
        self._text += text

    def flush(self) -> None:
        """Lines are there as a whole, and seen from elsewhere, when this returns."""
        add(self._path, self._text)
        self._text = ""


def add(path: Path, text: str) -> None:
    """Append to a file; whoever opens it after this returns sees all of it."""
    with path.open("ab") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
