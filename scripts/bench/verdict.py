#!/usr/bin/env python
"""Does the last word cry wolf? How often two groups of trainings of one and the same model come out as different.

    python scripts/bench/verdict.py CIFAR10 [--trainings 48] [--shard 1/2 & ... --shard 2/2]

A base is fine-tuned many times from the same weights, each time from a seed of its own. Two groups of these trainings
are then compared as a search compares its winner with the base, over and over with other groups; whatever is called
significant is a false alarm, of which there should be 5 %. Beside the test that the search uses
(attnsurgery.search.result.statistics.gain_of) stands the sign test on images, which knows nothing of trainings: an
image votes for the model that gets it right in more of the seeds. How often each finds a difference that is there is
seen with trainings half as long again as those of the base.

The base and its weights are those of docs/benchmarks/table/. The same call goes on where it was stopped; without
--shard it reports when all is trained. Writes docs/benchmarks/verdict.json.
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
from table import CHOSEN, TABLE, WAYS, data_of, settings_of, start_of

from attnsurgery.evaluate import Data, TrainSettings, train
from attnsurgery.evaluate.finetune import accuracy
from attnsurgery.search.execution.verdict import SIGNIFICANT
from attnsurgery.search.files import Journal
from attnsurgery.search.result.statistics import gain_of, sign_test

ROOT = Path(__file__).resolve().parents[2]
WAY = WAYS[CHOSEN]
MODELS = {"base": WAY.epochs, "longer": WAY.epochs * 3 // 2}
"""Epochs of each."""
SEEDS = (1, 2, 3)
DRAWS = 4000
Rights = npt.NDArray[np.bool_]


def run(asked: argparse.Namespace, journals: list[Journal]) -> None:
    """Train what is missing of this shard."""
    part, parts = map(int, asked.shard.split("/"))
    data = data_of(asked.cifar, WAY)
    base = start_of(WAY, data, TABLE)
    done = set(known(journals))
    counts = {"base": asked.trainings, "longer": asked.trainings // 2}
    wanted = [(name, seed) for name, count in counts.items() for seed in range(count)]
    for number, (name, seed) in enumerate(wanted):
        if (name, seed) not in done and (parts == 1 or number % parts == part - 1):
            settings = replace(settings_of(WAY), epochs=MODELS[name])
            right_N = trained(copy.deepcopy(base), data, settings, seed)
            packed = np.packbits(right_N.numpy()).tobytes().hex()
            journals[part - 1].append({"model": name, "seed": seed, "images": len(right_N), "right": packed})
            print(f"{name}, seed {seed}: {100 * float(right_N.float().mean()):.2f} %", flush=True)


def trained(model: torch.nn.Module, data: Data, settings: TrainSettings, seed: int) -> torch.Tensor:
    train(model, data.train, settings, seed)
    return accuracy(model, data.test, settings)[2]


def known(journals: list[Journal]) -> dict[tuple[str, int], Rights]:
    return {
        (row["model"], row["seed"]): np.unpackbits(np.frombuffer(bytes.fromhex(row["right"]), np.uint8))[
            : row["images"]
        ].astype(bool)
        for journal in journals
        for row in journal.read()
    }


def by_votes(first_SN: Rights, second_SN: Rights) -> float:
    """The sign test's p-value."""
    votes_N = first_SN.sum(0, dtype=int) - second_SN.sum(0, dtype=int)
    return sign_test(int((votes_N > 0).sum()), int((votes_N < 0).sum()))


def alarms(first_TN: Rights, second_TN: Rights, seeds: int, images: int, apart: bool) -> dict[str, float]:
    """The share of draws that each test calls significant.

    Args:
        apart: the groups are of one and the same model, so they share no training.
    """
    rng = np.random.default_rng(0)
    hits = {"trainings_and_images": 0, "images": 0}
    for _ in range(DRAWS):
        some_N = rng.choice(first_TN.shape[1], images, replace=False)
        order = rng.permutation(len(first_TN))
        first = first_TN[order[:seeds]][:, some_N]
        other = order[seeds : 2 * seeds] if apart else rng.permutation(len(second_TN))[:seeds]
        second = second_TN[other][:, some_N]
        hits["trainings_and_images"] += gain_of(first, second).p_value < SIGNIFICANT
        hits["images"] += by_votes(first, second) < SIGNIFICANT
    return {name: count / DRAWS for name, count in hits.items()}


def report(found: dict[tuple[str, int], Rights]) -> None:
    groups = {name: np.stack([right for (of, _), right in sorted(found.items()) if of == name]) for name in MODELS}
    base, longer = groups["base"], groups["longer"]
    every = base.shape[1]
    rows: list[dict[str, Any]] = []
    for images in (every // 10, every):
        for seeds in SEEDS:
            false = alarms(base, base, seeds, images, apart=True)
            true = alarms(longer, base, seeds, images, apart=False)
            rows.append({"images": images, "seeds": seeds, "false_alarms": false, "found": true})
            print(
                f"{images:6} images, {seeds} seed{'s' if seeds > 1 else ' '}: false alarms {_said(false)}; "
                f"of a true difference found {_said(true)}"
            )
    means = {name: group.mean(1) for name, group in groups.items()}
    facts = {
        "trainings": {name: len(group) for name, group in groups.items()},
        "sd_of_top1": {name: statistics.stdev(some.tolist()) for name, some in means.items()},
        "true_gain": float(means["longer"].mean() - means["base"].mean()),
    }
    print(f"written {write('verdict', {**facts, 'draws': DRAWS, 'rows': rows})}")
    worst = max(row["false_alarms"]["trainings_and_images"] for row in rows if row["seeds"] > 1)
    votes = max(row["false_alarms"]["images"] for row in rows if row["seeds"] > 1)
    print(
        f"false alarms with two or three seeds: at most {worst:.1%} (5 % is right), by votes of images {votes:.1%}; "
        f"sd between trainings {100 * facts['sd_of_top1']['base']:.2f} points"
    )


def _said(shares: dict[str, float]) -> str:
    return f"{shares['trainings_and_images']:.1%} (by votes of images alone {shares['images']:.1%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cifar", type=Path, metavar="CIFAR10")
    parser.add_argument("--trainings", type=int, default=48, help="of the base")
    parser.add_argument("--shard", default="1/1", metavar="K/N")
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "bench-verdict")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    begin_or_resume(asked.results, {"trainings": asked.trainings})
    parts = max(8, int(asked.shard.split("/")[1]))
    journals = [Journal(asked.results / f"trainings-{part}.jsonl") for part in range(1, parts + 1)]
    run(asked, journals)
    if asked.shard == "1/1":
        report(known(journals))


if __name__ == "__main__":
    main()
