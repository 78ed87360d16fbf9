"""Workers as jobs of Slurm, through submitit; without Slurm, as processes of this machine that submitit starts.

A Slurm job is a worker and not a trial: it waits in the queue once, reads images once and builds models once. The
search and its workers exchange messages through files in the run directory, which must be visible to all nodes under
the same path.
"""

from __future__ import annotations

import json
import secrets
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from attnsurgery.errors import SearchError, UsageError
from attnsurgery.faults import Fault, fault_of
from attnsurgery.search.config import SearchConfig
from attnsurgery.search.workers.launch._base import (
    LAUNCHERS,
    Launcher,
    Link,
    Message,
    OnMessage,
    WorkerExited,
    last_line,
    missing,
)
from attnsurgery.search.workers.launch.mailbox import ANSWERS, BEAT, BEAT_S, ORDERS, POLL_S, Lines, add

_JOBS = ".jobs"
"""Folder of the run directory: mailboxes, and files of submitit."""
_LOOK_S = 1.0
"""Time between two looks at the state of a job, in s."""
_WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "READY", "UNKNOWN"}
"""States of jobs that do not run yet."""
_END_S = 5.0
_DAY_MIN = 24 * 60


@LAUNCHERS.register("submitit", summary="as Slurm jobs")
class Submitit(Launcher):
    """Requests for each worker `threads` CPUs, one day, and one GPU if it trains on GPUs.

    `launcher_args` are parameters of submitit's AutoExecutor, such as slurm_partition=gpu, timeout_min=600, mem_gb=32;
    and cluster, which selects another executor than the default one.

    Raises:
        UsageError: submitit is not installed, or refuses the arguments.
    """

    name = "submitit"
    argument_names = None
    package = "submitit"
    local_arguments = "cluster=local"

    def __init__(self, config: SearchConfig) -> None:
        super().__init__(config)
        try:
            import submitit
        except ImportError as error:
            raise missing(self.name, "slurm", error) from None
        self._folder = Path(config.output).resolve() / _JOBS
        shutil.rmtree(self._folder, ignore_errors=True)  # workers of a dead search exit when their mailbox is removed
        parameters = {"timeout_min": _DAY_MIN, "cpus_per_task": self.threads, "name": "attnsurgery", **self.arguments}
        if not self._on_cpu:
            parameters.setdefault("gpus_per_node", 1)
        try:
            self._executor: Any = submitit.AutoExecutor(
                self._folder / "submitit", cluster=parameters.pop("cluster", None)
            )
            self._executor.update_parameters(**parameters)
        except (NameError, TypeError, ValueError, AssertionError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"--launcher-args {config.launcher_args!r}: submitit says: {reason}") from None

    @property
    def threads(self) -> int:
        return int(self.arguments.get("cpus_per_task", super().threads))

    def start(self, index: int, on_message: OnMessage) -> Link:
        from attnsurgery.search.workers.worker import serve_mailbox

        folder = self._folder / f"worker-{index}-{secrets.token_hex(4)}"
        begin = self.begin(index)
        begin["config"] |= {"output": str(Path(self.config.output).resolve())}
        try:
            folder.mkdir(parents=True)
            (folder / ANSWERS).touch()
            (folder / BEAT).write_text("0")
            add(folder / ORDERS, json.dumps({"begin": begin}) + "\n")
            job = self._executor.submit(serve_mailbox, str(folder))
        except OSError as error:
            raise SearchError(f"a worker cannot be submitted: {error.strerror}.") from None
        except Exception as error:  # submitit raises the message of sbatch
            raise SearchError(f"a worker cannot be submitted: {' '.join(str(error).split())}") from None
        return _MailboxLink(job, folder, on_message, local=self._executor.cluster == "local")

    def close(self) -> None:
        super().close()
        shutil.rmtree(self._folder, ignore_errors=True)


class _MailboxLink(Link):
    def __init__(self, job: Any, folder: Path, on_message: OnMessage, local: bool) -> None:
        self.queued = True
        self._job, self._folder, self._on_message, self._local = job, folder, on_message, local
        self._ended = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def send(self, message: Message) -> None:
        with suppress(OSError):
            add(self._folder / ORDERS, json.dumps(message) + "\n")

    def end(self) -> None:
        self._ended.set()
        with suppress(OSError):
            (self._folder / ORDERS).unlink()  # ends the worker, also if cancelling fails
        with suppress(Exception):  # it has ended, or Slurm does not respond
            if not (self._local and self._ends_within(_END_S)):
                self._job.cancel(check=False)
                self._ends_within(_END_S if self._local else 0.0)

    def _ends_within(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while not (finished := self._job.done()) and time.monotonic() < until:
            time.sleep(POLL_S)
        return bool(finished)

    def _watch(self) -> None:
        answers, count, counted, looked = Lines(self._folder / ANSWERS), 0, time.monotonic(), time.monotonic()
        while not self._ended.wait(POLL_S):
            with suppress(OSError):  # the file server does not respond for a moment
                self._receive(answers)
                if time.monotonic() - counted > BEAT_S:
                    count, counted = count + 1, time.monotonic()
                    (self._folder / BEAT).write_text(f"{count}")
            if time.monotonic() - looked > _LOOK_S:
                looked = time.monotonic()
                if self.queued and str(self._job.state).upper() not in _WAITING:
                    self.queued = False
                if self._job.done():
                    with suppress(OSError):
                        self._receive(answers)
                    self._on_message(self._exit())
                    return

    def _receive(self, answers: Lines) -> None:
        for line in answers.new():
            self.queued = False
            self._on_message(json.loads(line))

    def _exit(self) -> WorkerExited:
        state = str(self._job.state)
        last = last_line(Path(self._job.paths.stderr))
        lacking = "MEMORY" in state or fault_of(RuntimeError(last)) is Fault.OUT_OF_MEMORY
        return WorkerExited(f"its job {self._job.job_id} ended as {state}" + (f": {last}" if last else ""), lacking)
