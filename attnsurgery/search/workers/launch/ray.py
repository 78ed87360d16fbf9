"""Workers on a Ray cluster, or on Ray on one machine: an actor reserves the resources of each worker, such as a GPU.

The actor starts the worker as a process of its node and forwards lines. So a worker is the same program as elsewhere,
and may die without the actor. The run directory and the images must be visible to all nodes under the same path.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import queue
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from attnsurgery.errors import SearchError, UsageError
from attnsurgery.search.config import SearchConfig
from attnsurgery.search.workers.launch._base import (
    LAUNCHERS,
    Launcher,
    Link,
    Message,
    OnMessage,
    WorkerExited,
    missing,
)
from attnsurgery.search.workers.launch.processes import end_of
from attnsurgery.search.workers.spawn import import_path, spawn

_GROUPS = ("receive", "send", "end")
"""Methods of the actor that run concurrently; calls of the same method keep their order."""
_NICENESS = "RAY_worker_niceness"
_RECEIVE_S = 1.0
_END_S = 10.0


@LAUNCHERS.register("ray", summary="on a cluster")
class Ray(Launcher):
    """Joins the cluster at `address`, by default that of RAY_ADDRESS or one on this machine, or starts Ray here.

    `launcher_args` may have address, and num_cpus, num_gpus, memory, resources and accelerator_type of each worker's
    actor; the defaults are as many CPUs as it has threads, and one GPU if it trains on GPUs.

    Raises:
        UsageError: Ray is not installed.
        SearchError: there is no cluster at the address.
    """

    name = "ray"
    package = "ray"
    argument_names = frozenset({"address", "num_cpus", "num_gpus", "memory", "resources", "accelerator_type"})

    def __init__(self, config: SearchConfig) -> None:
        super().__init__(config)
        try:
            import ray
        except ImportError as error:
            raise missing(self.name, "ray", error) from None
        self._ray: Any = ray
        self._ours = not ray.is_initialized()
        address = self.arguments.pop("address", None)
        if self._ours:
            with _own_signals(), _not_nice():
                try:
                    self._join(address)
                except (ConnectionError, ValueError, RuntimeError) as error:
                    reason = " ".join(str(error).split())[:300]
                    raise SearchError(f"--launcher ray: no cluster at {address or 'hand'}: {reason}") from None

    def _join(self, address: str | None) -> None:
        quietly = {"log_to_driver": False, "logging_level": logging.ERROR, "include_dashboard": False}
        if address:
            self._ray.init(address=address, **quietly)
            return
        try:  # enough CPUs for all workers, also if that is more than the machine has: the user decides
            self._ray.init(num_cpus=max(os.cpu_count() or 1, self.size * self.threads), **quietly)
        except ValueError:  # a running cluster has a fixed number of CPUs
            self._ray.init(**quietly)

    @property
    def threads(self) -> int:
        return int(self.arguments.get("num_cpus", 0)) or super().threads

    def device(self, index: int) -> str:
        return "cpu" if self._on_cpu else "cuda"  # its actor sees one GPU

    @property
    def _gpus(self) -> float:
        return float(self.arguments.get("num_gpus", 0 if self._on_cpu else 1))

    def start(self, index: int, on_message: OnMessage) -> Link:
        options = {"num_cpus": self.threads, **self.arguments, "num_gpus": self._gpus}
        begin = json.dumps({"begin": self.begin(index)})
        log = str(self.log(index).resolve())
        try:
            actor = self._ray.remote(concurrency_groups=dict.fromkeys(_GROUPS, 1), max_restarts=0, **options)(
                _WorkerActor
            ).remote(os.getcwd(), import_path(), log, begin)
        except (ValueError, TypeError) as error:
            raise UsageError(f"--launcher-args {self.config.launcher_args!r}: Ray says: {error}") from None
        return _ActorLink(self._ray, actor, on_message)

    def close(self) -> None:
        super().close()
        if self._ours:
            self._ray.shutdown()


class _WorkerActor:
    """The actor of one worker, on the node that Ray has chosen."""

    def __init__(self, folder: str, path: str, log: str, begin: str) -> None:
        self._log, self._refused = Path(log), ""
        self._process: subprocess.Popen[bytes] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()
        try:
            os.chdir(folder)
            self._process = spawn(self._log, path)
        except OSError as error:
            self._refused = (
                f"{platform.node()} cannot begin a worker in {folder} with its log at {log}: {error.strerror}. The run "
                "directory has to lie where all nodes see it"
            )
            return
        self.send(begin)
        threading.Thread(target=self._listen, args=(self._process,), daemon=True).start()

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._lines.put(line.decode())
        process.wait()
        self._lines.put(None)

    def receive(self, seconds: float) -> tuple[list[str], tuple[str, bool] | None]:
        """New lines of the worker, waiting at most so many seconds for the first; and how it ended, if it has ended."""
        if self._process is None:
            return [], (self._refused, False)
        lines: list[str] = []
        with suppress(queue.Empty):
            line = self._lines.get(timeout=seconds)
            while line is not None:
                lines.append(line)
                line = self._lines.get_nowait()
            ending = end_of(self._process.returncode, self._log)
            return lines, (ending.reason, ending.out_of_memory)
        return lines, None

    def send(self, line: str) -> None:
        if self._process is not None and self._process.stdin is not None:
            with suppress(OSError, ValueError):
                self._process.stdin.write(line.encode() + b"\n")
                self._process.stdin.flush()

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


class _ActorLink(Link):
    def __init__(self, ray: Any, actor: Any, on_message: OnMessage) -> None:
        self.queued = True
        self._ray, self._actor, self._on_message = ray, actor, on_message
        self._ended = False
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while not self._ended:
            try:
                lines, ending = self._ray.get(self._call("receive", _RECEIVE_S))
            except Exception as error:  # the actor, its node, or Ray itself has died
                self._on_message(WorkerExited(f"its Ray actor is gone: {' '.join(str(error).split())[:300]}"))
                return
            self.queued = False
            for line in lines:
                with suppress(ValueError):  # a line that a dying worker has not completed
                    self._on_message(json.loads(line))
            if ending:
                self._on_message(WorkerExited(*ending))
                return

    def _call(self, method: str, *arguments: Any) -> Any:
        return getattr(self._actor, method).options(concurrency_group=method).remote(*arguments)

    def send(self, message: Message) -> None:
        with suppress(Exception):  # it has exited, which is reported elsewhere
            self._call("send", json.dumps(message))

    def end(self) -> None:
        self._ended = True
        with suppress(Exception):
            if not self.queued:
                self._ray.get(self._call("end"), timeout=_END_S)
        with suppress(Exception):
            self._ray.kill(self._actor)


@contextmanager
def _not_nice() -> Iterator[None]:
    """Start Ray without lowering the priority of its workers, which would disturb measurements of latency."""
    before = os.environ.get(_NICENESS)
    os.environ.setdefault(_NICENESS, "0")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_NICENESS, None)


@contextmanager
def _own_signals() -> Iterator[None]:
    """Restore the SIGTERM handler, which Ray replaces when it starts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
