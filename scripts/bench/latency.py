#!/usr/bin/env python
"""What blocks cost at inference: surgical models against their bases, in every mode of the device.

    python scripts/bench/latency.py [--seconds 5]

Writes docs/benchmarks/latency-<device>.json; figures of a device on which this has not run are not known.
"""

from __future__ import annotations

import argparse
import re

import timm
import torch
from _common import write

import attnsurgery  # noqa: F401  (makes the names known to timm)
from attnsurgery.latency import Conditions, Effort, backend_for

PAIRS = [
    ("resnet50", "resnet50_se"),
    ("resnet50", "resnet50_nonlocal_s3"),
    ("resnet50", "resnet50_nonlocal5"),
    ("convnext_tiny", "convnext_tiny_se"),
    ("vit_small_patch16_224", "vit_small_patch16_224_nonlocal_s3"),
]


def settings() -> list[Conditions]:
    size = (3, 224, 224)
    if not torch.cuda.is_available():
        return [Conditions(device="cpu", dtype="float32", batch_size=1, input_size=size, mode="eager", threads=1)]
    return [
        Conditions(device="cuda", dtype="bfloat16", batch_size=batch, input_size=size, mode=mode, channels_last=True)
        for mode in ("eager", "cudagraph", "compile")
        for batch in (1, 64)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="time limit of one comparison")
    seconds = parser.parse_args().seconds
    rows = []
    for conditions in settings():
        backend = backend_for(conditions, effort=Effort(tolerance=0.002, max_seconds=seconds))
        for base, surgical in PAIRS:
            found = backend.compare(timm.create_model(base), timm.create_model(surgical))
            rows.append(
                {
                    "base": base,
                    "surgical": surgical,
                    "conditions": conditions.describe(),
                    "base_p50_ms": found.base.p50_ms,
                    "ratio": found.ratio,
                    "ratio_95": [found.ratio_low, found.ratio_high],
                }
            )
            interval = f"[{found.ratio_low:.3f}, {found.ratio_high:.3f}]"
            print(f"{surgical:36} {found.ratio:.3f} x  {interval}  {conditions.describe()}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    path = write(f"latency-{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}", {"rows": rows})
    print(f"written {path}")


if __name__ == "__main__":
    main()
