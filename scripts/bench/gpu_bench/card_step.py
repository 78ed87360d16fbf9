"""The card as it is: name, clocks, software, whether packages are as new as this project asks, and a first product."""

from __future__ import annotations

import importlib.metadata
import tomllib
from typing import Any

import timm  # noqa: F401  (its version is among the conditions)
import torch
from packaging.requirements import Requirement

import attnsurgery  # noqa: F401
from gpu_bench.rows import RED, Row, Rows
from gpu_bench.runner import ROOT


def milliseconds(run: Any, repeats: int) -> float:
    """Of one run, the device waited for."""
    for _ in range(3):
        run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / repeats


def state() -> Row:
    properties = torch.cuda.get_device_properties(0)
    told = {
        "name": torch.cuda.get_device_name(),
        "memory_gib": properties.total_memory / 2**30,
        "multiprocessors": properties.multi_processor_count,
        "l2_mib": getattr(properties, "L2_cache_size", 0) / 2**20,
        "capability": list(torch.cuda.get_device_capability()),
        "count": torch.cuda.device_count(),
    }
    return {**told, "say": f"{told['name']}, {told['multiprocessors']} SMs, {told['memory_gib']:.0f} GiB"}


def packages() -> Row:
    """What pyproject.toml asks for, and what is there."""
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    there: dict[str, str | None] = {}
    unmet = []
    for one in map(Requirement, asked):
        try:
            there[one.name] = importlib.metadata.version(one.name)
        except importlib.metadata.PackageNotFoundError:
            there[one.name] = None
        if not there[one.name] or not one.specifier.contains(there[one.name] or "", prereleases=True):
            unmet.append(f"{one} (there is {there[one.name]})")
    say = f"unmet: {', '.join(unmet)}" if unmet else ", ".join(f"{name} {version}" for name, version in there.items())
    return {"packages": there, "say": say, **({"state": RED} if unmet else {})}


def matmul(size: int) -> Row:
    a, b = (torch.randn(size, size, device="cuda").to(torch.bfloat16) for _ in range(2))
    ms = milliseconds(lambda: a @ b, 20)
    tflops = 2 * size**3 / ms / 1e9
    return {"size": size, "ms": ms, "tflops": tflops, "say": f"{tflops:.0f} TFLOP/s in bfloat16, {size} x {size}"}


def copy(mib: int) -> Row:
    source = torch.zeros(mib << 20, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    ms = milliseconds(lambda: target.copy_(source), 20)
    gb_per_s = 2 * source.numel() / ms / 1e6
    return {"mib": mib, "ms": ms, "gb_per_s": gb_per_s, "say": f"{gb_per_s:.0f} GB/s, read and written"}


def run(rows: Rows, tiny: bool) -> None:
    rows.make("state", state)
    rows.make("packages", packages)
    rows.make("matmul", lambda: matmul(128 if tiny else 8192))
    rows.make("copy", lambda: copy(1 if tiny else 1024))
