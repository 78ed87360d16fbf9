"""The spaces whose candidates are all trained, and how: what `table.py` makes a table of.

Each setup has four sites, one in each stage of a small network, with four choices at each: 256 candidates. A block is
at the end of its stage, unless the choice names another place.
"""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from _common import RESULTS, link_images
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import nn

from attnsurgery.blocks import Start
from attnsurgery.data import Data, load_data
from attnsurgery.data.preprocess import Preprocessing
from attnsurgery.evaluate import TrainSettings, fit_head
from attnsurgery.evaluate.finetune import evaluate, train
from attnsurgery.graph.find import survey
from attnsurgery.recipe.build import resolve
from attnsurgery.recipe.schema import Edit, Recipe
from attnsurgery.surgery.operate import operate
from attnsurgery.timm_plugin.architectures import check_base

ROOT = Path(__file__).resolve().parents[2]
TABLE = RESULTS / "table"
"""The results, and the weights that all networks started from."""
BASE = "test_resnet"
SITES = ("stage:1", "stage:2", "stage:3", "stage:4")
Picks = tuple[str, ...]
Options = Mapping[str, Mapping[str, Any] | None]
SE = {"block": "se", "options": {"reduction": 4}}
MASK = {"block": "residual_attention", "options": {"width": 0.5}}
CIFAR_OPTIONS: Options = {
    "none": None,
    "se": SE,
    "non_local": {"block": "non_local", "options": {"reduction": 2, "subsample": 2}},
    "mask": MASK,
}
STRIP_OPTIONS: Options = {
    "none": None,
    "se": {"place": "spatial", "block": "se", "options": {"reduction": 16}},
    "eca": {"place": "spatial", "block": "timm:eca"},
    "non_local": {"block": "non_local", "options": {"reduction": 2}},
}
"""The narrow slots leave it open whether a candidate can compare the two digits; SE after every stage always can."""


@dataclass(frozen=True)
class Setup:
    """How candidates are made and trained."""

    source: str = "cifar"
    """'cifar', 'pairs' (the embedded pairs), or 'differences' (pictures made by `write_differences`)."""
    size: tuple[int, int, int] = (3, 24, 24)
    options: Options = field(default_factory=lambda: CIFAR_OPTIONS)
    images: int = 600
    """Number of training images of each class of CIFAR-10."""
    base_epochs: int = 0
    """Epochs of the base before candidates start from it; 0 for training from scratch."""
    epochs: int = 4
    lr: float = 1e-3
    new_lr_scale: float = 10.0
    batch_size: int = 128
    channels: tuple[int, ...] = ()
    """Channels of the four stages; () for those of the base."""
    start: Start = "identity"
    seeds: int = 2
    """Number of trainings of each candidate, from seeds 0, 1, 2 ..."""
    latencies: str = ""
    """The setup whose latencies hold for this one, because its networks and images are the same; '' for its own."""


STRIP = Setup(
    source="pairs",
    size=(3, 8, 192),
    options=STRIP_OPTIONS,
    base_epochs=8,
    epochs=2,
    lr=3e-3,
    new_lr_scale=1.0,
    batch_size=64,
    seeds=4,
)
SETUPS = {
    "pretrained": Setup(base_epochs=8),
    "pretrained_longer": Setup(base_epochs=8, epochs=8),
    "scratch": Setup(epochs=6, lr=4e-3, new_lr_scale=1.0),
    "strip": STRIP,
    "differences": replace(STRIP, source="differences", epochs=4, latencies="strip"),
    "narrow": Setup(
        images=400, epochs=8, lr=1e-2, new_lr_scale=1.0, batch_size=64, channels=(8, 12, 16, 24), start="paper"
    ),
}


def candidates(setup: Setup) -> list[Picks]:
    """All candidates of the space."""
    return list(itertools.product(setup.options, repeat=len(SITES)))


def base_model(setup: Setup, classes: int) -> nn.Module:
    """timm's test_resnet; at 24 pixels without max-pooling, so that its maps are of 12, 6, 3 and 2."""
    check_base(BASE, "base")
    torch.manual_seed(0)
    narrow = {"channels": setup.channels, "zero_init_last": False} if setup.channels else {}
    model: nn.Module = timm.create_model(BASE, num_classes=classes, **narrow)
    if setup.source == "cifar":
        model.maxpool = nn.Identity()
    return model.to(memory_format=torch.channels_last)  # a third faster on CPU


def edit_of(site: str, choice: Mapping[str, Any], start: Start = "identity") -> Edit:
    """The edit of a choice at a site."""
    return Edit(
        at=f"{site} {choice.get('place', 'last')}", start=start, **{k: v for k, v in choice.items() if k != "place"}
    )


