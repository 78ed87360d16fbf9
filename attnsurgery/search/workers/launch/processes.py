"""Workers as processes of this machine: each has its own interpreter, and a device of its own where there are enough.

They are fresh interpreters and no forks, so they share nothing that could break, and need no guard around the main
module of whoever runs a search. What they print goes to `worker-<number>.log` in the run directory.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

import torch

from attnsurgery.errors import SearchError
from attnsurgery.faults import Fault, fault_of
from attnsurgery.search.workers.launch._base import (
    COMMAND,
    LAUNCHERS,
    Launcher,
    Link,
    Message,
    OnMessage,
    WorkerExited,
    import_path,
    last_line,
)


@LAUNCHERS.register("local")
class Processes(Launcher):
    """Processes of this machine; 'cuda' stands for all of its CUDA devices in turn."""

    name = "local"

    def device(self, index: int) -> str:
        if self.config.device == "cuda" and self.size > 1:
            return f"cuda:{index % torch.cuda.device_count()}"
        return self.config.device

    def start(self, index: int, heard: OnMessage) -> Link:
        log = self.log(index)
        try:
            process = spawn(log, import_path())
        except OSError as error:
            raise SearchError(f"a worker cannot be started: {error.strerror}.") from None
        link = _Process(process)
        link.tell({"begin": self.begin(index)})
        threading.Thread(target=_listen, args=(process, log, heard), daemon=True).start()
        return link


def spawn(log: Path, path: str) -> subprocess.Popen[bytes]:
    """A worker on pipes.

    Args:
        log: what it prints is added to this file.
        path: its PYTHONPATH.

    Raises:
        OSError: there is no room for a process, or for its log.
    """
    with log.open("ab") as file:
        return subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C in the terminal is not for it
        )


def end_of(code: int, log: Path) -> WorkerExited:
    """What an exit code says.

    Args:
        code: negative where a signal has ended the process, as of subprocess.
        log: its last line is the reason where the code is none.
    """
    if code == -signal.SIGKILL:
        return WorkerExited("its worker was ended by SIGKILL, as a system short of memory does", out_of_memory=True)
    reason = f"its worker was ended by {_signal(-code)}" if code < 0 else f"its worker ended with exit code {code}"
    last = last_line(log)
    return WorkerExited(f"{reason}: {last}" if last else reason, fault_of(RuntimeError(last)) is Fault.OUT_OF_MEMORY)


class _Process(Link):
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def tell(self, message: Message) -> None:
        assert self._process.stdin is not None
        with suppress(OSError, ValueError):  # it is dead, and its end will be heard of
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()


def _listen(process: subprocess.Popen[bytes], log: Path, heard: OnMessage) -> None:
    assert process.stdout is not None
    with process.stdout as answers:
        for line in answers:
            try:
                heard(json.loads(line))
            except ValueError:  # a line that a dying worker has torn
                break
    heard(end_of(process.wait(), log))


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
