#!/usr/bin/env python
"""Do winners keep to their budgets? Short searches, each winner measured again in a process of its own.

    python scripts/bench/budget.py [--searches 30] [--trials 6] [--results DIR]

Three small timm models, three spaces and as many seeds as searches, on the embedded digits. A budget is drawn between
what the cheapest and what the dearest of a few random candidates take, as ratios to the base's latency, so that it
binds. The base is measured just before its search, which takes that number as its reference. Each winner is then built
from its run directory in a fresh process and measured beside the base, under the conditions and with the effort of its
search.

What is held against the budget is the product's own number: the ratio to the base, in milliseconds of the search's
base. A winner is *over* if the whole 95 % interval of that fresh measurement is above the budget. Beside it: how many
are over by the point estimate alone, a coin's toss for a winner that uses up its budget, and by how much at most; and
the same in absolute milliseconds of the fresh process, where a machine that is slower by then counts against the winner
(`base_drift` says by how much the base itself was). A search that finds nothing within its budget is counted as that.

The same call goes on where it was stopped. Writes docs/benchmarks/budget-<card>.json, for the CPU budget-cpu.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
from _common import card_or_cpu, go_on, on_scale, write

from attnsurgery.errors import NothingFeasibleError
from attnsurgery.latency import Comparison, Latency, LatencyBackend
from attnsurgery.search import Listener, Outcome, SearchConfig, run
from attnsurgery.search.execution.assemble import assemble, prepare
from attnsurgery.search.files import Journal, write_atomically
from attnsurgery.search.result.record import Record
from attnsurgery.search.storage.load import load_search

ROOT = Path(__file__).resolve().parents[2]
BASES = ("test_resnet", "test_efficientnet", "test_byobnet")
SPACES = {"tiny": (1.05, 1.25), "se": (1.05, 1.15), "non_local": (1.12, 1.5)}
"""With the smallest and the largest budget, as ratios to the base's latency."""
AGAIN = "again.json"
"""Of a run directory: its winner, measured again."""
CLOSE = 0.97
"""A winner that uses so much of its budget tests the meter; one far below does not."""


def config_of(number: int, budget_ms: float, asked: argparse.Namespace) -> SearchConfig:
    return SearchConfig(
        budget_ms=budget_ms,
        base=BASES[number % len(BASES)],
        space=list(SPACES)[number // len(BASES) % len(SPACES)],
        trials=asked.trials,
        epochs=1,
        base_epochs=1,
        finalists=1,
        confirm_seeds=1,
        device=asked.device,
        **({} if asked.mode is None else {"mode": asked.mode}),
        seed=number,
        output=str(asked.results / f"{number:02}"),
    )


def budget_of(number: int, asked: argparse.Namespace) -> tuple[float, LatencyBackend]:
    """In ms, drawn by the search's number, and what measures on the scale of the base that it was drawn for.

    Both are kept: a search goes on with its own budget only.
    """
    path = asked.results / f"{number:02}.json"
    probe = config_of(number, 1.0, asked)
    bench = assemble(probe, Listener())
    if not path.exists():
        base = bench.backend.measure(bench.base)
        budget_ms = random.Random(number).uniform(*SPACES[probe.space]) * base.p50_ms
        write_atomically(path, json.dumps({"base": asdict(base), "budget_ms": budget_ms}))
    kept = json.loads(path.read_text())
    return kept["budget_ms"], on_scale(bench.backend, Latency(**kept["base"]))


def searched(number: int, asked: argparse.Namespace) -> dict[str, Any]:
    """One search, and its winner measured again."""
    budget_ms, backend = budget_of(number, asked)
    config = config_of(number, budget_ms, asked)
    row = {"number": number, "base": config.base, "space": config.space, "budget_ms": budget_ms}
    try:
        outcome = run(config, backend=backend)
    except NothingFeasibleError as error:
        return row | {"feasible": False, "reason": str(error)}
    return row | {"feasible": True} | of_search(outcome) | {"fresh": in_a_fresh_process(Path(config.output))}


def of_search(outcome: Outcome) -> dict[str, Any]:
    """What the search itself says: times of base and winner, and how many candidates the budget has turned away."""
    winner, confirmation, base = outcome.best, outcome.confirmation, outcome.base
    assert winner is not None
    assert confirmation is not None
    assert base.timing is not None
    return {
        "winner": winner.describe(),
        "counts": dict(outcome.counts),
        "reference_ms": base.timing.ms,
        "trial": timing(winner),
        "confirmation_ms": confirmation.timing.ms,
    }


def timing(record: Record) -> dict[str, float]:
    assert record.timing is not None
    return {"ms": record.timing.ms, "low_ms": record.timing.low_ms, "high_ms": record.timing.high_ms}


def in_a_fresh_process(folder: Path) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).resolve()), "--again", str(folder)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads((folder / AGAIN).read_text())  # what it prints may be mixed with warnings
    return found


