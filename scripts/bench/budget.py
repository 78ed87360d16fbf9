#!/usr/bin/env python
"""Whether winners keep to their budgets: short searches, each winner measured again in a fresh process.

    python scripts/bench/budget.py [--searches 30] [--trials 6] [--results DIR]

The searches use three small timm models and three spaces, each with its own seed, on the embedded digits. A budget is
drawn between the latencies of the fastest and the slowest of a few random candidates, as ratios to the base's, so that
it binds. The base is measured just before its search, which uses this latency as its reference. Each winner is then
built from its run directory in a fresh process and measured against the base, under the conditions and with the effort
of its search.

The latency that is compared with the budget is the search's own: the ratio to the base, in milliseconds of the search's
base. A winner is *over* the budget if the whole 95 % confidence interval of the fresh measurement is above it. Also
reported are the number of winners over it by the point estimate, which is random for one that uses its whole budget,
and the largest excess; and the same in absolute milliseconds of the fresh process, in which a slower machine counts
against the winner (`base_drift` is the change of the base itself). Searches that find no candidate within their budget
are counted separately.

The same call resumes. Writes docs/benchmarks/budget-<card>.json, on a CPU budget-cpu.json.
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
from _common import begin_or_resume, card_or_cpu, with_base_latency, write

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
"""By space, the smallest and the largest budget, as ratios to the base's latency."""
FRESH_RESULT = "again.json"
"""The file in a run directory with the fresh measurement of its winner."""
CLOSE = 0.97
"""Share of the budget above which a winner counts as close to it."""


def config_of(number: int, budget_ms: float, options: argparse.Namespace) -> SearchConfig:
    return SearchConfig(
        data="digits",
        budget_ms=budget_ms,
        base=BASES[number % len(BASES)],
        space=list(SPACES)[number // len(BASES) % len(SPACES)],
        trials=options.trials,
        epochs=1,
        lr=1e-3,
        block_lr_scale=10.0,
        base_epochs=1,
        finalists=1,
        confirm_seeds=1,
        device=options.device,
        **({} if options.mode is None else {"mode": options.mode}),
        seed=number,
        output=str(options.results / f"{number:02}"),
    )


def budget_of(number: int, options: argparse.Namespace) -> tuple[float, LatencyBackend]:
    """The budget of a search in ms, drawn from its number, and a backend on the scale of the base's latency then.

    Both are stored, since a search can only be resumed with its own budget.
    """
    path = options.results / f"{number:02}.json"
    probe = config_of(number, 1.0, options)
    bench = assemble(probe, Listener())
    if not path.exists():
        base = bench.backend.measure(bench.base)
        budget_ms = random.Random(number).uniform(*SPACES[probe.space]) * base.p50_ms
        write_atomically(path, json.dumps({"base": asdict(base), "budget_ms": budget_ms}))
    stored = json.loads(path.read_text())
    return stored["budget_ms"], with_base_latency(bench.backend, Latency(**stored["base"]))


def run_search(number: int, options: argparse.Namespace) -> dict[str, Any]:
    """One search, and its winner measured again."""
    budget_ms, backend = budget_of(number, options)
    config = config_of(number, budget_ms, options)
    row = {"number": number, "base": config.base, "space": config.space, "budget_ms": budget_ms}
    try:
        outcome = run(config, backend=backend)
    except NothingFeasibleError as error:
        return row | {"feasible": False, "reason": str(error)}
    return row | {"feasible": True} | search_row(outcome) | {"fresh": measure_in_fresh_process(Path(config.output))}


def search_row(outcome: Outcome) -> dict[str, Any]:
    """Results of the search: latencies of base and winner, and the number of candidates in each state."""
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


def measure_in_fresh_process(folder: Path) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).resolve()), "--again", str(folder)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    result: dict[str, Any] = json.loads(
        (folder / FRESH_RESULT).read_text()
    )  # what it prints may be mixed with warnings
    return result


def measure_winner(folder: Path) -> dict[str, Any]:
    """Measure the winner of a run directory as its search measured it."""
    saved = load_search(folder).outcome
    bench = prepare(saved.config, folder, Listener(), lambda: False)
    winner = timm.create_model(f"local-dir:{folder / 'best'}", pretrained=True).eval()
    assert saved.best is not None
    assert sum(parameter.numel() for parameter in winner.parameters()) == saved.best.parameters
    return comparison_row(bench.backend.compare(bench.base, winner))


def comparison_row(comparison: Comparison) -> dict[str, Any]:
    return {
        "ratio": comparison.ratio,
        "ratio_low": comparison.ratio_low,
        "ratio_high": comparison.ratio_high,
        "base_ms": comparison.base.p50_ms,
        "ms": comparison.variant.p50_ms,
        "noise": comparison.variant.noise,
        "steady": comparison.base.steady,
    }


def budget_shares(row: dict[str, Any]) -> dict[str, float]:
    """The fresh latencies of a winner as shares of its budget."""
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


def row_text(row: dict[str, Any]) -> str:
    of = f"{row['number']:2} {row['base']:18}{row['space']:10} budget {row['budget_ms']:.3f} ms "
    if not row["feasible"]:
        return f"{of} nothing feasible"
    share = row["held"]
    return (
        f"{of} of it: in the search {share['trial']:.1%}, again {share['ratio']:.1%} (at least "
        f"{share['ratio_low']:.1%}), absolute {share['absolute']:.1%}; base {share['base_drift']:+.1%}"
    )


def report(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    figures = figures_of(rows)
    settings = {
        "trials": options.trials,
        "epochs": 1,
        "device": options.device,
        "mode": config_of(0, 1.0, options).mode,
    }
    name = "cpu" if options.device == "cpu" else card_or_cpu()
    print(f"written {write(f'budget-{name}', {'figures': figures, 'settings': settings, 'searches': rows})}")
    print(
        f"{figures['searches']} searches: {figures['nothing_feasible']} found no candidate within the budget; it "
        f"excluded candidates in {figures['budget_bound']}, and {figures['close_to_the_budget']} winners use at least "
        f"{CLOSE:.0%} of it"
    )
    for scale, unit in (("absolute", "in absolute ms"), ("ratio", "by the ratio to the base")):
        excesses = figures[scale]
        worst = "" if excesses["worst_excess"] is None else f", the worst {excesses['worst_excess']:+.1%}"
        print(
            f"{figures['winners']} winners measured again, {unit}: {excesses['over_by_more_than_the_interval']} over "
            f"budget by more than the interval, {excesses['over_by_the_point_estimate']} by the point estimate{worst}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--searches", type=int, default=30)
    parser.add_argument("--trials", type=int, default=6, help="trained candidates of each search")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--mode", help="of a measured forward; by default what suits the device")
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "bench-budget")
    parser.add_argument("--again", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.again:
        write_atomically(options.again / FRESH_RESULT, json.dumps(measure_winner(options.again)))
        return
    begin_or_resume(
        options.results, {"trials": options.trials, "device": options.device, "mode": config_of(0, 1.0, options).mode}
    )
    os.environ["ATTNSURGERY_CACHE"] = str(options.results / "cache")
    journal = Journal(options.results / "searches.jsonl")
    rows = {row["number"]: row for row in journal.read()}
    for number in range(options.searches):
        if number not in rows:
            rows[number] = run_search(number, options)
            journal.append(rows[number])
        if rows[number]["feasible"]:
            rows[number]["held"] = budget_shares(rows[number])
        print(row_text(rows[number]), flush=True)
    report([rows[number] for number in range(options.searches)], options)


if __name__ == "__main__":
    main()
