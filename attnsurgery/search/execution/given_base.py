"""The base of a search as it is named and as it comes: plain timm names out of others, and the classifier it brings.

A classifier that came with given weights fits the images only if its outputs are in the order of their classes, which a
number of classes that happens to be equal does not say. Names say it, where the weights come with such; else the
validation images do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.models import split_model_name_tag
from torch import nn

from attnsurgery.errors import CheckpointError, UsageError
from attnsurgery.evaluate import Data, TrainSettings, Watch, answers
from attnsurgery.timm_plugin.architectures import weightless

LOCAL, HUB = "local-dir:", "hf-hub:"
_OF_WEIGHTS = ("num_classes", "in_chans", "img_size")
"""Arguments of an architecture that are read off weights and images anyway."""
_SURGERY = "surgery"
_CHANCE = 0.01
_ORDER = 0.05
"""So many more right answers, in another order of the outputs, tell that the order is another."""
_NAMED = 5


@dataclass(frozen=True, slots=True)
class Plain:
    """A base by its timm name, with the weights that it comes with."""

    base: str
    checkpoint: str | None


def plain(base: str, checkpoint: str | None) -> Plain:
    """What 'local-dir:DIR' and 'hf-hub:NAME' stand for; other names are left as they are.

    Raises:
        UsageError: a recipe, or a model that is no plain one; says what to give instead.
        CheckpointError: the directory or the model of the hub cannot be read.
    """
    if base.startswith(LOCAL):
        folder = Path(base.removeprefix(LOCAL))
        return Plain(_architecture(base, _config_of(folder)), checkpoint or str(folder))
    if base.startswith(HUB):
        config, weights = _from_hub(base.removeprefix(HUB))
        return Plain(_architecture(base, config), checkpoint or str(weights))
    if Path(base).suffix in (".yaml", ".yml", ".json"):
        raise UsageError(
            f"MODEL {base} is a recipe, and a search makes recipes: it begins with a plain timm model. Give the "
            "recipe's base, and its weights with --checkpoint."
        )
    if Path(base).is_dir() and (Path(base) / "config.json").is_file():
        raise UsageError(f"MODEL {base} is a directory. Give it as {LOCAL}{base}.")
    return Plain(base, checkpoint)


def label_names(checkpoint: str | None, model: nn.Module) -> tuple[str, ...]:
    """The names of the classes that given weights tell apart, in the order of the outputs; () where none are known.

    They are looked for in the config.json of a timm directory, else in the published configuration of the model.
    """
    if checkpoint is None:
        config: Mapping[str, Any] = {"pretrained_cfg": getattr(model, "pretrained_cfg", None) or {}}
    else:
        path = Path(checkpoint)
        folder = path if path.is_dir() else path.parent
        if not path.is_dir() and path.name not in ("model.safetensors", "pytorch_model.bin"):
            return ()
        try:
            config = _config_of(folder)
        except CheckpointError:
            return ()
    inner = config.get("pretrained_cfg") or {}
    names = config.get("label_names") or inner.get("label_names") or ()
    if isinstance(names, Mapping):
        names = [names[key] for key in sorted(names, key=int)]
    return tuple(map(str, names))


def normalization(checkpoint: str | None) -> dict[str, Any]:
    """`mean` and `std` that the config.json of a timm directory gives for its images; nothing for other files."""
    path = Path(checkpoint or "")
    folder = path if path.is_dir() else path.parent
    if checkpoint is None or not (path.is_dir() or path.stem in ("model", "pytorch_model")):
        return {}
    if not (folder / "config.json").is_file():
        return {}
    stored = _config_of(folder).get("pretrained_cfg") or {}
    return {name: tuple(stored[name]) for name in ("mean", "std") if stored.get(name)}


def reordered(model: nn.Module, names: Sequence[str], classes: Sequence[str]) -> None:
    """Put the outputs of the classifier, which are of `names`, into the order of `classes`, which are the same."""
    order = torch.tensor([list(names).index(name) for name in classes])
    for head in _heads(model):
        with torch.no_grad():
            for parameter in head.parameters(recurse=False):
                if parameter.shape[0] == len(classes):
                    parameter.copy_(parameter[order.to(parameter.device)])


def can_reorder(model: nn.Module, count: int) -> bool:
    """Whether the classifier is made of layers with a row for each of so many classes."""
    rows = [parameter.shape[0] for head in _heads(model) for parameter in head.parameters(recurse=False)]
    return bool(rows) and set(rows) == {count}


@dataclass(frozen=True, slots=True)
class HeadCheck:
    """How a classifier that came with weights, and whose classes have no names, does on the images as it is."""

    images: int
    right: float
    """Share of right answers, 0 to 1."""
    chance: float
    """Of whoever always names the largest class."""
    best_order: float
    """Share of right answers with the outputs in the order that suits the images best."""

    @property
    def fits(self) -> bool:
        """Whether its outputs are the images' classes in their order."""
        count = round(self.right * self.images)
        from scipy.stats import binomtest  # takes a second to import

        better = binomtest(count, self.images, self.chance, alternative="greater").pvalue < _CHANCE
        return bool(better) and self.best_order - self.right <= _ORDER

    def words(self) -> str:
        """For people."""
        said = f"it gets {100 * self.right:.1f} % of {self.images:,} validation images right before any training"
        if self.fits:
            return f"the classifier of the given weights is kept, whose classes have no names: {said}"
        if self.best_order - self.right > _ORDER:
            said += f", and {100 * self.best_order:.1f} % with its outputs in another order"
        return f"the classifier of the given weights is of other classes, or of these in another order: {said}"


