"""The connection to a worker through files of a shared folder, where no pipe is possible.

Each side appends complete lines to its own file and reads the other's. A file is opened again for every read, because
network file systems look for changes then. The search counts up in a third file as a sign of life; a worker exits if
the count does not change for a while, or if the folder is removed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

ORDERS, ANSWERS, BEAT = "orders.jsonl", "answers.jsonl", "beat"
BEAT_S = 5.0
"""Time between two counts of the search, in s."""
SILENCE_S = 120.0
"""Time without a new count after which the search has ended, in s; network file systems may delay a change by 60 s."""
POLL_S = 0.2
"""Time between two reads of a file, in s."""


class Lines:
    """The lines of a file that grows."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def new(self) -> list[str]:
        """Complete lines that were added since the last call.

        Raises:
            FileNotFoundError: the file does not exist.
        """
        with self._path.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        complete = text[: text.rfind(b"\n") + 1]
        self._offset += len(complete)
        return complete.decode().splitlines()


class Inbox:
    """The orders of a worker; iterating waits for the next one and ends when the search has ended.

    Args:
        folder: the mailbox.
        timeout_s: time without a sign of life after which the search has ended, in s.
    """

    def __init__(self, folder: Path, timeout_s: float = SILENCE_S) -> None:
        self._orders, self._beat, self._timeout_s = Lines(folder / ORDERS), folder / BEAT, timeout_s

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
            except OSError:  # the file server does not respond for a moment
                pass
            if time.monotonic() - since > self._timeout_s:
                return
            time.sleep(POLL_S)


class Outbox:
    """The answers of a worker.

    Args:
        folder: the mailbox.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / ANSWERS
        self._text = ""

    def write(self, text: str) -> None:
        self._text += text

    def flush(self) -> None:
        """Write the text to the disk, where other machines see it."""
        add(self._path, self._text)
        self._text = ""


def add(path: Path, text: str) -> None:
    """Append text to a file and write it to the disk."""
    with path.open("ab") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
