#!/usr/bin/env python
"""Fully enumerated tables of trained networks: the scores of every candidate of a small space from several seeds.

    scripts/bench/table.py --setup strip --pilot                      a dozen candidates: do blocks differ? minutes
    scripts/bench/table.py --setup strip                              all 256 candidates, twice; hours, resumable
    scripts/bench/table.py --setup narrow CIFAR10 --shard 1/2 & ... --shard 2/2      a setup with images
    scripts/bench/table.py --setup strip --latency                    every candidate's latency, on an idle machine
    scripts/bench/table.py --report                                   docs/benchmarks/table.json, of complete tables

All results are in docs/benchmarks/table/, one line each, with the weights that networks started from, so that another
machine can resume. The setups are in _tables.py. CIFAR10 is an image folder with train/<class>/ and test/<class>/.

* `strip`: the embedded pairs. Two digits stand at the ends of a strip, and test_resnet alone cannot compare them; with
  the right blocks at the right stages it can. A network starts from weights that can read one digit.
* `differences`: strips of the same kind; the class is the difference of the two digits, 0 to 4. The sum of what both
  contribute says something about it, so the base is far better than chance, and blocks add to that.
* `narrow`: CIFAR-10 at 24 pixels, a narrow ResNet trained from scratch with blocks that start as in their papers.
  Whether blocks make a difference there is not known yet.
* `pretrained`: CIFAR-10 at 24 pixels, test_resnet with trained weights. Blocks make no difference there: `fidelity.py`
  and `verdict.py` use it.

A network is trained as in a search (attnsurgery.evaluate); seeds change the order of the images and the blocks' initial
weights. `val` is the score on images that were not trained on, `test` that on the test images.

A table shows differences between samplers only if candidates differ by more than seeds do: `effect_by_noise` is the
standard deviation between candidates divided by that between two trainings of the same one, after a shift that is
common to all candidates of a seed. It should be at least 3 in `test`, the metric that users see.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from _common import conditions, write
from _tables import (
    BASE,
    SETUPS,
    SITES,
    TABLE,
    Picks,
    Setup,
    base_model,
    build_candidate,
    candidates,
    data_of,
    settings_of,
    start_of,
)
from torch import nn

from attnsurgery.data import Data
from attnsurgery.evaluate.finetune import evaluate, train
from attnsurgery.latency import Conditions, Effort, backend_for

CHOSEN_SETUP = "pretrained"
"""Of fidelity.py and verdict.py."""
WITH_EFFECT = ("strip", "differences")
"""Of samplers.py."""
MEASURES = ("val", "val_loss", "test")
SAMPLE = 12
"""Number of candidates of a pilot."""


def train_candidate(base: nn.Module, picks: Picks, seed: int, setup: Setup, data: Data) -> dict[str, Any]:
    start = time.process_time()
    model = build_candidate(base, picks, seed, setup)
    settings = settings_of(setup)
    train(model, data.train, settings, seed)
    val = evaluate(model, data.val, settings)
    test = evaluate(model, data.test, settings).metric
    seconds = time.process_time() - start
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "picks": list(picks), "seed": seed, "val": val.metric, "val_loss": val.loss, "test": test,
        "parameters": parameters, "cpu_seconds": round(seconds, 1),
    }  # fmt: skip


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    rows = []
    for file in sorted(folder.glob(f"{name}-*.jsonl")):
        for line in file.read_text().splitlines():
            if line.endswith("}"):  # the network of an incomplete last line is trained again
                rows.append(json.loads(line))
    return rows


def latency_rows(folder: Path, name: str) -> list[dict[str, Any]]:
    """The latencies of a setup's candidates, a row each."""
    return rows_of(folder, f"latency-{SETUPS[name].latencies or name}")


def run(cifar: Path | None, name: str, requested: list[tuple[Picks, int]], part: int, parts: int, folder: Path) -> None:
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
        "seeds": len(seeds),
        "mean": grand,
        "sd_between": between**0.5,
        "sd_seeds": noise**0.5,
        "effect_by_noise": (between / noise) ** 0.5 if noise else 0.0,
        "reliability": between / (between + noise / len(seeds)) if between else 0.0,
    }


def cross_seed_correlation(rows: list[dict[str, Any]], measure: str) -> float:
    """Correlation of a measure after one training with the test top-1 after another training of the same candidate."""
    seeds = sorted({row["seed"] for row in rows})
    by_seed = {seed: {tuple(row["picks"]): row for row in rows if row["seed"] == seed} for seed in seeds}
    sign = -1.0 if measure.endswith("loss") else 1.0
    correlations = [
        statistics.correlation(
            [sign * by_seed[trained_seed][picks][measure] for picks in by_seed[trained_seed]],
            [by_seed[judged_seed][picks]["test"] for picks in by_seed[trained_seed]],
        )
        for trained_seed, judged_seed in itertools.permutations(seeds, 2)
    ]
    return statistics.mean(correlations)


