"""A pool of worker processes: each does one job at a time, and is replaced if it dies or hangs."""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from attnsurgery import errors
from attnsurgery.errors import AttnSurgeryError, SearchError
from attnsurgery.evaluate import Epoch
from attnsurgery.search.compatibility import VERSIONS, differences
from attnsurgery.search.execution.jobs import BEFORE_WEIGHTS, Job, result_from_data
from attnsurgery.search.listener import Listener
from attnsurgery.search.result.record import Timing
from attnsurgery.search.workers.launch import Launcher, Link, Message, WorkerExited
from attnsurgery.search.workers.pool import RESUME_HINT, JobOutcome, WorkerPool

_STOP_S = 30.0
"""Time that a worker has to stop its job before it is ended, in s."""
_START_S = 300.0
"""Time that a new worker has until its first message, in s; it imports torch."""
_STARTS = 3
"""Number of failed starts of a worker after which the search ends."""
_POLL_S = 0.25
"""Longest wait for messages before hung workers are looked for, in s."""


@dataclass(eq=False)
class WorkerSlot:
    """The place of one worker in the pool; workers that die are replaced in it."""

    index: int
    """Number of the place, from 0."""
    listener: Listener
    """Told of the worker's progress."""
    link: Link | None = None
    """The connection to the present worker; None if there is none."""
    generation: object = None
    """Identifies the present worker, to ignore messages of earlier ones."""
    job: Job | None = None
    """The job that the worker does."""
    last_sign: float = 0.0
    """Time of its last message, or of the beginning of its job, on the monotonic clock, in s."""
    alive: bool = False
    """Whether it has sent a message."""
    failed_starts: int = 0
    """Number of workers in a row that ended without a message."""


