"""What searches are tested with: a few tiny images, and searches made by hand whose numbers nobody trained for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from attnsurgery.search import Outcome, Record, SearchConfig, Timing
from attnsurgery.search.result.about import About, Place, Spot, Stage
from attnsurgery.search.result.confirmation import Confirmation
from attnsurgery.search.result.options import Option
from attnsurgery.search.result.record import Promotion, best

SPACE = """
version: 1
name: small
decisions:
  - at: "stage:* branches"
    choices:
      - block: se
        options: {reduction: [4, 16]}
"""

LABELS = ("se(reduction=4)", "se(reduction=16)", "non_local(reduction=2, subsample=2)", "dual(which=position)")
SITES = [(stage, block) for stage, blocks in ((1, 2), (2, 2), (3, 4), (4, 2)) for block in range(blocks)]
PLACES = [f"layer{stage}.{block}.bn2" for stage, block in SITES]


def write_images(root: Path) -> Path:
    """Two classes that any model learns to tell apart."""
    for label, level in (("dark", 0), ("light", 160)):
        (root / label).mkdir(parents=True)
        for index in range(20):
            pixels = np.random.default_rng(index).integers(0, 90, (32, 32, 3)) + level
            Image.fromarray(pixels.astype(np.uint8)).save(root / label / f"{index}.png")
    return root


def write_space(folder: Path) -> Path:
    path = folder / "small.yaml"
    path.write_text(SPACE)
    return path


def small_search(images: Path, space: Path, output: Path) -> SearchConfig:
    """Four candidates, seconds, and a latency that is computed."""
    return SearchConfig(
        budget_ms=100.0,
        space=str(space),
        data=str(images),
        trials=4,
        epochs=1,
        lr=1e-3,
        block_lr_scale=10.0,
        base_epochs=1,
        train_batch_size=8,
        finalists=1,
        confirm_seeds=1,
        input_size=32,
        latency="fixed",
        workers=0,
        output=str(output),
    )


def change(config: SearchConfig, **fields: object) -> SearchConfig:
    return config.model_copy(update=fields)


def about(**changes: Any) -> About:
    places = tuple(
        Place(name, (Spot(name, stage, float(index), "branch", 16 * 2**stage, 64 >> stage, 64 >> stage),))
        for index, (name, (stage, _)) in enumerate(zip(PLACES, SITES, strict=True))
    )
    stages = tuple(
        Stage(stage, blocks, 16 * 2**stage, 64 >> stage, 64 >> stage)
        for stage, blocks in ((1, 2), (2, 2), (3, 4), (4, 2))
    )
    made = About(
        command="attnsurgery search test_resnet --budget-ms 2.0",
        conditions="cpu, float32, batch 1, input 3x128x128, eager, 1 thread",
        data="photos: 8000 train, 2000 validation, 2000 test, 10 classes",
        images={"train": 8000, "validation": 2000, "test": 2000},
        fingerprint="0123456789abcdef",
        weights="fedcba9876543210",
        candidates=1_953_124,
        training={"epochs": 3, "optimizer": "adamw", "lr": 1e-3},
        versions={"torch": "2.15.0", "processor": "an imagined one"},
        code=("attnsurgery 0.1.0 (source 00000000), timm 1.0.31",),
        noise=0.002,
        steady=True,
        input_size=(3, 128, 128),
        places=places,
        stages=stages,
        shared=(),
    )
    return replace(made, **changes)


def timing(ms: float, half: float = 0.006) -> Timing:
    return Timing(ms, ms * (1 - half), ms * (1 + half), ms / 1.5)


BASE = Record(-1, "trained", timing=timing(1.5), metric=0.80, loss=0.6, parameters=373_658, seconds=20.0, epochs=3)


def trial(number: int, metric: float | None, ms: float, **fields: Any) -> Record:
    """A candidate with one block, trained if it has an accuracy."""
    given = {"assignment": {PLACES[number % len(PLACES)]: LABELS[number % len(LABELS)]}, "blocks": 1, **fields}
    recipe = {"version": 1, "name": f"test_resnet_small_{number:08x}", "base": "test_resnet", "edits": []}
    recipe["edits"] = [{"at": place, "block": "se"} for place in given["assignment"]]
    state = "over_budget" if metric is None else "trained"
    made = Record(number, state, recipe=recipe, digest=f"{number:08x}", timing=timing(ms), metric=metric, epochs=3)
    loss = None if metric is None else 1 - metric
    return replace(made, loss=loss, parameters=380_000 + number, seconds=20.0, **given)


def search(count: int, rungs: int = 0, seed: int = 0) -> list[Record]:
    """As many trials as a search makes: blocks with effects that add up, noise, a budget, promotions of the best."""
    rng = np.random.default_rng(seed)
    worth = rng.normal(0.001, 0.007, (len(PLACES), len(LABELS)))
    price = np.array([0.02, 0.03, 0.16, 0.11]) * np.linspace(1.6, 0.6, len(PLACES))[:, None]
    found: list[Record] = []
    for number in range(count):
        drawn = [_drawn(rng) for _ in range(1 if number < 8 else 1 + number // 8)]
        picks = max(drawn, key=lambda picks: sum(worth[pick] for pick in picks) + float(rng.normal(0, 0.02)))
        ms = 1.5 + sum(price[pick] for pick in picks) + float(rng.normal(0, 0.003))
        metric = 0.80 + sum(worth[pick] for pick in picks) + float(rng.normal(0, 0.004))
        fields = {"assignment": {PLACES[p]: LABELS[b] for p, b in picks}, "blocks": len(picks), "drawn": number < 8}
        found.append(trial(number, metric if ms <= 2.0 else None, ms, **fields))
    for rung in range(rungs):
        there = [record for record in found if record.state == "trained" and record.reached == rung]
        there.sort(key=lambda record: record.final_metric or 0.0, reverse=True)
        for record in there[: max(2, len(there) // 3)]:
            higher = (record.final_metric or 0.0) + 0.02 + float(rng.normal(0, 0.004))
            promotion = Promotion(higher, 1 - higher, 60.0, 3 * 3 ** (rung + 1))
            found[record.number] = replace(record, promotions=(*record.promotions, promotion))
    return found


def _drawn(rng: np.random.Generator) -> list[tuple[int, int]]:
    some = rng.choice(len(PLACES), size=int(rng.integers(1, 5)), replace=False)
    return [(int(place), int(rng.integers(len(LABELS)))) for place in sorted(some)]


def outcome(folder: Path, records: list[Record], judged: bool = True, **fields: Any) -> Outcome:
    """A search that has come to an end, unless told otherwise."""
    winner = best(records, "metric")
    verdict = Confirmation(
        digest=winner.digest or "",
        images=2000,
        seeds=3,
        epochs=3,
        base_metric=0.801,
        winner_metric=0.824,
        low=0.009,
        high=0.037,
        p_value=0.0021,
        verdict="better",
        timing=winner.timing or timing(1.0),
        options=(
            Option("winner", f"trial {winner.number}", timing(1.9), 0.824, 0.023, 0.009, 0.037, may_be_best=True),
            Option("base", "test_resnet", timing(1.5), 0.801),
            Option("rival", "resnet34", timing(1.95), 0.815, 0.014, -0.002, 0.03, may_be_best=True),
            Option("rival", "resnet50", timing(3.1), left_out="3.1 ms, over the budget of 2 ms"),
        ),
    ) if winner and judged else None  # fmt: skip
    config = SearchConfig(budget_ms=2.0, trials=len(records), output=str(folder), rank_by="metric")
    given = {"about": about(), "base": BASE, "confirmation": verdict, "interrupted": False, "seconds": 4321.0}
    return Outcome(**{"config": config, "folder": folder, "records": records, **given, **fields})
