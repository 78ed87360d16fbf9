"""Memory of a device: which tensors stay on it, and work that is repeated at half the size where memory is too small.

Tensors that all batches are taken from stay on a CUDA device only where they take a small share of its free memory,
since models and other processes need the rest. Otherwise they stay on the host, and each batch is copied from
page-locked memory: the numbers are the same, and it takes a little longer.
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
RESIDENT_SHARE = 0.25
"""Share of the free memory that such a tensor may take."""


def halve_until_it_fits(
    work: Callable[[int], T],
    size: int,
    pieces: int = 1,
    minimum: int = 1,
    on_smaller: Callable[[int], None] | None = None,
) -> T:
    """What `work` returns for the largest of `size`, its half, its quarter ... that fits into memory.

    Args:
        work: called with the number of images to process at a time, again for each smaller size.
        size: the largest number of images at a time.
        pieces: the first attempt is at `size` / `pieces`, where memory is known to be short.
        minimum: the smallest size that is attempted.
        on_smaller: called with each smaller size.

    Raises:
        Exception: whatever `work` raises, except a lack of memory above the minimum.
    """
    size = max(minimum, size // pieces)
    while True:
        try:
            return work(size)
        except Exception as error:
            if fault_of(error) is not Fault.OUT_OF_MEMORY or size <= minimum:
                raise
        size = max(minimum, size // 2)  # out of the handler, whose traceback holds on to the memory
        free_memory()
        if on_smaller:
            on_smaller(size)


def free_memory() -> None:
    """Return unused memory to CUDA devices."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def allocate_for(shape: Sequence[int], dtype: torch.dtype, device: str) -> torch.Tensor:
    """An empty tensor from which batches for `device` are taken: there if small enough, or on the host."""
    if torch.device(device).type != "cuda":
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if math.prod(shape) * dtype.itemsize <= RESIDENT_SHARE * (free + cached):
        try:
            return torch.empty(tuple(shape), dtype=dtype, device=device)
        except RuntimeError as error:  # others take memory too
            if fault_of(error) is not Fault.OUT_OF_MEMORY:
                raise
    return torch.empty(tuple(shape), dtype=dtype)


def to_device(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """The tensor on the device; a copy from the host to CUDA is asynchronous."""
    if torch.device(device).type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    with current(device):
        return tensor.pin_memory().to(device, non_blocking=True)


@contextmanager
def current(device: str) -> Iterator[None]:
    """Make the device the current one, for which page-locked memory is allocated; otherwise card 0 gets a context."""
    if torch.device(device).type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        yield
