"""Distinguish errors of a device from errors of a model, by a table of messages.

Libraries below torch report failures of the device as plain RuntimeErrors, so their messages have to be matched. The
table has the messages of torch and the libraries that it loads: CUDA (HIP on AMD), its driver, cuBLAS and related
libraries, cuDNN, Triton, NCCL, torch's allocators, and the processes of a DataLoader.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import torch


class Fault(StrEnum):
    """The kind of failure of a device, which decides how the work is repeated."""

    OUT_OF_MEMORY = "out of memory"
    """Half of the batch may fit, so the work is repeated with half the batch, in a new process if possible."""
    DEVICE = "device"
    """The CUDA context of this process is lost, so only a new process can use the device."""


@dataclass(frozen=True, slots=True)
class _Row:
    """A pattern of messages, and the fault that they report."""

    pattern: re.Pattern[str]
    fault: Fault | None
    """None for an error of the model itself, which will occur on each device and does not affect other work."""


def _row(pattern: str, fault: Fault | None) -> _Row:
    return _Row(re.compile(pattern, re.IGNORECASE), fault)


_RUNTIME = r"(?:CUDA|HIP)(?: driver)? error|Triton Error \[(?:CUDA|HIP)\]"
_LIBRARY = r"(?:CUBLAS|CUBLASLT|CUDNN|CUSOLVER|CUSPARSE|HIPBLAS|MIOPEN)_STATUS_"

MESSAGES = (
    # A kernel that needs more than the card has, or a call that the library does not support: the launch fails, and
    # the context is still valid.
    _row(r"\bout of resources?: ", None),  # Triton: shared memory or registers of one thread block
    _row(rf"(?:{_RUNTIME}): (?:too many resources requested|invalid configuration argument)", None),
    _row(rf"(?:{_RUNTIME}): operation (?:not permitted|failed due to a previous error|would .*) .*captur", None),
    _row(rf"{_LIBRARY}(?:NOT_SUPPORTED|BAD_PARAM|INVALID_VALUE|ARCH_MISMATCH)", None),
    # Memory. A handle that cannot be initialized and a convolution without an algorithm usually mean this too.
    _row(r"\b(?:CUDA|HIP|XPU|MPS backend) out of memory", Fault.OUT_OF_MEMORY),
    _row(rf"(?:{_RUNTIME}): out of memory", Fault.OUT_OF_MEMORY),
    _row(rf"{_LIBRARY}(?:INTERNAL_ERROR_\w*ALLOCATION_FAILED|ALLOC_FAILED|NOT_INITIALIZED)", Fault.OUT_OF_MEMORY),
    _row(r"CUFFT_ALLOC_FAILED", Fault.OUT_OF_MEMORY),
    _row(r"unable to find a valid cuDNN algorithm|was unable to find an engine", Fault.OUT_OF_MEMORY),
    _row(r"\bNCCL\b[\s\S]*out of memory", Fault.OUT_OF_MEMORY),
    _row(r"DefaultCPUAllocator: (?:can't allocate|not enough) memory|cannot allocate memory", Fault.OUT_OF_MEMORY),
    _row(r"DataLoader worker .*killed by signal: (?:Bus error|Killed)", Fault.OUT_OF_MEMORY),
    _row(r"insufficient shared memory|out of shared memory", Fault.OUT_OF_MEMORY),
    _row(r"unable to (?:write to|mmap|resize) .*(?:torch_|shared)", Fault.OUT_OF_MEMORY),
    _row(
        r"Failed to allocate memory for requested buffer|CUDA failure 2\b|CUDNN_FE failure.*ALLOC", Fault.OUT_OF_MEMORY
    ),
    # Any other error of these libraries.
    _row(rf"(?:{_RUNTIME}): ", Fault.DEVICE),
    _row(rf"{_LIBRARY}\w+", Fault.DEVICE),
    _row(r"\b(?:CUDA|CUDNN|CUBLAS) failure \d+", Fault.DEVICE),  # message of ONNX Runtime
    _row(r"\bcu(?:DNN|FFT|SOLVER|SPARSE|RAND)\b error", Fault.DEVICE),
    _row(r"\bNCCL\b.* error|\bnccl(?:Unhandled|System|Internal|Remote)\w*Error", Fault.DEVICE),
    _row(r"DataLoader worker .*(?:killed by signal|exited unexpectedly)", Fault.DEVICE),
)
"""The first row that matches a message decides."""

_MEMORY_TYPES: tuple[type[BaseException], ...] = (torch.OutOfMemoryError, MemoryError)
_DEVICE_TYPES: tuple[type[BaseException], ...] = tuple(
    kind
    for kind in (
        getattr(torch, "AcceleratorError", None),  # torch 2.8 and later
        getattr(torch.distributed, "DistBackendError", None),
    )
    if kind is not None
)


def fault_of(error: BaseException) -> Fault | None:
    """The fault of the device behind an error or one of its causes; None if it is an error of the model itself."""
    return next(filter(None, map(_fault_of_one, _chain(error))), None)


def _fault_of_one(error: BaseException) -> Fault | None:
    """The fault of one error without its causes, by its type for memory errors, and by its message otherwise."""
    if isinstance(error, _MEMORY_TYPES) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return Fault.OUT_OF_MEMORY
    message = str(error)
    for row in MESSAGES:
        if row.pattern.search(message):
            return row.fault
    return Fault.DEVICE if isinstance(error, _DEVICE_TYPES) else None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and all its causes, nearest first, also those hidden by `from None` or wrapped by a compiler."""
    waiting, visited = [error], {id(error)}
    while waiting:
        current = waiting.pop(0)
        yield current
        for inner in (current.__cause__, getattr(current, "inner_exception", None), current.__context__):
            if isinstance(inner, BaseException) and id(inner) not in visited:
                visited.add(id(inner))
                waiting.append(inner)
