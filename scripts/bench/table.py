#!/usr/bin/env python
"""A fully enumerated table of trained networks: what every candidate of a small space is worth, from two seeds.

    scripts/bench/table.py CIFAR10 --pilot                          which training tells blocks apart; an hour
    scripts/bench/table.py CIFAR10 --shard 1/2 & ... --shard 2/2     all 256 candidates, twice; hours, resumable
    scripts/bench/table.py --latency                                every candidate's milliseconds; nothing else running
    scripts/bench/table.py --report                                  docs/benchmarks/table.json

All results are kept in docs/benchmarks/table/, a line each, with the weights that every network began from: what one
machine has begun another may end.

CIFAR10 is an image folder with train/<class>/ and test/<class>/. The base is a small timm ResNet; each of its four
stages may have, after its last block, squeeze-and-excitation, a non-local block or a residual attention mask: 256.
A network is trained as the search trains one (attnsurgery.evaluate), from the same starting weights; seeds change the
order of the images and the blocks' initial weights. `val` is of 10,000 training images that nothing was trained on,
`test` of the test images. samplers.py and fidelity.py stand on this table.

The pilot trains a dozen candidates from both seeds in each of several ways. A table is worth making where candidates
differ by more than seeds do: `reliability` is the share of the variance between two-seed means that is the candidates'.
Where short trainings hardly move top-1 apart, validation loss may still tell candidates apart: all three are printed.
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
"""What was trained and measured, and the weights from which everything began."""
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
class Way:
    """How candidates are made and trained."""

    images: int = 600
    """Of each class, to train on."""
    base_epochs: int = 0
    """The base is trained so long before candidates begin from it; 0: from scratch."""
    epochs: int = 4
    lr: float = 1e-3
    new_lr_scale: float = 10.0


WAYS = {
    "pretrained": Way(base_epochs=8),
    "pretrained_longer": Way(base_epochs=8, epochs=8),
    "scratch": Way(epochs=6, lr=4e-3, new_lr_scale=1.0),
}
CHOSEN = "pretrained"


def candidates() -> list[Picks]:
    return list(itertools.product(OPTIONS, repeat=len(SITES)))


def base_model() -> nn.Module:
    """timm's test_resnet without max-pooling: maps of 12, 6, 3 and 2 at 24 px."""
    check_base(BASE, "base")
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(BASE, num_classes=10)
    model.maxpool = nn.Identity()
    return model.to(memory_format=torch.channels_last)  # a third faster on CPU


def made(base: nn.Module, picks: Picks, seed: int, start: Start = "identity") -> nn.Module:
    """A copy of the base with these blocks in it."""
    model = copy.deepcopy(base)
    edits = [
        Edit(at=site, start=start, **given) for site, pick in zip(SITES, picks, strict=True) if (given := OPTIONS[pick])
    ]
    if edits:
        torch.manual_seed(1000 + seed)
        recipe = Recipe(version=1, name="candidate", base=BASE, edits=edits)
        operate(model, resolve(recipe, survey(model, SIZE)))
    return model.to(memory_format=torch.channels_last)


def data_of(cifar: Path, way: Way) -> Data:
    parts = {"train": ("train", slice(way.images)), "val": ("train", slice(4000, 5000)), "test": ("test", slice(None))}
    images = link_images(cifar, ROOT / "runs" / "table" / f"images-{way.images}", parts)
    return load_data(str(images), Preprocessing.of(timm.create_model(BASE), SIZE), 0)


def settings_of(way: Way) -> TrainSettings:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return TrainSettings(
        epochs=way.epochs, lr=way.lr, new_lr_scale=way.new_lr_scale, device=device, amp=device == "cuda"
    )


