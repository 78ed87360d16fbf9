"""Whether float32 on CUDA may round to TF32: one switch for convolutions and matrix products, put back afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_cuda: Any = torch.backends.cuda
_cudnn: Any = torch.backends.cudnn


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Float32 convolutions and matrix products on CUDA round their inputs to TF32, or do not.

    torch allows it for convolutions and not for matrix products unless told otherwise, which would favour models of
    convolutions. Where a program uses the switches that torch 2.9 brought, the old ones cannot even be read.
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
