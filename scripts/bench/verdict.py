#!/usr/bin/env python
"""The false alarms of the verdict: how often two groups of trainings of the same model are significantly different.

    python scripts/bench/verdict.py CIFAR10 [--trainings 48] [--shard 1/2 & ... --shard 2/2]

A base is fine-tuned many times from the same weights, each time with another seed. Two groups of these trainings are
then compared as a search compares its winner with the base, repeatedly with random groups. Each significant difference
is a false alarm, and there should be 5 % of them. The test of the search (attnsurgery.search.result.statistics.gain_of)
is compared with the sign test on images, which ignores trainings: an image votes for the model that is right in more of
the seeds. The power of both is estimated with trainings half as long again as those of the base.

The base and its weights are those of docs/benchmarks/table/. The same call resumes; without --shard it reports when all
models are trained. Writes docs/benchmarks/verdict.json.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from _common import begin_or_resume, write
from _tables import SETUPS, TABLE, data_of, settings_of, start_of
from table import CHOSEN_SETUP

from attnsurgery.data import Data
from attnsurgery.evaluate import TrainSettings, train
from attnsurgery.evaluate.finetune import evaluate
from attnsurgery.search.files import Journal
from attnsurgery.search.result.sequential import SIGNIFICANT
from attnsurgery.search.result.statistics import gain_of, sign_test

ROOT = Path(__file__).resolve().parents[2]
SETUP = SETUPS[CHOSEN_SETUP]
MODELS = {"base": SETUP.epochs, "longer": SETUP.epochs * 3 // 2}
"""Epochs of each model."""
SEEDS = (1, 2, 3)
DRAWS = 4000
Correct = npt.NDArray[np.bool_]


def run(options: argparse.Namespace, journals: list[Journal]) -> None:
    """Train the missing models of this shard."""
    part, parts = map(int, options.shard.split("/"))
    data = data_of(options.cifar, SETUP)
    base = start_of(SETUP, data, TABLE)
    existing = set(load_correct(journals))
    counts = {"base": options.trainings, "longer": options.trainings // 2}
    requested = [(name, seed) for name, count in counts.items() for seed in range(count)]
    for number, (name, seed) in enumerate(requested):
        if (name, seed) not in existing and (parts == 1 or number % parts == part - 1):
            settings = replace(settings_of(SETUP), epochs=MODELS[name])
            right_N = train_and_test(copy.deepcopy(base), data, settings, seed)
            packed = np.packbits(right_N.numpy()).tobytes().hex()
            journals[part - 1].append({"model": name, "seed": seed, "images": len(right_N), "right": packed})
            print(f"{name}, seed {seed}: {100 * float(right_N.float().mean()):.2f} %", flush=True)


def train_and_test(model: torch.nn.Module, data: Data, settings: TrainSettings, seed: int) -> torch.Tensor:
    train(model, data.train, settings, seed)
    return evaluate(model, data.test, settings).values


def load_correct(journals: list[Journal]) -> dict[tuple[str, int], Correct]:
    return {
        (row["model"], row["seed"]): np.unpackbits(np.frombuffer(bytes.fromhex(row["right"]), np.uint8))[
            : row["images"]
        ].astype(bool)
        for journal in journals
        for row in journal.read()
    }


def vote_p_value(first_SN: Correct, second_SN: Correct) -> float:
    """The sign test's p-value."""
    votes_N = first_SN.sum(0, dtype=int) - second_SN.sum(0, dtype=int)
    return sign_test(int((votes_N > 0).sum()), int((votes_N < 0).sum()))


def significant_shares(
    first_TN: Correct, second_TN: Correct, seeds: int, images: int, disjoint: bool
) -> dict[str, float]:
    """By test, the share of draws in which the difference is significant.

    Args:
        first_TN, second_TN: by training, whether each image is predicted correctly.
        seeds: number of trainings in each group.
        images: number of images that are drawn.
        disjoint: both groups are of the same model and must not share a training.
    """
    rng = np.random.default_rng(0)
    hits = {"trainings_and_images": 0, "images": 0}
    for _ in range(DRAWS):
        images_N = rng.choice(first_TN.shape[1], images, replace=False)
        order = rng.permutation(len(first_TN))
        first = first_TN[order[:seeds]][:, images_N]
        second_order = order[seeds : 2 * seeds] if disjoint else rng.permutation(len(second_TN))[:seeds]
        second = second_TN[second_order][:, images_N]
        hits["trainings_and_images"] += gain_of(first, second).p_value < SIGNIFICANT
        hits["images"] += vote_p_value(first, second) < SIGNIFICANT
    return {name: count / DRAWS for name, count in hits.items()}


def report(correct: dict[tuple[str, int], Correct]) -> None:
    groups = {
        name: np.stack([right for (model_name, _), right in sorted(correct.items()) if model_name == name])
        for name in MODELS
    }
    base, longer = groups["base"], groups["longer"]
    total_images = base.shape[1]
    rows: list[dict[str, Any]] = []
    for images in (total_images // 10, total_images):
        for seeds in SEEDS:
            false = significant_shares(base, base, seeds, images, disjoint=True)
            true = significant_shares(longer, base, seeds, images, disjoint=False)
            rows.append({"images": images, "seeds": seeds, "false_alarms": false, "found": true})
            print(
                f"{images:6} images, {seeds} seed{'s' if seeds > 1 else ' '}: false alarms {_shares_text(false)}; "
                f"of a true difference found {_shares_text(true)}"
            )
    means = {name: group.mean(1) for name, group in groups.items()}
    facts = {
        "trainings": {name: len(group) for name, group in groups.items()},
        "sd_of_top1": {name: statistics.stdev(accuracies.tolist()) for name, accuracies in means.items()},
        "true_gain": float(means["longer"].mean() - means["base"].mean()),
    }
    print(f"written {write('verdict', {**facts, 'draws': DRAWS, 'rows': rows})}")
    worst = max(row["false_alarms"]["trainings_and_images"] for row in rows if row["seeds"] > 1)
    votes = max(row["false_alarms"]["images"] for row in rows if row["seeds"] > 1)
    print(
        f"false alarms with two or three seeds: at most {worst:.1%} (5 % is right), by votes of images {votes:.1%}; "
        f"sd between trainings {100 * facts['sd_of_top1']['base']:.2f} points"
    )


def _shares_text(shares: dict[str, float]) -> str:
    return f"{shares['trainings_and_images']:.1%} (by votes of images alone {shares['images']:.1%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cifar", type=Path, metavar="CIFAR10")
    parser.add_argument("--trainings", type=int, default=48, help="of the base")
    parser.add_argument("--shard", default="1/1", metavar="K/N")
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "bench-verdict")
    options = parser.parse_args()
    torch.set_num_threads(1)
    begin_or_resume(options.results, {"trainings": options.trainings})
    parts = max(8, int(options.shard.split("/")[1]))
    journals = [Journal(options.results / f"trainings-{part}.jsonl") for part in range(1, parts + 1)]
    run(options, journals)
    if options.shard == "1/1":
        report(load_correct(journals))


if __name__ == "__main__":
    main()
