#!/usr/bin/env python
"""A fully enumerated table of trained networks: the scores of every candidate of a small space from two seeds.

    scripts/bench/table.py CIFAR10 --pilot                          which training distinguishes blocks; an hour
    scripts/bench/table.py CIFAR10 --shard 1/2 & ... --shard 2/2     all 256 candidates, twice; hours, resumable
    scripts/bench/table.py --latency                                every candidate's latency, on an idle machine
    scripts/bench/table.py --report                                  docs/benchmarks/table.json

All results are in docs/benchmarks/table/, one line each, with the weights that every network started from, so that
another machine can resume.

CIFAR10 is an image folder with train/<class>/ and test/<class>/. The base is a small timm ResNet; each of its four
stages may have, after its last block, squeeze-and-excitation, a non-local block or a residual attention mask: 256.
A network is trained as in a search (attnsurgery.evaluate), from the same weights; seeds change the order of the images
and the blocks' initial weights. `val` is the score on 10,000 training images that were not trained on, `test` that on
the test images. samplers.py and fidelity.py use this table.

The pilot trains a dozen candidates from both seeds in each of several setups. A table is useful if candidates differ by
more than seeds do: `reliability` is the share of the variance of two-seed means that is due to candidates. If top-1
hardly differs after short trainings, the validation loss may still: all three measures are printed.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from _common import RESULTS, conditions, link_images, write
from safetensors.torch import load_file, save_file
from torch import nn

from attnsurgery.blocks import Start
from attnsurgery.evaluate import Data, TrainSettings, load_data
from attnsurgery.evaluate.finetune import accuracy, train
from attnsurgery.evaluate.preprocess import Preprocessing
from attnsurgery.graph.find import survey
from attnsurgery.latency import Conditions, Effort, backend_for
from attnsurgery.recipe.build import resolve
from attnsurgery.recipe.schema import Edit, Recipe
from attnsurgery.surgery.operate import operate
from attnsurgery.timm_plugin.architectures import check_base

ROOT = Path(__file__).resolve().parents[2]
TABLE = RESULTS / "table"
"""The results, and the weights that all networks started from."""
BASE, SIZE = "test_resnet", (3, 24, 24)
SITES = ("stage:1 last", "stage:2 last", "stage:3 last", "stage:4 last")
OPTIONS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "se": {"block": "se", "options": {"reduction": 4}},
    "non_local": {"block": "non_local", "options": {"reduction": 2, "subsample": 2}},
    "mask": {"block": "residual_attention", "options": {"width": 0.5}},
}
SEEDS = (0, 1)
MEASURES = ("val", "val_loss", "test")
Picks = tuple[str, ...]


@dataclass(frozen=True)
class Setup:
    """How candidates are made and trained."""

    images: int = 600
    """Number of training images of each class."""
    base_epochs: int = 0
    """Epochs of the base before candidates start from it; 0 for training from scratch."""
    epochs: int = 4
    lr: float = 1e-3
    new_lr_scale: float = 10.0


SETUPS = {
    "pretrained": Setup(base_epochs=8),
    "pretrained_longer": Setup(base_epochs=8, epochs=8),
    "scratch": Setup(epochs=6, lr=4e-3, new_lr_scale=1.0),
}
CHOSEN_SETUP = "pretrained"


def candidates() -> list[Picks]:
    """All candidates of the space."""
    return list(itertools.product(OPTIONS, repeat=len(SITES)))


def base_model() -> nn.Module:
    """timm's test_resnet without max-pooling: maps of 12, 6, 3 and 2 at 24 px."""
    check_base(BASE, "base")
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(BASE, num_classes=10)
    model.maxpool = nn.Identity()
    return model.to(memory_format=torch.channels_last)  # a third faster on CPU


def build_candidate(base: nn.Module, picks: Picks, seed: int, start: Start = "identity") -> nn.Module:
    """A copy of the base with these blocks in it."""
    model = copy.deepcopy(base)
    edits = [
        Edit(at=site, start=start, **edit_fields)
        for site, pick in zip(SITES, picks, strict=True)
        if (edit_fields := OPTIONS[pick])
    ]
    if edits:
        torch.manual_seed(1000 + seed)
        recipe = Recipe(version=1, name="candidate", base=BASE, edits=edits)
        operate(model, resolve(recipe, survey(model, SIZE)))
    return model.to(memory_format=torch.channels_last)


def data_of(cifar: Path, setup: Setup) -> Data:
    parts = {
        "train": ("train", slice(setup.images)),
        "val": ("train", slice(4000, 5000)),
        "test": ("test", slice(None)),
    }
    images = link_images(cifar, ROOT / "runs" / "table" / f"images-{setup.images}", parts)
    return load_data(str(images), Preprocessing.of(timm.create_model(BASE), SIZE), 0)


