#!/usr/bin/env python
"""The sequential verdict, simulated: false alarms over all looks, gains that are found, and trainings that it takes.

    python scripts/bench/sequential.py [--repeats 1000]

Two models answer the same test images. Each image has its own ease, each training its own luck, each seed may move both
models alike, and each answer has noise. Three designs see the same answers: three trainings of each model, eight of
each, and from three up to eight, one by one, until the gain is decided (attnsurgery.search.result.sequential). The
luck of trainings is chosen so that top-1 has the standard deviation that is given. Beside them, what happens without
significance levels for looks: testing after each training at 5 %, and stopping at the first significant result.

Writes docs/benchmarks/sequential.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from _common import write
from scipy.special import ndtri

from attnsurgery.search.result.sequential import SIGNIFICANT, Design, look_at
from attnsurgery.search.result.statistics import gain_of

FIRST, MOST = 3, 8
DIFFERENCE = 0.005
EASE = 3.0
"""Standard deviation of the ease of images, relative to the noise of one answer: most images are easy or hopeless."""
SITUATIONS: list[dict[str, float]] = [
    {"images": images, "top1": top1, "sd": sd, "shared_sd": shared, "gain": gain}
    for images, top1, sd, shared in ((357, 0.95, 0.005, 0.0), (2000, 0.6, 0.005, 0.0), (2000, 0.6, 0.002, 0.01))
    for gain in (0.0, 0.01, 0.03)
]
"""Test images, accuracy, standard deviation of the accuracy of trainings and of seeds, and the true gain."""


def draw(rng: np.random.Generator, situation: Mapping[str, float]) -> list[npt.NDArray[np.bool_]]:
    """The answers of the better and the other model, (MOST, images) booleans each."""
    images = int(situation["images"])
    scale = (1 + EASE**2) ** 0.5
    middle = float(ndtri(situation["top1"]))
    slope = float(np.exp(-(middle**2) / 2) / (2 * np.pi) ** 0.5 / scale)  # of the accuracy, by a shift of the ease
    ease_N = rng.normal(middle * scale, EASE, images)
    seed_S1 = rng.normal(0.0, situation["shared_sd"] / slope, (MOST, 1))
    models = []
    for gain in (situation["gain"], 0.0):
        luck_S1 = rng.normal(gain / slope, situation["sd"] / slope, (MOST, 1))
        models.append(ease_N + seed_S1 + luck_S1 + rng.normal(0.0, 1.0, (MOST, images)) > 0)
    return models


def simulate(situation: Mapping[str, float], repeats: int) -> dict[str, dict[str, float]]:
    """By design, the share of significant results and the mean number of trainings of each model."""
    rng = np.random.default_rng(0)
    designs = {
        "three": Design(FIRST, FIRST),
        "eight": Design(MOST, MOST),
        "sequential": Design(FIRST, MOST, DIFFERENCE),
        "sequential, in pairs": Design(FIRST, MOST, DIFFERENCE, paired=True),
    }
    found = {name: [0, 0] for name in [*designs, "5 % at each look"]}
    for _ in range(repeats):
        better, other = draw(rng, situation)
        for name, design in designs.items():
            look = look_at(better[: design.most], other[: design.most], design)
            found[name][0] += look.significant
            found[name][1] += look.trainings
        count, significant = FIRST - 1, False
        while count < MOST and not significant:
            count += 1
            significant = gain_of(better[:count], other[:count]).p_value < SIGNIFICANT
        found["5 % at each look"][0] += significant
        found["5 % at each look"][1] += count
    return {name: {"found": hits / repeats, "trainings": count / repeats} for name, (hits, count) in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1000)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for situation in SITUATIONS:
        results = simulate(situation, options.repeats)
        rows.append({**situation, "designs": results})
        text = "; ".join(
            f"{name} {100 * result['found']:.1f} % with {result['trainings']:.1f}" for name, result in results.items()
        )
        print(f"{situation}: {text}", flush=True)
    print(f"written {write('sequential', {'repeats': options.repeats, 'rows': rows})}")


if __name__ == "__main__":
    main()
