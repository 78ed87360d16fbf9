"""What the benchmarks share: folders cut out of larger ones, interleaved timing in one process, conditions, JSON."""

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


def linked(images: Path, folder: Path, parts: dict[str, tuple[str, slice]]) -> Path:
    """`folder` as an image folder of links: {"val": ("train", slice(1000, 2000))} is so many of each class of train."""
    for part, (source, some) in parts.items():
        for kind in sorted(path for path in (images / source).iterdir() if path.is_dir()):
            target = folder / part / kind.name
            target.mkdir(parents=True, exist_ok=True)
            for image in sorted(kind.iterdir())[some]:
                link = target / image.name
                with suppress(FileExistsError):  # another shard may be at it too
                    link.symlink_to(image.resolve())
    return folder


def go_on(folder: Path, asked: dict[str, Any]) -> None:
    """Begin in `folder`, or go on there with the very same; ends the script where another benchmark's results are."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "asked.json"
    now = {
        key: value if value is None or isinstance(value, int | float) else str(value) for key, value in asked.items()
    }
    before = json.loads(path.read_text()) if path.exists() else now
    if changed := [f"{key}: was {before.get(key)}, is {now[key]}" for key in now if before.get(key) != now[key]]:
        raise SystemExit(f"{folder} holds the results of another call ({'; '.join(changed)}). Give another --results.")
    write_atomically(path, json.dumps(now, indent=2) + "\n")


def on_scale(backend: LatencyBackend, base: Latency) -> LatencyBackend:
    """The backend, made to take the base's latency as known: what a search measures then is on the scale of `base`."""
    backend.measure = lambda model: base  # type: ignore[method-assign]
    return backend


def interleaved(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each candidate; they take turns, so that a slow moment of the machine meets them all."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + 1):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if turn:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def card_or_cpu() -> str:
    """What results of this machine are named by: h100, or cpu."""
    return short(torch.cuda.get_device_name()) if torch.cuda.is_available() else "cpu"


def conditions() -> dict[str, Any]:
    """What a figure depends on; on a GPU also driver, clocks and libraries."""
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
    """docs/benchmarks/<name>.json, with the conditions."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"conditions": conditions(), **results}, indent=2) + "\n")
    return path