def settings_of(setup: Setup) -> TrainSettings:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return TrainSettings(
        epochs=setup.epochs, lr=setup.lr, new_lr_scale=setup.new_lr_scale, device=device, amp=device == "cuda"
    )


def start_of(setup: Setup, data: Data, folder: Path) -> nn.Module:
    """The base with the weights that all candidates start from; trained once and saved."""
    model = base_model()
    if not setup.base_epochs:
        return model
    path = folder / f"base-{setup.images}-{setup.base_epochs}.safetensors"
    if not path.exists():
        train(model, data.train, settings_of(Setup(epochs=setup.base_epochs, lr=4e-3)), seed=99)
        top1, _, _ = accuracy(model, data.val, settings_of(setup))
        print(f"base: {100 * top1:.2f} % after {setup.base_epochs} epochs", flush=True)
        part = path.with_suffix(f".{os.getpid()}")
        save_file({name: tensor.contiguous() for name, tensor in model.cpu().state_dict().items()}, part)
        part.replace(path)
    model.load_state_dict(load_file(path))
    return model


def train_candidate(base: nn.Module, picks: Picks, seed: int, setup: Setup, data: Data) -> dict[str, Any]:
    start = time.process_time()
    model = build_candidate(base, picks, seed)
    settings = settings_of(setup)
    train(model, data.train, settings, seed)
    val, val_loss, _ = accuracy(model, data.val, settings)
    test, _, _ = accuracy(model, data.test, settings)
    seconds = time.process_time() - start
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "picks": list(picks), "seed": seed, "val": val, "val_loss": val_loss, "test": test,
        "parameters": parameters, "cpu_seconds": round(seconds, 1),
    }  # fmt: skip


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    rows = []
    for file in sorted(folder.glob(f"{name}-*.jsonl")):
        for line in file.read_text().splitlines():
            if line.endswith("}"):  # the network of an incomplete last line is trained again
                rows.append(json.loads(line))
    return rows


def run(cifar: Path, name: str, requested: list[tuple[Picks, int]], part: int, parts: int, folder: Path) -> None:
    """Train this part of the requested networks, except those with a row."""
    setup = SETUPS[name]
    folder.mkdir(parents=True, exist_ok=True)
    data = data_of(cifar, setup)
    base = start_of(setup, data, folder)
    existing = {(tuple(row["picks"]), row["seed"]) for row in rows_of(folder, name)}
    missing = [
        network for index, network in enumerate(requested) if index % parts == part - 1 and network not in existing
    ]
    with (folder / f"{name}-{part}-of-{parts}.jsonl").open("a") as file:
        for number, (picks, seed) in enumerate(missing):
            row = train_candidate(base, picks, seed, setup, data)
            file.write(json.dumps(row) + "\n")
            file.flush()
            text = f"{' '.join(picks)} seed {seed}: {100 * row['val']:.2f} %, {row['cpu_seconds']} s"
            print(f"{number + 1}/{len(missing)} {text}", flush=True)


def reliability(rows: list[dict[str, Any]], measure: str = "val_loss") -> dict[str, float]:
    """The share of the variance of the candidates' means over seeds that is due to candidates.

    It is computed by a two-way analysis of variance: a seed that changes all candidates equally adds no noise between
    them. Candidates without a result of each seed are left out.
    """
    values = {(tuple(row["picks"]), row["seed"]): float(row[measure]) for row in rows}
    seeds = sorted({seed for _, seed in values})
    table = [
        [values[picks, seed] for seed in seeds]
        for picks in dict.fromkeys(picks for picks, _ in values)
        if all((picks, seed) in values for seed in seeds)
    ]
    means = [statistics.mean(row) for row in table]
    grand = statistics.mean(means)
    seed_effects = [statistics.mean(column) - grand for column in zip(*table, strict=True)]
    residuals = [
        value - mean - seed_effect
        for row, mean in zip(table, means, strict=True)
        for value, seed_effect in zip(row, seed_effects, strict=True)
    ]
    noise = sum(value * value for value in residuals) / ((len(table) - 1) * (len(seeds) - 1))
    between = max(0.0, statistics.variance(means) - noise / len(seeds))
    return {
        "candidates": len(table),
        "mean": grand,
        "sd_between": between**0.5,
        "sd_seeds": noise**0.5,
        "reliability": between / (between + noise / len(seeds)) if between else 0.0,
    }


def cross_seed_correlation(rows: list[dict[str, Any]], measure: str) -> float:
    """Correlation of a measure after one training with the test top-1 after another training of the same candidate."""
    by_seed = {seed: {tuple(row["picks"]): row for row in rows if row["seed"] == seed} for seed in SEEDS}
    sign = -1.0 if measure.endswith("loss") else 1.0
    correlations = [
        statistics.correlation(
            [sign * by_seed[trained_seed][picks][measure] for picks in by_seed[trained_seed]],
            [by_seed[judged_seed][picks]["test"] for picks in by_seed[trained_seed]],
        )
        for trained_seed, judged_seed in itertools.permutations(SEEDS, 2)
    ]
    return statistics.mean(correlations)


