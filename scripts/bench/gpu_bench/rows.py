"""Rows of a benchmark: one JSON line each, on the disk the moment it is made, never made twice.

A row has `step`, `key` (what it is, unique within its step), `state`, `say` (one line for people), the figures, and the
`conditions` that they hold under. Of several rows with one key the last counts.

States: `done`; `refused`, with the reason: it cannot be, and nothing is wrong with that; `red`: something is wrong.
"""

from __future__ import annotations

import json
import os
import re
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
DONE, REFUSED, RED = "done", "refused", "red"
AGAIN = 75
"""Exit code of a step whose process can use the device no more: another process goes on with its other rows."""
PART = 76
"""Exit code of a step that left rows out for want of time."""
_NOISE = re.compile(r"nvidia|geforce|tesla|\d+ ?gi?b\b|hbm\w*|sxm\d*", re.IGNORECASE)


class Refused(Exception):
    """A row that cannot be made, for a reason that is nobody's mistake."""


class NoTime(Exception):
    """A row that was begun, and that time did not last for."""


def short(card: str) -> str:
    """A card's name as a part of a file's name: 'NVIDIA H100 80GB HBM3' is h100."""
    return re.sub("[^a-z0-9]+", "-", _NOISE.sub(" ", card).lower()).strip("-") or "unnamed"


def read(path: Path) -> list[Row]:
    """The last row of every step and key, in the order of their first; a torn last line is left out."""
    found: dict[tuple[str, str], Row] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found[row["step"], row["key"]] = row
    return list(found.values())


def append(path: Path, row: Row) -> None:
    """One line more, on the disk when this returns; a line that a killed process left torn is ended first."""
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


class Rows:
    """The rows of one step, made one after the other.

    Args:
        run: names the call of the benchmark; a red row of another call is made again.
        left_s: seconds that the step has.
        now: a file that holds the key of the row being made, for whoever finds the process dead.
        fatal: whether an error means that this process can use the device no more.
    """

    def __init__(
        self,
        path: Path,
        step: str,
        run: str = "",
        left_s: float = 600.0,
        now: Path | None = None,
        conditions: Callable[[], Row] = dict,
        fatal: Callable[[BaseException], bool] = lambda error: False,
    ) -> None:
        self.path, self.step, self.run = path, step, run
        self._end = time.monotonic() + left_s
        self._now, self._conditions, self._fatal = now, conditions, fatal
        self.left_out: list[str] = []

    def left_s(self) -> float:
        """Seconds until the step has to be over."""
        return self._end - time.monotonic()

    def all(self, step: str | None = None) -> dict[str, Row]:
        """Rows of this step, or of another, by key."""
        return {row["key"]: row for row in read(self.path) if row["step"] == (step or self.step)}

    def there(self, key: str) -> bool:
        """Whether the row need not be made."""
        row = self.all().get(key)
        return row is not None and (row["state"] != RED or row.get("run") == self.run)

    def begin(self, key: str) -> None:
        """Say which row is being made; empty: none."""
        if self._now:
            self._now.write_text(key)

    def add(self, key: str, row: Row, seconds: float = 0.0) -> None:
        head = {"step": self.step, "key": key, "state": row.get("state", DONE), "run": self.run}
        tail = {"seconds": round(seconds, 2), "conditions": self._conditions()}
        append(self.path, {**head, **row, **tail})

    def make(self, key: str, maker: Callable[[], Row], needs_s: float = 0.0) -> None:
        """Make a row unless it is there, or less than `needs_s` is left. Whatever goes wrong is a row as well.

        Raises:
            SystemExit: the device is lost for this process.
        """
        if self.there(key):
            return
        if self.left_s() < needs_s:
            self.left_out.append(key)
            return
        self.begin(key)
        start = time.monotonic()
        try:
            row, lost = maker(), False
        except NoTime:
            self.left_out.append(key)
            self.begin("")
            return
        except Refused as reason:
            row, lost = {"state": REFUSED, "say": str(reason)}, False
        except Exception as error:
            traceback.print_exc()
            said = f"{type(error).__name__}: {str(error).strip()[:1500]}"
            row, lost = {"state": RED, "say": said, "where": _where(error)}, self._fatal(error)
        self.add(key, row, time.monotonic() - start)
        self.begin("")
        if lost:
            raise SystemExit(AGAIN)


def _where(error: BaseException) -> list[str]:
    """The innermost lines of code."""
    frames: Iterable[traceback.FrameSummary] = traceback.extract_tb(error.__traceback__)[-4:]
    return [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
