"""Operates on a base with its weights, proves that an identity start changed no output, and writes the result.

`apply` goes from a checkpoint to a timm directory, or to an error without any output.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attnsurgery import api
from attnsurgery.blocks import Start
from attnsurgery.checkpoint.base import build_base, match_names, refuse_nan
from attnsurgery.checkpoint.directory import (
    ARCHITECTURE,
    build_errors_named,
    open_directory,
    outputs_on_random_images,
    refuse_existing,
    write_directory,
)
from attnsurgery.checkpoint.formats import DELTA_NAME
from attnsurgery.checkpoint.weights import AUTOMATIC, Layout, StateDict, read
from attnsurgery.errors import RecipeError, SurgeryError, UsageError
from attnsurgery.graph.find import input_size_of, survey
from attnsurgery.recipe.build import resolve
from attnsurgery.recipe.schema import Recipe
from attnsurgery.recipe.text import dumps, keep_origin, where
from attnsurgery.surgery.operate import grafted_blocks, operate
from attnsurgery.surgery.verify import Report, verify
from attnsurgery.timm_plugin import registry
from attnsurgery.timm_plugin.architectures import check_base, for_images, weightless


@dataclass(frozen=True, slots=True)
class Operated:
    """A base with its weights after an operation, and the proof of it."""

    model: nn.Module
    recipe: Recipe
    """All edits of the plain base, those of earlier operations included."""
    report: Report
    weights: StateDict
    """The weights before the operation, as their file holds them."""
    source_notes: str | None = None
    """How the weights were read from their file, and which blocks existed before, in words; None if as usual."""

    @property
    def model_args(self) -> dict[str, Any]:
        """The arguments from which the generic architecture builds the model."""
        return {
            "base": self.recipe.base,
            "recipe": self.recipe.as_dict(),
            "in_chans": input_size_of(self.model)[0],
            **for_images(self.recipe.base, _size_of(self.recipe)),
        }


def apply(
    recipe: Recipe,
    checkpoint: Path | None,
    output: Path,
    *,
    pretrained: bool = False,
    start: Start | None = None,
    layout: Layout = AUTOMATIC,
) -> Report:
    """Operate on the recipe's base with its weights, prove it, and write a timm directory.

    Args:
        recipe: the edits.
        output: a directory that does not exist yet.
        checkpoint, pretrained, start, layout: as `operated_base`.

    Raises:
        UsageError: `output` exists.
        CheckpointError: it cannot be written, or the directory does not build the same model. Also whatever
            `operated_base` raises.
    """
    refuse_existing(output)
    operation = operated_base(recipe, checkpoint, pretrained=pretrained, start=start, layout=layout)
    write_operated(operation, output)
    return operation.report


def write_operated(operation: Operated, output: Path) -> None:
    """Write the model of an operation as a timm directory; raises as `write_directory`."""
    texts = {"recipe.yaml": dumps(operation.recipe)}
    write_directory(operation.model, output, architecture=ARCHITECTURE, model_args=operation.model_args, texts=texts)


def operated_base(
    recipe: Recipe,
    checkpoint: Path | None,
    *,
    pretrained: bool = False,
    start: Start | None = None,
    layout: Layout = AUTOMATIC,
) -> Operated:
    """The recipe's base with its weights, operated on; an identity start is proven to change no output.

    Args:
        recipe: the edits.
        checkpoint: weights of the base, whose shapes give the number of classes and of input channels. Or a directory
            with a surgical model of the same base: its blocks stay with their weights, and the edits are added.
        pretrained: use timm's published weights instead of a checkpoint.
        start: replaces the start of every edit.
        layout: where the weights are in their file.

    Raises:
        UsageError: not exactly one source of weights; or the checkpoint has all of the edits already.
        RecipeError, SiteError, OptionError, UnknownNameError: the recipe does not fit its base.
        CheckpointError: the weights cannot be read, or are of another model.
        SurgeryError: an identity start changed the outputs.
    """
    if (checkpoint is None) != pretrained:
        raise UsageError("apply needs weights: either a checkpoint (--checkpoint FILE) or --pretrained, and not both.")
    recipe, size = _with_start(recipe, start), _size_of(recipe)
    check_base(recipe.base, where(recipe, "base"))
    if not recipe.edits:
        raise RecipeError(
            f"{where(recipe, 'edits')}: the recipe {recipe.name!r} puts no block anywhere: it is {recipe.base} for "
            f"another input size, {size}, which timm builds by itself."
        )
    earlier = None if checkpoint is None or layout else surgery_in(checkpoint)
    if checkpoint is not None and earlier is not None:
        return _with_added_edits(recipe, checkpoint, earlier)
    notes = None
    if checkpoint is None:
        model = build_base(recipe.base, img_size=size)
        weights = dict(model.state_dict())
    else:
        loaded = match_names(weightless(recipe.base), read(checkpoint, layout.key), layout.prefix)
        weights, notes = loaded.tensors, loaded.describe()
        model = build_base(recipe.base, weights, str(checkpoint), size)
    if size is not None:
        described: dict[str, Any] = {
            **getattr(model, "pretrained_cfg", {}),
            "input_size": (input_size_of(model)[0], *size),
        }
        model.pretrained_cfg = described  # type: ignore[assignment]
    plan = resolve(recipe, survey(model))
    outputs = outputs_on_random_images(model)
    blocks = len(grafted_blocks(model))
    operate(model, plan)
    report = _prove(model, recipe, outputs if blocks else None)
    return Operated(model, registry.flatten(recipe), report, weights, notes)


def surgery_in(path: Path) -> Recipe | None:
    """The recipe of the surgical model in a directory, from its config.json; None for anything else.

    Raises:
        CheckpointError: config.json names a surgical model that cannot be built.
    """
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        name = config["architecture"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    if not isinstance(name, str) or (path / DELTA_NAME).is_file():  # reading a delta says how to merge it
        return None
    if name != ARCHITECTURE and registry.recipe_by_name(name) is None:
        return None
    with build_errors_named(path):
        return api.recipe_of(weightless(f"local-dir:{path}"))


def _with_added_edits(recipe: Recipe, checkpoint: Path, earlier: Recipe) -> Operated:
    """The surgical model of a directory with those edits of the recipe that it does not have yet.

    Args:
        recipe: all edits, or the new ones alone.
        checkpoint: the directory.
        earlier: the recipe of its model.
    """
    requested = registry.flatten(recipe)
    if requested.base.partition(".")[0] != earlier.base.partition(".")[0]:
        raise UsageError(
            f"{where(recipe, 'base')}: the recipe is for {recipe.base}, and the model in {checkpoint} is "
            f"{earlier.base} with blocks in it."
        )
    edits = list(requested.edits)
    if edits[: len(earlier.edits)] == earlier.edits:
        edits = edits[len(earlier.edits) :]
    if not edits:
        raise UsageError(
            f"the model in {checkpoint} has had every edit of the recipe already. Give a recipe with those to add, or "
            "the weights of the plain base."
        )
    model = open_directory(checkpoint)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    refuse_nan(weights, str(checkpoint))
    outputs = outputs_on_random_images(model)
    blocks = list(grafted_blocks(model))
    added = recipe if edits == recipe.edits else recipe.model_copy(update={"edits": edits})
    api.operate(model, added)
    report = _prove(model, added, outputs)
    joined = api.recipe_of(model)
    assert joined is not None
    listed = ", ".join(blocks[:3]) + ", ..." * (len(blocks) > 3)
    notes = f"of a surgical model; {len(blocks)} blocks stay as they were ({listed})"
    return Operated(model, joined, report, weights, notes)


def _prove(model: nn.Module, recipe: Recipe, outputs: torch.Tensor | None) -> Report:
    """The report of an operation.

    Args:
        model: after the operation.
        recipe: its edits.
        outputs: those before the operation, of a model that had blocks then; None for a plain base. They do not show
            an identity start where the recipe takes out attention of the base.

    Raises:
        SurgeryError: a block does not work, or an identity start changed the outputs.
    """
    report = verify(model)
    if outputs is not None:
        difference = float((outputs_on_random_images(model) - outputs).abs().max())
        report = replace(report, max_abs_diff=difference)
    comparable = outputs is None or not any(edit.replace for edit in recipe.edits)
    identity = comparable and all(edit.start == "identity" for edit in recipe.edits)
    if not report.alive or (identity and report.max_abs_diff != 0):
        raise SurgeryError(
            f"{recipe.name} does not compute what its base did: outputs differ by {report.max_abs_diff:.3g}"
            f"{''.join(f'; {fault}' for fault in report.faults)}. Nothing was written."
        )
    return report


def _size_of(recipe: Recipe) -> tuple[int, int] | None:
    """Height and width of the images that a recipe is meant for; None for the base's own."""
    return None if recipe.input_size is None else (recipe.input_size[0], recipe.input_size[1])


def _with_start(recipe: Recipe, start: Start | None) -> Recipe:
    """The recipe with the start of every edit replaced."""
    if start is None:
        return recipe
    edits = [edit.model_copy(update={"start": start}) for edit in recipe.edits]
    return keep_origin(recipe.model_copy(update={"edits": edits}), recipe)
