"""Workers as processes of this machine: each has its own interpreter, and a device of its own where there are enough.

They are fresh interpreters and no forks, so they share nothing that could break, and need no guard around the main
module of whoever runs a search. What they print goes to `worker-<number>.log` in the run directory.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import attnsurgery
from attnsurgery import errors
from attnsurgery.errors import AttnSurgeryError, SearchError
from attnsurgery.evaluate import Epoch
from attnsurgery.search.config import SearchConfig
from attnsurgery.search.crew import Crew, Done
from attnsurgery.search.jobs import Job
from attnsurgery.search.listener import Listener
from attnsurgery.search.record import Timing

_STOP_S = 30.0
"""A worker that was asked to give up its job has so long, then it is ended."""
_START_S = 300.0
"""A new worker has so long until it says anything: it imports torch."""
_POLL_S = 0.25
_TAIL = 2000


@dataclass(eq=False)
class _Hand:
    """One worker, or the place for one."""

    index: int
    listener: Listener
    device: str
    process: subprocess.Popen[bytes] | None = None
    job: Job | None = None
    signed: float = 0.0
    """When it last gave a sign of life."""
    heard: bool = False
    """It has given one."""


class Processes(Crew):
    """So many processes, started as they are needed.

    Args:
        patience_s: a worker that gives no sign of life for so long is hung, and is ended.
    """

    def __init__(
        self, config: SearchConfig, listener: Listener, stop: Callable[[], bool], patience_s: float | None = None
    ) -> None:
        super().__init__(listener, stop)
        self._config = config
        self._patience_s = patience_s or 60 * config.patience_minutes
        devices = devices_of(config)
        lanes = [listener.lane(index) if len(devices) > 1 else listener for index in range(len(devices))]
        self._hands = [_Hand(index, lanes[index], device) for index, device in enumerate(devices)]
        self._waiting: deque[Job] = deque()
        self._heard: queue.Queue[tuple[_Hand, subprocess.Popen[bytes], dict[str, Any] | None]] = queue.Queue()
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
            for hand, process, message in heard:
                if hand.process is process:  # and not what one that was ended since has left
                    done += self._hear(hand, message)
            done += self._hung()
            self._hand_out()
        return done

    def close(self) -> None:
        self._waiting.clear()
        for hand in self._hands:
            hand.job = None
            self._end(hand)
            with suppress(OSError):
                if not self._log(hand).stat().st_size:
                    self._log(hand).unlink()

    def _hand_out(self) -> None:
        if self._waiting and not any(hand.process for hand in self._hands):
            for hand in self._hands:  # all at once: where there is one job there will be more
                self._start(hand)
        for hand in self._hands:
            if hand.job is None and self._waiting and self._stopped_at is None:
                hand.job, hand.signed = self._waiting.popleft(), time.monotonic()
                if hand.process is None:
                    self._start(hand)
                if not hand.heard:
                    hand.signed += _START_S
                self._tell(hand, {"job": hand.job.as_dict()})

    def _start(self, hand: _Hand) -> None:
        source = str(Path(attnsurgery.__file__).resolve().parents[1])  # also where it runs without being installed
        paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        with self._log(hand).open("ab") as log:
            try:
                hand.process = subprocess.Popen(
                    [sys.executable, "-m", "attnsurgery.search.worker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=environment,
                    start_new_session=True,  # Ctrl-C in the terminal is not for it
                )
            except OSError as error:
                raise SearchError(f"a worker cannot be started: {error.strerror}.") from None
        config = self._config.model_copy(update={"device": hand.device})
        shared = sum(other.device == hand.device for other in self._hands) > 1
        threads = max(1, torch.get_num_threads() // (self.size if torch.device(hand.device).type == "cpu" else 1))
        begin = {
            "config": config.model_dump(exclude={"storage"}),  # which may hold a password
            "threads": threads,
            "shares": hand.device if shared else None,
        }
        hand.heard = False
        self._tell(hand, {"begin": begin})
        threading.Thread(target=self._listen, args=(hand, hand.process), daemon=True).start()

    def _listen(self, hand: _Hand, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with process.stdout as answers:
            for line in answers:
                try:
                    self._heard.put((hand, process, json.loads(line)))
                except ValueError:  # a line that a dying worker has torn
                    break
        process.wait()
        self._heard.put((hand, process, None))

    def _tell(self, hand: _Hand, message: dict[str, Any]) -> None:
        assert hand.process is not None
        assert hand.process.stdin is not None
        with suppress(OSError):  # it is dead, and its end will be heard of
            hand.process.stdin.write(json.dumps(message).encode() + b"\n")
            hand.process.stdin.flush()

    def _hear(self, hand: _Hand, message: dict[str, Any] | None) -> list[Done]:
        hand.signed, hand.heard = time.monotonic(), True
        if message is None:
            return self._died(hand)
        if "say" in message:
            _say(hand.listener, *message["say"])
            return []
        if "sign" in message or hand.job is None:
            return []
        if "broken" in message:
            reason, out_of_memory = message["broken"]
            self._end(hand)
            return self._lost(hand, reason, out_of_memory)
        job, hand.job = hand.job, None
        if "error" in message:
            name, text = message["error"]
            return [Done(job, error=getattr(errors, name, AttnSurgeryError)(text))]
        return [Done(job, stopped=True)] if "stopped" in message else [Done(job, message["result"])]

    def _died(self, hand: _Hand) -> list[Done]:
        assert hand.process is not None
        code = hand.process.returncode
        killed = code == -signal.SIGKILL
        reason = f"its worker was ended by {_signal(-code)}" if code < 0 else f"its worker ended with exit code {code}"
        if killed:
            reason += ", as a system short of memory does"
        elif last := self._last_line(hand):
            reason += f": {last}"
        self._end(hand)
        return self._lost(hand, reason, killed) if hand.job else []

    def _hung(self) -> list[Done]:
        done: list[Done] = []
        for hand in self._hands:
            if hand.job is not None and time.monotonic() - hand.signed > self._patience_s:
                self._end(hand)
                done += self._lost(hand, f"its worker gave no sign of life for {self._patience_s:g} s", False)
        return done

    def _stopping(self) -> list[Done]:
        """Ask for an end once; what is not begun then never is, and who does not answer is ended."""
        if self._stopped_at is None:
            if not self.stop():
                return []
            self._stopped_at = time.monotonic()
            for hand in self._hands:
                if hand.job is not None:
                    self._tell(hand, {"stop": True})
        done = [Done(job, stopped=True) for job in self._waiting]
        self._waiting.clear()
        if time.monotonic() - self._stopped_at > _STOP_S:
            for hand in self._hands:
                if hand.job is not None:
                    self._end(hand)
                    done += self._lost(hand, "", False)
        return done

    def _lost(self, hand: _Hand, reason: str, out_of_memory: bool) -> list[Done]:
        job, hand.job = hand.job, None
        if job is None:
            return []
        if self._stopped_at is not None:
            return [Done(job, stopped=True)]
        if job.attempt >= job.most:
            return [Done(job, lost=reason)]
        self._waiting.appendleft(job.again(out_of_memory))
        half = ", at half the batch" if out_of_memory else ""
        hand.listener.phase(f"begun again{half}: {reason}")
        return []

    def _end(self, hand: _Hand) -> None:
        process, hand.process = hand.process, None
        if process is None:
            return
        process.kill()
        process.wait()
        if process.stdin is not None:
            with suppress(OSError):
                process.stdin.close()

    def _log(self, hand: _Hand) -> Path:
        return Path(self._config.output) / f"worker-{hand.index}.log"

    def _last_line(self, hand: _Hand) -> str:
        try:
            with self._log(hand).open("rb") as log:
                size = log.seek(0, os.SEEK_END)
                log.seek(max(0, size - _TAIL))
                lines = log.read().decode(errors="replace").strip().splitlines()
        except OSError:
            return ""
        return lines[-1].strip() if lines else ""


def devices_of(config: SearchConfig) -> list[str]:
    """One a worker: 'cuda' stands for all CUDA devices in turn."""
    count = max(1, config.workers)
    if config.device == "cuda" and count > 1:
        return [f"cuda:{index % torch.cuda.device_count()}" for index in range(count)]
    return [config.device] * count


def _say(listener: Listener, method: str, *given: Any) -> None:
    if method == "epoch":
        listener.epoch(Epoch(**given[0]))
    elif method == "timed":
        listener.timed(given[0], Timing(**given[1]))
    elif method == "loading":
        listener.loading(*given)
    elif method == "phase":
        listener.phase(*given)


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
