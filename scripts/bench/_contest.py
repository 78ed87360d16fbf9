"""Models that are trained equally long from the same weights, and compared on test images that no search has used.

Two models are compared as a search compares its winner with the base, over images and trainings. The p-values are those
of single tests.
"""

from __future__ import annotations

import copy
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attnsurgery.recipe.schema import Recipe
from attnsurgery.search import Timing
from attnsurgery.search.coordinator.compare import compare_on_test
from attnsurgery.search.execution.bench import Bench
from attnsurgery.search.execution.trial import build
from attnsurgery.search.files import Journal
from attnsurgery.search.seeds import seed_of

BASE, WINNER = "base", "winner"
Recipes = dict[str, Recipe | None]
"""The recipes of the models by name; None is the base itself."""
Correct = list[torch.Tensor]
"""By seed, whether each test image is predicted correctly: booleans (N,)."""


def train_contestants(bench: Bench, recipes: Recipes, seeds: int, path: Path) -> dict[str, Correct]:
    """Train all models from each seed, except those in the journal at `path`."""
    journal = Journal(path)
    packed = {(row["digest"], row["seed"]): row["right"] for row in journal.read()}
    for seed in range(seeds):
        for name, recipe in recipes.items():
            key = (_digest(recipe), seed)
            if key in packed:
                continue
            score = bench.final_evaluator.score(
                _build_contestant(bench, recipe), seed_of(bench.config.seed, "contest", seed), on="test"
            )
            packed[key] = np.packbits(score.values.numpy()).tobytes().hex()
            journal.append({"digest": key[0], "seed": seed, "name": name, "top1": score.metric, "right": packed[key]})
            print(f"{name}, seed {seed + 1} of {seeds}: {100 * score.metric:.2f} %", flush=True)
    images = len(bench.data.test)
    return {
        name: [_unpack(packed[_digest(recipe), seed], images) for seed in range(seeds)]
        for name, recipe in recipes.items()
    }


def entries(bench: Bench, recipes: Recipes, rights: dict[str, Correct], reference_ms: float) -> list[dict[str, Any]]:
    """A row for each model: latency, test top-1 of every seed, and its comparisons with the base and the winner."""
    rows = []
    for name, recipe in recipes.items():
        model = _build_contestant(bench, recipe)
        comparison = replace(bench.backend.compare(bench.base, model), reference_ms=reference_ms)
        top1s = [float(right_N.float().mean()) for right_N in rights[name]]
        entry = {
            "name": name,
            "recipe": recipe.as_dict() if recipe else None,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "latency": asdict(Timing.of(comparison)),
            "test_top1": top1s,
            "mean": statistics.fmean(top1s),
        }
        if name != BASE:
            entry["against_base"] = _comparison(rights[name], rights[BASE])
        if name != WINNER and WINNER in rights:
            entry["winner_against"] = _comparison(rights[WINNER], rights[name])
        rows.append(entry)
    return rows


def show(rows: list[dict[str, Any]], budget_ms: float) -> None:
    """Print the rows as a table."""
    head = f"\n{'':34}{'latency':>10}{'of budget':>11}  {'test top-1 of each seed, %':28}{'mean':>6}"
    print(f"{head}  {'against the base':20}winner against it")
    for row in rows:
        ms, seeds = row["latency"]["ms"], " ".join(f"{100 * top1:.2f}" for top1 in row["test_top1"])
        print(
            f"{row['name']:34}{ms:7.3f} ms{ms / budget_ms:11.1%}  {seeds:28}{100 * row['mean']:6.2f}  "
            f"{_gain_text(row.get('against_base')):20}{_gain_text(row.get('winner_against'))}"
        )


def conclude(rows: list[dict[str, Any]]) -> None:
    """Print the comparisons of the winner."""
    winner = next((row for row in rows if row["name"] == WINNER), None)
    if winner is None:
        print("the search found no candidate within the budget")
        return
    comparisons = [
        f"{_gain_text(row['winner_against'])} against {row['name']}, {row['winner_against']['verdict']}"
        for row in rows
        if row is not winner
    ]
    print(f"winner {100 * winner['mean']:.2f} % at {winner['latency']['ms']:.3f} ms: {'; '.join(comparisons)}")


def _digest(recipe: Recipe | None) -> str:
    return recipe.digest() if recipe else ""


def _build_contestant(bench: Bench, recipe: Recipe | None) -> torch.nn.Module:
    return build(bench, recipe) if recipe else copy.deepcopy(bench.base)


def _unpack(right: str, images: int) -> torch.Tensor:
    bits_N = np.unpackbits(np.frombuffer(bytes.fromhex(right), np.uint8))[:images]
    return torch.from_numpy(bits_N.astype(bool))


def _comparison(first: Correct, second: Correct) -> dict[str, Any]:
    second_SN, first_SN = (torch.stack(rights).numpy() for rights in (second, first))
    verdict = compare_on_test("", second_SN, first_SN, 0)
    return {
        "gain": verdict.winner_metric - verdict.base_metric,
        "gains": [
            float(first_N.float().mean() - second_N.float().mean())
            for first_N, second_N in zip(first, second, strict=True)
        ],
        "low": verdict.low,
        "high": verdict.high,
        "p_value": verdict.p_value,
        "verdict": verdict.verdict,
    }


def _gain_text(comparison: dict[str, Any] | None) -> str:
    return "" if comparison is None else f"{100 * comparison['gain']:+.2f} (p = {comparison['p_value']:.2g})"
