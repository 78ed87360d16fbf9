"""How numbers are rounded while a model is trained or judged: autocast to bfloat16, and TF32 in float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from attnsurgery.evaluate._base import TrainSettings
from attnsurgery.tf32 import tf32


def autocast(settings: TrainSettings) -> torch.autocast:
    """bfloat16 where the settings say so, on CUDA."""
    kind = torch.device(settings.device).type
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=settings.amp and kind == "cuda")


def float32_as(settings: TrainSettings) -> AbstractContextManager[None]:
    """Whether float32 on CUDA uses TF32 is as the settings say; afterwards as it was."""
    return tf32(settings.tf32) if torch.device(settings.device).type == "cuda" else nullcontext()
