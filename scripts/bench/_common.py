"""Functions of several benchmarks: subsets of image folders, interleaved timing, conditions, JSON files."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import timm
import torch
from gpu_bench.rows import short

from attnsurgery.latency import Latency, LatencyBackend, card
from attnsurgery.search.files import write_atomically

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "benchmarks"


def link_images(images: Path, folder: Path, parts: dict[str, tuple[str, slice]]) -> Path:
    """Fill `folder` with links to a subset of the images of another image folder; returns `folder`.

    Args:
        images: an image folder with splits.
        folder: the new image folder.
        parts: by new split, the original split and the range of images of each class, such as
            {"val": ("train", slice(1000, 2000))}.
    """
    for part, (source, part_of_class) in parts.items():
        for kind in sorted(path for path in (images / source).iterdir() if path.is_dir()):
            target = folder / part / kind.name
            target.mkdir(parents=True, exist_ok=True)
            for image in sorted(kind.iterdir())[part_of_class]:
                link = target / image.name
                with suppress(FileExistsError):  # another shard may do the same
                    link.symlink_to(image.resolve())
    return folder


def begin_or_resume(folder: Path, settings: dict[str, Any]) -> None:
    """Begin a benchmark in `folder`, or resume it with the same settings.

    Raises:
        SystemExit: the folder has results of other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.json"
    current = {
        key: value if value is None or isinstance(value, int | float) else str(value) for key, value in settings.items()
    }
    recorded = json.loads(path.read_text()) if path.exists() else current
    if changed := [
        f"{key}: was {recorded.get(key)}, is {current[key]}" for key in current if recorded.get(key) != current[key]
    ]:
        raise SystemExit(f"{folder} holds the results of another call ({'; '.join(changed)}). Give another --results.")
    write_atomically(path, json.dumps(current, indent=2) + "\n")


def with_base_latency(backend: LatencyBackend, base: Latency) -> LatencyBackend:
    """The backend, changed to return a known latency of the base, so that searches measure on its scale."""
    backend.measure = lambda model: base  # type: ignore[method-assign]
    return backend


def interleaved(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each candidate; they run alternately, so that a slow machine affects all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for round_number in range(rounds + 1):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if round_number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def card_or_cpu() -> str:
    """The name of this machine in names of result files: h100, or cpu."""
    return short(torch.cuda.get_device_name()) if torch.cuda.is_available() else "cpu"


def conditions() -> dict[str, Any]:
    """The conditions of a figure; on a GPU also driver, clocks and libraries."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine() + " CPU",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        **(card.facts("cuda") | card.state("cuda") if torch.cuda.is_available() else {}),
    }


def write(name: str, results: dict[str, Any]) -> Path:
    """Write docs/benchmarks/<name>.json with the conditions; returns its path."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"conditions": conditions(), **results}, indent=2) + "\n")
    return path
