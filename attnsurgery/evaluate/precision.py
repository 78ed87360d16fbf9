"""The precision in which a model is trained or evaluated: autocast to bfloat16, and TF32 in float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from attnsurgery.evaluate._base import TrainSettings
from attnsurgery.tf32 import tf32


def autocast(settings: TrainSettings) -> torch.autocast:
    """A context of bfloat16 autocast if the settings ask for it, on CUDA."""
    kind = torch.device(settings.device).type
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=settings.amp and kind == "cuda")


def float32_as(settings: TrainSettings) -> AbstractContextManager[None]:
    """A context in which float32 on CUDA uses TF32 or not, as the settings say; restored afterwards."""
    return tf32(settings.tf32) if torch.device(settings.device).type == "cuda" else nullcontext()
