#!/usr/bin/env python
"""A task that depends on distant positions: are the two digits at the ends of a long strip the same?

    python scripts/bench/strip.py --out FILE.jsonl [--jobs 12] [--seeds 3] [--minutes 8] [--device cuda]
        [--train-device cpu] [--tiny]

Each image has one embedded digit at either end, 16 pixels high, and nothing in between. test_resnet first learns their
sum, so it can read both digits. Then everything is trained to answer "same digit?" on 3,000 pairs. The receptive field
of its convolutions hardly covers both ends; an attention block covers the whole map. All candidates have the same grid
of learning rates (for blocks and all other weights), the same lengths and the same seeds. Each candidate is evaluated
at its best setting by validation accuracy, on test pairs whose digits are in no other split.

Candidates: the base; SE in all branches and in the narrow slots; a non-local block at the end of stage 3; dual
attention there; and, as a baseline, the same network with two blocks a stage and no attention, whose latency blocks
should not exceed. Latencies are ratios to the base of the same width, on the device, at batch 1 and 64.

Writes one JSON line for each training and latency as it finishes; a second call adds the missing ones.
`--table FILE.jsonl` prints the summary.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import multiprocessing
import os
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from sklearn.datasets import load_digits
from torch import nn

import attnsurgery  # noqa: F401  (makes the names known to timm)
from attnsurgery import operate
from attnsurgery.data.batches import Batch, Split
from attnsurgery.evaluate import TrainSettings, train
from attnsurgery.evaluate.finetune import evaluate
from attnsurgery.latency import Conditions, Effort, backend_for

SIDE = 16
WIDTHS = (64, 96, 128, 160)
LRS = (1e-3, 3e-3, 1e-2)
EPOCHS = (6, 16)
BLOCKS: dict[str, list[dict[str, Any]]] = {
    "base": [],
    "se branches": [{"at": "stage:* branches", "block": "se"}],
    "se spatial": [{"at": "stage:* spatial", "block": "se"}],
    "non-local s3": [{"at": "stage:3", "block": "non_local"}],
    "dual s3": [{"at": "stage:3", "block": "dual"}],
    "deeper": [],
}


class Strips(Split):
    """Pairs of digits as images (N, 3, 16, W), drawn once from the seed."""

    def __init__(self, digits: np.ndarray, kinds: np.ndarray, count: int, width: int, seed: int, task: str) -> None:
        rng = np.random.default_rng(seed)
        same = rng.random(count) < 0.5
        first = rng.integers(len(digits), size=count)
        by_kind = [np.flatnonzero(kinds == kind) for kind in range(10)]
        other_kind = (kinds[first] + rng.integers(1, 10, size=count)) % 10
        second_kind = np.where(same, kinds[first], other_kind)
        second = np.array([rng.choice(by_kind[kind]) for kind in second_kind])
        strips_NHW = np.zeros((count, SIDE, width), dtype=np.float32)
        large = digits.repeat(2, axis=1).repeat(2, axis=2) / 16.0
        strips_NHW[:, :, :SIDE], strips_NHW[:, :, -SIDE:] = large[first], large[second]
        self.pixels_NCHW = torch.tensor((strips_NHW - 0.5) / 0.5)[:, None].expand(-1, 3, -1, -1)
        self.labels = torch.tensor(kinds[first] + kinds[second] if task == "sum" else same.astype(int))
        self._on_device: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def _load(self, picks: list[torch.Tensor], device: str, augment: torch.Generator | None) -> Iterator[Batch]:
        if device not in self._on_device:
            self._on_device[device] = self.pixels_NCHW.contiguous().to(device), self.labels.to(device)
        pixels_NCHW, labels_N = self._on_device[device]
        for picks_B in picks:
            picks_B = picks_B.to(device)
            yield pixels_NCHW[picks_B], labels_N[picks_B]


def splits(width: int, task: str, options: argparse.Namespace) -> dict[str, Strips]:
    """Train, validation and test, which have no digit in common."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    parts = {"train": order[:900], "val": order[900:1300], "test": order[1300:]}
    counts = {"train": 3000, "val": 1500, "test": 1500}
    if options.tiny:
        counts = {name: 128 for name in counts}
    return {
        name: Strips(digits.images[part], digits.target[part], counts[name], width, seed, task)
        for seed, (name, part) in enumerate(parts.items())
    }


