"""Who does the jobs: this process itself, or processes that may die and are replaced, while the search goes on.

A job that a worker did not come back from, because it was killed, hung, or lost its device or its memory, is begun once
more on a fresh one: at half the batch, its gradients added up, where memory was the cause. After that it is lost, with
the reason; whose job it was decides what follows. One that the search cannot do without is begun some more times.
Where this process does the jobs itself, only memory is worth another attempt: a CUDA context that is broken stays so.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from attnsurgery.errors import AttnSurgeryError, SearchError
from attnsurgery.evaluate.memory import free_memory
from attnsurgery.faults import Fault, fault_of
from attnsurgery.search.device_lock import device_lock
from attnsurgery.search.execution.bench import Bench
from attnsurgery.search.execution.jobs import Data, Job, Result, perform
from attnsurgery.search.execution.trial import reason_of
from attnsurgery.search.listener import Listener
from attnsurgery.search.watching import StopAsked, Watching

ESSENTIAL = 4
"""How often a job is begun, in one run, that the search cannot do without."""
GOES_ON = "What was finished is kept, and the same command goes on from there."


@dataclass(frozen=True, slots=True)
class Done:
    """What became of a job: one of the four."""

    job: Job
    result: Result | None = None
    error: AttnSurgeryError | None = None
    """It cannot be done."""
    lost: str = ""
    """No worker came back from it; why."""
    stopped: bool = False
    """The user asked for an end, and it was given up."""


class WorkerPool(ABC):
    """Workers, each at one job at a time.

    Laws, which tests/contracts/test_pool.py checks of every pool: each job that was given comes back from `wait` once;
    a result is what `perform` returns; what `perform` raises of attnsurgery's own errors comes back as `error`; a
    worker that breaks is replaced, and its job begun once more, or `wait` raises where none can be replaced; after
    `close` nothing runs.
    """

    def __init__(self, listener: Listener, stop: Callable[[], bool]) -> None:
        self.listener = listener
        self.stop = stop

    @property
    @abstractmethod
    def size(self) -> int:
        """How many jobs are worked on at a time."""

    @property
    @abstractmethod
    def busy(self) -> int:
        """How many jobs have been given and not come back."""

    @abstractmethod
    def give(self, job: Job) -> None:
        """Have a job done, as soon as a worker is free."""

    @abstractmethod
    def wait(self, seconds: float) -> list[Done]:
        """What has come back; waits at most so long for the first.

        Raises:
            SearchError: no worker can do any job any more.
        """

    @abstractmethod
    def close(self) -> None:
        """End all workers, whatever they do."""

    def all(self, jobs: list[Job], keep: Callable[[int, Data], None] | None = None) -> list[Data]:
        """Have jobs done that the search cannot do without; their results, JSON data, in the same order.

        Args:
            keep: told the place of each job and its result, as soon as that is there.

        Raises:
            StopAsked: the user asked for an end.
            AttnSurgeryError: one of them cannot be done.
        """
        for tag, job in enumerate(jobs):
            self.give(replace(job, tag=tag, most=ESSENTIAL))
        done: list[Done] = []
        while self.busy:
            for one in self.wait(_A_WHILE):
                done.append(one)
                if keep and isinstance(one.result, dict):
                    keep(one.job.tag, one.result)
        for one in done:
            if one.error:
                raise one.error
            if one.lost:
                times = f"the last of {one.job.attempt} attempts"
                raise SearchError(f"{_name(one.job)} could not be done: {one.lost} ({times}). {GOES_ON}")
        if any(one.stopped for one in done):
            raise StopAsked
        results = {one.job.tag: one.result for one in done if isinstance(one.result, dict)}
        return [results[tag] for tag in range(len(jobs))]


_A_WHILE = 1.0


class InProcessPool(WorkerPool):
    """This process does everything itself: nothing to start, and nothing that could be replaced.

    Args:
        bench: what jobs are done on.
    """

    def __init__(self, bench: Bench, listener: Listener, stop: Callable[[], bool]) -> None:
        super().__init__(listener, stop)
        self._bench = bench
        self._jobs: deque[Job] = deque()
        self._lock = device_lock(bench.config.device)
        self._watch = Watching(listener, stop, self._lock)
        bench.backend.alone = self._lock.exclusive

    @property
    def size(self) -> int:
        return 1

    @property
    def busy(self) -> int:
        return len(self._jobs)

    def give(self, job: Job) -> None:
        self._jobs.append(job)

    def wait(self, seconds: float) -> list[Done]:
        if not self._jobs:
            return []
        job = self._jobs[0]
        while (done := self._attempt(job)) is None:
            job = job.again(out_of_memory=True)
            free_memory()
        self._jobs.popleft()
        return [done]

    def _attempt(self, job: Job) -> Done | None:
        """What became of the job; None if memory ran out and it may be begun again.

        It returns before the next attempt, so that no traceback holds on to the memory of this one.

        Raises:
            SearchError: the device is lost to this process.
        """
        try:
            with self._lock.shared():
                return Done(job, perform(self._bench, job, self._watch))
        except StopAsked:
            return Done(job, stopped=True)
        except Exception as error:
            fault = fault_of(error)
            if fault is Fault.DEVICE:
                reason = reason_of(error).rstrip(".")
                raise SearchError(
                    f"{_name(job)} broke the device: {reason}. This process cannot use the device any more. "
                    f"{GOES_ON} With --workers 1 a worker process does the work, and is replaced when this happens."
                ) from error
            if fault is Fault.OUT_OF_MEMORY:
                return None if job.attempt < job.most else Done(job, lost=reason_of(error))
            if isinstance(error, AttnSurgeryError):
                return Done(job, error=error)
            raise

    def close(self) -> None:
        self._jobs.clear()
        self._lock.waiting = lambda: None  # the lock outlives this search


def _name(job: Job) -> str:
    return f"the {job.kind}" if job.trial is None else f"the {job.kind} of trial {job.trial}"
