"""Pools of workers: this process itself, or processes that may die and are replaced while the search continues.

A job is repeated on a new worker if its worker was killed, hung, lost its device or ran out of memory; after running
out of memory, with half batches whose gradients are accumulated. After its last attempt the job is lost, with the
reason, and its owner decides what follows. Jobs that the search cannot do without have more attempts. If this process
does the jobs itself, only running out of memory is worth another attempt, because a broken CUDA context stays broken.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from attnsurgery.data.memory import free_memory
from attnsurgery.errors import AttnSurgeryError, SearchError
from attnsurgery.faults import Fault, fault_of
from attnsurgery.search.device_lock import device_lock
from attnsurgery.search.execution.bench import Bench
from attnsurgery.search.execution.jobs import Data, Job, Result, perform
from attnsurgery.search.execution.trial import reason_of
from attnsurgery.search.listener import Listener
from attnsurgery.search.watching import StopRequested, Watching

ESSENTIAL = 4
"""Maximum number of attempts, in one run, of a job that the search cannot do without."""
RESUME_HINT = "Finished results are kept, and the same command resumes the search."
_WAIT_S = 1.0


@dataclass(frozen=True, slots=True)
class JobOutcome:
    """How a job ended: with a result, with an error, lost or stopped."""

    job: Job
    """The job, as of its last attempt."""
    result: Result | None = None
    """What `perform` returned."""
    error: AttnSurgeryError | None = None
    """Why the job cannot be done."""
    lost: str = ""
    """Why every worker that attempted the job was lost."""
    stopped: bool = False
    """True if the job was abandoned because the user asked for an end."""


class WorkerPool(ABC):
    """Workers that do one job at a time each.

    Laws, which tests/contracts/test_pool.py checks for every pool: `wait` returns each given job once; a result is what
    `perform` returns; attnsurgery's own errors that `perform` raises are returned as `error`; a broken worker is
    replaced and its job repeated, or `wait` raises if workers cannot be replaced; nothing runs after `close`.

    Args:
        listener: told of the workers' progress.
        stop: whether the user asked for an end.
    """

    def __init__(self, listener: Listener, stop: Callable[[], bool]) -> None:
        self.listener = listener
        self.stop = stop

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of workers."""

    @property
    @abstractmethod
    def busy(self) -> int:
        """Number of given jobs that `wait` has not returned yet."""

    @abstractmethod
    def give(self, job: Job) -> None:
        """Queue a job for the next free worker."""

    @abstractmethod
    def wait(self, seconds: float) -> list[JobOutcome]:
        """The jobs that have ended, perhaps none; waits at most so many seconds for the first.

        Raises:
            SearchError: no worker can do any more jobs.
        """

    @abstractmethod
    def close(self) -> None:
        """End all workers, also in the middle of a job."""

    def all(self, jobs: list[Job], keep: Callable[[int, Data], None] | None = None) -> list[Data]:
        """Do jobs that the search cannot do without; return their results, JSON data, in the same order.

        Args:
            jobs: to be done.
            keep: called with the index of each job and its result, as soon as it is done.

        Raises:
            StopRequested: the user asked for an end.
            AttnSurgeryError: one of the jobs cannot be done.
        """
        for tag, job in enumerate(jobs):
            self.give(replace(job, tag=tag, max_attempts=ESSENTIAL))
        outcomes: list[JobOutcome] = []
        while self.busy:
            for outcome in self.wait(_WAIT_S):
                outcomes.append(outcome)
                if keep and isinstance(outcome.result, dict):
                    keep(outcome.job.tag, outcome.result)
        for outcome in outcomes:
            if outcome.error:
                raise outcome.error
            if outcome.lost:
                times = f"the last of {outcome.job.attempt} attempts"
                raise SearchError(f"{_name(outcome.job)} could not be done: {outcome.lost} ({times}). {RESUME_HINT}")
        if any(outcome.stopped for outcome in outcomes):
            raise StopRequested
        results = {outcome.job.tag: outcome.result for outcome in outcomes if isinstance(outcome.result, dict)}
        return [results[tag] for tag in range(len(jobs))]


class InProcessPool(WorkerPool):
    """Does all jobs in this process, which cannot be replaced.

    Args:
        bench: what trials are made on.
        listener: told of progress.
        stop: whether the user asked for an end.
    """

    def __init__(self, bench: Bench, listener: Listener, stop: Callable[[], bool]) -> None:
        super().__init__(listener, stop)
        self._bench = bench
        self._jobs: deque[Job] = deque()
        self._lock = device_lock(bench.config.device)
        self._watch = Watching(listener, stop, self._lock)
        bench.backend.lock = self._lock.exclusive

    @property
    def size(self) -> int:
        return 1

    @property
    def busy(self) -> int:
        return len(self._jobs)

    def give(self, job: Job) -> None:
        self._jobs.append(job)

    def wait(self, seconds: float) -> list[JobOutcome]:
        if not self._jobs:
            return []
        job = self._jobs[0]
        while (done := self._attempt(job)) is None:
            job = job.again(out_of_memory=True)
            free_memory()
        self._jobs.popleft()
        return [done]

    def _attempt(self, job: Job) -> JobOutcome | None:
        """How the job ended; None if memory ran out and it may be attempted again.

        This returns before the next attempt, so that no traceback keeps the memory of this one alive.

        Raises:
            SearchError: the device is broken for this process.
        """
        try:
            with self._lock.shared():
                return JobOutcome(job, perform(self._bench, job, self._watch))
        except StopRequested:
            return JobOutcome(job, stopped=True)
        except Exception as error:
            fault = fault_of(error)
            if fault is Fault.DEVICE:
                reason = reason_of(error).rstrip(".")
                raise SearchError(
                    f"{_name(job)} broke the device: {reason}. This process cannot use the device any more. "
                    f"{RESUME_HINT} With --workers 1 a worker process does the work, and is replaced when this happens."
                ) from error
            if fault is Fault.OUT_OF_MEMORY:
                return None if job.attempt < job.max_attempts else JobOutcome(job, lost=reason_of(error))
            if isinstance(error, AttnSurgeryError):
                return JobOutcome(job, error=error)
            raise

    def close(self) -> None:
        self._jobs.clear()
        self._lock.waiting = self._lock.long_wait = lambda: None  # the lock outlives this search


def _name(job: Job) -> str:
    return f"the {job.kind}" if job.trial is None else f"the {job.kind} of trial {job.trial}"
