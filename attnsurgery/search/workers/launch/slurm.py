"""Workers as jobs of Slurm, through submitit; where there is no Slurm, submitit's processes of this machine.

A job is a worker and not a trial: images are read and models built once, and it waits in the queue once. The search
and its workers talk through files in the run directory, so that has to lie where all nodes see it, under one path.
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
"""Of the run directory: mailboxes, and what submitit writes."""
_LOOK_S = 1.0
_WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "READY", "UNKNOWN"}
"""States of jobs that nothing can be expected of."""
_END_S = 5.0
_DAY_MIN = 24 * 60


@LAUNCHERS.register("submitit")
class Submitit(Launcher):
    """Asks for a GPU a worker where it trains on GPUs, for `threads` CPUs, and for a day.

    `launcher_args` are parameters of submitit's AutoExecutor, such as slurm_partition=gpu, timeout_min=600, mem_gb=32;
    and cluster, which names another executor than the best that is there.
    """

    name = "submitit"
    takes = None

    def __init__(self, config: SearchConfig) -> None:
        super().__init__(config)
        try:
            import submitit
        except ImportError as error:
            raise missing(self.name, "slurm", error) from None
        self._folder = Path(config.output).resolve() / _JOBS
        shutil.rmtree(self._folder, ignore_errors=True)  # workers of a search that died end when theirs is gone
        asked = {"timeout_min": _DAY_MIN, "cpus_per_task": self.threads, "name": "attnsurgery", **self.asked}
        if not self._on_cpu:
            asked.setdefault("gpus_per_node", 1)
        try:
            self._executor: Any = submitit.AutoExecutor(self._folder / "submitit", cluster=asked.pop("cluster", None))
            self._executor.update_parameters(**asked)
        except (NameError, TypeError, ValueError, AssertionError, RuntimeError) as error:
            said = " ".join(str(error).split())
            raise UsageError(f"--launcher-args {config.launcher_args!r}: submitit says: {said}") from None

    @property
    def threads(self) -> int:
        return int(self.asked.get("cpus_per_task", super().threads))

    def start(self, index: int, heard: OnMessage) -> Link:
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
        except Exception as error:  # of submitit: whatever sbatch says
            raise SearchError(f"a worker cannot be submitted: {' '.join(str(error).split())}") from None
        return _Mail(job, folder, heard, here=self._executor.cluster == "local")

    def close(self) -> None:
        super().close()
        shutil.rmtree(self._folder, ignore_errors=True)


class _Mail(Link):
    def __init__(self, job: Any, folder: Path, heard: OnMessage, here: bool) -> None:
        self.queued = True
        self._job, self._folder, self._heard, self._here = job, folder, heard, here
        self._ended = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def tell(self, message: Message) -> None:
        with suppress(OSError):
            add(self._folder / ORDERS, json.dumps(message) + "\n")

    def end(self) -> None:
        self._ended.set()
        with suppress(OSError):
            (self._folder / ORDERS).unlink()  # which ends it, should nobody else
        with suppress(Exception):  # it has ended, or Slurm is away
            if not (self._here and self._done_within(_END_S)):
                self._job.cancel(check=False)
                self._done_within(_END_S if self._here else 0.0)

    def _done_within(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while not (done := self._job.done()) and time.monotonic() < until:
            time.sleep(POLL_S)
        return bool(done)

    def _watch(self) -> None:
        answers, count, counted, looked = Lines(self._folder / ANSWERS), 0, time.monotonic(), time.monotonic()
        while not self._ended.wait(POLL_S):
            with suppress(OSError):  # a file server that is away for a moment
                self._hear(answers)
                if time.monotonic() - counted > BEAT_S:
                    count, counted = count + 1, time.monotonic()
                    (self._folder / BEAT).write_text(f"{count}")
            if time.monotonic() - looked > _LOOK_S:
                looked = time.monotonic()
                if self.queued and str(self._job.state).upper() not in _WAITING:
                    self.queued = False
                if self._job.done():
                    with suppress(OSError):
                        self._hear(answers)
                    self._heard(self._gone())
                    return

    def _hear(self, answers: Lines) -> None:
        for line in answers.new():
            self.queued = False
            self._heard(json.loads(line))

    def _gone(self) -> WorkerExited:
        state = str(self._job.state)
        said = last_line(Path(self._job.paths.stderr))
        lacking = "MEMORY" in state or fault_of(RuntimeError(said)) is Fault.OUT_OF_MEMORY
        return WorkerExited(f"its job {self._job.job_id} ended as {state}" + (f": {said}" if said else ""), lacking)
