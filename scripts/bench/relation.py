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
* `long` is the same budget with trainings twelve times as long (LONG), from which the deeper network learns the task.
  It is run only if `--budgets` names it.

Latencies of candidates are ratios to the base's, which is measured once on each kind of processor and stored; the
budgets are multiples of it. So searches that run at different times have the same budgets. How much longer the deeper
network takes depends on the processor, and the budgets with it: it fits `wide` and does not fit `tight` on any.
docs/benchmarks/relation.json keeps every search that has finished; the same call adds the missing ones, and ends after
`--minutes` without starting another.
"""

from __future__ import annotations

import itertools
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
from _common import with_base_latency
from _whole import Row, Searches, parser_of

from attnsurgery.latency import Effort, Latency, LatencyBackend
from attnsurgery.search import Outcome, SearchConfig
from attnsurgery.search.execution.assemble import assemble
from attnsurgery.search.listener import Listener

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
LONG: dict[str, Any] = {"trials": 4, "epochs": 24, "final_epochs": 24, "lr": 3e-3, "block_lr_scale": 1.0}
"""Settings of `long`; the learning rate is that at which relation_sweep.py found that the deeper network learns."""
SHARES = {"tight": 0.8, "wide": 1.2, "long": 1.2}
"""Budgets: the base's latency, and this share of what the deeper network takes in addition."""
WANTED = 0.15
"""The gain over the base that the winner of the tight budget should have."""


def search_config(seed: int, sampler: str, budget: str, budget_ms: float, output: Path) -> SearchConfig:
    settings = SETTINGS | (LONG if budget == "long" else {})
    against = "none" if budget == "tight" else DEEPER
    return SearchConfig(
        **settings, seed=seed, sampler=sampler, against=against, budget_ms=budget_ms, output=str(output)
    )


def reference_of(results: Row, folder: Path) -> tuple[Row, LatencyBackend]:
    """The stored latencies of base and deeper network on this processor, measured if there are none, and a backend on
    their scale."""
    bench = assemble(search_config(0, "random", "tight", 1e3, folder), Listener(), check=False)
    references, processor = results.setdefault("references", {}), bench.backend.versions()["processor"]
    if processor not in references:
        bench.backend.effort = Effort(tolerance=0.005, max_seconds=20.0)
        deeper = timm.create_model(DEEPER, num_classes=bench.data.num_classes).eval()
        base = bench.backend.measure(bench.base)
        comparison = bench.backend.compare(bench.base, deeper, base)
        references[processor] = {
            "base": asdict(base),
            "deeper_ratio": comparison.ratio,
            "deeper_ratio_95": [comparison.ratio_low, comparison.ratio_high],
        }
        bench.backend.effort = Effort(tolerance=0.005, max_seconds=1.5)
    reference = references[processor]
    ratios = {name: 1 + share * (reference["deeper_ratio"] - 1) for name, share in SHARES.items()}
    reference["budgets_in_base_latencies"] = ratios
    return reference, with_base_latency(bench.backend, Latency(**reference["base"]))


def figures_of(searches: list[Row]) -> Row:
    """By budget and sampler: mean gain and its range, how many are as large as wanted, and what the advice names."""
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
            "winner_is_best_use_of_budget": sum(row.get("best_use_of_budget", "").startswith("trial") for row in rows),
        }
    return figures


def main() -> None:
    parser = parser_of(__doc__, NAME, seeds=10)
    parser.add_argument("--samplers", nargs="+", default=["additive", "random"])
    parser.add_argument("--budgets", nargs="+", choices=list(SHARES), default=["tight", "wide"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    searches = Searches(NAME, SETTINGS, figures_of)
    reference, backend = reference_of(searches.header, options.results / "reference")
    base_ms, ratios = reference["base"]["p50_ms"], reference["budgets_in_base_latencies"]
    processor = reference["base"]["versions"]["processor"]
    searches.header["settings_of_long"] = LONG
    searches.save()
    keys = [
        {"budget": budget, "sampler": sampler, "seed": seed}
        for sampler, seed, budget in itertools.product(options.samplers, range(options.seeds), options.budgets)
    ]

    def config_of(key: Row, output: Path) -> SearchConfig:
        return search_config(**key, budget_ms=base_ms * ratios[key["budget"]], output=output)

    def more(outcome: Outcome) -> Row:
        assert outcome.config.budget_ms is not None
        return {"budget_in_base_latencies": outcome.config.budget_ms / base_ms, "processor": processor}

    searches.add(keys, config_of, options.results, options.minutes, backend, more)


if __name__ == "__main__":
    main()
