#!/usr/bin/env python
"""The cost of blocks at inference: surgical models compared with their bases, in the usual modes of deployment.

    python scripts/bench/latency.py [--seconds 5]

Writes docs/benchmarks/latency-<card>.json, on a CPU latency-cpu.json. There are no figures of devices on which this has
not run. `scripts/bench/gpu` makes the same rows one by one.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import timm
import torch
from _common import card_or_cpu, write

import attnsurgery  # noqa: F401  (makes the names known to timm)
from attnsurgery.graph.find import input_size_of
from attnsurgery.latency import Conditions, Effort, backend_for

BASES = ("resnet50", "convnext_tiny", "efficientnet_b0", "vit_small_patch16_224")
BLOCKS = ("se", "nonlocal_s3", "dual_s4", "resattn_s3")
BATCHES = (64, 1)
ON_CPU = (
    ("resnet50", "se"),
    ("resnet50", "nonlocal_s3"),
    ("resnet50", "nonlocal5"),
    ("convnext_tiny", "se"),
    ("vit_small_patch16_224", "nonlocal_s3"),
)


@dataclass(frozen=True)
class Case:
    """A surgical model and its base, in one mode, at one batch size."""

    base: str
    block: str
    mode: str
    batch: int

    @property
    def surgical(self) -> str:
        return f"{self.base}_{self.block}"

    @property
    def key(self) -> str:
        return f"{self.surgical} {self.mode} b{self.batch}"


def cases() -> list[Case]:
    """The cases on a GPU, the most important first, since time may be too short for all; compiling takes longest."""
    pairs = [(base, block) for block in BLOCKS for base in BASES]
    first_pairs, other_batches = [*pairs[:1], ("resnet50", "nonlocal_s3")], BATCHES[1:]
    ordered = [
        *(Case(*pair, "cudagraph", batch) for pair in first_pairs for batch in BATCHES),
        *(Case(*pair, "compile-cudagraph", BATCHES[0]) for pair in first_pairs),
        *(Case(*pair, "cudagraph", batch) for pair in pairs for batch in BATCHES),
        *(Case(*pair, "compile-cudagraph", batch) for pair in first_pairs for batch in other_batches),
        *(Case(*pair, "eager", batch) for pair in first_pairs for batch in BATCHES),
        *(Case(*pair, "compile-cudagraph", BATCHES[0]) for pair in pairs),
        *(Case(*pair, "eager", batch) for pair in pairs for batch in BATCHES),
        *(Case(*pair, "compile-cudagraph", batch) for pair in pairs for batch in other_batches),
    ]
    return list(dict.fromkeys(ordered))


def build(name: str) -> torch.nn.Module:
    return timm.create_model(name).eval()


def measure(case: Case, device: str, effort: Effort) -> dict[str, Any]:
    """The figures of one case.

    Raises:
        AttnSurgeryError: the base has no place for the block, or cannot be measured in this mode.
    """
    base, surgical = build(case.base), build(case.surgical)
    cuda = torch.device(device).type == "cuda"
    conditions = Conditions.on(
        device,
        batch_size=case.batch,
        input_size=input_size_of(base),
        mode=case.mode,
        threads=None if cuda else 1,
    )
    comparison = backend_for(conditions, effort=effort).compare(base, surgical)
    eager = comparison.variant.eager_ms
    return {
        "base": case.base,
        "block": case.block,
        "surgical": case.surgical,
        "mode": case.mode,
        "batch": case.batch,
        "measured_under": conditions.describe(),
        "base_p50_ms": comparison.base.p50_ms,
        "ratio": comparison.ratio,
        "ratio_95": [comparison.ratio_low, comparison.ratio_high],
        "eager_to_graph": eager / comparison.variant.p50_ms if eager else None,
        "images_per_second": comparison.variant.images_per_second,
        "steady": comparison.base.steady,
    }


def row_text(row: dict[str, Any]) -> str:
    low, high = row["ratio_95"]
    return f"{row['ratio']:.3f} x [{low:.3f}, {high:.3f}] of {row['base_p50_ms']:.3f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="time limit of one comparison")
    seconds = parser.parse_args().seconds
    cuda = torch.cuda.is_available()
    selected = cases() if cuda else [Case(*pair, "eager", 1) for pair in ON_CPU]
    rows = []
    for case in selected:
        rows.append(measure(case, "cuda" if cuda else "cpu", Effort(tolerance=0.002, max_seconds=seconds)))
        print(f"{case.key:48} {row_text(rows[-1])}", flush=True)
    print(f"written {write(f'latency-{card_or_cpu()}', {'rows': rows})}")


if __name__ == "__main__":
    main()
