#!/usr/bin/env python
"""The cost of surgery: inspect + plan + operate, as a ratio to timm.create_model.

Target: at most 1.5; and `import attnsurgery` adds at most 150 ms to `import timm`.

    python scripts/bench/surgery.py [--rounds 9]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

import timm
from _common import interleaved, write

import attnsurgery
from attnsurgery.graph.find import survey
from attnsurgery.recipe.build import resolve
from attnsurgery.surgery.operate import operate, remove

MODELS = ["resnet50", "convnext_tiny", "vit_small_patch16_224", "efficientnet_b0"]
EDITS = [{"at": "stage:* branches", "block": "se"}, {"at": "stage:3 before_last_block", "block": "non_local"}]


def surgery_ratio(name: str, rounds: int) -> dict[str, float]:
    recipe = attnsurgery.timm_plugin.registry.as_recipe({"version": 1, "name": "bench", "base": name, "edits": EDITS})
    model = timm.create_model(name)

    def operate_and_remove() -> None:
        operate(model, resolve(recipe, survey(model)))
        remove(model)

    seconds = interleaved({"create": lambda: timm.create_model(name), "surgery": operate_and_remove}, rounds)
    return {**seconds, "ratio": seconds["surgery"] / seconds["create"]}


def import_overhead_ms(rounds: int) -> float:
    """The median time that importing attnsurgery after timm takes, in fresh processes."""
    program = "import time, timm; start = time.perf_counter(); import attnsurgery; print(time.perf_counter() - start)"
    runs = [
        float(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)
        for _ in range(rounds)
    ]
    return 1000 * statistics.median(runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    overhead = import_overhead_ms(min(rounds, 5))
    models = {name: surgery_ratio(name, rounds) for name in MODELS}
    for name, row in models.items():
        print(f"{name:24} create {row['create']:.3f} s   surgery {row['surgery']:.3f} s   ratio {row['ratio']:.2f}")
    worst = max(row["ratio"] for row in models.values())
    path = write("surgery", {"models": models, "import_overhead_ms": overhead, "worst_ratio": worst})
    print(f"written {path}")
    print(f"import attnsurgery adds {overhead:.0f} ms; worst ratio of surgery to create_model {worst:.2f}")


if __name__ == "__main__":
    main()
