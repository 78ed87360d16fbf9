"""Memory of a device: what is kept there, and work that goes on at half the size where the whole does not fit.

Tensors that all batches are taken from are kept on a CUDA device only where they take a part of its free memory, for
models and other processes need the rest. Else they stay on the host, and each batch is copied from page-locked memory:
the same numbers, a little later.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from attnsurgery.faults import Fault, fault_of

T = TypeVar("T")
SHARE = 0.25
"""Of the free memory, that what is kept may take."""


def halving(
    work: Callable[[int], T],
    size: int,
    pieces: int = 1,
    least: int = 1,
    on_half: Callable[[int], None] | None = None,
) -> T:
    """What `work` returns, given the largest of `size`, its half, its quarter ... that memory holds.

    Args:
        work: takes so many images at a time; begun anew each time, or going on from where it was.
        pieces: it begins at this part of the size, where memory is known to be short.
        least: a smaller size is of no use.
        on_half: told each smaller size.

    Raises:
        what `work` raises: anything but a lack of memory, or that at the least size.
    """
    size = max(least, size // pieces)
    while True:
        try:
            return work(size)
        except Exception as error:
            if fault_of(error) is not Fault.OUT_OF_MEMORY or size <= least:
                raise
        size = max(least, size // 2)  # out of the handler, whose traceback holds on to the memory
        free_memory()
        if on_half:
            on_half(size)


def free_memory() -> None:
    """Give the devices back what nothing refers to any more."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def room_for(shape: Sequence[int], dtype: torch.dtype, device: str) -> torch.Tensor:
    """An empty tensor that batches on `device` are to be taken from: there if it leaves room, or else on the host."""
    if torch.device(device).type != "cuda":
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if math.prod(shape) * dtype.itemsize <= SHARE * (free + cached):
        try:
            return torch.empty(tuple(shape), dtype=dtype, device=device)
        except RuntimeError as error:  # others take memory too
            if fault_of(error) is not Fault.OUT_OF_MEMORY:
                raise
    return torch.empty(tuple(shape), dtype=dtype)


def moved(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """On the device, without waiting for it."""
    if torch.device(device).type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    with current(device):
        return tensor.pin_memory().to(device, non_blocking=True)


@contextmanager
def current(device: str) -> Iterator[None]:
    """The device is the current one: page-locked memory belongs to that, and would open a context on card 0."""
    if torch.device(device).type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        yield
