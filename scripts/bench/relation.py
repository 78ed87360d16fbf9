#!/usr/bin/env python
"""Does a search find blocks that decide? Whole searches of the embedded pairs, at two budgets, beside random search.

    python scripts/bench/relation.py [--seeds 10] [--samplers additive random] [--budgets tight wide] [--minutes 30]

The task is `--data pairs`: two digits far apart, the same one or not? Each search has another seed, 10 trials, the
space `tiny`, and chooses the learning rates of base and candidates itself (SETTINGS). The winner is compared with the
base on test pictures, as in any search.

* `tight` is a budget that test_resnet_deeper, the same network with two blocks a stage and no attention, does not fit.
  In at least 9 of 10 searches the winner should be better than the base by 15 points or more.
* `wide` is a budget that it fits. There it is trained and tested too (`--against`), and the verdict should name
  whichever is better.

Latencies of candidates are ratios to the base's, which is measured once and stored; the budgets are multiples of it. So
searches that run at different times have the same budgets. docs/benchmarks/relation.json keeps every search that has
finished; the same call adds the missing ones, and ends after `--minutes` without starting another.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
from _common import RESULTS, conditions, with_base_latency, write

from attnsurgery.latency import Effort, Latency, LatencyBackend
from attnsurgery.search import Outcome, SearchConfig, run
from attnsurgery.search.execution.assemble import assemble
from attnsurgery.search.listener import Listener
from attnsurgery.search.result.options import best_of

NAME = "relation"
DEEPER = "test_resnet_deeper"
SETTINGS: dict[str, Any] = {
    "data": "pairs",
    "space": "tiny",
    "trials": 10,
    "epochs": 2,
    "train_batch_size": 32,
    "lr": "auto",
    "block_lr_scale": "auto",
    "finalists": 1,
    "confirm_seeds": 2,
    "final_epochs": 2,
    "workers": 0,
}
SHARES = {"tight": 0.8, "wide": 1.2}
"""Budgets: the base's latency, and this share of what the deeper network takes in addition."""
WANTED = 0.15
"""The gain over the base that the winner of the tight budget should have."""
Row = dict[str, Any]


def config_of(seed: int, sampler: str, budget: str, budget_ms: float, output: Path) -> SearchConfig:
    against = DEEPER if budget == "wide" else "none"
    return SearchConfig(
        **SETTINGS, seed=seed, sampler=sampler, against=against, budget_ms=budget_ms, output=str(output)
    )


def reference_of(results: Row, folder: Path) -> tuple[Row, LatencyBackend]:
    """The stored latencies of base and deeper network, measured if there are none, and a backend on their scale."""
    bench = assemble(config_of(0, "random", "tight", 1e3, folder), Listener(), check=False)
    if "reference" not in results:
        bench.backend.effort = Effort(tolerance=0.005, max_seconds=20.0)
        deeper = timm.create_model(DEEPER, num_classes=bench.data.num_classes).eval()
        base = bench.backend.measure(bench.base)
        comparison = bench.backend.compare(bench.base, deeper, base)
        results["reference"] = {
            "base": asdict(base),
            "deeper_ratio": comparison.ratio,
            "deeper_ratio_95": [comparison.ratio_low, comparison.ratio_high],
        }
        bench.backend.effort = Effort(tolerance=0.005, max_seconds=1.5)
    reference = results["reference"]
    return reference, with_base_latency(bench.backend, Latency(**reference["base"]))


def row_of(key: Row, outcome: Outcome, cpu_seconds: float) -> Row:
    """The results of a search: the gain of its winner with its interval, and what it tried."""
    confirmation, base, winner = outcome.confirmation, outcome.base, outcome.best
    row = {**key, "cpu_seconds": round(cpu_seconds), "conditions": conditions(), "counts": dict(outcome.counts)}
    if confirmation is None or winner is None:
        return {**row, "verdict": "no winner"}
    assert base.timing is not None
    return {
        **row,
        "verdict": confirmation.verdict,
        "winner": winner.describe(),
        "ratio": confirmation.timing.ms / base.timing.ms,
        "base_top1": confirmation.base_top1,
        "winner_top1": confirmation.winner_top1,
        "gain": confirmation.winner_top1 - confirmation.base_top1,
        "gain_95": [confirmation.low, confirmation.high],
        "seeds_of_verdict": confirmation.seeds,
        "options": [option.as_dict() for option in confirmation.options],
        "best_use_of_budget": best_of(confirmation.options).name if confirmation.options else "",
        "tuned": (outcome.about.tuning or {}).get("tuned"),
    }


def figures_of(searches: list[Row]) -> Row:
    """By budget and sampler: mean gain, range, and how many are as large as wanted."""
    figures = {}
    groups = itertools.groupby(
        sorted(searches, key=lambda row: (row["budget"], row["sampler"])),
        lambda row: f"{row['budget']}, {row['sampler']}",
    )
    for name, group in groups:
        rows = list(group)
        gains = [row.get("gain", 0.0) for row in rows]
        figures[name] = {
            "searches": len(rows),
            "better": sum(row["verdict"] == "better" for row in rows),
            "gain_of_15_points_or_more": sum(gain >= WANTED for gain in gains),
            "mean_gain": statistics.mean(gains),
            "smallest_gain": min(gains),
            "largest_gain": max(gains),
        }
    return figures


def key_of(row: Row) -> str:
    return json.dumps([row[name] for name in ("budget", "sampler", "seed")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--samplers", nargs="+", default=["additive", "random"])
    parser.add_argument("--budgets", nargs="+", choices=list(SHARES), default=list(SHARES))
    parser.add_argument("--minutes", type=float, default=600.0)
    parser.add_argument("--results", type=Path, default=Path("runs/relation"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    deadline = time.monotonic() + 60 * options.minutes
    path = RESULTS / f"{NAME}.json"
    results: Row = json.loads(path.read_text()) if path.exists() else {}
    if results.get("settings", SETTINGS) != SETTINGS:
        raise SystemExit(f"{path} has results of other settings; move it away.")
    searches: list[Row] = results.get("searches", [])
    existing = {key_of(row) for row in searches}
    options.results.mkdir(parents=True, exist_ok=True)
    reference, backend = reference_of(results, options.results / "reference")
    base_ms = reference["base"]["p50_ms"]
    ratios = {name: 1 + share * (reference["deeper_ratio"] - 1) for name, share in SHARES.items()}

    def save() -> None:
        results = {"settings": SETTINGS, "reference": reference, "budgets_in_base_latencies": ratios}
        write(NAME, {**results, "figures": figures_of(searches), "searches": searches})

    save()
    for seed, budget, sampler in itertools.product(range(options.seeds), options.budgets, options.samplers):
        key = {"budget": budget, "sampler": sampler, "seed": seed}
        if key_of(key) in existing:
            continue
        if time.monotonic() > deadline:
            break
        start = time.process_time()
        output = options.results / f"{budget}-{sampler}-{seed}"
        outcome = run(config_of(seed, sampler, budget, base_ms * ratios[budget], output), backend=backend)
        searches.append(row_of(key, outcome, time.process_time() - start))
        print(json.dumps(searches[-1]), flush=True)
        save()
    print(json.dumps(figures_of(searches), indent=2))


if __name__ == "__main__":
    main()
