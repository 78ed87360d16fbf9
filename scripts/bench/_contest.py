"""Contestants trained equally long from the same weights, and judged on test images that nothing has looked at.

Two are compared as a search compares its winner with the base, by images and trainings both. The p-values are those of
single tests.
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
from attnsurgery.search.execution.bench import Bench
from attnsurgery.search.execution.trial import build
from attnsurgery.search.execution.verdict import compare_on_test
from attnsurgery.search.files import Journal
from attnsurgery.search.seeds import seed_of

BASE, WINNER = "base", "winner"
Recipes = dict[str, Recipe | None]
"""The contestants by their names; None is the base as it is."""
Rights = list[torch.Tensor]
"""Which test images one got right: (N,) booleans of each seed."""


def trained(bench: Bench, recipes: Recipes, seeds: int, path: Path) -> dict[str, Rights]:
    """Train all from each seed; what `path` holds from an earlier run is not trained again."""
    journal = Journal(path)
    known = {(row["digest"], row["seed"]): row["right"] for row in journal.read()}
    for seed in range(seeds):
        for name, recipe in recipes.items():
            key = (_digest(recipe), seed)
            if key in known:
                continue
            score = bench.final_evaluator.score(
                _made(bench, recipe), seed_of(bench.config.seed, "contest", seed), on="test"
            )
            known[key] = np.packbits(score.correct.numpy()).tobytes().hex()
            journal.append({"digest": key[0], "seed": seed, "name": name, "top1": score.top1, "right": known[key]})
            print(f"{name}, seed {seed + 1} of {seeds}: {100 * score.top1:.2f} %", flush=True)
    images = len(bench.data.test)
    return {
        name: [_unpacked(known[_digest(recipe), seed], images) for seed in range(seeds)]
        for name, recipe in recipes.items()
    }


def entries(bench: Bench, recipes: Recipes, rights: dict[str, Rights], reference_ms: float) -> list[dict[str, Any]]:
    """Of each: latency, test top-1 of every seed, how it does against the base, and how the winner does against it."""
    found = []
    for name, recipe in recipes.items():
        model = _made(bench, recipe)
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
            entry["against_base"] = _compared(rights[name], rights[BASE])
        if name != WINNER and WINNER in rights:
            entry["winner_against"] = _compared(rights[WINNER], rights[name])
        found.append(entry)
    return found


def show(rows: list[dict[str, Any]], budget_ms: float) -> None:
    """The entries as a table."""
    head = f"\n{'':34}{'latency':>10}{'of budget':>11}  {'test top-1 of each seed, %':28}{'mean':>6}"
    print(f"{head}  {'against the base':20}winner against it")
    for row in rows:
        ms, seeds = row["latency"]["ms"], " ".join(f"{100 * top1:.2f}" for top1 in row["test_top1"])
        print(
            f"{row['name']:34}{ms:7.3f} ms{ms / budget_ms:11.1%}  {seeds:28}{100 * row['mean']:6.2f}  "
            f"{_said(row.get('against_base')):20}{_said(row.get('winner_against'))}"
        )


def conclude(rows: list[dict[str, Any]]) -> None:
    """The figure, whatever it is."""
    winner = next((row for row in rows if row["name"] == WINNER), None)
    if winner is None:
        print("the search has found nothing within the budget")
        return
    told = [
        f"{_said(row['winner_against'])} against {row['name']}, {row['winner_against']['verdict']}"
        for row in rows
        if row is not winner
    ]
    print(f"winner {100 * winner['mean']:.2f} % at {winner['latency']['ms']:.3f} ms: {'; '.join(told)}")


def _digest(recipe: Recipe | None) -> str:
    return recipe.digest() if recipe else ""


def _made(bench: Bench, recipe: Recipe | None) -> torch.nn.Module:
    return build(bench, recipe) if recipe else copy.deepcopy(bench.base)


def _unpacked(right: str, images: int) -> torch.Tensor:
    bits_N = np.unpackbits(np.frombuffer(bytes.fromhex(right), np.uint8))[:images]
    return torch.from_numpy(bits_N.astype(bool))


def _compared(first: Rights, second: Rights) -> dict[str, Any]:
    found = compare_on_test("", second, first, 0, Timing(0.0, 0.0, 0.0, 0.0))
    return {
        "gain": found.winner_top1 - found.base_top1,
        "gains": [
            float(one_N.float().mean() - other_N.float().mean()) for one_N, other_N in zip(first, second, strict=True)
        ],
        "low": found.low,
        "high": found.high,
        "p_value": found.p_value,
        "verdict": found.verdict,
    }


def _said(found: dict[str, Any] | None) -> str:
    return "" if found is None else f"{100 * found['gain']:+.2f} (p = {found['p_value']:.2g})"
