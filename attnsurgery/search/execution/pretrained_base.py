"""The base of a search: resolves its name to a plain timm model, and checks the classifier of pretrained weights.

A pretrained classifier fits the images only if its outputs are in the order of their classes. An equal number of
classes does not show that. Class names show it if the weights come with names; otherwise the validation images do.
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

from attnsurgery.data import Data
from attnsurgery.errors import CheckpointError, UsageError
from attnsurgery.evaluate import TrainSettings, Watch, answers
from attnsurgery.timm_plugin.architectures import weightless

LOCAL, HUB = "local-dir:", "hf-hub:"
_INFERRED = ("num_classes", "in_chans", "img_size")
"""Arguments of an architecture that are inferred from weights and images."""
_SURGERY = "surgery"
"""The architecture of models with blocks."""
_MAX_P_VALUE = 0.01
"""Largest p-value at which a classifier is better than chance."""
_MAX_REORDER_GAIN = 0.05
"""Largest gain in accuracy by another order of the outputs at which the present order counts as the right one."""
_SHOWN = 5
"""Number of class names that a message lists."""


@dataclass(frozen=True, slots=True)
class ResolvedBase:
    """A base by its timm name, with its weights."""

    base: str
    """A timm name, perhaps with a tag."""
    checkpoint: str | None
    """The file or directory of its weights, if there is one."""


def resolve_base(base: str, checkpoint: str | None) -> ResolvedBase:
    """The plain timm model that 'local-dir:DIR' or 'hf-hub:NAME' stands for; any other name stands for itself.

    Args:
        base: the name as the user gave it.
        checkpoint: weights that the user gave, which are preferred to those of the directory or the hub.

    Raises:
        UsageError: a recipe, or a model that is not plain; the message says what to give instead.
        CheckpointError: the directory or the model of the hub cannot be read.
    """
    if base.startswith(LOCAL):
        folder = Path(base.removeprefix(LOCAL))
        return ResolvedBase(_architecture(base, _config_of(folder)), checkpoint or str(folder))
    if base.startswith(HUB):
        config, weights = _from_hub(base.removeprefix(HUB))
        return ResolvedBase(_architecture(base, config), checkpoint or str(weights))
    if Path(base).suffix in (".yaml", ".yml", ".json"):
        raise UsageError(
            f"MODEL {base} is a recipe, and a search makes recipes: it begins with a plain timm model. Give the "
            "recipe's base, and its weights with --checkpoint."
        )
    if Path(base).is_dir() and (Path(base) / "config.json").is_file():
        raise UsageError(f"MODEL {base} is a directory. Give it as {LOCAL}{base}.")
    return ResolvedBase(base, checkpoint)


def label_names(checkpoint: str | None, model: nn.Module) -> tuple[str, ...]:
    """The class names of pretrained weights in the order of the outputs; () if there are none.

    Args:
        checkpoint: a timm directory or a file in it, whose config.json is read; None for timm's published weights.
        model: its published configuration is read if there is no checkpoint.
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
    """`mean` and `std` of the images from the config.json of a timm directory; nothing for other files."""
    path = Path(checkpoint or "")
    folder = path if path.is_dir() else path.parent
    if checkpoint is None or not (path.is_dir() or path.stem in ("model", "pytorch_model")):
        return {}
    if not (folder / "config.json").is_file():
        return {}
    stored = _config_of(folder).get("pretrained_cfg") or {}
    return {name: tuple(stored[name]) for name in ("mean", "std") if stored.get(name)}


def reorder(model: nn.Module, names: Sequence[str], classes: Sequence[str]) -> None:
    """Permute the outputs of the classifier from the order of `names` to that of `classes`, in place."""
    order = torch.tensor([list(names).index(name) for name in classes])
    for head in _heads(model):
        with torch.no_grad():
            for parameter in head.parameters(recurse=False):
                if parameter.shape[0] == len(classes):
                    parameter.copy_(parameter[order.to(parameter.device)])


def can_reorder(model: nn.Module, count: int) -> bool:
    """Whether every parameter of the classifier has one row for each of `count` classes."""
    rows = [parameter.shape[0] for head in _heads(model) for parameter in head.parameters(recurse=False)]
    return bool(rows) and set(rows) == {count}


