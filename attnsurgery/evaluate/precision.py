"""How numbers are rounded while a model is trained or judged: autocast to bfloat16, and TF32 in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from attnsurgery.evaluate._base import TrainSettings


def autocast(settings: TrainSettings) -> torch.autocast:
    """bfloat16 where the settings say so, on CUDA."""
    kind = torch.device(settings.device).type
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=settings.amp and kind == "cuda")


@contextmanager
def float32_as(settings: TrainSettings) -> Iterator[None]:
    """Convolutions and matrix products in float32 on CUDA use TF32, or do not; afterwards as they were.

    torch allows it for convolutions and not for matrix products unless told otherwise, which would favour models of
    convolutions. These switches are there, and warn of nothing, in torch 2.6 as in 2.14.
    """
    if torch.device(settings.device).type != "cuda":
        yield
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = settings.tf32
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
