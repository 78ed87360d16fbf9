"""Switch TF32 for float32 convolutions and matrix products on CUDA on or off, and restore the state afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_cuda: Any = torch.backends.cuda
_cudnn: Any = torch.backends.cudnn


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Inside the `with` statement, float32 convolutions and matrix products on CUDA may or may not round to TF32.

    By default torch allows it for convolutions and not for matrix products, which would favour convolutional models. If
    a program uses the switches of torch 2.9, the old ones cannot even be read.

    Args:
        allowed: True if inputs may be rounded to TF32.
    """
    try:
        torch.get_float32_matmul_precision()
        restore = _with_old_switches(allowed)
    except RuntimeError:
        restore = _with_new_switches(allowed)
    try:
        yield
    finally:
        restore()


def _with_old_switches(allowed: bool) -> Callable[[], None]:
    before = torch.get_float32_matmul_precision(), _cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    _cudnn.allow_tf32 = allowed

    def restore() -> None:
        torch.set_float32_matmul_precision(before[0])
        _cudnn.allow_tf32 = before[1]

    return restore


def _with_new_switches(allowed: bool) -> Callable[[], None]:
    switches = (_cuda.matmul, _cudnn.conv, _cudnn.rnn)
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "tf32" if allowed else "ieee"

    def restore() -> None:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision

    return restore
