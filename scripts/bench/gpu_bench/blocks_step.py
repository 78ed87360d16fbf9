"""blocks.py, which writes its rows itself, a line at a time, beside those of this benchmark."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from gpu_bench.rows import RED, NoTime, Row, Rows

_RESERVE_S = 4.0
"""Of the step's time."""
SCRIPT = Path(__file__).resolve().parents[1] / "blocks.py"


def beside(rows: Rows, kind: str) -> Path:
    """The file of blocks.py's rows: crossover-h100.jsonl beside rows-h100.jsonl."""
    return rows.path.with_name(rows.path.name.replace("rows-", f"{kind}-", 1))


def make(rows: Rows, kind: str, words: list[str], most_s: float, some: bool = False) -> None:
    """Run blocks.py, for so long at most; what it has not come to then is left to the next call.

    Args:
        some: rows that are there by then are enough.
    """
    path = beside(rows, kind)

    def called() -> Row:
        command = [sys.executable, str(SCRIPT), *words]
        try:
            code = subprocess.run(command, stdin=subprocess.DEVNULL, check=False, timeout=most_s).returncode
        except subprocess.TimeoutExpired:
            if not (some and path.exists()):
                raise NoTime from None
            return {"rows": _count(path), "say": f"{_count(path)} rows in {path.name} in {most_s:.0f} s, and no more"}
        count = _count(path)
        say = f"{count} rows in {path.name}" + (f", but it ended with {code}" if code else "")
        return {"rows": count, "exit": code, "say": say, **({} if code == 0 and count else {"state": RED})}

    rows.make(kind, called)


def _count(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def crossover(rows: Rows, tiny: bool) -> None:
    words = ["--crossover", "--out", str(beside(rows, "crossover")), "--seconds", "0.02" if tiny else "0.6"]
    make(rows, "crossover", words, rows.left_s() - _RESERVE_S)


def blocks(rows: Rows, tiny: bool) -> None:
    words = ["--rows", str(beside(rows, "blocks")), "--seconds", "0.02" if tiny else "0.5"]
    make(rows, "blocks", words, 15.0 if tiny else rows.left_s() - _RESERVE_S, some=tiny)
