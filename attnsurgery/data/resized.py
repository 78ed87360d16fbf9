"""The same images at other input sizes, decoded anew from their originals, of which the latest stay in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

DataT = TypeVar("DataT")
Sides = tuple[int, int]
"""Height and width of an image, in pixels."""


@dataclass
class Resized(Generic[DataT]):
    """Makes data at other input sizes, and keeps the latest ones as long as they fit into memory together.

    Args:
        make: the data at a size, whose images are decoded when they are needed.
        decoded_bytes: memory that all images take at a size, once they are decoded; 0 if they are not kept decoded.
        memory_bytes: memory for the images of all sizes together, without those of the original size.
    """

    make: Callable[[Sides], DataT]
    decoded_bytes: Callable[[Sides], int]
    memory_bytes: int
    kept: dict[Sides, DataT] = field(default_factory=dict)
    """The data in memory by size, the latest last."""

    def __call__(self, size: Sides) -> DataT:
        """The data at a size. Others are given up, the one that was not used for longest first, until this one fits."""
        data = self.kept.pop(size) if size in self.kept else None
        needed = self.decoded_bytes(size)
        while self.kept and needed + sum(map(self.decoded_bytes, self.kept)) > self.memory_bytes:
            del self.kept[next(iter(self.kept))]
        self.kept[size] = data or self.make(size)
        return self.kept[size]