def sample_of(setup: Setup) -> list[Picks]:
    """A dozen candidates, drawn at random."""
    order = torch.randperm(len(candidates(setup)), generator=torch.Generator().manual_seed(0)).tolist()
    return [candidates(setup)[index] for index in order[:SAMPLE]]


def print_reliability(name: str, rows: list[dict[str, Any]]) -> None:
    cost = statistics.mean(row["cpu_seconds"] for row in rows)
    for measure in MEASURES:
        figure = reliability(rows, measure)
        print(
            f"{name}, {measure}: {figure['mean']:.4f} on average, sd {figure['sd_between']:.4f} between "
            f"{figure['candidates']} candidates and {figure['sd_seeds']:.4f} between seeds, ratio "
            f"{figure['effect_by_noise']:.1f}; reliability of {figure['seeds']} seeds {figure['reliability']:.2f}; "
            f"{cost:.0f} s each"
        )


def latencies(folder: Path, name: str) -> None:
    """Measure every candidate against the base, in random order, so that a slow machine affects all kinds of blocks."""
    setup = SETUPS[name]
    if setup.latencies:
        raise SystemExit(f"{name} has the latencies of {setup.latencies}: table.py --setup {setup.latencies} --latency")
    folder.mkdir(parents=True, exist_ok=True)
    base = base_model(setup, 10).eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    conditions = Conditions(device=device, input_size=setup.size, channels_last=True, threads=1)
    backend = backend_for(conditions, effort=Effort(tolerance=0.005, max_seconds=3.0))
    base.to(device)
    rows = latency_rows(folder, name)
    reference = backend.measure(base)
    if rows:  # one scale for all rows, also of earlier calls
        reference = replace(reference, p50_ms=rows[0]["ms"] / rows[0]["ratio"])
    existing = {tuple(row["picks"]) for row in rows}
    every = candidates(setup)
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(1)).tolist()
    with (folder / f"latency-{name}-1.jsonl").open("a") as file:
        for picks in (every[index] for index in order):
            if picks not in existing:
                candidate: nn.Module = build_candidate(base, picks, 0, setup).eval()
                comparison = backend.compare(base, candidate, reference)
                row = {"picks": picks, "ms": comparison.variant_ms, "ratio": comparison.ratio}
                file.write(json.dumps({**row, "low": comparison.ratio_low, "high": comparison.ratio_high}) + "\n")
                file.flush()
    print(f"{len(rows_of(folder, f'latency-{name}'))} latencies ({backend.conditions.describe()})")


def report(folder: Path) -> None:
    """Write the figures of all tables of which every candidate is trained and measured."""
    tables: dict[str, Any] = {}
    for name, setup in SETUPS.items():
        rows = rows_of(folder, name)
        by_network = {(tuple(row["picks"]), row["seed"]): row for row in rows}
        every = list(itertools.product(candidates(setup), range(setup.seeds)))
        missing = [network for network in every if network not in by_network]
        unmeasured = len(candidates(setup)) - len({tuple(row["picks"]) for row in latency_rows(folder, name)})
        if missing or unmeasured:
            if rows:
                print(f"{name}: {len(missing)} of {len(every)} networks and {unmeasured} latencies are missing")
            continue
        networks = [by_network[network] for network in every]
        print_reliability(name, networks)
        figures = {
            measure: {**reliability(networks, measure), "predicts": cross_seed_correlation(networks, measure)}
            for measure in MEASURES
        }
        tables[name] = {"setup": asdict(setup), "figures": figures}
    print(f"written {write('table', {'base': BASE, 'sites': SITES, 'tables': tables, **conditions()})}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cifar", type=Path, nargs="?")
    parser.add_argument("--setup", choices=list(SETUPS), default="strip")
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
        return
    if options.latency:
        latencies(options.results, options.setup)
        return
    setup = SETUPS[options.setup]
    if options.cifar is None and setup.source == "cifar":
        parser.error("CIFAR10 is needed to train on")
    chosen = sample_of(setup) if options.pilot else candidates(setup)
    requested = [(picks, seed) for seed in range(setup.seeds) for picks in chosen]
    run(options.cifar, options.setup, requested, part, parts, options.results)
    if options.pilot:
        rows = [row for row in rows_of(options.results, options.setup) if tuple(row["picks"]) in chosen]
        print_reliability(options.setup, rows)


if __name__ == "__main__":
    main()
