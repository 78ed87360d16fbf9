"""Rows of a benchmark: one JSON line each, written to disk as soon as it is made, and never made twice.

A row has `step`, `key` (unique within its step), `state`, `say` (one line of text), the figures, and their
`conditions`. Of several rows with one key the last counts.

States: `done`; `refused`, with the reason why there can be no such row; `red`: an error.
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
RESTART = 75
"""Exit code of a step whose process cannot use the device any longer: another process makes its other rows."""
INCOMPLETE = 76
"""Exit code of a step that had no time for some rows."""
_NOISE = re.compile(r"nvidia|geforce|tesla|\d+ ?gi?b\b|hbm\w*|sxm\d*", re.IGNORECASE)


class Refused(Exception):
    """A row that cannot be made, without an error."""


class NoTime(Exception):
    """The time ran out while a row was made."""


def short(card: str) -> str:
    """A card's name for file names: 'NVIDIA H100 80GB HBM3' becomes h100."""
    return re.sub("[^a-z0-9]+", "-", _NOISE.sub(" ", card).lower()).strip("-") or "unnamed"


def read(path: Path) -> list[Row]:
    """The last row of every step and key, in the order of the first ones; incomplete lines are skipped."""
    rows: dict[tuple[str, str], Row] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows[row["step"], row["key"]] = row
    return list(rows.values())


def append(path: Path, row: Row) -> None:
    """Append a line and flush it to disk; an incomplete last line of a killed process is terminated first."""
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


class Rows:
    """The rows of one step, which are made one after the other.

    Args:
        path: the file of the rows.
        step: its name.
        run: identifies the call of the benchmark; red rows of other calls are made again.
        left_s: time for the step.
        now: a file with the key of the row that is being made, for the runner if the process dies.
        conditions: returns the conditions of a row.
        fatal: whether an error means that this process cannot use the device any longer.
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
        """Seconds until the step has to end."""
        return self._end - time.monotonic()

    def all(self, step: str | None = None) -> dict[str, Row]:
        """Rows of this step, or of another, by key."""
        return {row["key"]: row for row in read(self.path) if row["step"] == (step or self.step)}

    def has(self, key: str) -> bool:
        """Whether a row exists and need not be made again."""
        row = self.all().get(key)
        return row is not None and (row["state"] != RED or row.get("run") == self.run)

    def begin(self, key: str) -> None:
        """Note which row is being made; '' for none."""
        if self._now:
            self._now.write_text(key)

    def add(self, key: str, row: Row, seconds: float = 0.0) -> None:
        head = {"step": self.step, "key": key, "state": row.get("state", DONE), "run": self.run}
        tail = {"seconds": round(seconds, 2), "conditions": self._conditions()}
        append(self.path, {**head, **row, **tail})

    def make(self, key: str, maker: Callable[[], Row], needs_s: float = 0.0) -> None:
        """Make a row, unless it exists or less than `needs_s` is left; an error becomes a red row.

        Raises:
            SystemExit: this process cannot use the device any longer.
        """
        if self.has(key):
            return
        if self.left_s() < needs_s:
            self.left_out.append(key)
            return
        self.begin(key)
        start = time.monotonic()
        try:
            row, device_lost = maker(), False
        except NoTime:
            self.left_out.append(key)
            self.begin("")
            return
        except Refused as reason:
            row, device_lost = {"state": REFUSED, "say": str(reason)}, False
        except Exception as error:
            traceback.print_exc()
            message = f"{type(error).__name__}: {str(error).strip()[:1500]}"
            row, device_lost = {"state": RED, "say": message, "where": _innermost_lines(error)}, self._fatal(error)
        self.add(key, row, time.monotonic() - start)
        self.begin("")
        if device_lost:
            raise SystemExit(RESTART)


def _innermost_lines(error: BaseException) -> list[str]:
    """The innermost lines of code of a traceback."""
    frames: Iterable[traceback.FrameSummary] = traceback.extract_tb(error.__traceback__)[-4:]
    return [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
