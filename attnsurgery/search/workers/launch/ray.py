"""Workers on a Ray cluster, or on the Ray of one machine: an actor keeps a place for each, with a GPU if one is used.

The actor starts the worker as a process of its node and passes lines on, so a worker is the same interpreter as
everywhere, and may die without the actor. The run directory and the images have to lie where all nodes see them, under
one path.
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
    import_path,
    missing,
)
from attnsurgery.search.workers.launch.processes import end_of, spawn

_GROUPS = ("hear", "tell", "end")
"""Methods of the actor that do not wait for each other; two calls of the same one keep their order."""
_NICENESS = "RAY_worker_niceness"
_HEAR_S = 1.0
_END_S = 10.0


@LAUNCHERS.register("ray")
class Ray(Launcher):
    """Joins the cluster at `address` (by default that of RAY_ADDRESS, then one that this machine has started), or
    starts Ray on this machine.

    `launcher_args` takes address, and num_cpus, num_gpus, memory, resources and accelerator_type of each worker's
    actor; by default as many CPUs as it has threads, and one GPU where it trains on GPUs.
    """

    name = "ray"
    takes = frozenset({"address", "num_cpus", "num_gpus", "memory", "resources", "accelerator_type"})

    def __init__(self, config: SearchConfig) -> None:
        super().__init__(config)
        try:
            import ray
        except ImportError as error:
            raise missing(self.name, "ray", error) from None
        self._ray: Any = ray
        self._ours = not ray.is_initialized()
        address = self.asked.pop("address", None)
        if self._ours:
            with _own_signals(), _not_nice():
                try:
                    self._join(address)
                except (ConnectionError, ValueError, RuntimeError) as error:
                    said = " ".join(str(error).split())[:300]
                    raise SearchError(f"--launcher ray: no cluster at {address or 'hand'}: {said}") from None

    def _join(self, address: str | None) -> None:
        quietly = {"log_to_driver": False, "logging_level": logging.ERROR, "include_dashboard": False}
        if address:
            self._ray.init(address=address, **quietly)
            return
        try:  # room for all that were asked for: whether they crowd this machine is for the user to say
            self._ray.init(num_cpus=max(os.cpu_count() or 1, self.size * self.threads), **quietly)
        except ValueError:  # there is a cluster, which has the CPUs that it has
            self._ray.init(**quietly)

    @property
    def threads(self) -> int:
        return int(self.asked.get("num_cpus", 0)) or super().threads

    def device(self, index: int) -> str:
        return "cpu" if self._on_cpu else "cuda"  # its actor sees one GPU

    @property
    def _gpus(self) -> float:
        return float(self.asked.get("num_gpus", 0 if self._on_cpu else 1))

    def start(self, index: int, heard: OnMessage) -> Link:
        options = {"num_cpus": self.threads, **self.asked, "num_gpus": self._gpus}
        begin = json.dumps({"begin": self.begin(index)})
        log = str(self.log(index).resolve())
        try:
            actor = self._ray.remote(concurrency_groups=dict.fromkeys(_GROUPS, 1), max_restarts=0, **options)(
                _Place
            ).remote(os.getcwd(), import_path(), log, begin)
        except (ValueError, TypeError) as error:
            raise UsageError(f"--launcher-args {self.config.launcher_args!r}: Ray says: {error}") from None
        return _Actor(self._ray, actor, heard)

    def close(self) -> None:
        super().close()
        if self._ours:
            self._ray.shutdown()


class _Place:
    """An actor: runs on the node that Ray has chosen."""

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
        self.tell(begin)
        threading.Thread(target=self._listen, args=(self._process,), daemon=True).start()

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._lines.put(line.decode())
        process.wait()
        self._lines.put(None)

    def hear(self, seconds: float) -> tuple[list[str], tuple[str, bool] | None]:
        """Lines that were not heard yet, waiting so long for the first; and how the worker has ended, if it has."""
        if self._process is None:
            return [], (self._refused, False)
        lines: list[str] = []
        with suppress(queue.Empty):
            line = self._lines.get(timeout=seconds)
            while line is not None:
                lines.append(line)
                line = self._lines.get_nowait()
            gone = end_of(self._process.returncode, self._log)
            return lines, (gone.reason, gone.out_of_memory)
        return lines, None

    def tell(self, line: str) -> None:
        if self._process is not None and self._process.stdin is not None:
            with suppress(OSError, ValueError):
                self._process.stdin.write(line.encode() + b"\n")
                self._process.stdin.flush()

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


class _Actor(Link):
    def __init__(self, ray: Any, actor: Any, heard: OnMessage) -> None:
        self.queued = True
        self._ray, self._actor, self._heard = ray, actor, heard
        self._ended = False
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while not self._ended:
            try:
                lines, gone = self._ray.get(self._call("hear", _HEAR_S))
            except Exception as error:  # the actor, its node, or Ray itself has died
                self._heard(WorkerExited(f"its Ray actor is gone: {' '.join(str(error).split())[:300]}"))
                return
            self.queued = False
            for line in lines:
                with suppress(ValueError):  # a line that a dying worker has torn
                    self._heard(json.loads(line))
            if gone:
                self._heard(WorkerExited(*gone))
                return

    def _call(self, method: str, *given: Any) -> Any:
        return getattr(self._actor, method).options(concurrency_group=method).remote(*given)

    def tell(self, message: Message) -> None:
        with suppress(Exception):  # it is gone, and its end will be heard of
            self._call("tell", json.dumps(message))

    def end(self) -> None:
        self._ended = True
        with suppress(Exception):
            if not self.queued:
                self._ray.get(self._call("end"), timeout=_END_S)
        with suppress(Exception):
            self._ray.kill(self._actor)


@contextmanager
def _not_nice() -> Iterator[None]:
    """A Ray that is started here has its workers give way to everything else, unless it is told not to; who measures
    latencies must not."""
    before = os.environ.get(_NICENESS)
    os.environ.setdefault(_NICENESS, "0")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_NICENESS, None)


@contextmanager
def _own_signals() -> Iterator[None]:
    """Ray puts a handler of its own in the place of whoever starts it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
