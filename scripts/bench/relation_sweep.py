#!/usr/bin/env python
"""How far apart the digits of the embedded pairs have to be, and for how long what is trained, for blocks to matter.

    python scripts/bench/relation_sweep.py [--widths 64 128 192] [--candidates base se ...] [--lrs 3e-3] [--epochs 3]
        [--seeds 2] [--batch-size 32]

Each candidate is trained as in a search on `--data pairs`: test_resnet first learns to read one digit at either end,
gets a new head that is fitted by itself, and then all weights are trained on the pairs. Blocks have the rate of all
other weights. `deeper` is test_resnet_deeper, with two blocks a stage and no attention. `gap` is the distance between
the two digits, and `reach` the width of the receptive field; at a gap of at least `reach`, no position of the last
feature map depends on both.

A call adds the missing trainings of its grid to docs/benchmarks/relation-sweep.json, and prints a table of all: test
accuracy at the learning rate with the best validation accuracy, mean and range over seeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections import defaultdict
from dataclasses import replace
from typing import Any

import timm
import torch
from _common import RESULTS, write
from torch import nn

import attnsurgery  # noqa: F401  (registers test_resnet_deeper)
from attnsurgery import operate
from attnsurgery.data import Data, Preprocessing, load_data
from attnsurgery.evaluate import TrainSettings, evaluate, fit_head, train

NAME = "relation-sweep"
HEIGHT = 8
FIRST_EPOCHS, HEAD_EPOCHS = 8, 2
FIRST_LR = 3e-3
NON_LOCAL = {"at": "stage:3 last", "block": "non_local", "options": {"reduction": 2}}
SE = {"at": "stage:* branches", "block": "se", "options": {"reduction": 4}}
CANDIDATES: dict[str, list[dict[str, Any]]] = {
    "base": [],
    "se": [SE],
    "se spatial": [{**SE, "at": "stage:* spatial"}],
    "non-local": [NON_LOCAL],
    "both": [SE, NON_LOCAL],
    "dual": [{"at": "stage:3 last", "block": "dual"}],
    "deeper": [],
}
PLAIN = {"base": "test_resnet", "deeper": "test_resnet_deeper"}
"""Networks without blocks."""
Row = dict[str, Any]


def network(candidate: str, classes: int) -> nn.Module:
    model: nn.Module = timm.create_model(PLAIN.get(candidate, PLAIN["base"]), num_classes=classes)
    return model


def receptive_field(candidate: str) -> int:
    """Width of the part of a picture that one position of the last feature map depends on, in pixels."""
    torch.manual_seed(0)
    model = network(candidate, 2).eval()
    for name, weight in model.named_parameters():  # timm switches residual branches off at the start
        if "bn" in name and name.endswith("weight"):
            nn.init.ones_(weight)
    x_BCHW = torch.randn(1, 3, HEIGHT, 1024, requires_grad=True)
    features_BCHW = model.forward_features(x_BCHW)  # type: ignore[operator]
    middle = features_BCHW.shape[-1] // 2
    (gradient_BCHW,) = torch.autograd.grad(features_BCHW[..., middle].sum(), x_BCHW)
    used = torch.nonzero(gradient_BCHW.abs().sum((0, 1, 2)) > 0)
    return int(used[-1] - used[0]) + 1


def start_of(candidate: str, data: Data, seed: int, options: argparse.Namespace) -> nn.Module:
    """The plain network with its starting weights, and a head that is fitted to the pairs."""
    assert data.first is not None
    torch.manual_seed(seed)
    model = network(candidate, len(data.first.classes))
    settings = TrainSettings(epochs=FIRST_EPOCHS, batch_size=options.batch_size, lr=FIRST_LR)
    train(model, data.first.train, settings, seed)
    model.reset_classifier(data.num_classes)  # type: ignore[operator]
    fit_head(model, data.train, replace(settings, epochs=HEAD_EPOCHS), seed)
    return model


def row_of(key: Row, data: Data, starts: dict[str, dict[str, torch.Tensor]], options: argparse.Namespace) -> Row:
    """Train a candidate; `starts` has the starting weights of this width and seed."""
    candidate, seed = key["candidate"], key["seed"]
    plain = candidate if candidate in PLAIN else "base"
    if plain not in starts:
        starts[plain] = start_of(plain, data, seed, options).state_dict()
    torch.manual_seed(seed)
    model = network(candidate, data.num_classes)
    model.load_state_dict({name: tensor.clone() for name, tensor in starts[plain].items()})
    if CANDIDATES[candidate]:
        recipe = {"version": 1, "name": "relation", "base": "test_resnet", "edits": CANDIDATES[candidate]}
        operate(model, recipe, input_size=(3, HEIGHT, key["width"]))
    settings = TrainSettings(epochs=key["epochs"], batch_size=options.batch_size, lr=key["lr"], new_lr_scale=1.0)
    start = time.process_time()
    train(model, data.train, settings, seed)
    seconds = time.process_time() - start
    parts = {"train": data.train, "val": data.val, "test": data.test}
    scores = {name: round(evaluate(model, part, settings).metric, 4) for name, part in parts.items()}
    return {**key, **scores, "cpu_seconds": round(seconds, 1)}


def key_of(row: Row) -> str:
    return json.dumps([row[name] for name in ("width", "candidate", "epochs", "lr", "batch_size", "seed")])


def table(rows: list[Row]) -> list[str]:
    """By width, candidate and epochs: test accuracy at the best learning rate."""
    by_rate: dict[tuple[int, str, int], dict[float, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        by_rate[row["width"], row["candidate"], row["epochs"]][row["lr"]].append(row)
    order = list(CANDIDATES)
    lines = [f"{'width':>5} {'gap':>4}  {'candidate':11}{'epochs':>7}{'lr':>8}  test top-1, mean (range) of seeds"]
    for (width, name, epochs), rates in sorted(by_rate.items(), key=lambda item: (item[0][0], order.index(item[0][1]))):
        lr, best = max(rates.items(), key=lambda item: statistics.mean(row["val"] for row in item[1]))
        tests = [100 * row["test"] for row in best]
        spread = f" ({min(tests):.1f} to {max(tests):.1f})" if len(tests) > 1 else ""
        lines.append(
            f"{width:5} {width - 2 * HEIGHT:4}  {name:11}{epochs:7}{lr:8g}  {statistics.mean(tests):.1f}{spread} of "
            f"{len(tests)}"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[48, 96, 144, 192, 240])
    parser.add_argument("--candidates", nargs="+", choices=list(CANDIDATES), default=list(CANDIDATES))
    parser.add_argument("--lrs", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--epochs", type=int, nargs="+", default=[3, 12])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / f"{NAME}.json"
    rows: list[Row] = json.loads(path.read_text())["trainings"] if path.exists() else []
    existing = {key_of(row) for row in rows}
    reach = {name: receptive_field(name) for name in PLAIN}
    for width, seed in itertools.product(options.widths, options.seeds):
        preprocessing = Preprocessing.of(timm.create_model("test_resnet"), (3, HEIGHT, width))
        data = load_data("pairs", preprocessing)
        starts: dict[str, dict[str, torch.Tensor]] = {}
        for name, epochs, lr in itertools.product(options.candidates, options.epochs, options.lrs):
            key = {"width": width, "candidate": name, "epochs": epochs, "lr": lr}
            key |= {"batch_size": options.batch_size, "seed": seed}
            if key_of(key) not in existing:
                rows.append(row_of(key, data, starts, options))
                print(json.dumps(rows[-1]), flush=True)
                first = {"epochs": FIRST_EPOCHS, "lr": FIRST_LR, "head_epochs": HEAD_EPOCHS}
                pictures = {name: len(part) for name, part in (("train", data.train), ("val", data.val))}
                counts = {**pictures, "test": len(data.test)}
                write(NAME, {"height": HEIGHT, "reach": reach, "pictures": counts, "first": first, "trainings": rows})
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
