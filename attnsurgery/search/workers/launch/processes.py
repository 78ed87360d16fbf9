"""Workers as processes of this machine, each with its own interpreter and, if there are enough, its own device.

They are new interpreters and not forks, so they share no state, and a script that runs a search needs no guard around
its main code. Their output goes to `worker-<number>.log` in the run directory.
"""

from __future__ import annotations

import json
import signal
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

import torch

from attnsurgery.errors import SearchError
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
)
from attnsurgery.search.workers.spawn import end, import_path, spawn, take


@LAUNCHERS.register("local")
class Processes(Launcher):
    """Starts processes on this machine; 'cuda' stands for all of its CUDA devices in turn."""

    name = "local"
    prepares = True

    def __init__(self, config: SearchConfig) -> None:
        super().__init__(config)
        self._spare: subprocess.Popen[bytes] | None = None
        """A process that imports torch and waits for its first message."""

    def prepare(self) -> None:
        with suppress(OSError):  # `start` reports it
            self._spare = take() or spawn(self.log(0), import_path())

    def device(self, index: int) -> str:
        if self.config.device == "cuda" and self.size > 1:
            return f"cuda:{index % torch.cuda.device_count()}"
        return self.config.device

    def start(self, index: int, on_message: OnMessage) -> Link:
        log = self.log(index)
        spare, self._spare = (self._spare, None) if index == 0 else (None, self._spare)
        try:
            process = spare or spawn(log, import_path())
        except OSError as error:
            raise SearchError(f"a worker cannot be started: {error.strerror}.") from None
        link = _PipeLink(process)
        link.send({"begin": {**self.begin(index), "log": str(log.resolve())}})
        threading.Thread(target=_listen, args=(process, log, on_message), daemon=True).start()
        return link

    def close(self) -> None:
        spare, self._spare = self._spare, None
        if spare is not None:
            end(spare)
        super().close()


def end_of(code: int, log: Path) -> WorkerExited:
    """How a worker ended.

    Args:
        code: its exit code, negative if a signal ended it, as `subprocess` has it.
        log: its last line is added as the reason.
    """
    if code == -signal.SIGKILL:
        return WorkerExited("its worker was ended by SIGKILL, as a system short of memory does", out_of_memory=True)
    reason = f"its worker was ended by {_signal(-code)}" if code < 0 else f"its worker ended with exit code {code}"
    last = last_line(log)
    return WorkerExited(f"{reason}: {last}" if last else reason, fault_of(RuntimeError(last)) is Fault.OUT_OF_MEMORY)


class _PipeLink(Link):
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def send(self, message: Message) -> None:
        assert self._process.stdin is not None
        with suppress(OSError, ValueError):  # it has exited, which is reported elsewhere
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()


def _listen(process: subprocess.Popen[bytes], log: Path, on_message: OnMessage) -> None:
    assert process.stdout is not None
    with process.stdout as answers:
        for line in answers:
            try:
                on_message(json.loads(line))
            except ValueError:  # a line that a dying worker has not completed
                break
    on_message(end_of(process.wait(), log))


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