def pilot(cifar: Path, part: int, parts: int, folder: Path) -> None:
    """Train a dozen candidates in each setup, and print the reliability of each measure."""
    order = torch.randperm(len(candidates()), generator=torch.Generator().manual_seed(0)).tolist()
    sample = [candidates()[index] for index in order[:12]]
    for name in SETUPS:
        run(cifar, name, [(picks, seed) for seed in SEEDS for picks in sample], part, parts, folder)
        rows = rows_of(folder, name)
        cost = statistics.mean(row["cpu_seconds"] for row in rows)
        for measure in MEASURES:
            print(f"{name}, {measure}: {reliability(rows, measure)} at {cost:.0f} s a network", flush=True)


def latencies(folder: Path) -> None:
    """Measure every candidate against the base, in random order, so that a slow machine affects all kinds of blocks."""
    folder.mkdir(parents=True, exist_ok=True)
    base = base_model().eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    conditions = Conditions(device=device, input_size=SIZE, channels_last=True, threads=1)
    backend = backend_for(conditions, effort=Effort(tolerance=0.005, max_seconds=3.0))
    base.to(device)
    rows = rows_of(folder, "latency")
    reference = backend.measure(base)
    if rows:  # one scale for all rows, also of earlier calls
        reference = replace(reference, p50_ms=rows[0]["ms"] / rows[0]["ratio"])
    existing = {tuple(row["picks"]) for row in rows}
    order = torch.randperm(len(candidates()), generator=torch.Generator().manual_seed(1)).tolist()
    with (folder / "latency-1.jsonl").open("a") as file:
        for picks in (candidates()[index] for index in order):
            if picks not in existing:
                comparison = backend.compare(base, build_candidate(base, picks, 0).eval(), reference)
                row = {"picks": picks, "ms": comparison.variant_ms, "ratio": comparison.ratio}
                file.write(json.dumps({**row, "low": comparison.ratio_low, "high": comparison.ratio_high}) + "\n")
                file.flush()
    print(f"{len(rows_of(folder, 'latency'))} latencies ({backend.conditions.describe()})")


def report(folder: Path) -> None:
    rows = rows_of(folder, CHOSEN_SETUP)
    by_network = {(tuple(row["picks"]), row["seed"]): row for row in rows}
    missing = [pair for pair in itertools.product(candidates(), SEEDS) if pair not in by_network]
    if missing:
        raise SystemExit(f"{len(missing)} of {len(candidates()) * len(SEEDS)} networks are not trained yet")
    networks = [by_network[pair] for pair in itertools.product(candidates(), SEEDS)]
    figures = {
        measure: {**reliability(networks, measure), "predicts": cross_seed_correlation(networks, measure)}
        for measure in MEASURES
    }
    setup = asdict(SETUPS[CHOSEN_SETUP])
    provenance = {"base": BASE, "size": SIZE, "sites": SITES, "options": OPTIONS, "way": setup, **conditions()}
    measured_picks = {tuple(row["picks"]) for row in rows_of(folder, "latency")}
    if missing_count := len(candidates()) - len(measured_picks):
        raise SystemExit(f"{missing_count} candidates have no latency yet: --latency measures them")
    path = write("table", {"provenance": provenance, "figures": figures})
    print(f"written {path}")
    for measure, figure in figures.items():
        print(
            f"{measure}: {figure['mean']:.4f} on average, sd {figure['sd_between']:.4f} between candidates and "
            f"{figure['sd_seeds']:.4f} between seeds, reliability of two seeds {figure['reliability']:.2f}; "
            f"correlation of one seed with the other's test top-1 {figure['predicts']:+.2f}"
        )
    print(f"{len(networks)} networks of {len(candidates())} candidates")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cifar", type=Path, nargs="?")
    parser.add_argument("--pilot", action="store_true")
    parser.add_argument("--latency", action="store_true")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--shard", default="1/1", metavar="K/N")
    parser.add_argument("--results", type=Path, default=TABLE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    part, parts = map(int, options.shard.split("/"))
    if options.report:
        report(options.results)
    elif options.latency:
        latencies(options.results)
    elif options.cifar is None:
        parser.error("CIFAR10 is needed to train on")
    elif options.pilot:
        pilot(options.cifar, part, parts, options.results)
    else:
        requested = [(picks, seed) for seed in SEEDS for picks in candidates()]
        run(options.cifar, CHOSEN_SETUP, requested, part, parts, options.results)


if __name__ == "__main__":
    main()
