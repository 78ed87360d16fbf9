"""What a latency is measured under. A number without its conditions is no latency, so the two never travel apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import torch

from attnsurgery.errors import UsageError
from attnsurgery.settings import Mode

MODES: tuple[Mode, ...] = get_args(Mode)

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def device_defaults(device: str, dtype: str | None = None) -> dict[str, Any]:
    """How models are deployed on a device, for whoever does not say: `dtype`, `mode` and `channels_last`.

    On CUDA that is a CUDA graph in bfloat16 with channels last. An eager forward of one image there mostly measures how
    fast Python launches kernels, and half precision is what tensor cores and their convolution kernels are made for.

    Args:
        dtype: chosen already; float32 keeps channels first, for which cuDNN's float32 kernels are made.
    """
    if device.partition(":")[0] != "cuda":
        return {"dtype": dtype or "float32", "mode": "eager", "channels_last": False}
    dtype = dtype or "bfloat16"
    return {"dtype": dtype, "mode": "cudagraph", "channels_last": dtype != "float32"}


@dataclass(frozen=True, slots=True)
class Conditions:
    """What a latency is measured under; part of the number and of the key that measurements are kept by.

    Raises:
        UsageError: a value that means nothing, or a mode that this device does not have.
    """

    device: str = "cpu"
    dtype: str = "float32"
    batch_size: int = 1
    input_size: tuple[int, int, int] = (3, 224, 224)
    """Channels, height, width."""
    mode: Mode = "eager"
    channels_last: bool = False
    threads: int = 0
    """CPU threads during the measurement; 0 keeps what the process has."""
    tf32: bool = False
    """Whether float32 convolutions and matrix products on CUDA may round their inputs to TF32 (10 bits of mantissa).

    Both or neither: torch's own defaults round convolutions only, which makes attention look slower than it is."""
    cudnn_benchmark: bool = False
    """Whether cuDNN tries its algorithms on the first call of a shape and keeps the fastest."""
    cold_cache: bool = False
    """Whether the last-level cache is flushed before every forward, so that weights come from memory."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UsageError(f"latency cannot be measured in dtype {self.dtype!r}. Known: {', '.join(DTYPES)}.")
        if self.mode not in MODES:
            raise UsageError(f"there is no mode {self.mode!r} to run a forward in. Known: {', '.join(MODES)}.")
        if self.batch_size < 1 or self.threads < 0 or min(self.input_size) < 1:
            raise UsageError(
                f"batch_size={self.batch_size}, threads={self.threads}, input_size={self.input_size}: "
                "a latency needs at least one image of at least one pixel, and threads >= 0."
            )
        if self.graph and not self.cuda:
            raise UsageError(f"mode {self.mode!r} needs a CUDA device, not {self.device!r}. Use 'eager' or 'compile'.")

    @classmethod
    def on(cls, device: str, **given: Any) -> Conditions:
        """Conditions on this device; what is not given, or is None, is `device_defaults`."""
        given = {name: value for name, value in given.items() if value is not None}
        return cls(device=device, **{**device_defaults(device, given.get("dtype")), **given})

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the input: (B, C, H, W)."""
        return (self.batch_size, *self.input_size)

    @property
    def cuda(self) -> bool:
        return torch.device(self.device).type == "cuda"

    @property
    def graph(self) -> bool:
        """Whether a CUDA graph is replayed."""
        return self.mode in ("cudagraph", "compile-cudagraph")

    @property
    def compiled(self) -> bool:
        """Whether torch.compile takes part."""
        return self.mode in ("compile", "compile-cudagraph")

    def describe(self) -> str:
        """One line for people, printed beside every number."""
        size = "x".join(map(str, self.input_size))
        more = [
            "channels_last" if self.channels_last else "",
            f"{self.threads} thread{'s' * (self.threads > 1)}" if self.threads else "",
            ("TF32" if self.tf32 else "no TF32") if self.cuda and self.dtype == "float32" else "",
            "cuDNN benchmark" if self.cudnn_benchmark else "",
            "cold cache" if self.cold_cache else "",
        ]
        first = [self.device, self.dtype, f"batch {self.batch_size}", f"input {size}", self.mode]
        return ", ".join([*first, *filter(None, more)])
