"""Runs steps one after the other, each in a process of its own with a time limit, and says how each came out.

A step that runs over its limit is killed with everything that it has started. One whose process dies in the middle of a
row has that row marked red, and goes on with the others in a new process. What a step prints goes to one log; what it
found is in its rows and nowhere else.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_bench.rows import AGAIN, PART, RED, append, read

BODY = Path(__file__).with_name("body.py")
ROOT = Path(__file__).resolve().parents[3]
_POLL_S = 0.1
_GRACE_S = 3.0
_RESTARTS = 20
_TINY = 4
"""Times as long may a step take where there is no card to make it fast."""
BAD = ("red", "timed out")
"""How a step may come out that makes the whole call fail."""


@dataclass(frozen=True)
class Step:
    """One thing to run."""

    name: str
    call: int
    """In which of the calls of a few minutes it has its place."""
    body: str
    """module:function, which gets a Rows and whether everything is to be tiny."""
    limit_s: float
    least_s: float
    """Not begun with less time than that."""
    what: str


@dataclass
class Runner:
    """Steps of one call."""

    out: Path
    card: str
    minutes: float
    tiny: bool = False
    path: tuple[str, ...] = ()
    """More folders in which bodies are looked for."""
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    run_id: str = field(default_factory=lambda: f"{time.time():.3f}")
    _child: subprocess.Popen[bytes] | None = None
    _shown: int = 0

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self.rows = self.out / f"rows-{self.card}.jsonl"
        self.log = self.out / "log.txt"
        self._end = time.monotonic() + 60 * self.minutes
        self._shown = self.rows.stat().st_size if self.rows.exists() else 0

    def run(self, steps: Sequence[Step]) -> int:
        """All of them; 1 if any came out badly."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stopped)
        with tempfile.TemporaryDirectory(prefix="gpu-bench-", ignore_cleanup_errors=True) as scratch:
            for step in steps:
                self._say(f"== {step.name}: {step.what}")
                began = time.monotonic()
                how, why = self._step(step, Path(scratch))
                seconds = round(time.monotonic() - began, 1)
                self.results[step.name] = {"how": how, **({"why": why} if why else {}), "seconds": seconds}
                self._say(f"   {how}{': ' if why else ''}{why} ({seconds:.0f} s)")
                self._summary()
        return int(any(result["how"] in BAD for result in self.results.values()))

    def _step(self, step: Step, scratch: Path) -> tuple[str, str]:
        left = self._end - time.monotonic()
        if left < step.least_s:
            return "skipped", f"{left:.0f} s are left, and it needs at least {step.least_s:.0f}"
        limit = min(step.limit_s * (_TINY if self.tiny else 1), left)
        deadline, now = time.monotonic() + limit, scratch / "now"
        for _ in range(_RESTARTS):
            now.write_text("")
            code = self._process(step, scratch, now, deadline)
            if code is None:
                where = now.read_text()
                return "timed out", f"after {limit:.0f} s{f', at {where}' if where else ''}"
            if code in (0, PART):
                break
            if key := now.read_text():  # it died in the middle of this one
                append(self.rows, self._death(step, key, code))
                self._follow()
            elif code != AGAIN:
                return "red", f"its process ended with {code}, see {self.log.name}"
        red = [row["key"] for row in read(self.rows) if row["step"] == step.name and row["state"] == RED]
        if red:
            return "red", f"{', '.join(red[:8])}{f' and {len(red) - 8} more' if len(red) > 8 else ''}"
        return ("part", "the rest had no time") if code == PART else ("done", "")

    def _process(self, step: Step, scratch: Path, now: Path, deadline: float) -> int | None:
        """The exit code of one process; None if it had to be killed."""
        left = deadline - time.monotonic()
        command = [
            sys.executable,
            str(BODY),
            step.name,
            step.body,
            str(self.rows),
            str(now),
            self.run_id,
            f"{left:.1f}",
        ]
        with self.log.open("ab") as log:
            log.write(f"\n==== {step.name} {time.strftime('%H:%M:%S')}, at most {left:.0f} s\n".encode())
            log.flush()
            self._child = subprocess.Popen(
                [*command, *(["--tiny"] if self.tiny else [])],
                cwd=ROOT,
                env=self._environment(scratch),
                stdin=subprocess.PIPE,  # which ends when this process does, and the body with it
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            try:
                while self._child.poll() is None and time.monotonic() < deadline:
                    self._follow()
                    time.sleep(_POLL_S)
                return self._child.poll()
            finally:
                self._kill()
                self._follow()

    def _environment(self, scratch: Path) -> dict[str, str]:
        paths = [str(ROOT), *self.path, *filter(None, [os.environ.get("PYTHONPATH")])]
        own = {
            "PYTHONPATH": os.pathsep.join(paths),
            "ATTNSURGERY_CACHE": str(scratch / "cache"),
            "TMPDIR": str(scratch),
        }
        return {**os.environ, **own, "PYTHONUNBUFFERED": "1", "BENCH_CARD": self.card}

    def _kill(self) -> None:
        """End the process and whatever it has started; nothing of a step outlives it."""
        child, self._child = self._child, None
        if child is None:
            return
        for number, grace_s in ((signal.SIGTERM, _GRACE_S if child.poll() is None else 0.0), (signal.SIGKILL, 0.0)):
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, number)
            with suppress(subprocess.TimeoutExpired):
                child.wait(grace_s)
        child.wait()
        if child.stdin:
            child.stdin.close()

    def _death(self, step: Step, key: str, code: int) -> dict[str, Any]:
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        say = f"its process ended with {how} in the middle of this row, see {self.log.name}"
        return {"step": step.name, "key": key, "state": RED, "run": self.run_id, "say": say}

    def _follow(self) -> None:
        """Show rows that have come since the last look."""
        if not self.rows.exists():
            return
        with self.rows.open("rb") as file:
            file.seek(self._shown)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._shown += len(whole)
        for line in whole.splitlines():
            with suppress(ValueError):
                row = json.loads(line)
                mark = "" if row["state"] == "done" else f"{row['state'].upper()}: "
                key = row["key"].rpartition("::")[2]  # of a test, without its file
                self._say(f"   {key:44} {mark}{row.get('say', '')}".rstrip()[:300])

    def _summary(self) -> None:
        (self.out / "summary.json").write_text(json.dumps({"card": self.card, "steps": self.results}, indent=2) + "\n")

    def _stopped(self, number: int, frame: object) -> None:
        self._kill()
        raise SystemExit(128 + number)

    @staticmethod
    def _say(line: str) -> None:
        print(line, flush=True)
