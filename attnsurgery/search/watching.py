"""Watches a training: reports epochs, ends it at the user's request, and lets other processes measure between steps."""

from __future__ import annotations

from collections.abc import Callable

from attnsurgery.evaluate import Epoch, Watch
from attnsurgery.search.device_lock import DeviceLock
from attnsurgery.search.listener import Listener


class StopRequested(Exception):
    """The user asked for an end; results so far are kept."""


class Watching(Watch):
    """Raises StopRequested at most one batch after `stop` returns true.

    Args:
        listener: told of epochs and phases.
        stop: called before every step, and while the process waits for the device.
        lock: of the device; None if the device is not shared.
    """

    def __init__(self, listener: Listener, stop: Callable[[], bool], lock: DeviceLock | None = None) -> None:
        self.listener = listener
        self.stop = stop
        self._lock = lock
        if lock is not None:
            lock.waiting, lock.long_wait = self.wait, self.long_wait

    def step(self) -> None:
        self.wait()
        if self._lock is not None:
            self._lock.yield_to_measurements()

    def wait(self) -> None:
        """Called between steps and while the process waits.

        Raises:
            StopRequested: the user asked for an end.
        """
        if self.stop():
            raise StopRequested

    def long_wait(self) -> None:
        """Called once in each long wait for the device."""
        self.listener.phase("waiting for another search or measurement on this device; it may be stopped (Ctrl-Z)")

    def epoch(self, epoch: Epoch) -> None:
        self.listener.epoch(epoch)

    def accumulating(self, images: int) -> None:
        self.listener.phase(f"out of memory: at most {images} images are passed at a time from here on")
