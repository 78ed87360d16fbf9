"""Workers that may die: each is given one job at a time, and is replaced, while the search goes on."""

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
from attnsurgery.search.execution.jobs import Job, result_from_data
from attnsurgery.search.listener import Listener
from attnsurgery.search.result.record import Timing
from attnsurgery.search.workers.launch import Launcher, Link, Message, WorkerExited
from attnsurgery.search.workers.pool import GOES_ON, Done, WorkerPool

_STOP_S = 30.0
"""A worker that was asked to give up its job has so long, then it is ended."""
_START_S = 300.0
"""A new worker has so long until it says anything: it imports torch."""
_STARTS = 3
"""A worker that does not come to say anything is started so often."""
_POLL_S = 0.25


@dataclass(eq=False)
class WorkerSlot:
    """One worker, or the place for one."""

    index: int
    listener: Listener
    link: Link | None = None
    life: object = None
    """Tells the worker that is there from those that were."""
    job: Job | None = None
    signed: float = 0.0
    """When it last gave a sign of life."""
    heard: bool = False
    """It has given one."""
    in_vain: int = 0
    """How often it was started and gave none."""


class ProcessPool(WorkerPool):
    """So many workers, started as they are needed.

    Args:
        launcher: starts them.
        patience_s: a worker that gives no sign of life for so long is hung, and is ended.
        versions: the software and machine that each is to have; None: any.
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
        self._hands = [WorkerSlot(index, listener.lane(index) if size > 1 else listener) for index in range(size)]
        self._waiting: deque[Job] = deque()
        self._heard: queue.Queue[tuple[WorkerSlot, object, Message | WorkerExited]] = queue.Queue()
        self._stopped_at: float | None = None

    @property
    def size(self) -> int:
        return len(self._hands)

    @property
    def busy(self) -> int:
        return len(self._waiting) + sum(hand.job is not None for hand in self._hands)

    def give(self, job: Job) -> None:
        self._waiting.append(job)
        self._hand_out()

    def wait(self, seconds: float) -> list[Done]:
        done: list[Done] = []
        until = time.monotonic() + seconds
        while not done and self.busy and (left := until - time.monotonic()) > 0:
            done += self._stopping()
            try:
                heard = [self._heard.get(timeout=min(left, _POLL_S))]
                while not self._heard.empty():
                    heard.append(self._heard.get())
            except queue.Empty:
                heard = []
            for hand, life, message in heard:
                if life is hand.life:  # and not what one that was ended since has left
                    done += self._hear(hand, message)
            done += self._hung()
            self._hand_out()
        return done

    def close(self) -> None:
        self._waiting.clear()
        for hand in self._hands:
            hand.job = None
            self._end(hand)
        self._launcher.close()

    def _hand_out(self) -> None:
        if self._stopped_at is not None:
            return
        for hand in self._hands:
            if self._waiting and hand.link is None:  # all at once: where there is one job there will be more
                self._start(hand)
        for hand in self._hands:
            if self._waiting and hand.job is None and hand.link is not None and not hand.link.queued:
                hand.job, hand.signed = self._waiting.popleft(), time.monotonic()
                hand.link.tell({"job": hand.job.as_dict()})

    def _start(self, hand: WorkerSlot) -> None:
        life = object()
        hand.life, hand.heard = life, False
        hand.link = self._launcher.start(hand.index, lambda message: self._heard.put((hand, life, message)))

    def _hear(self, hand: WorkerSlot, message: Message | WorkerExited) -> list[Done]:
        if isinstance(message, WorkerExited):
            self._end(hand)
            return self._lost(hand, message)
        hand.signed, hand.heard, hand.in_vain = time.monotonic(), True, 0
        if "say" in message:
            _say(hand.listener, *message["say"])
            return []
        if "versions" in message:
            self._same_versions(hand, **message["versions"])
            return []
        if "sign" in message or hand.job is None:
            return []
        if "broken" in message:
            self._end(hand)
            return self._lost(hand, WorkerExited(*message["broken"]))
        job, hand.job = hand.job, None
        if "error" in message:
            name, text = message["error"]
            return [Done(job, error=getattr(errors, name, AttnSurgeryError)(text))]
        return (
            [Done(job, stopped=True)] if "stopped" in message else [Done(job, result_from_data(job, message["result"]))]
        )

    def _same_versions(self, hand: WorkerSlot, node: str, found: Mapping[str, str]) -> None:
        """
        Raises:
            SearchError: a worker has other software than this process, or sits on another machine.
        """
        if self._versions is None or self._launcher.config.extend:
            return
        others = differences({VERSIONS: self._versions}, {VERSIONS: found})
        if others:
            said = "; ".join(f"{key}: here {here}, there {there}" for key, (here, there) in others.items())
            raise SearchError(
                f"worker {hand.index} on {node} has other software, or is another machine, which may change scores and "
                f"latencies. {said}. Give all workers the same, or go on all the same with --extend."
            )

    def _hung(self) -> list[Done]:
        done: list[Done] = []
        for hand in self._hands:
            if hand.job is None:
                continue
            patience_s = self._patience_s if hand.heard else max(_START_S, self._patience_s)
            if time.monotonic() - hand.signed > patience_s:
                self._end(hand)
                done += self._lost(hand, WorkerExited(f"its worker gave no sign of life for {patience_s:g} s"))
        return done

    def _stopping(self) -> list[Done]:
        """Ask for an end once; what is not begun then never is, and who does not answer is ended."""
        if self._stopped_at is None:
            if not self.stop():
                return []
            self._stopped_at = time.monotonic()
            for hand in self._hands:
                if hand.link is not None and hand.job is not None:
                    hand.link.tell({"stop": True})
        done = [Done(job, stopped=True) for job in self._waiting]
        self._waiting.clear()
        if time.monotonic() - self._stopped_at > _STOP_S:
            for hand in self._hands:
                if hand.job is not None:
                    self._end(hand)
                    done += self._lost(hand, WorkerExited(""))
        return done

    def _lost(self, hand: WorkerSlot, how: WorkerExited) -> list[Done]:
        """
        Raises:
            SearchError: workers end before they come to say anything, again and again.
        """
        job, hand.job = hand.job, None
        if not hand.heard:
            hand.in_vain += 1
            if hand.in_vain >= _STARTS and self._stopped_at is None:
                raise SearchError(f"worker {hand.index} was started {_STARTS} times in vain: {how.reason}. {GOES_ON}")
        if job is None:
            return []
        if self._stopped_at is not None:
            return [Done(job, stopped=True)]
        if not hand.heard:  # and nothing of the job was begun
            self._waiting.appendleft(job)
            return []
        if job.attempt >= job.most:
            return [Done(job, lost=how.reason)]
        self._waiting.appendleft(job.again(how.out_of_memory))
        half = ", at half the batch" if how.out_of_memory else ""
        hand.listener.phase(f"begun again{half}: {how.reason}")
        return []

    def _end(self, hand: WorkerSlot) -> None:
        link, hand.link, hand.life = hand.link, None, None
        if link is not None:
            link.end()


def _say(listener: Listener, method: str, *given: Any) -> None:
    if method == "epoch":
        listener.epoch(Epoch(**given[0]))
    elif method == "timed":
        listener.timed(given[0], Timing(**given[1]))
    elif method == "loading":
        listener.loading(*given)
    elif method == "phase":
        listener.phase(*given)
