"""Errors of a device, told apart from errors of a model: one table, and what follows from each.

Libraries below torch report failures of the device as plain RuntimeErrors, so their messages have to be read. The table
holds what torch and the libraries that it loads say: CUDA (HIP on AMD), its driver, cuBLAS and its siblings, cuDNN,
Triton, NCCL, the allocators of torch, and the processes of a DataLoader.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import torch


class Fault(StrEnum):
    """What went wrong with the device, and what follows."""

    OUT_OF_MEMORY = "out of memory"
    """Half of the batch may fit: the same work is done again, in a new process if there is one, at half the batch."""
    DEVICE = "device"
    """The CUDA context of this process is lost, so it can use the device no more; a new process can."""


@dataclass(frozen=True, slots=True)
class _Row:
    """A message, and what it tells of."""

    pattern: re.Pattern[str]
    fault: Fault | None
    """None: the error is the model's own. It comes again wherever the model runs, and harms nobody else."""


def _row(pattern: str, fault: Fault | None) -> _Row:
    return _Row(re.compile(pattern, re.IGNORECASE), fault)


_RUNTIME = r"(?:CUDA|HIP)(?: driver)? error|Triton Error \[(?:CUDA|HIP)\]"
_LIBRARY = r"(?:CUBLAS|CUBLASLT|CUDNN|CUSOLVER|CUSPARSE|HIPBLAS|MIOPEN)_STATUS_"

MESSAGES = (
    # A kernel that asks for more than the card has, a call that the library does not offer: the launch was refused, and
    # the context is as good as before.
    _row(r"\bout of resources?: ", None),  # Triton: shared memory or registers of one thread block
    _row(rf"(?:{_RUNTIME}): (?:too many resources requested|invalid configuration argument)", None),
    _row(rf"(?:{_RUNTIME}): operation (?:not permitted|failed due to a previous error|would .*) .*captur", None),
    _row(rf"{_LIBRARY}(?:NOT_SUPPORTED|BAD_PARAM|INVALID_VALUE|ARCH_MISMATCH)", None),
    # Memory. A handle that cannot be initialised, and a convolution without an algorithm, are usually that too.
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
    # Anything else that these libraries report.
    _row(rf"(?:{_RUNTIME}): ", Fault.DEVICE),
    _row(rf"{_LIBRARY}\w+", Fault.DEVICE),
    _row(r"\b(?:CUDA|CUDNN|CUBLAS) failure \d+", Fault.DEVICE),  # ONNX Runtime's words
    _row(r"\bcu(?:DNN|FFT|SOLVER|SPARSE|RAND)\b error", Fault.DEVICE),
    _row(r"\bNCCL\b.* error|\bnccl(?:Unhandled|System|Internal|Remote)\w*Error", Fault.DEVICE),
    _row(r"DataLoader worker .*(?:killed by signal|exited unexpectedly)", Fault.DEVICE),
)
"""The first row that is found in a message holds."""

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
    """The fault of the device that an error, or one that led to it, tells of; None if the error is the model's own."""
    return next(filter(None, map(_own_fault, _chain(error))), None)


def _own_fault(error: BaseException) -> Fault | None:
    """Of one error, whatever led to it. The type says memory for sure; of the rest the message says more."""
    if isinstance(error, _MEMORY_TYPES) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return Fault.OUT_OF_MEMORY
    message = str(error)
    for row in MESSAGES:
        if row.pattern.search(message):
            return row.fault
    return Fault.DEVICE if isinstance(error, _DEVICE_TYPES) else None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and all that led to it, the nearest first; also what `from None` hides or a compiler wraps."""
    waiting, seen = [error], {id(error)}
    while waiting:
        found = waiting.pop(0)
        yield found
        for inner in (found.__cause__, getattr(found, "inner_exception", None), found.__context__):
            if isinstance(inner, BaseException) and id(inner) not in seen:
                seen.add(id(inner))
                waiting.append(inner)