def network(deeper: bool, classes: int) -> nn.Module:
    model: nn.Module = timm.create_model("test_resnet", num_classes=classes, **({"layers": [2] * 4} if deeper else {}))
    return model


def candidate(name: str, pretrained: dict[str, torch.Tensor] | None, width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = network(name == "deeper", 2)
    if pretrained is not None:
        loaded = {key: value for key, value in pretrained.items() if not key.startswith("fc.")}
        model.load_state_dict(loaded, strict=False)
    if BLOCKS[name]:
        recipe = {"version": 1, "name": "strip", "base": "test_resnet", "edits": BLOCKS[name]}
        operate(model, recipe, input_size=(3, SIDE, width))
    return model


def settings(lr: float, epochs: int, device: str) -> TrainSettings:
    return TrainSettings(epochs=epochs, lr=lr, new_lr_scale=1.0, label_smoothing=0.0, device=device)


def learn_sum(deeper: bool, width: int, seed: int, folder: Path, options: argparse.Namespace) -> Path:
    """The file of weights that were trained on the sum of the digits; trained once."""
    path = folder / f"sum-{'deeper' if deeper else 'base'}-{width}-{seed}.pt"
    if not path.exists():
        torch.manual_seed(seed)
        model = network(deeper, 19)
        split = splits(width, "sum", options)
        train(model, split["train"], settings(3e-3, 1 if options.tiny else 16, options.train_device), seed)
        part = path.with_suffix(f".{os.getpid()}")
        torch.save({key: value.cpu() for key, value in model.state_dict().items()}, part)
        part.rename(path)
    return path


def train_job(job: dict[str, Any]) -> dict[str, Any]:
    options, key = job["options"], job["key"]
    torch.set_num_threads(1)
    start = time.perf_counter()
    path = learn_sum(key["candidate"] == "deeper", key["width"], key["seed"], Path(job["folder"]), options)
    model = candidate(key["candidate"], torch.load(path), key["width"], key["seed"])
    parts = splits(key["width"], "same", options)
    train_settings = settings(key["lr"], key["epochs"], options.train_device)
    train(model, parts["train"], train_settings, key["seed"])
    scores = {name: evaluate(model, parts[name], train_settings).metric for name in ("train", "val", "test")}
    return {**key, **scores, "seconds": time.perf_counter() - start}


def latencies(options: argparse.Namespace, known: set[str]) -> Iterator[dict[str, Any]]:
    for width, batch in itertools.product(options.widths, (1, 64)):
        conditions = Conditions.on(options.device, batch_size=batch, input_size=(3, SIDE, width), threads=1)
        backend = backend_for(conditions, effort=Effort(tolerance=0.005, max_seconds=0.6))
        base = candidate("base", None, width, 0)
        for name in options.candidates:
            key = {"kind": "latency", "candidate": name, "width": width, "batch": batch}
            if name == "base" or key_of(key) in known:
                continue
            comparison = backend.compare(base, candidate(name, None, width, 0))
            yield {
                **key,
                "ratio": comparison.ratio,
                "ratio_95": [comparison.ratio_low, comparison.ratio_high],
                "base_ms": comparison.base.p50_ms,
                "conditions": conditions.describe(),
                "versions": backend.versions(),
            }


def key_of(row: dict[str, Any]) -> str:
    return json.dumps({name: row.get(name) for name in ("kind", "candidate", "width", "batch", "lr", "epochs", "seed")})


def jobs_of(options: argparse.Namespace, known: set[str], folder: str) -> list[dict[str, Any]]:
    """The missing trainings, seed by seed, so that the finished ones are comparable when the time is up."""
    grid = itertools.product(range(options.seeds), options.widths, options.epochs, options.lrs, options.candidates)
    keys = [
        {"kind": "training", "candidate": name, "width": width, "lr": lr, "epochs": epochs, "seed": seed}
        for seed, width, epochs, lr, name in grid
    ]
    return [{"key": key, "options": copy.copy(options), "folder": folder} for key in keys if key_of(key) not in known]


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines with each candidate at its best learning rate and length by validation accuracy: mean and sd over seeds."""
    trainings = [row for row in rows if row["kind"] == "training"]
    ratios = {(r["width"], r["candidate"], r["batch"]): r["ratio"] for r in rows if r["kind"] == "latency"}
    lines = [
        f"{'width':>5}  {'candidate':14}{'lr':>7}{'epochs':>7}  {'test, mean (sd) of n':24}"
        f"{'batch 1':>9}{'batch 64':>9}"
    ]
    for width, name in itertools.product(sorted({row["width"] for row in trainings}), BLOCKS):
        candidate_rows = [row for row in trainings if (row["width"], row["candidate"]) == (width, name)]
        counts = Counter((row["lr"], row["epochs"]) for row in candidate_rows)
        settings_ = sorted(setting for setting in counts if counts[setting] == max(counts.values()))
        if not settings_:
            continue

        def val(setting: tuple[float, int], candidate_rows: list[dict[str, Any]] = candidate_rows) -> float:
            return statistics.mean(row["val"] for row in candidate_rows if (row["lr"], row["epochs"]) == setting)

        best = max(settings_, key=val)
        tests = [100 * row["test"] for row in candidate_rows if (row["lr"], row["epochs"]) == best]
        sd = f" ({statistics.stdev(tests):.1f})" if len(tests) > 1 else ""
        result_text = f"{statistics.mean(tests):.1f}{sd} of {len(tests)}"
        batches = "".join(f"{ratios.get((width, name, batch), 1.0):9.2f}" for batch in (1, 64))
        lines.append(f"{width:5}  {name:14}{best[0]:7g}{best[1]:7}  {result_text:24}{batches}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--train-device", default=None, help="where to train; by default on --device")
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument("--lrs", type=float, nargs="+", default=list(LRS))
    parser.add_argument("--epochs", type=int, nargs="+", default=list(EPOCHS))
    parser.add_argument("--candidates", nargs="+", choices=list(BLOCKS), default=list(BLOCKS))
    parser.add_argument("--tiny", action="store_true", help="a few pairs, to check that it runs")
    options = parser.parse_args()
    options.train_device = options.train_device or options.device
    if options.table:
        print("\n".join(table([json.loads(line) for line in options.table.read_text().splitlines()])))
        return
    deadline = time.monotonic() + 60 * options.minutes
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    known = {key_of(row) for row in rows}
    folder = options.out.parent / f"{options.out.stem}-weights"
    folder.mkdir(parents=True, exist_ok=True)
    with options.out.open("a") as file:

        def save(row: dict[str, Any]) -> None:
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()

        for row in latencies(options, known):
            save(row)
        sums = [
            {"key": {"candidate": name, "width": width, "seed": seed}, "options": options, "folder": str(folder)}
            for seed, width, name in itertools.product(range(options.seeds), options.widths, ("base", "deeper"))
            if name == "base" or name in options.candidates
        ]
        with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
            pool.map(learn_sum_job, sums, chunksize=1)
            for row in pool.imap_unordered(train_job, jobs_of(options, known, str(folder)), chunksize=1):
                save(row)
                if time.monotonic() > deadline:
                    break
    print("\n".join(table(rows)))


def learn_sum_job(job: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    key = job["key"]
    learn_sum(key["candidate"] == "deeper", key["width"], key["seed"], Path(job["folder"]), job["options"])


if __name__ == "__main__":
    main()
