"""Properties of an NVIDIA card that a latency depends on, and its state during a measurement.

They come from NVML (the package nvidia-ml-py, `attnsurgery[gpu]`). Without it, only what torch knows is reported.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_cudnn: Any = torch.backends.cudnn  # carries no types

_REASONS = {
    0x004: "power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "software thermal slowdown",
    0x040: "hardware thermal slowdown",
    0x080: "hardware power brake",
}
"""Bits of NVML's clock event reasons that mean throttling; idle and clocks set by an application do not."""


def facts(device: str) -> dict[str, str]:
    """What stays the same between measurements: card, software, driver, limits of power and clocks."""
    index = torch.device(device).index or 0
    known = {
        "gpu": torch.cuda.get_device_name(index),
        "cuda": str(torch.version.cuda),
        "cudnn": str(_cudnn.version()),
    }
    with _handle(device) as (nvml, handle):
        if nvml is None:
            return known
        queries = {
            "driver": lambda: nvml.nvmlSystemGetDriverVersion(),
            "power_limit_w": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) // 1000,
            "max_sm_mhz": lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM),
        }
        return known | {name: str(value) for name, query in queries.items() if (value := _query(query)) is not None}


def state(device: str) -> dict[str, Any]:
    """What changes between measurements: clocks in MHz, temperature in Celsius, power in watts, throttling reasons."""
    with _handle(device) as (nvml, handle):
        if nvml is None:
            return {}
        queries = {
            "sm_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "memory_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) // 1000,
            "throttled": lambda: reasons(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)),
        }
        return {name: value for name, query in queries.items() if (value := _query(query)) is not None}


def reasons(bits: int) -> list[str]:
    """The names of throttling reasons from NVML's bits."""
    return [name for bit, name in _REASONS.items() if bits & bit]


def _query(query: Any) -> Any:
    """The result of a query of NVML; None if it fails."""
    try:
        return query()
    except Exception:  # a virtual machine may hide any property; NVML has an exception class for each reason
        return None


@contextmanager
def _handle(device: str) -> Iterator[tuple[Any, Any]]:
    """A context with NVML and its handle of a torch device, or (None, None) where they are not available."""
    nvml = handle = None
    try:
        import pynvml

        pynvml.nvmlInit()
        nvml = pynvml
        # torch's indices depend on CUDA_VISIBLE_DEVICES and NVML's do not; the UUID is the same in both
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except Exception:  # no NVML, no driver, a slice of a card, or a torch without UUIDs
        handle = None
    try:
        yield (nvml, handle) if handle is not None else (None, None)
    finally:
        if nvml is not None:
            _query(nvml.nvmlShutdown)