class ProcessPool(WorkerPool):
    """Worker processes, started when they are needed.

    Args:
        launcher: starts workers.
        listener: told of progress.
        stop: whether the user asked for an end.
        patience_s: time without a message after which a worker is ended, in s; by default as configured.
        versions: of software and machine that each worker must have; None for any.
    """

    def __init__(
        self,
        launcher: Launcher,
        listener: Listener,
        stop: Callable[[], bool],
        patience_s: float | None = None,
        versions: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(listener, stop)
        self._launcher = launcher
        self._patience_s = patience_s or 60 * launcher.config.patience_minutes
        self._versions = versions
        size = launcher.size
        self._slots = [WorkerSlot(index, listener.lane(index) if size > 1 else listener) for index in range(size)]
        self._waiting: deque[Job] = deque()
        self._messages: queue.Queue[tuple[WorkerSlot, object, Message | WorkerExited]] = queue.Queue()
        self._stopped_at: float | None = None

    @property
    def size(self) -> int:
        return len(self._slots)

    @property
    def busy(self) -> int:
        return len(self._waiting) + sum(slot.job is not None for slot in self._slots)

    def give(self, job: Job) -> None:
        self._waiting.append(job)
        self._assign()

    def wait(self, seconds: float) -> list[JobOutcome]:
        outcomes: list[JobOutcome] = []
        until = time.monotonic() + seconds
        while not outcomes and self.busy and (remaining_s := until - time.monotonic()) > 0:
            outcomes += self._stopping()
            try:
                messages = [self._messages.get(timeout=min(remaining_s, _POLL_S))]
                while not self._messages.empty():
                    messages.append(self._messages.get())
            except queue.Empty:
                messages = []
            for slot, life, message in messages:
                if life is slot.generation:  # ignore messages of an earlier worker
                    outcomes += self._receive(slot, message)
            outcomes += self._hung()
            self._assign()
        return outcomes

    def close(self) -> None:
        self._waiting.clear()
        for slot in self._slots:
            slot.job = None
            self._end(slot)
        self._launcher.close()

    def _assign(self) -> None:
        if self._stopped_at is not None:
            return
        early = all(job.kind in BEFORE_WEIGHTS for job in self._waiting)
        for slot in self._slots:
            if early and any(other.link is not None for other in self._slots):
                break  # a worker that starts would disturb a measurement that comes before all other work
            if self._waiting and slot.link is None:  # start all workers: more jobs will follow
                self._start(slot)
        for slot in self._slots:
            if self._waiting and slot.job is None and slot.link is not None and not slot.link.queued:
                slot.job, slot.last_sign = self._waiting.popleft(), time.monotonic()
                slot.link.send({"job": slot.job.as_dict()})

    def _start(self, slot: WorkerSlot) -> None:
        life = object()
        slot.generation, slot.alive = life, False
        slot.link = self._launcher.start(slot.index, lambda message: self._messages.put((slot, life, message)))

    def _receive(self, slot: WorkerSlot, message: Message | WorkerExited) -> list[JobOutcome]:
        if isinstance(message, WorkerExited):
            self._end(slot)
            return self._replace(slot, message)
        slot.last_sign, slot.alive, slot.failed_starts = time.monotonic(), True, 0
        if "event" in message:
            _forward(slot.listener, *message["event"])
            return []
        if "versions" in message:
            self._same_versions(slot, **message["versions"])
            return []
        if "sign" in message or slot.job is None:
            return []
        if "broken" in message:
            self._end(slot)
            return self._replace(slot, WorkerExited(*message["broken"]))
        job, slot.job = slot.job, None
        if "error" in message:
            name, text = message["error"]
            return [JobOutcome(job, error=getattr(errors, name, AttnSurgeryError)(text))]
        return (
            [JobOutcome(job, stopped=True)]
            if "stopped" in message
            else [JobOutcome(job, result_from_data(job, message["result"]))]
        )

    def _same_versions(self, slot: WorkerSlot, node: str, worker_versions: Mapping[str, str]) -> None:
        """Make sure that a worker has the expected versions.

        Raises:
            SearchError: a worker has other software than this process, or another kind of machine.
        """
        if self._versions is None or self._launcher.config.extend:
            return
        differing = differences({VERSIONS: self._versions}, {VERSIONS: worker_versions})
        if differing:
            text = "; ".join(f"{key}: here {own}, there {other}" for key, (own, other) in differing.items())
            raise SearchError(
                f"worker {slot.index} on {node} has other software, or is another machine, which may change scores and "
                f"latencies. {text}. Give all workers the same, or continue nevertheless with --extend."
            )

    def _hung(self) -> list[JobOutcome]:
        outcomes: list[JobOutcome] = []
        for slot in self._slots:
            if slot.job is None:
                continue
            patience_s = self._patience_s if slot.alive else max(_START_S, self._patience_s)
            if time.monotonic() - slot.last_sign > patience_s:
                self._end(slot)
                outcomes += self._replace(slot, WorkerExited(f"its worker gave no sign of life for {patience_s:g} s"))
        return outcomes

    def _stopping(self) -> list[JobOutcome]:
        """Once the user asks for an end: ask workers to stop, drop queued jobs, end workers that do not answer."""
        if self._stopped_at is None:
            if not self.stop():
                return []
            self._stopped_at = time.monotonic()
            for slot in self._slots:
                if slot.link is not None and slot.job is not None:
                    slot.link.send({"stop": True})
        outcomes = [JobOutcome(job, stopped=True) for job in self._waiting]
        self._waiting.clear()
        if time.monotonic() - self._stopped_at > _STOP_S:
            for slot in self._slots:
                if slot.job is not None:
                    self._end(slot)
                    outcomes += self._replace(slot, WorkerExited(""))
        return outcomes

    def _replace(self, slot: WorkerSlot, ending: WorkerExited) -> list[JobOutcome]:
        """Queue the job of a lost worker for another attempt, or return it as lost or stopped.

        Raises:
            SearchError: workers end repeatedly before their first message.
        """
        job, slot.job = slot.job, None
        if not slot.alive:
            slot.failed_starts += 1
            if slot.failed_starts >= _STARTS and self._stopped_at is None:
                raise SearchError(
                    f"worker {slot.index} was started {_STARTS} times in vain: {ending.reason}. {RESUME_HINT}"
                )
        if job is None:
            return []
        if self._stopped_at is not None:
            return [JobOutcome(job, stopped=True)]
        if not slot.alive:  # the job did not begin
            self._waiting.appendleft(job)
            return []
        if job.attempt >= job.max_attempts:
            return [JobOutcome(job, lost=ending.reason)]
        self._waiting.appendleft(job.again(ending.out_of_memory))
        half = ", at half the batch" if ending.out_of_memory else ""
        slot.listener.phase(f"repeated{half}: {ending.reason}")
        return []

    def _end(self, slot: WorkerSlot) -> None:
        link, slot.link, slot.generation = slot.link, None, None
        if link is not None:
            link.end()


def _forward(listener: Listener, method: str, *arguments: Any) -> None:
    """Pass an event of a worker on to its listener."""
    if method == "epoch":
        listener.epoch(Epoch(**arguments[0]))
    elif method == "timed":
        listener.timed(arguments[0], Timing(**arguments[1]))
    elif method == "loading":
        listener.loading(*arguments)
    elif method == "phase":
        listener.phase(*arguments)
