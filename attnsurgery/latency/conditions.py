"""The conditions of a latency, without which the number has no meaning."""

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
    """The defaults of `dtype`, `mode` and `channels_last`: how models are usually deployed on a device.

    On CUDA that is a CUDA graph in bfloat16 with channels last. An eager forward pass of one image mostly measures
    how fast Python launches kernels, and tensor cores and their convolution kernels are made for half precision.

    Args:
        device: a torch device.
        dtype: the requested type, if any; float32 has channels first, for which cuDNN's float32 kernels are made.
    """
    if device.partition(":")[0] != "cuda":
        return {"dtype": dtype or "float32", "mode": "eager", "channels_last": False}
    dtype = dtype or "bfloat16"
    return {"dtype": dtype, "mode": "cudagraph", "channels_last": dtype != "float32"}


@dataclass(frozen=True, slots=True)
class Conditions:
    """The conditions of a latency. They are part of every result, and of the key of cached measurements.

    Raises:
        UsageError: a value is not valid, or the device does not have the mode.
    """

    device: str = "cpu"
    dtype: str = "float32"
    """One of `DTYPES`."""
    batch_size: int = 1
    """Number of images in one forward pass."""
    input_size: tuple[int, int, int] = (3, 224, 224)
    """Channels, height, width."""
    mode: Mode = "eager"
    """How the forward pass runs."""
    channels_last: bool = False
    """Whether input and convolution weights have the channels-last format."""
    threads: int = 0
    """CPU threads during the measurement; 0 for those that the process has."""
    tf32: bool = False
    """Whether float32 convolutions and matrix products on CUDA may round their inputs to TF32 (10 bits of mantissa).

    Torch's own defaults round convolutions alone, which makes attention look slower than it is."""
    cudnn_benchmark: bool = False
    """Whether cuDNN tries all algorithms at the first call with a shape, and uses the fastest."""
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
    def on(cls, device: str, **settings: Any) -> Conditions:
        """Conditions on this device.

        Args:
            device: a torch device.
            settings: fields by name; those that are missing or None are `device_defaults`.
        """
        settings = {name: value for name, value in settings.items() if value is not None}
        return cls(device=device, **{**device_defaults(device, settings.get("dtype")), **settings})

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the input: (B, C, H, W)."""
        return (self.batch_size, *self.input_size)

    @property
    def cuda(self) -> bool:
        """Whether the device is a CUDA device."""
        return torch.device(self.device).type == "cuda"

    @property
    def graph(self) -> bool:
        """Whether a CUDA graph is replayed."""
        return self.mode in ("cudagraph", "compile-cudagraph")

    @property
    def compiled(self) -> bool:
        """Whether the model is compiled by torch.compile."""
        return self.mode in ("compile", "compile-cudagraph")

    def describe(self) -> str:
        """The conditions in one line, which is printed with every result."""
        size = "x".join(map(str, self.input_size))
        options = [
            "channels_last" if self.channels_last else "",
            f"{self.threads} thread{'s' * (self.threads > 1)}" if self.threads else "",
            ("TF32" if self.tf32 else "no TF32") if self.cuda and self.dtype == "float32" else "",
            "cuDNN benchmark" if self.cudnn_benchmark else "",
            "cold cache" if self.cold_cache else "",
        ]
        basics = [self.device, self.dtype, f"batch {self.batch_size}", f"input {size}", self.mode]
        return ", ".join([*basics, *filter(None, options)])
