"""Runs steps one after the other, each in its own process with a time limit, and reports how each ended.

A step that exceeds its limit is killed with its child processes. If a process dies during a row, this row is red, and a
new process makes the others. The output of all steps goes to one log; their results are in the rows alone.
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

from gpu_bench.rows import INCOMPLETE, RED, RESTART, append, read

BODY = Path(__file__).with_name("body.py")
ROOT = Path(__file__).resolve().parents[3]
_POLL_S = 0.1
_GRACE_S = 3.0
_RESTARTS = 20
_TINY_FACTOR = 4
"""Factor on time limits in a tiny run, which may be on a machine without a card."""
FAILURES = ("red", "timed out")
"""Outcomes of a step that make the call fail."""


@dataclass(frozen=True)
class Step:
    """One step of the benchmark."""

    name: str
    call: int
    """The number of the call of a few minutes in which it runs."""
    body: str
    """module:function, called with a Rows and whether the run is tiny."""
    limit_s: float
    """Time limit."""
    min_s: float
    """The step is skipped if less time remains."""
    description: str


@dataclass
class Runner:
    """Runs the steps of one call."""

    out: Path
    card: str
    minutes: float
    tiny: bool = False
    path: tuple[str, ...] = ()
    """Additional folders of Python modules."""
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
        """Run all steps; returns 1 if any failed, else 0."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stopped)
        with tempfile.TemporaryDirectory(prefix="gpu-bench-", ignore_cleanup_errors=True) as scratch:
            for step in steps:
                self._say(f"== {step.name}: {step.description}")
                start = time.monotonic()
                outcome, reason = self._step(step, Path(scratch))
                seconds = round(time.monotonic() - start, 1)
                self.results[step.name] = {"how": outcome, **({"why": reason} if reason else {}), "seconds": seconds}
                self._say(f"   {outcome}{': ' if reason else ''}{reason} ({seconds:.0f} s)")
                self._summary()
        return int(any(result["how"] in FAILURES for result in self.results.values()))

    def _step(self, step: Step, scratch: Path) -> tuple[str, str]:
        remaining_s = self._end - time.monotonic()
        if remaining_s < step.min_s:
            return "skipped", f"{remaining_s:.0f} s are left, and it needs at least {step.min_s:.0f}"
        limit = min(step.limit_s * (_TINY_FACTOR if self.tiny else 1), remaining_s)
        deadline, now = time.monotonic() + limit, scratch / "now"
        for _ in range(_RESTARTS):
            now.write_text("")
            code = self._process(step, scratch, now, deadline)
            if code is None:
                current_key = now.read_text()
                return "timed out", f"after {limit:.0f} s{f', at {current_key}' if current_key else ''}"
            if code in (0, INCOMPLETE):
                break
            if key := now.read_text():  # the process died during this row
                append(self.rows, self._death(step, key, code))
                self._follow()
            elif code != RESTART:
                return "red", f"its process ended with {code}, see {self.log.name}"
        red = [row["key"] for row in read(self.rows) if row["step"] == step.name and row["state"] == RED]
        if red:
            return "red", f"{', '.join(red[:8])}{f' and {len(red) - 8} more' if len(red) > 8 else ''}"
        return ("part", "the rest had no time") if code == INCOMPLETE else ("done", "")

    def _process(self, step: Step, scratch: Path, now: Path, deadline: float) -> int | None:
        """Run one process of a step; returns its exit code, or None if it had to be killed."""
        remaining_s = deadline - time.monotonic()
        command = [
            sys.executable,
            str(BODY),
            step.name,
            step.body,
            str(self.rows),
            str(now),
            self.run_id,
            f"{remaining_s:.1f}",
        ]
        with self.log.open("ab") as log:
            log.write(f"\n==== {step.name} {time.strftime('%H:%M:%S')}, at most {remaining_s:.0f} s\n".encode())
            log.flush()
            self._child = subprocess.Popen(
                [*command, *(["--tiny"] if self.tiny else [])],
                cwd=ROOT,
                env=self._environment(scratch),
                stdin=subprocess.PIPE,  # closed when this process ends, which ends the body
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
        variables = {
            "PYTHONPATH": os.pathsep.join(paths),
            "ATTNSURGERY_CACHE": str(scratch / "cache"),
            "TMPDIR": str(scratch),
        }
        return {**os.environ, **variables, "PYTHONUNBUFFERED": "1", "BENCH_CARD": self.card}

    def _kill(self) -> None:
        """End the process of the step and all its child processes."""
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
        ending = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        say = f"its process ended with {ending} in the middle of this row, see {self.log.name}"
        return {"step": step.name, "key": key, "state": RED, "run": self.run_id, "say": say}

    def _follow(self) -> None:
        """Print the rows that were added since the last call."""
        if not self.rows.exists():
            return
        with self.rows.open("rb") as file:
            file.seek(self._shown)
            content = file.read()
        complete = content[: content.rfind(b"\n") + 1]
        self._shown += len(complete)
        for line in complete.splitlines():
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
