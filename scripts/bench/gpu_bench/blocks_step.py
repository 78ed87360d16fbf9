"""The step of blocks.py, which writes its rows to files of its own, line by line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from gpu_bench.rows import RED, NoTime, Row, Rows

_RESERVE_S = 4.0
"""Part of the step's time that is not given to blocks.py."""
SCRIPT = Path(__file__).resolve().parents[1] / "blocks.py"


def row_file(rows: Rows, kind: str) -> Path:
    """The file of blocks.py's rows, such as crossover-h100.jsonl next to rows-h100.jsonl."""
    return rows.path.with_name(rows.path.name.replace("rows-", f"{kind}-", 1))


def run_script(rows: Rows, kind: str, arguments: list[str], limit_s: float, partial_suffices: bool = False) -> None:
    """Run blocks.py with a time limit; the next call measures the missing rows.

    Args:
        rows: of this benchmark.
        kind: key of the row, and beginning of the file's name.
        arguments: of blocks.py.
        limit_s: the time limit.
        partial_suffices: whether a part of the rows is enough.
    """
    path = row_file(rows, kind)

    def call_script() -> Row:
        command = [sys.executable, str(SCRIPT), *arguments]
        try:
            code = subprocess.run(command, stdin=subprocess.DEVNULL, check=False, timeout=limit_s).returncode
        except subprocess.TimeoutExpired:
            if not (partial_suffices and path.exists()):
                raise NoTime from None
            return {"rows": _count(path), "say": f"{_count(path)} rows in {path.name} in {limit_s:.0f} s, and no more"}
        count = _count(path)
        say = f"{count} rows in {path.name}" + (f", but it ended with {code}" if code else "")
        return {"rows": count, "exit": code, "say": say, **({} if code == 0 and count else {"state": RED})}

    rows.make(kind, call_script)


def _count(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def crossover(rows: Rows, tiny: bool) -> None:
    arguments = ["--crossover", "--out", str(row_file(rows, "crossover")), "--seconds", "0.02" if tiny else "0.6"]
    run_script(rows, "crossover", arguments, rows.left_s() - _RESERVE_S)


def blocks(rows: Rows, tiny: bool) -> None:
    arguments = ["--rows", str(row_file(rows, "blocks")), "--seconds", "0.02" if tiny else "0.5"]
    run_script(rows, "blocks", arguments, 15.0 if tiny else rows.left_s() - _RESERVE_S, partial_suffices=tiny)