def start_of(way: Way, data: Data, folder: Path) -> nn.Module:
    """The weights that all candidates begin from; trained once, and kept."""
    model = base_model()
    if not way.base_epochs:
        return model
    path = folder / f"base-{way.images}-{way.base_epochs}.safetensors"
    if not path.exists():
        train(model, data.train, settings_of(Way(epochs=way.base_epochs, lr=4e-3)), seed=99)
        top1, _, _ = accuracy(model, data.val, settings_of(way))
        print(f"base: {100 * top1:.2f} % after {way.base_epochs} epochs", flush=True)
        part = path.with_suffix(f".{os.getpid()}")
        save_file({name: tensor.contiguous() for name, tensor in model.cpu().state_dict().items()}, part)
        part.replace(path)
    model.load_state_dict(load_file(path))
    return model


def trained(base: nn.Module, picks: Picks, seed: int, way: Way, data: Data) -> dict[str, Any]:
    began = time.process_time()
    model = made(base, picks, seed)
    settings = settings_of(way)
    train(model, data.train, settings, seed)
    val, val_loss, _ = accuracy(model, data.val, settings)
    test, _, _ = accuracy(model, data.test, settings)
    seconds = time.process_time() - began
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "picks": list(picks), "seed": seed, "val": val, "val_loss": val_loss, "test": test,
        "parameters": parameters, "cpu_seconds": round(seconds, 1),
    }  # fmt: skip


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    rows = []
    for file in sorted(folder.glob(f"{name}-*.jsonl")):
        for line in file.read_text().splitlines():
            if line.endswith("}"):  # a torn last line is made again
                rows.append(json.loads(line))
    return rows


def run(cifar: Path, name: str, wanted: list[tuple[Picks, int]], part: int, parts: int, folder: Path) -> None:
    """Train what is wanted and not there yet, this part of it."""
    way = WAYS[name]
    folder.mkdir(parents=True, exist_ok=True)
    data = data_of(cifar, way)
    base = start_of(way, data, folder)
    done = {(tuple(row["picks"]), row["seed"]) for row in rows_of(folder, name)}
    todo = [one for index, one in enumerate(wanted) if index % parts == part - 1 and one not in done]
    with (folder / f"{name}-{part}-of-{parts}.jsonl").open("a") as file:
        for number, (picks, seed) in enumerate(todo):
            row = trained(base, picks, seed, way, data)
            file.write(json.dumps(row) + "\n")
            file.flush()
            said = f"{' '.join(picks)} seed {seed}: {100 * row['val']:.2f} %, {row['cpu_seconds']} s"
            print(f"{number + 1}/{len(todo)} {said}", flush=True)