def build_candidate(base: nn.Module, picks: Picks, seed: int, setup: Setup, start: Start | None = None) -> nn.Module:
    """A copy of the base with these blocks in it."""
    model = copy.deepcopy(base)
    edits = [
        edit_of(site, choice, start or setup.start)
        for site, pick in zip(SITES, picks, strict=True)
        if (choice := setup.options[pick])
    ]
    if edits:
        torch.manual_seed(1000 + seed)
        recipe = Recipe(version=1, name="candidate", base=BASE, edits=edits)
        operate(model, resolve(recipe, survey(model, setup.size)))
    return model.to(memory_format=torch.channels_last)


def write_differences(folder: Path) -> Path:
    """Write strips with a digit from 0 to 4 at either end; the class is their difference. Returns the image folder.

    Each difference is equally frequent. No digit is in two splits, but each is in several pictures.
    """
    if (folder / "complete").exists():
        return folder
    digits = load_digits()
    order = np.random.default_rng(0).permutation(np.flatnonzero(digits.target < 5))
    parts = {"train": (order[:400], 3000), "val": (order[400:550], 600), "test": (order[550:], 1500)}
    for number, (part, (indices, count)) in enumerate(parts.items()):
        rng = np.random.default_rng([1, number])
        by_kind = [indices[digits.target[indices] == kind] for kind in range(5)]
        for index in range(count):
            difference = index % 5
            smaller = int(rng.integers(5 - difference))
            kinds = rng.permutation([smaller, smaller + difference])
            left, right = (digits.images[rng.choice(by_kind[kind])] for kind in kinds)
            strip = np.zeros((8, 192))
            strip[:, :8], strip[:, -8:] = left, right
            path = folder / part / str(difference) / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.minimum(16 * strip, 255).astype(np.uint8)).convert("RGB").save(path)
    (folder / "complete").touch()
    return folder


def data_of(cifar: Path | None, setup: Setup) -> Data:
    """The images of a setup.

    Args:
        cifar: CIFAR-10 as an image folder with train/<class>/ and test/<class>/; other sources do not need it.
        setup: of the table.
    """
    preprocessing = Preprocessing.of(timm.create_model(BASE), setup.size)
    if setup.source == "pairs":
        return load_data(setup.source, preprocessing, 0)
    if setup.source == "differences":
        images = write_differences(ROOT / "runs" / "table" / "differences")
        reading = load_data("pairs", preprocessing, 0).first
        return replace(load_data(str(images), preprocessing, 0, augment="none"), first=reading)
    assert cifar is not None, "the setup needs CIFAR-10"
    parts = {
        "train": ("train", slice(setup.images)),
        "val": ("train", slice(4000, 5000)),
        "test": ("test", slice(None)),
    }
    images = link_images(cifar, ROOT / "runs" / "table" / f"images-{setup.images}", parts)
    return load_data(str(images), preprocessing, 0)


def settings_of(setup: Setup) -> TrainSettings:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return TrainSettings(
        epochs=setup.epochs,
        batch_size=setup.batch_size,
        lr=setup.lr,
        new_lr_scale=setup.new_lr_scale,
        device=device,
        amp=device == "cuda",
    )


def start_of(setup: Setup, data: Data, folder: Path) -> nn.Module:
    """The base with the weights that all candidates start from; trained once and saved."""
    if not setup.base_epochs:
        return base_model(setup, data.num_classes)
    name = setup.images if setup.source == "cifar" else setup.source
    path = folder / f"base-{name}-{setup.base_epochs}.safetensors"
    if path.exists():
        model = base_model(setup, data.num_classes)
        model.load_state_dict(load_file(path))
        return model
    settings = replace(settings_of(setup), epochs=setup.base_epochs)
    if data.first is None:
        model = base_model(setup, data.num_classes)
        train(model, data.train, replace(settings, lr=4e-3), seed=99)
    else:  # as in a search: it first learns to read one digit, and then gets a head for pairs
        model = base_model(setup, len(data.first.classes))
        train(model, data.first.train, settings, seed=99)
        model.reset_classifier(data.num_classes)  # type: ignore[operator]
        fit_head(model, data.train, replace(settings, epochs=2), 99)
    top1 = evaluate(model, data.val, settings).metric
    print(f"base: {100 * top1:.2f} % after {setup.base_epochs} epochs", flush=True)
    part = path.with_suffix(f".{os.getpid()}")
    save_file({name: tensor.contiguous() for name, tensor in model.cpu().state_dict().items()}, part)
    part.replace(path)
    return model
