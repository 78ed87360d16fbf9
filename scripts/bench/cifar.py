#!/usr/bin/env python
"""A search on CIFAR-10 from a base that is trained there, with base and winner on test images it has not used.

    python scripts/bench/cifar.py CIFAR10 [--images 2000] [--budget-ms 1.8] [--run DIR]

CIFAR10 is an image folder with train/<class>/ and test/<class>/. `--images` of each class are trained on; all test
images are used. The same call resumes. Writes docs/benchmarks/cifar.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from _common import link_images, write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cifar", type=Path)
    parser.add_argument("--images", type=int, default=2000, help="training images of each class")
    parser.add_argument("--budget-ms", type=float, default=1.8)
    parser.add_argument("--run", type=Path, default=Path("runs/cifar"), help="data links and the run directory")
    options = parser.parse_args()
    parts = {"train": ("train", slice(options.images)), "test": ("test", slice(None))}
    data = link_images(options.cifar, options.run / "images", parts)
    command = [
        *(sys.executable, "-m", "attnsurgery", "search", "test_resnet", "--data", str(data)),
        *("--space", "tiny"),
        *("--budget-ms", str(options.budget_ms), "--trials", "8", "--epochs", "3", "--base-epochs", "10"),
        *("--lr", "1e-3", "--block-lr-scale", "10"),
        *("--train-batch-size", "128", "--confirm-seeds", "2", "--output", str(options.run / "search"), "--json"),
    ]
    outcome = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    confirmation = outcome["confirmation"]
    fields = ("number", "state", "metric", "parameters", "timing", "assignment")
    rows = [{key: row[key] for key in fields} for row in outcome["front"]]
    path = write(
        "cifar",
        {
            "images_per_class": options.images,
            "budget_ms": options.budget_ms,
            "base": {key: outcome["base"][key] for key in fields},
            "front": rows,
            "winner": outcome["best"]["recipe"],
            "confirmation": confirmation,
            "counts": outcome["counts"],
            "latency": outcome["conditions"],
        },
    )
    print(f"written {path}")
    print(
        f"{confirmation['verdict']}: test top-1 {100 * confirmation['winner_metric']:.2f} % against "
        f"{100 * confirmation['base_metric']:.2f} % of the base, p = {confirmation['p_value']:.3g}"
    )


if __name__ == "__main__":
    main()