def reliability(rows: list[dict[str, Any]], measure: str = "val_loss") -> dict[str, float]:
    """How much of what differs between candidates' means over the seeds is the candidates' own.

    Two-way analysis of variance: a seed that moves all candidates alike, by the order of its images, makes no noise
    between them. Candidates that lack a seed are left out.
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
    moved = [statistics.mean(column) - grand for column in zip(*table, strict=True)]
    rest = [
        value - mean - by for row, mean in zip(table, means, strict=True) for value, by in zip(row, moved, strict=True)
    ]
    noise = sum(value * value for value in rest) / ((len(table) - 1) * (len(seeds) - 1))
    between = max(0.0, statistics.variance(means) - noise / len(seeds))
    return {
        "candidates": len(table),
        "mean": grand,
        "sd_between": between**0.5,
        "sd_seeds": noise**0.5,
        "reliability": between / (between + noise / len(seeds)) if between else 0.0,
    }


def predicts(rows: list[dict[str, Any]], measure: str) -> float:
    """Correlation of a measure of one training with the test top-1 of another training of the same candidate."""
    by_seed = {seed: {tuple(row["picks"]): row for row in rows if row["seed"] == seed} for seed in SEEDS}
    sign = -1.0 if measure.endswith("loss") else 1.0
    found = [
        statistics.correlation(
            [sign * by_seed[one][picks][measure] for picks in by_seed[one]],
            [by_seed[other][picks]["test"] for picks in by_seed[one]],
        )
        for one, other in itertools.permutations(SEEDS, 2)
    ]
    return statistics.mean(found)


def pilot(cifar: Path, part: int, parts: int, folder: Path) -> None:
    """A dozen candidates, a way after the other."""
    order = torch.randperm(len(candidates()), generator=torch.Generator().manual_seed(0)).tolist()
    some = [candidates()[index] for index in order[:12]]
    for name in WAYS:
        run(cifar, name, [(picks, seed) for seed in SEEDS for picks in some], part, parts, folder)
        rows = rows_of(folder, name)
        cost = statistics.mean(row["cpu_seconds"] for row in rows)
        for measure in MEASURES:
            print(f"{name}, {measure}: {reliability(rows, measure)} at {cost:.0f} s a network", flush=True)


def latencies(folder: Path) -> None:
    """Measure every candidate against the base, in random order, so that a slow hour meets no kind of block alone."""
    folder.mkdir(parents=True, exist_ok=True)
    base = base_model().eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    conditions = Conditions(device=device, input_size=SIZE, channels_last=True, threads=1)
    backend = backend_for(conditions, effort=Effort(tolerance=0.005, max_seconds=3.0))
    base.to(device)
    kept = rows_of(folder, "latency")
    reference = backend.measure(base)
    if kept:  # one scale for all, whenever they were measured
        reference = replace(reference, p50_ms=kept[0]["ms"] / kept[0]["ratio"])
    done = {tuple(row["picks"]) for row in kept}
    order = torch.randperm(len(candidates()), generator=torch.Generator().manual_seed(1)).tolist()
    with (folder / "latency-1.jsonl").open("a") as file:
        for picks in (candidates()[index] for index in order):
            if picks not in done:
                found = backend.compare(base, made(base, picks, 0).eval(), reference)
                row = {"picks": picks, "ms": found.variant_ms, "ratio": found.ratio}
                file.write(json.dumps({**row, "low": found.ratio_low, "high": found.ratio_high}) + "\n")
                file.flush()
    print(f"{len(rows_of(folder, 'latency'))} latencies ({backend.conditions.describe()})")


def report(folder: Path) -> None:
    rows = rows_of(folder, CHOSEN)
    every = {(tuple(row["picks"]), row["seed"]): row for row in rows}
    missing = [pair for pair in itertools.product(candidates(), SEEDS) if pair not in every]
    if missing:
        raise SystemExit(f"{len(missing)} of {len(candidates()) * len(SEEDS)} networks are not trained yet")
    kept = [every[pair] for pair in itertools.product(candidates(), SEEDS)]
    figures = {measure: {**reliability(kept, measure), "predicts": predicts(kept, measure)} for measure in MEASURES}
    way = asdict(WAYS[CHOSEN])
    provenance = {"base": BASE, "size": SIZE, "sites": SITES, "options": OPTIONS, "way": way, **conditions()}
    measured = {tuple(row["picks"]) for row in rows_of(folder, "latency")}
    if lacking := len(candidates()) - len(measured):
        raise SystemExit(f"{lacking} candidates have no latency yet: --latency measures them")
    path = write("table", {"provenance": provenance, "figures": figures})
    print(f"written {path}")
    for measure, found in figures.items():
        print(
            f"{measure}: {found['mean']:.4f} on average, sd {found['sd_between']:.4f} between candidates and "
            f"{found['sd_seeds']:.4f} between seeds, reliability of two seeds {found['reliability']:.2f}; "
            f"correlation of one seed with the other's test top-1 {found['predicts']:+.2f}"
        )
    print(f"{len(kept)} networks of {len(candidates())} candidates")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cifar", type=Path, nargs="?")
    parser.add_argument("--pilot", action="store_true")
    parser.add_argument("--latency", action="store_true")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--shard", default="1/1", metavar="K/N")
    parser.add_argument("--results", type=Path, default=TABLE)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    part, parts = map(int, asked.shard.split("/"))
    if asked.report:
        report(asked.results)
    elif asked.latency:
        latencies(asked.results)
    elif asked.cifar is None:
        parser.error("CIFAR10 is needed to train on")
    elif asked.pilot:
        pilot(asked.cifar, part, parts, asked.results)
    else:
        wanted = [(picks, seed) for seed in SEEDS for picks in candidates()]
        run(asked.cifar, CHOSEN, wanted, part, parts, asked.results)


if __name__ == "__main__":
    main()