@dataclass(frozen=True, slots=True)
class HeadCheck:
    """The accuracy of a pretrained classifier without class names on the validation images, before any training."""

    images: int
    """Number of validation images."""
    right: float
    """Accuracy, 0 to 1."""
    chance: float
    """Accuracy of always answering the largest class, 0 to 1."""
    best_order: float
    """Accuracy with the outputs in the best order for these images, 0 to 1."""

    @property
    def fits(self) -> bool:
        """Whether the outputs seem to be the images' classes in their order."""
        count = round(self.right * self.images)
        from scipy.stats import binomtest  # takes a second to import

        better = binomtest(count, self.images, self.chance, alternative="greater").pvalue < _MAX_P_VALUE
        return bool(better) and self.best_order - self.right <= _MAX_REORDER_GAIN

    def words(self) -> str:
        """The result as a sentence."""
        text = f"it gets {100 * self.right:.1f} % of {self.images:,} validation images right before any training"
        if self.fits:
            return f"the classifier of the given weights is kept, whose classes have no names: {text}"
        if self.best_order - self.right > _MAX_REORDER_GAIN:
            text += f", and {100 * self.best_order:.1f} % with its outputs in another order"
        return f"the classifier of the given weights is of other classes, or of these in another order: {text}"


def check_head(model: nn.Module, data: Data, settings: TrainSettings, watch: Watch | None = None) -> HeadCheck:
    """Test a pretrained classifier on the validation images."""
    answers_N = answers(model, data.val, settings, watch).numpy()
    labels_N = data.val.labels.numpy()
    counts_KK = np.zeros((data.num_classes, data.num_classes), int)
    np.add.at(counts_KK, (answers_N, labels_N), 1)
    from scipy.optimize import linear_sum_assignment

    best = counts_KK[linear_sum_assignment(counts_KK, maximize=True)].sum()
    chance = counts_KK.sum(axis=0).max() / len(labels_N)
    return HeadCheck(len(labels_N), float((answers_N == labels_N).mean()), float(chance), float(best / len(labels_N)))


def mismatch(names: Sequence[str], classes: Sequence[str]) -> str:
    """The statement that a classifier is of other classes than the images."""
    return (
        f"the classifier of the given weights is of other classes ({_listed(names)}) than the images "
        f"({_listed(classes)})"
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (" ..." if len(names) > _SHOWN else "")


def _heads(model: nn.Module) -> list[nn.Module]:
    head: Any = model.get_classifier()  # type: ignore[operator]
    return list(head) if isinstance(head, tuple | list) else [head]


def _config_of(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}. A timm directory has one.") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}.") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} does not say what the model is.")
    return config


def _architecture(base: str, config: Mapping[str, Any]) -> str:
    """The timm name of a plain model, with its tag if there is one, from its config.json.

    Raises:
        UsageError: the model has blocks, or is built with arguments that a search does not support.
        CheckpointError: the configuration names no architecture.
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
    if extra := sorted(_extra_arguments(name, arguments)):
        raise UsageError(
            f"MODEL {base} is a {name} built with {', '.join(extra)}, and a search builds plain architectures. "
            "Search for one of timm's names."
        )
    tag = inner.get("tag")
    return f"{name}.{tag}" if tag and _is_tagged(name, tag) else name


def _extra_arguments(name: str, arguments: Mapping[str, Any]) -> set[str]:
    """The arguments that differ from the architecture's defaults; timm also stores those that do not."""
    model_args_of: Any = getattr(timm.models, "get_model_args", None)  # before 1.0.31 there is none
    usual = model_args_of(weightless(name)) if model_args_of and timm.is_model(name) else {}
    usual = json.loads(json.dumps(usual, default=str))
    return {key for key, value in arguments.items() if key not in _INFERRED and usual.get(key) != value}


def _is_tagged(name: str, tag: str) -> bool:
    from timm.models import get_arch_pretrained_cfgs

    arch, _ = split_model_name_tag(name)
    try:
        return f"{arch}.{tag}" in get_arch_pretrained_cfgs(arch)
    except Exception:
        return False


def _from_hub(name: str) -> tuple[dict[str, Any], Path]:
    """The config.json of a model of the Hugging Face hub, and the file of its downloaded weights."""
    from huggingface_hub import hf_hub_download

    model, _, revision = name.partition("@")
    try:
        config = Path(hf_hub_download(model, "config.json", revision=revision or None))
        weights = Path(hf_hub_download(model, "model.safetensors", revision=revision or None))
    except Exception as error:  # hub, network and cache errors have no common root
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"MODEL {HUB}{name} cannot be downloaded ({type(error).__name__}: {reason}). Without a network, give a "
            "timm name and its weights with --checkpoint."
        ) from error
    return _config_of(config.parent), weights
