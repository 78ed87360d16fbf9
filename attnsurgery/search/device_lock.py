"""One lock for each device: who measures on it is alone, and who trains on it lets measurements in between two steps.

Two files lie behind a lock. Work is done under a shared lock on the first. A measurement is made under an exclusive
lock, which it gets when all others have come to the end of their step. So that they do not take the shared lock again
before that, a measurement first closes the *gate*, the second file, which everybody passes on the way to the first. As
long as the gate is open nobody waits, and a step costs no more than a look at it.

A card is known by its UUID, whatever CUDA_VISIBLE_DEVICES makes of its number; a CPU is the machine. The files lie in
one folder for all searches of a user on a machine, /dev/shm or else the temporary directory; the environment variable
ATTNSURGERY_LOCKS names another, such as one that several containers see. The kernel releases the locks of a process
that ends, however it does.
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
except ImportError:  # no such locks on this system; then measurements are as noisy as they are
    fcntl = None  # type: ignore[assignment]

_MEASURER_S, _WORKER_S = 0.002, 0.01
"""Who waits looks that often whether the wait is over."""
_of_thread = threading.local()


def device_lock(device: str) -> DeviceLock:
    """The lock of that device; a thread gets the same one each time, so it never waits for itself.

    Args:
        device: as torch names it.
    """
    path = _folder() / _name(device)
    locks: dict[Path, DeviceLock] = _of_thread.__dict__.setdefault("locks", {})
    if path not in locks:
        locks[path] = DeviceLock(device, path)
    return locks[path]


def alone_on_device(backend: LatencyBackend) -> LatencyBackend:
    """The same backend, whose every measurement is made under the exclusive lock of its device."""
    backend.lock = lambda: device_lock(backend.conditions.device).exclusive()
    return backend


class DeviceLock:
    """The lock of one device, as one thread holds it. Made by `device_lock`.

    Args:
        path: of the lock file; the gate lies beside it.
    """

    def __init__(self, device: str, path: Path) -> None:
        self.waiting: Callable[[], None] = lambda: None
        """Called again and again while this lock is waited for; what it raises ends the wait."""
        self._device = torch.device(device)
        self._shared = self._exclusive = False
        self._files: list[int] = []
        weakref.finalize(self, _close, self._files)
        if fcntl is not None:
            with suppress(OSError):  # a folder that cannot be written: as on a system without locks
                for end in ("lock", "gate"):
                    self._files.append(os.open(f"{path}.{end}", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600))
        self._none = len(self._files) < 2

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Work on the device: nobody measures meanwhile, but between two steps."""
        if self._none or self._shared or self._exclusive:
            yield
            return
        self._enter()
        try:
            yield
        finally:
            with suppress(RuntimeError):  # of a device that is broken, which was told before
                self._synchronize()
            self._leave()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Alone on the device, as soon as all others have come to the end of their step."""
        if self._none or self._exclusive:
            yield
            return
        worked = self._shared
        if worked:
            self._synchronize()
            self._leave()
        lock, gate = self._files
        try:
            self._take(gate, alone=True)
            try:
                self._take(lock, alone=True)
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
        """Between two steps: if somebody waits to measure, finish what the device was told to do, and let him."""
        if self._none or self._exclusive:
            return
        gate = self._files[1]
        if _take_at_once(gate, alone=False):
            _unlock(gate)
        elif self._shared:
            self._synchronize()
            self._leave()
            self._enter()
        else:
            self._take(gate, alone=False)
            _unlock(gate)

    def _enter(self) -> None:
        """Through the gate, and take the shared lock; whoever measures holds both, so it is free then."""
        lock, gate = self._files
        self._take(gate, alone=False)
        try:
            self._take(lock, alone=False)
            self._shared = True
        finally:
            _unlock(gate)

    def _leave(self) -> None:
        self._shared = False
        _unlock(self._files[0])

    def _take(self, file: int, *, alone: bool) -> None:
        while not _take_at_once(file, alone=alone):
            self.waiting()
            time.sleep(_MEASURER_S if alone else _WORKER_S)

    def _synchronize(self) -> None:
        if self._device.type == "cuda" and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize(self._device)


def _take_at_once(file: int, *, alone: bool) -> bool:
    """Whether the lock was free; if it was, it is held now."""
    try:
        fcntl.flock(file, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _unlock(file: int) -> None:
    fcntl.flock(file, fcntl.LOCK_UN)


def _close(files: list[int]) -> None:
    for file in files:
        os.close(file)


def _folder() -> Path:
    """Where this user's locks lie on this machine."""
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
            if os.access(folder, os.W_OK) and folder.lstat().st_uid == user:  # and nobody else has put it there
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