def again(folder: Path) -> dict[str, Any]:
    """Measure the winner that a run directory holds, as its search measured it."""
    saved = load_search(folder).outcome
    bench = prepare(saved.config, folder, Listener(), lambda: False)
    winner = timm.create_model(f"local-dir:{folder / 'best'}", pretrained=True).eval()
    assert saved.best is not None
    assert sum(parameter.numel() for parameter in winner.parameters()) == saved.best.parameters
    return measured(bench.backend.compare(bench.base, winner))


def measured(found: Comparison) -> dict[str, Any]:
    return {
        "ratio": found.ratio,
        "ratio_low": found.ratio_low,
        "ratio_high": found.ratio_high,
        "base_ms": found.base.p50_ms,
        "ms": found.variant.p50_ms,
        "noise": found.variant.noise,
        "steady": found.base.steady,
    }


def held(row: dict[str, Any]) -> dict[str, float]:
    """The fresh numbers of a winner as shares of its budget: above 1 is over."""
    fresh, scale = row["fresh"], row["reference_ms"] / row["budget_ms"]
    absolute = fresh["ms"] / row["budget_ms"]
    return {
        "trial": row["trial"]["ms"] / row["budget_ms"],
        "ratio": fresh["ratio"] * scale,
        "ratio_low": fresh["ratio_low"] * scale,
        "absolute": absolute,
        "absolute_low": absolute * (1 - fresh["noise"]),
        "half_interval": (fresh["ratio_high"] - fresh["ratio_low"]) / 2 / fresh["ratio"],
        "base_drift": fresh["base_ms"] / row["reference_ms"] - 1,
    }


def figures_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    winners = [row for row in rows if row["feasible"]]
    shares = [row["held"] for row in winners]
    figures: dict[str, Any] = {
        "searches": len(rows),
        "nothing_feasible": len(rows) - len(winners),
        "winners": len(winners),
        "budget_bound": sum(row["counts"].get("over_budget", 0) > 0 for row in winners),
        "close_to_the_budget": sum(share["trial"] >= CLOSE for share in shares),
        "unsteady": sum(not row["fresh"]["steady"] for row in winners),
    }
    for scale in ("ratio", "absolute"):
        figures[scale] = {
            "over_by_more_than_the_interval": sum(share[f"{scale}_low"] > 1 for share in shares),
            "over_by_the_point_estimate": sum(share[scale] > 1 for share in shares),
            "worst_excess": max((share[scale] - 1 for share in shares), default=None),
        }
    if shares:
        drifts = [share["base_drift"] for share in shares]
        figures["median_half_interval"] = statistics.median(share["half_interval"] for share in shares)
        figures["base_drift"] = {"least": min(drifts), "most": max(drifts)}
    return figures


def said(row: dict[str, Any]) -> str:
    of = f"{row['number']:2} {row['base']:18}{row['space']:10} budget {row['budget_ms']:.3f} ms "
    if not row["feasible"]:
        return f"{of} nothing feasible"
    share = row["held"]
    return (
        f"{of} of it: in the search {share['trial']:.1%}, again {share['ratio']:.1%} (at least "
        f"{share['ratio_low']:.1%}), absolute {share['absolute']:.1%}; base {share['base_drift']:+.1%}"
    )


def report(rows: list[dict[str, Any]], asked: argparse.Namespace) -> None:
    figures = figures_of(rows)
    settings = {"trials": asked.trials, "epochs": 1, "device": asked.device, "mode": config_of(0, 1.0, asked).mode}
    name = "cpu" if asked.device == "cpu" else card_or_cpu()
    print(f"written {write(f'budget-{name}', {'figures': figures, 'settings': settings, 'searches': rows})}")
    print(
        f"{figures['searches']} searches: {figures['nothing_feasible']} found nothing within the budget; it turned "
        f"candidates away in {figures['budget_bound']}, and {figures['close_to_the_budget']} winners use at least "
        f"{CLOSE:.0%} of it"
    )
    for scale, words in (("absolute", "in absolute ms"), ("ratio", "by the ratio to the base")):
        found = figures[scale]
        worst = "" if found["worst_excess"] is None else f", the worst {found['worst_excess']:+.1%}"
        print(
            f"{figures['winners']} winners measured again, {words}: {found['over_by_more_than_the_interval']} over "
            f"budget by more than the interval, {found['over_by_the_point_estimate']} by the point estimate{worst}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--searches", type=int, default=30)
    parser.add_argument("--trials", type=int, default=6, help="trained candidates of each search")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--mode", help="of a measured forward; by default what suits the device")
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "bench-budget")
    parser.add_argument("--again", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.again:
        write_atomically(asked.again / AGAIN, json.dumps(again(asked.again)))
        return
    go_on(asked.results, {"trials": asked.trials, "device": asked.device, "mode": config_of(0, 1.0, asked).mode})
    os.environ["ATTNSURGERY_CACHE"] = str(asked.results / "cache")
    journal = Journal(asked.results / "searches.jsonl")
    rows = {row["number"]: row for row in journal.read()}
    for number in range(asked.searches):
        if number not in rows:
            rows[number] = searched(number, asked)
            journal.append(rows[number])
        if rows[number]["feasible"]:
            rows[number]["held"] = held(rows[number])
        print(said(rows[number]), flush=True)
    report([rows[number] for number in range(asked.searches)], asked)


if __name__ == "__main__":
    main()
