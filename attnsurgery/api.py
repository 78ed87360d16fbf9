"""The verbs: inspect a model, operate on it, verify what was done, remove it again.

They add to attnsurgery.surgery what timm should remember: a model operated on describes itself, in the arguments timm
saves, as the architecture `surgery` with its base and recipe, so that `save_for_hf` and `local-dir:` bring it back.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from torch import nn

from attnsurgery import registry
from attnsurgery.base import check_base, weightless
from attnsurgery.errors import SurgeryError, UnknownNameError, UsageError
from attnsurgery.graph.anatomy import Anatomy
from attnsurgery.graph.find import survey
from attnsurgery.recipe.build import resolve, settled
from attnsurgery.recipe.forecast import Forecast, forecast
from attnsurgery.recipe.schema import Recipe
from attnsurgery.surgery import operate as surgery
from attnsurgery.surgery.verify import Report
from attnsurgery.surgery.verify import verify as verify_model


def inspect(model: nn.Module | str, input_size: tuple[int, int, int] | None = None) -> Anatomy:
    """Every place for a block in a model, with address, shape, layout and stage.

    Args:
        model: a built timm model, or a name; a name is built without allocating its weights.
        input_size: (C, H, W) of one image; by default what the model is built for.

    Raises:
        UnknownNameError: timm has no such model.
    """
    if isinstance(model, str):
        return survey(_named(model, input_size), input_size, spend=True)
    return survey(model, input_size)


def plan(
    model: nn.Module | str,
    recipe: Recipe | Mapping[str, Any] | str | Path,
    input_size: tuple[int, int, int] | None = None,
) -> Forecast:
    """What the recipe would put where, and what each block would cost. Nothing is changed and nothing allocated.

    Args:
        model: a built timm model, or a name; the recipe's `base` need not be its architecture.
        recipe: a Recipe, the same as plain data, or a path of a YAML file.
        input_size: (C, H, W) of one image; by default what the model is built for.

    Raises:
        RecipeError, SiteError, OptionError, UnknownNameError: whatever `operate` would refuse.
    """
    made = registry.as_recipe(recipe)
    if not isinstance(model, str):
        _check_model(model)
    return forecast(made, _named(model, input_size) if isinstance(model, str) else model, input_size)


def operate(
    model: nn.Module,
    recipe: Recipe | Mapping[str, Any] | str | Path,
    input_size: tuple[int, int, int] | None = None,
) -> nn.Module:
    """Insert the recipe's blocks into a built model, in place. All is planned first; an error changes nothing.

    Args:
        model: any timm model; the recipe's `base` need not be its architecture, only its selectors must match.
        recipe: a Recipe, the same as plain data, or a path of a YAML file.

    Returns:
        The same object.

    Raises:
        RecipeError, SiteError, OptionError, UnknownNameError: what cannot be meant, with the nearest that can.
    """
    made = registry.as_recipe(recipe)
    _check_model(model)
    anatomy = survey(model, input_size)
    plan = resolve(made, anatomy)
    # rebuilt by its description, the model is surveyed at its own size of images
    done = _joined(model, made if input_size is None else settled(made, anatomy), anatomy)
    surgery.operate(model, plan)
    _describe(model, registry.GENERIC, base=done.base, recipe=done.as_dict())
    return model


def remove(model: nn.Module) -> nn.Module:
    """Take all blocks out again, in place: classes, state dict and description are the base's.

    Returns:
        The same object.

    Raises:
        SurgeryError: the blocks are there, but the record of how they came is not: the model was rebuilt since.
    """
    before = _kept_recipe(model)
    surgery.remove(model)
    if before is not None:
        _describe(model, before.base.partition(".")[0], base=None, recipe=None, start=None)
    return model


def verify(model: nn.Module, input_size: tuple[int, int, int] | None = None) -> Report:
    """The proof that goes with a surgical model; see `Report`.

    Raises:
        SurgeryError: a block is gone, or the model was rebuilt since the operation.
    """
    _kept_recipe(model)
    return verify_model(model, input_size)


def recipe_of(model: nn.Module) -> Recipe | None:
    """The recipe a model was made by, as far as it says; None for a model without surgery."""
    arguments: dict[str, Any] = getattr(model, "_model_args", {})
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    recipe: Recipe | None
    if arguments.get("recipe") is not None:
        recipe = registry.as_recipe(arguments["recipe"])
        recipe = recipe.model_copy(update={"base": arguments.get("base") or recipe.base})
    else:
        recipe = registry.recipe_of(config.get("architecture") or "")
    start = arguments.get("start")
    if recipe is None or start is None:
        return recipe
    return recipe.model_copy(update={"edits": [edit.model_copy(update={"start": start}) for edit in recipe.edits]})


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"surgery needs a built model, and this is {type(model).__name__}: timm.create_model(...) first."
        )


def _kept_recipe(model: nn.Module) -> Recipe | None:
    """The recipe, after a look whether what it says is still in the model."""
    _check_model(model)
    recipe = recipe_of(model)
    if recipe is not None and not any(surgery.operated(model)):
        raise SurgeryError(
            f"the model says it was made by the recipe {recipe.name!r}, but it was rebuilt since (torch.fx and "
            "reparameterisation do that) and its blocks can be neither checked nor taken out."
        )
    return recipe


def _joined(model: nn.Module, made: Recipe, anatomy: Anatomy) -> Recipe:
    """The recipe of all operations so far and this one, on the model's own architecture.

    A limit is on the blocks of one recipe: the joined one has the sum of the limits, where every part sets one.
    """
    before = recipe_of(model)
    limits = [recipe.max_attention_mb for recipe in (before, made) if recipe is not None]
    if before is not None and any(limits):  # what each of the two has settled under its own limit stays so
        before, made = settled(before, survey(model)), settled(made, anatomy)
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    base = before.base if before else config.get("architecture")
    edits = [*(before.edits if before else ()), *made.edits]
    joined = {**made.as_dict(), "edits": [edit.model_dump(exclude_defaults=True) for edit in edits]}
    joined["max_attention_mb"] = sum(filter(None, limits)) if all(limits) else None
    return registry.as_recipe({**joined, "base": base if base and timm.is_model(base) else made.base})


def _describe(model: nn.Module, architecture: str, **arguments: Any) -> None:
    """What timm saves with the model; an argument of None is forgotten."""
    config = dict(getattr(model, "pretrained_cfg", None) or {}, architecture=architecture)
    model.pretrained_cfg = model.default_cfg = config  # type: ignore[assignment]
    kept = dict(getattr(model, "_model_args", {}), **arguments)
    model._model_args = {k: v for k, v in kept.items() if v is not None}  # type: ignore[assignment]


def _named(name: str, input_size: tuple[int, int, int] | None = None) -> nn.Module:
    """The model of that name without its weights, for such images; a directory is named `local-dir:DIR`."""
    if ":" not in name:
        check_base(name, "model")
    elif name.startswith("local-dir:") and not Path(name.partition(":")[2], "config.json").is_file():
        raise UnknownNameError(f"{name!r} names no directory with a config.json, as attnsurgery apply writes it.")
    return weightless(name, input_size and input_size[1:])
