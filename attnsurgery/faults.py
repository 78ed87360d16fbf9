"""Errors of a device, told apart from errors of a model: one table, and what follows from each."""

from __future__ import annotations

from enum import StrEnum

import torch


class Fault(StrEnum):
    """What went wrong with the device."""

    OUT_OF_MEMORY = "out of memory"
    """Half of the batch may fit."""
    DEVICE = "device"
    """This process can use the device no more; another one can."""


def fault_of(error: BaseException) -> Fault | None:
    """The fault of the device that an error tells of; None if the error is the model's own."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return Fault.OUT_OF_MEMORY
    accelerator = getattr(torch, "AcceleratorError", None)  # torch 2.8 and later
    if (accelerator is not None and isinstance(error, accelerator)) or "CUDA error" in str(error):
        return Fault.DEVICE
    return None
