"""Between the training and whoever looks on: passes epochs on, and ends the training when a stop was asked for."""

from __future__ import annotations

from collections.abc import Callable

from attnsurgery.evaluate import Epoch, Watch
from attnsurgery.search.listener import Listener


class StopAsked(Exception):
    """The user asked for an end; what was done so far is kept."""


class Watching(Watch):
    """Raises StopAsked within a batch of `stop` becoming true.

    Args:
        listener: told of epochs and phases.
        stop: asked before every step.
    """

    def __init__(self, listener: Listener, stop: Callable[[], bool]) -> None:
        self.listener = listener
        self.stop = stop

    def step(self) -> None:
        if self.stop():
            raise StopAsked

    def epoch(self, epoch: Epoch) -> None:
        self.listener.epoch(epoch)

    def accumulating(self, images: int) -> None:
        self.listener.phase(f"out of memory: batches are passed in pieces of {images} images from here on")
