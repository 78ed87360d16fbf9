"""The smallest settings, for --tiny: they show that every step runs to its end, and their figures mean nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from attnsurgery.latency import Effort

MODEL = "test_resnet"
SIZE = (3, 32, 32)
EFFORT = Effort(
    tolerance=1.0, max_seconds=0.0, block_ms=0.0, min_rounds=1, max_warmup_seconds=0.0, placements=1, rounds=1
)
SECONDS = 0.05
"""Duration of a measurement with more than one round."""


def images(folder: Path) -> Path:
    """Write images of two classes that are easy to distinguish; returns the folder."""
    for name, level in (("dark", 0), ("light", 160)):
        (folder / name).mkdir(parents=True)
        for index in range(20):
            pixels = np.random.default_rng(index).integers(0, 90, (SIZE[1], SIZE[2], SIZE[0])) + level
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{index}.png")
    return folder


def search_options(folder: Path) -> list[str]:
    """Options of `attnsurgery search` with images that are written to the folder, and computed latencies."""
    options = (
        f"--base-epochs 1 --finalists 1 --confirm-seeds 1 --input-size {SIZE[1]} --train-batch-size 8 --latency fixed"
    )
    return [*options.split(), "--data", str(images(folder / "images"))]