def check_head(model: nn.Module, data: Data, settings: TrainSettings, watch: Watch | None = None) -> HeadCheck:
    """Ask a classifier about the validation images."""
    found_N = answers(model, data.val, settings, watch).numpy()
    labels_N = data.val.labels.numpy()
    counts_KK = np.zeros((data.num_classes, data.num_classes), int)
    np.add.at(counts_KK, (found_N, labels_N), 1)
    from scipy.optimize import linear_sum_assignment

    best = counts_KK[linear_sum_assignment(counts_KK, maximize=True)].sum()
    chance = counts_KK.sum(axis=0).max() / len(labels_N)
    return HeadCheck(len(labels_N), float((found_N == labels_N).mean()), float(chance), float(best / len(labels_N)))


def other_classes(names: Sequence[str], classes: Sequence[str]) -> str:
    """In words, that a classifier is of other classes than the images."""
    return (
        f"the classifier of the given weights is of other classes ({_listed(names)}) than the images "
        f"({_listed(classes)})"
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (" ..." if len(names) > _NAMED else "")


def _heads(model: nn.Module) -> list[nn.Module]:
    found: Any = model.get_classifier()  # type: ignore[operator]
    return list(found) if isinstance(found, tuple | list) else [found]


def _config_of(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}. A timm directory has one.") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}.") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} does not say what the model is.")
    return found


def _architecture(base: str, config: Mapping[str, Any]) -> str:
    """
    Raises:
        UsageError: the model was operated on, or is built with arguments that a search does not know of.
    """
    inner = config.get("pretrained_cfg") or {}
    name = config.get("architecture") or inner.get("architecture")
    arguments = config.get("model_args") or {}
    if not isinstance(name, str):
        raise CheckpointError(f"MODEL {base}: its config.json does not name an architecture of timm.")
    if name == _SURGERY:
        raise UsageError(
            f"MODEL {base} was operated on, and a search begins with a plain model. Give its base, "
            f"{arguments.get('base', 'which its recipe names')}, and the weights from before the operation with "
            "--checkpoint."
        )
    if others := sorted(_others(name, arguments)):
        raise UsageError(
            f"MODEL {base} is a {name} built with {', '.join(others)}, and a search builds plain architectures. "
            "Search for one of timm's names."
        )
    tag = inner.get("tag")
    return f"{name}.{tag}" if tag and _is_tagged(name, tag) else name


def _others(name: str, arguments: Mapping[str, Any]) -> set[str]:
    """Arguments that make another model than the architecture's name does; timm also writes down those that do not."""
    told: Any = getattr(timm.models, "get_model_args", None)  # before 1.0.31 there is none
    usual = told(weightless(name)) if told and timm.is_model(name) else {}
    usual = json.loads(json.dumps(usual, default=str))
    return {key for key, value in arguments.items() if key not in _OF_WEIGHTS and usual.get(key) != value}


def _is_tagged(name: str, tag: str) -> bool:
    from timm.models import get_arch_pretrained_cfgs

    arch, _ = split_model_name_tag(name)
    try:
        return f"{arch}.{tag}" in get_arch_pretrained_cfgs(arch)
    except Exception:
        return False


def _from_hub(name: str) -> tuple[dict[str, Any], Path]:
    """The config.json of a model of the Hugging Face hub, and its weights on the disk."""
    from huggingface_hub import hf_hub_download

    model, _, revision = name.partition("@")
    try:
        config = Path(hf_hub_download(model, "config.json", revision=revision or None))
        weights = Path(hf_hub_download(model, "model.safetensors", revision=revision or None))
    except Exception as error:  # hub, network and cache errors have no common root
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"MODEL {HUB}{name} cannot be had ({type(error).__name__}: {said}). Without a network, give a timm name "
            "and its weights with --checkpoint."
        ) from error
    return _config_of(config.parent), weights
