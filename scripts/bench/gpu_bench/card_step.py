"""The card's name, clocks and software, whether packages satisfy this project's requirements, and a matrix product."""

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
    """The time of one run in ms, after a synchronisation of the device."""
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
    facts = {
        "name": torch.cuda.get_device_name(),
        "memory_gib": properties.total_memory / 2**30,
        "multiprocessors": properties.multi_processor_count,
        "l2_mib": getattr(properties, "L2_cache_size", 0) / 2**20,
        "capability": list(torch.cuda.get_device_capability()),
        "count": torch.cuda.device_count(),
    }
    return {**facts, "say": f"{facts['name']}, {facts['multiprocessors']} SMs, {facts['memory_gib']:.0f} GiB"}


def packages() -> Row:
    """The requirements in pyproject.toml, and the installed versions."""
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    installed: dict[str, str | None] = {}
    unmet = []
    for requirement in map(Requirement, requirements):
        try:
            installed[requirement.name] = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            installed[requirement.name] = None
        if not installed[requirement.name] or not requirement.specifier.contains(
            installed[requirement.name] or "", prereleases=True
        ):
            unmet.append(f"{requirement} (installed: {installed[requirement.name]})")
    say = (
        f"unmet: {', '.join(unmet)}" if unmet else ", ".join(f"{name} {version}" for name, version in installed.items())
    )
    return {"packages": installed, "say": say, **({"state": RED} if unmet else {})}


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
