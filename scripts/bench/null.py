#!/usr/bin/env python
"""How often does a search call its winner better where blocks bring nothing? Whole searches of the embedded digits.

    python scripts/bench/null.py [--seeds 40] [--kinds trained_out untuned] [--minutes 30]

Single digits need no attention: trained out, the base is right in nearly all of them. So "better" is a false alarm, and
the verdict is made for at most 5 % of these. Each search has another seed, and with it another base, other trials and
other trainings; images and splits are the same. They are 24 x 24 pixels, so that a search takes minutes.

* `trained_out` chooses learning rates and epochs first, as a search does by default. In 40 searches at most 3 should be
  called better.
* `untuned` has the settings that were the default before: 3 epochs at a learning rate of 0.001, blocks at ten times
  that. The base does not finish learning, the faster blocks do, and the verdict calls that a gain. It shows what the
  choice of learning rates is for.

docs/benchmarks/null.json keeps every search that has finished; the same call adds the missing ones, and ends after
`--minutes` without starting another.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
from _whole import Row, Searches, parser_of

from attnsurgery.search import SearchConfig

NAME = "null"
SETTINGS: dict[str, Any] = {
    "data": "digits",
    "space": "tiny",
    "input_size": 24,
    "budget_ms": 1000.0,
    "against": "none",
    "workers": 0,
}
KINDS: dict[str, dict[str, Any]] = {
    "trained_out": {"trials": 4, "finalists": 1, "lr": "auto", "epochs": "auto", "block_lr_scale": "auto"},
    "untuned": {
        "trials": 10,
        "finalists": 3,
        "lr": 1e-3,
        "epochs": 3,
        "block_lr_scale": 10.0,
        "final_epochs": 3,
        "confirm_seeds": 3,
    },
}


def figures_of(searches: list[Row]) -> Row:
    """By kind: the verdicts, the mean gain, and how often "better" is said."""
    figures = {}
    for kind in KINDS:
        rows = [row for row in searches if row["kind"] == kind]
        if not rows:
            continue
        verdicts = [row["verdict"] for row in rows]
        gains = [row.get("gain", 0.0) for row in rows]
        figures[kind] = {
            "searches": len(rows),
            "verdicts": {verdict: verdicts.count(verdict) for verdict in sorted(set(verdicts))},
            "mean_gain": statistics.mean(gains),
            "smallest_gain": min(gains),
            "largest_gain": max(gains),
            "mean_base_top1": statistics.mean(row["base_top1"] for row in rows if "base_top1" in row),
            "mean_seeds_of_verdict": statistics.mean(row.get("seeds_of_verdict", 0) for row in rows),
        }
    return figures


def main() -> None:
    parser = parser_of(__doc__, NAME, seeds=40)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    searches = Searches(NAME, {**SETTINGS, "kinds": KINDS}, figures_of)
    keys = [{"kind": kind, "seed": seed} for kind in options.kinds for seed in range(options.seeds)]

    def config_of(key: Row, output: Path) -> SearchConfig:
        return SearchConfig(**SETTINGS, **KINDS[key["kind"]], seed=key["seed"], output=str(output))

    searches.add(keys, config_of, options.results, options.minutes)


if __name__ == "__main__":
    main()
