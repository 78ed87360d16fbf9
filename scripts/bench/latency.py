#!/usr/bin/env python
"""What blocks cost at inference: surgical models against their bases, in the modes that models are deployed in.

    python scripts/bench/latency.py [--seconds 5]

Writes docs/benchmarks/latency-<card>.json, on a CPU latency-cpu.json; figures of a device on which this has not run are
not known. `scripts/bench/gpu` makes the same rows one by one.
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
    """On a GPU, the most telling first: time may end before the list does. Compiling is what takes long."""
    pairs = [(base, block) for block in BLOCKS for base in BASES]
    first, others = [*pairs[:1], ("resnet50", "nonlocal_s3")], BATCHES[1:]
    ordered = [
        *(Case(*pair, "cudagraph", batch) for pair in first for batch in BATCHES),
        *(Case(*pair, "compile-cudagraph", BATCHES[0]) for pair in first),
        *(Case(*pair, "cudagraph", batch) for pair in pairs for batch in BATCHES),
        *(Case(*pair, "compile-cudagraph", batch) for pair in first for batch in others),
        *(Case(*pair, "eager", batch) for pair in first for batch in BATCHES),
        *(Case(*pair, "compile-cudagraph", BATCHES[0]) for pair in pairs),
        *(Case(*pair, "eager", batch) for pair in pairs for batch in BATCHES),
        *(Case(*pair, "compile-cudagraph", batch) for pair in pairs for batch in others),
    ]
    return list(dict.fromkeys(ordered))


def built(name: str) -> torch.nn.Module:
    return timm.create_model(name).eval()


def measured(case: Case, device: str, effort: Effort) -> dict[str, Any]:
    """The figures of one case.

    Raises:
        AttnSurgeryError: the block has no place in the base, or the forward cannot be measured in this mode.
    """
    base, surgical = built(case.base), built(case.surgical)
    cuda = torch.device(device).type == "cuda"
    conditions = Conditions.on(
        device,
        batch_size=case.batch,
        input_size=input_size_of(base),
        mode=case.mode,
        threads=None if cuda else 1,
    )
    found = backend_for(conditions, effort=effort).compare(base, surgical)
    eager = found.variant.eager_ms
    return {
        "base": case.base,
        "block": case.block,
        "surgical": case.surgical,
        "mode": case.mode,
        "batch": case.batch,
        "measured_under": conditions.describe(),
        "base_p50_ms": found.base.p50_ms,
        "ratio": found.ratio,
        "ratio_95": [found.ratio_low, found.ratio_high],
        "eager_to_graph": eager / found.variant.p50_ms if eager else None,
        "images_per_second": found.variant.images_per_second,
        "steady": found.base.steady,
    }


def said(row: dict[str, Any]) -> str:
    low, high = row["ratio_95"]
    return f"{row['ratio']:.3f} x [{low:.3f}, {high:.3f}] of {row['base_p50_ms']:.3f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="time limit of one comparison")
    seconds = parser.parse_args().seconds
    cuda = torch.cuda.is_available()
    asked = cases() if cuda else [Case(*pair, "eager", 1) for pair in ON_CPU]
    rows = []
    for case in asked:
        rows.append(measured(case, "cuda" if cuda else "cpu", Effort(tolerance=0.002, max_seconds=seconds)))
        print(f"{case.key:48} {said(rows[-1])}", flush=True)
    print(f"written {write(f'latency-{card_or_cpu()}', {'rows': rows})}")


if __name__ == "__main__":
    main()
