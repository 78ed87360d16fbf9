"""Between the training and whoever looks on: passes epochs on, ends the training when a stop was asked for, and lets
other processes measure on the same device between two steps."""

from __future__ import annotations

from collections.abc import Callable

from attnsurgery.evaluate import Epoch, Watch
from attnsurgery.search.device_lock import DeviceLock
from attnsurgery.search.listener import Listener


class StopAsked(Exception):
    """The user asked for an end; what was done so far is kept."""


class Watching(Watch):
    """Raises StopAsked within a batch of `stop` becoming true.

    Args:
        listener: told of epochs and phases.
        stop: asked before every step, and while the device is waited for.
        lock: of the device.
    """

    def __init__(self, listener: Listener, stop: Callable[[], bool], lock: DeviceLock | None = None) -> None:
        self.listener = listener
        self.stop = stop
        self._lock = lock
        if lock is not None:
            lock.waiting = self.wait

    def step(self) -> None:
        self.wait()
        if self._lock is not None:
            self._lock.yield_to_measurements()

    def wait(self) -> None:
        """Nothing is done now, but a stop is heard.

        Raises:
            StopAsked: the user asked for an end.
        """
        if self.stop():
            raise StopAsked

    def epoch(self, epoch: Epoch) -> None:
        self.listener.epoch(epoch)

    def accumulating(self, images: int) -> None:
        self.listener.phase(f"out of memory: at most {images} images are passed at a time from here on")
