"""blocks.py, which writes its rows itself, a line at a time, beside those of this benchmark."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from gpu_bench.rows import RED, Row, Rows

SCRIPT = Path(__file__).resolve().parents[1] / "blocks.py"


def beside(rows: Rows, kind: str) -> Path:
    """The file of blocks.py's rows: crossover-h100.jsonl beside rows-h100.jsonl."""
    return rows.path.with_name(rows.path.name.replace("rows-", f"{kind}-", 1))


def called(rows: Rows, kind: str, words: list[str]) -> Row:
    path = beside(rows, kind)
    command = [sys.executable, str(SCRIPT), *words]
    code = subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode
    count = len(path.read_text().splitlines()) if path.exists() else 0
    say = f"{count} rows in {path.name}" + (f", but it ended with {code}" if code else "")
    return {"rows": count, "exit": code, "say": say, **({} if code == 0 and count else {"state": RED})}


def crossover(rows: Rows, tiny: bool) -> None:
    words = ["--crossover", "--out", str(beside(rows, "crossover")), "--seconds", "0.02" if tiny else "1"]
    rows.make("crossover", lambda: called(rows, "crossover", words))


def blocks(rows: Rows, tiny: bool) -> None:
    words = ["--rows", str(beside(rows, "blocks")), "--seconds", "0.02" if tiny else "0.5"]
    rows.make("blocks", lambda: called(rows, "blocks", words))
