"""A worker: a process that does jobs for the search that started it, one at a time, and may die at any moment.

It reads JSON lines and writes JSON lines, on standard input and output or through a mailbox; other output goes to its
log. When the search ends, so does the worker's input, and then the worker exits, also in the middle of a job.
"""

from __future__ import annotations

import json
import os
import platform
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch

from attnsurgery.errors import AttnSurgeryError, UsageError
from attnsurgery.evaluate import Epoch
from attnsurgery.faults import Fault, fault_of
from attnsurgery.search.config import SearchConfig
from attnsurgery.search.device_lock import DeviceLock, device_lock
from attnsurgery.search.execution.assemble import assemble
from attnsurgery.search.execution.baseline import starting_weights
from attnsurgery.search.execution.bench import Bench
from attnsurgery.search.execution.jobs import BEFORE_WEIGHTS, Job, perform, result_to_data
from attnsurgery.search.execution.trial import reason_of
from attnsurgery.search.listener import Listener
from attnsurgery.search.result.record import Timing
from attnsurgery.search.storage.run_directory import WEIGHTS
from attnsurgery.search.watching import StopRequested, Watching
from attnsurgery.search.workers.launch.mailbox import ANSWERS, Inbox, Outbox

_SIGN_S = 1.0
"""Shortest time between two signs of life, in s."""


class Out(Protocol):
    """A text stream that sends on flush."""

    def write(self, text: str, /) -> Any: ...

    def flush(self) -> None: ...


class Wire(Listener):
    """Writes answers, events and signs of life.

    Args:
        out: the stream to the search.
    """

    def __init__(self, out: Out) -> None:
        self._out = out
        self._last_sign = 0.0

    def send(self, message: Mapping[str, Any]) -> None:
        """Write a message as one JSON line."""
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()

    def sign(self) -> None:
        """Send a sign of life if the last one was sent a while ago."""
        if time.monotonic() - self._last_sign > _SIGN_S:
            self._last_sign = time.monotonic()
            self.send({"sign": True})

    def phase(self, text: str) -> None:
        self.send({"event": ["phase", text]})

    def loading(self, split: str, count: int, total: int) -> None:
        self.send({"event": ["loading", split, count, total]})

    def epoch(self, epoch: Epoch) -> None:
        self.send({"event": ["epoch", asdict(epoch)]})

    def timed(self, number: int, timing: Timing) -> None:
        self.send({"event": ["timed", number, asdict(timing)]})


class _SigningWatch(Watching):
    """Sends signs of life, also while the worker waits for the device."""

    def __init__(self, wire: Wire, stop: threading.Event, lock: DeviceLock) -> None:
        super().__init__(wire, stop.is_set, lock)
        self._wire = wire

    def wait(self) -> None:
        super().wait()
        self._wire.sign()


class _Worker:
    def __init__(self, begin: Mapping[str, Any], wire: Wire, stop: threading.Event) -> None:
        torch.set_num_threads(begin["threads"])
        self._begin, self._wire, self._stop = begin, wire, stop
        self._bench: Bench | None = None
        self._loaded = False
        self._error: Exception | None = None

    def assemble(self) -> None:
        """Load and build what jobs need, as far as it exists already; the first job reports an error."""
        try:
            use_device(self._begin["config"]["device"])
            self._config = SearchConfig(**self._begin["config"])
            self._lock = device_lock(self._config.device)
            self._watch = _SigningWatch(self._wire, self._stop, self._lock)
            self._bench = assemble(self._config, self._wire, check=False, decode=self._begin.get("decode", True))
            self._bench.backend.lock = self._lock.exclusive
            self._wire.send({"versions": {"node": platform.node(), "worker_versions": self._bench.versions()}})
        except Exception as error:
            if not isinstance(error, AttnSurgeryError) and fault_of(error) is None:
                raise
            self._error = error

    def answer(self, job: Job) -> dict[str, Any]:
        """Do a job; return the message with its result, error or fault."""
        try:
            bench = self._ready(job)
            with self._lock.shared():
                return {"result": result_to_data(perform(bench, job, self._watch))}
        except StopRequested:
            return {"stopped": True}
        except Exception as error:
            if (fault := fault_of(error)) is not None:
                traceback.print_exception(error)  # to the log
                return {"broken": [reason_of(error), fault is Fault.OUT_OF_MEMORY]}
            if isinstance(error, AttnSurgeryError):
                return {"error": [type(error).__name__, str(error)]}
            raise

    def _ready(self, job: Job) -> Bench:
        if self._bench is None:
            raise self._error or AttnSurgeryError("the worker was given a job before it was ready.")
        if not self._loaded and job.kind not in BEFORE_WEIGHTS and (Path(self._config.output) / WEIGHTS).exists():
            self._bench.weights = starting_weights(self._bench, self._watch)
            self._loaded = True
        return self._bench


def use_device(device: str) -> None:
    """Make a numbered GPU the current one, before anything opens a CUDA context on GPU 0.

    Raises:
        UsageError: there is no such GPU.
    """
    parsed = torch.device(device)
    if parsed.type != "cuda" or parsed.index is None:
        return
    try:
        torch.cuda.set_device(parsed)
    except (RuntimeError, AssertionError) as error:
        if fault_of(error) is not None and parsed.index < torch.cuda.device_count():
            raise  # the GPU exists but fails: another process may be able to use it
        raise UsageError(
            f"--device {device}: {platform.node()} has {torch.cuda.device_count()} CUDA devices ({reason_of(error)})."
        ) from error


def serve(orders: Iterable[str], out: Out) -> None:
    """Do jobs until the orders end or the device breaks; then the process exits.

    Args:
        orders: lines of JSON; iterating waits for the next one.
        out: the stream for lines of JSON.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the search, which sends "stop"
    wire, stop, waiting = Wire(out), threading.Event(), queue.Queue[dict[str, Any]]()

    def read() -> None:
        for line in orders:
            message = json.loads(line)
            if "stop" in message:
                stop.set()
            else:
                waiting.put(message)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    wire.sign()
    begin = waiting.get()["begin"]
    if log := begin.get("log"):
        _write_to(Path(log))
    worker = _Worker(begin, wire, stop)
    worker.assemble()
    while True:
        job = Job.from_dict(waiting.get()["job"])
        answer = worker.answer(job)
        wire.send(answer)
        if "broken" in answer:
            os._exit(1)


def _write_to(log: Path) -> None:
    """Append the further output of this process to a file, if it can be written."""
    with suppress(OSError), log.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())


def serve_mailbox(folder: str) -> None:
    """`serve` through files, unless a worker ran in the folder before: Slurm may put a job back into its queue."""
    if not (Path(folder) / ANSWERS).stat().st_size:
        serve(Inbox(Path(folder)), Outbox(Path(folder)))


def main() -> None:
    """`serve` on standard input and output."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries print to the log
    serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
