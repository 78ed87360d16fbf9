"""One lock for each device: measurements have the device to themselves, and trainings pause for them between two steps.

A lock has two files. Trainings hold a shared lock on the first. A measurement holds an exclusive lock on it, which it
gets when all trainings have finished their step. So that they do not take the shared lock again before that, a
measurement first locks the *gate*, the second file, which every process has to pass before it locks the first. While
the gate is open nobody waits, and a step costs only one test of the gate.

A GPU is identified by its UUID, whatever its number is under CUDA_VISIBLE_DEVICES; all CPUs of a machine are one
device. The files are in one folder for all searches of a user on a machine, in /dev/shm or else the temporary
directory; the environment variable ATTNSURGERY_LOCKS names another one, for example to share it between containers. The
kernel releases the locks of a process when it ends, for whatever reason.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from attnsurgery.latency import LatencyBackend

# flock itself and not filelock: its ReadWriteLock is a transaction of SQLite (0.6 ms a step instead of 3 us) and has no
# gate by which a waiting measurement is let in between two steps.
try:
    import fcntl
except ImportError:  # no such locks on this system; measurements are then disturbed by other processes
    fcntl = None  # type: ignore[assignment]

_MEASURER_S, _WORKER_S = 0.002, 0.01
"""Time between two attempts to get a lock, for measurements and for trainings, in s."""
_LONG_S = 10.0
"""Time after which a wait is long, in s; a measurement of a candidate takes a few seconds."""
_of_thread = threading.local()


def device_lock(device: str) -> DeviceLock:
    """The lock of a device; a thread gets the same object each time, so it never waits for itself.

    Args:
        device: as torch names it.
    """
    path = _folder() / _name(device)
    locks: dict[Path, DeviceLock] = _of_thread.__dict__.setdefault("locks", {})
    if path not in locks:
        locks[path] = DeviceLock(device, path)
    return locks[path]


def with_device_lock(backend: LatencyBackend) -> LatencyBackend:
    """Make a backend take the exclusive lock of its device for each measurement; returns the backend."""
    backend.lock = lambda: device_lock(backend.conditions.device).exclusive()
    return backend


class DeviceLock:
    """The lock of one device for one thread. Use `device_lock` to get it.

    Args:
        device: as torch names it.
        path: of the two files, without their suffixes.
    """

    def __init__(self, device: str, path: Path) -> None:
        self.waiting: Callable[[], None] = lambda: None
        """Called repeatedly while this thread waits for the lock; an exception that it raises ends the wait."""
        self.long_wait: Callable[[], None] = lambda: None
        """Called once in each wait that takes long."""
        self._device = torch.device(device)
        self._shared = self._exclusive = False
        self._files: list[int] = []
        weakref.finalize(self, _close, self._files)
        if fcntl is not None:
            with suppress(OSError):  # without a writable folder, as on a system without locks
                for end in ("lock", "gate"):
                    self._files.append(os.open(f"{path}.{end}", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600))
        self._disabled = len(self._files) < 2

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Hold the shared lock, under which others may measure only between two steps."""
        if self._disabled or self._shared or self._exclusive:
            yield
            return
        self._enter()
        try:
            yield
        finally:
            with suppress(RuntimeError):  # a broken device has raised before
                self._synchronize()
            self._leave()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the exclusive lock, once all others have finished their step."""
        if self._disabled or self._exclusive:
            yield
            return
        worked = self._shared
        if worked:
            self._synchronize()
            self._leave()
        lock, gate = self._files
        try:
            self._wait_for(gate, exclusive=True)
            try:
                self._wait_for(lock, exclusive=True)
                self._exclusive = True
                yield
            finally:
                self._exclusive = False
                _unlock(lock)
                _unlock(gate)
        finally:
            if worked:
                self._enter()

    def yield_to_measurements(self) -> None:
        """Between two steps: if a measurement waits, finish the device's work and release the lock for it."""
        if self._disabled or self._exclusive:
            return
        gate = self._files[1]
        if _try_lock(gate, exclusive=False):
            _unlock(gate)
        elif self._shared:
            self._synchronize()
            self._leave()
            self._enter()
        else:
            self._wait_for(gate, exclusive=False)
            _unlock(gate)

    def _enter(self) -> None:
        """Pass the gate and take the shared lock; a measurement holds both, so the lock is free after the gate."""
        lock, gate = self._files
        self._wait_for(gate, exclusive=False)
        try:
            self._wait_for(lock, exclusive=False)
            self._shared = True
        finally:
            _unlock(gate)

    def _leave(self) -> None:
        self._shared = False
        _unlock(self._files[0])

    def _wait_for(self, file: int, *, exclusive: bool) -> None:
        start, told = time.monotonic(), False
        while not _try_lock(file, exclusive=exclusive):
            self.waiting()
            if not told and time.monotonic() - start > _LONG_S:
                told = True
                self.long_wait()
            time.sleep(_MEASURER_S if exclusive else _WORKER_S)

    def _synchronize(self) -> None:
        if self._device.type == "cuda" and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize(self._device)


def _try_lock(file: int, *, exclusive: bool) -> bool:
    """Take a lock if it is free; returns whether it was."""
    try:
        fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _unlock(file: int) -> None:
    fcntl.flock(file, fcntl.LOCK_UN)


def _close(files: list[int]) -> None:
    for file in files:
        os.close(file)


def _folder() -> Path:
    """The folder of this user's locks on this machine."""
    if path := os.environ.get("ATTNSURGERY_LOCKS"):
        folder = Path(path)
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        return folder
    user = os.getuid() if hasattr(os, "getuid") else "user"
    for parent in (Path("/dev/shm"), Path(tempfile.gettempdir())):
        folder = parent / f"attnsurgery-{user}"
        with suppress(OSError):
            folder.mkdir(mode=0o700, exist_ok=True)
            if os.access(folder, os.W_OK) and folder.lstat().st_uid == user:  # not created by another user
                return folder
    return Path(tempfile.gettempdir())


def _name(device: str) -> str:
    parsed = torch.device(device)
    if parsed.type != "cuda":
        return parsed.type if parsed.index is None or parsed.type == "cpu" else f"{parsed.type}-{parsed.index}"
    index = torch.cuda.current_device() if parsed.index is None else parsed.index
    card: Any = torch.cuda.get_device_properties(index)
    if (uuid := str(getattr(card, "uuid", ""))).strip("0-"):
        return f"cuda-{uuid}"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")  # a card without UUID: its number, as this process counts
    return f"cuda-{index}-{''.join(letter for letter in visible if letter.isalnum())}".rstrip("-")
