"""Who does the jobs: this process itself, or processes that may die and are replaced, while the search goes on.

A job that a worker did not come back from, because it was killed, hung, or lost its device or its memory, is begun once
more on a fresh one: at half the batch, its gradients added up, where memory was the cause. After that it is lost, with
the reason; whose job it was decides what follows. One that the search cannot do without is begun some more times.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from attnsurgery.errors import AttnSurgeryError, SearchError
from attnsurgery.search.jobs import Job, perform
from attnsurgery.search.listener import Listener
from attnsurgery.search.prepare import Bench
from attnsurgery.search.trial import breaks, out_of_memory, reason_of
from attnsurgery.search.watching import StopAsked, Watching

ESSENTIAL = 4
"""How often a job is begun, in one run, that the search cannot do without."""
GOES_ON = "What was finished is kept, and the same command goes on from there."


@dataclass(frozen=True, slots=True)
class Done:
    """What became of a job: one of the four."""

    job: Job
    result: Mapping[str, Any] | None = None
    error: AttnSurgeryError | None = None
    """It cannot be done."""
    lost: str = ""
    """No worker came back from it; why."""
    stopped: bool = False
    """The user asked for an end, and it was given up."""


class Broken(Exception):
    """A worker is of no use any more; nothing is said of its job."""

    def __init__(self, reason: str, out_of_memory: bool = False) -> None:
        super().__init__(reason)
        self.out_of_memory = out_of_memory


class Crew(ABC):
    """Workers, each at one job at a time.

    Laws, which tests/contracts/test_crew.py checks of every crew: each job that was given comes back from `wait` once;
    a result is what `perform` returns; what `perform` raises of attnsurgery's own errors comes back as `error`; a
    worker that breaks is replaced, and its job begun once more; after `close` nothing runs.
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
        """What has come back; waits at most so long for the first."""

    @abstractmethod
    def close(self) -> None:
        """End all workers, whatever they do."""

    def all(
        self, jobs: list[Job], keep: Callable[[int, Mapping[str, Any]], None] | None = None
    ) -> list[Mapping[str, Any]]:
        """Have jobs done that the search cannot do without; their results, in the same order.

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
                if keep and one.result is not None:
                    keep(one.job.tag, one.result)
        for one in done:
            if one.error:
                raise one.error
            if one.lost:
                times = f"the last of {one.job.attempt} attempts"
                raise SearchError(f"{_name(one.job)} could not be done: {one.lost} ({times}). {GOES_ON}")
        if any(one.stopped for one in done):
            raise StopAsked
        found = {one.job.tag: one.result or {} for one in done}
        return [found[tag] for tag in range(len(jobs))]


_A_WHILE = 1.0


class Here(Crew):
    """This process does everything itself: nothing to start, and nothing that could be replaced.

    Args:
        bench: what jobs are done on.
    """

    def __init__(self, bench: Bench, listener: Listener, stop: Callable[[], bool]) -> None:
        super().__init__(listener, stop)
        self._bench = bench
        self._jobs: deque[Job] = deque()

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
        while True:
            try:
                result = perform(self._bench, job, Watching(self.listener, self.stop))
                done = Done(job, result)
            except StopAsked:
                done = Done(job, stopped=True)
            except AttnSurgeryError as error:
                done = Done(job, error=error)
            except Exception as error:
                if not breaks(error):
                    raise
                if job.attempt < job.most:
                    job = job.again(out_of_memory(error))
                    continue
                done = Done(job, lost=reason_of(error))
            self._jobs.popleft()
            return [done]

    def close(self) -> None:
        self._jobs.clear()


def _name(job: Job) -> str:
    return f"the {job.kind}" if job.trial is None else f"the {job.kind} of trial {job.trial}"
