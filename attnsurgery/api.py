"""The verbs: inspect a model, operate on it, verify what was done, bypass blocks, remove them again.

They add to attnsurgery.surgery what timm should remember: a model operated on describes itself, in the arguments timm
saves, as the architecture `surgery` with its base and recipe, so that `save_for_hf` and `local-dir:` bring it back.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import timm
from torch import nn

from attnsurgery.errors import SurgeryError, UnknownNameError, UsageError
from attnsurgery.graph.anatomy import Anatomy
from attnsurgery.graph.find import survey
from attnsurgery.graph.wrappers import Verb, bare, unwrapped
from attnsurgery.recipe.build import resolve_edits, settled, written_out
from attnsurgery.recipe.forecast import Forecast, forecast
from attnsurgery.recipe.schema import Recipe
from attnsurgery.recipe.without import without
from attnsurgery.surgery import operate as surgery
from attnsurgery.surgery.bypass import bypass
from attnsurgery.surgery.parameters import block_parameters, freeze_base
from attnsurgery.surgery.select_blocks import base_anatomy, blocks_by_place, named_blocks
from attnsurgery.surgery.verify import Report
from attnsurgery.surgery.verify import verify as verify_model
from attnsurgery.timm_plugin import registry
from attnsurgery.timm_plugin.architectures import check_base, weightless

__all__ = [
    "block_parameters",
    "bypass",
    "freeze_base",
    "inspect",
    "operate",
    "plan",
    "recipe_of",
    "remove",
    "verify",
]


def inspect(model: nn.Module | str, input_size: tuple[int, int, int] | None = None) -> Anatomy:
    """Every place for a block in a model, with address, shape, layout and stage.

    Args:
        model: a built timm model, or a name; a name is built without allocating its weights.
        input_size: (C, H, W) of one image; by default what the model is built for.

    Raises:
        UnknownNameError: timm has no such model.

    Example:
        >>> anatomy = attnsurgery.inspect("test_resnet")
        >>> [site.address for site in anatomy.blocks(3)]
        ['layer3.0']
        >>> anatomy.site("layer3.0").shape
        (192, 10, 10)
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

    Example:
        >>> edits = [{"at": "stage:3 last", "block": "se"}]
        >>> recipe = {"version": 1, "name": "mine", "base": "test_resnet", "edits": edits}
        >>> forecast = attnsurgery.plan("test_resnet", recipe)
        >>> forecast.params_added, forecast.macs_added
        (6352, 6144)
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
        model: any timm model, bare, in a wrapper (docs/wrappers.md) or inside a larger whole; the recipe's `base` need
            not be its architecture, only its selectors must match.
        recipe: a Recipe, the same as plain data, or a path of a YAML file.
        input_size: (C, H, W) of one image; by default what the model is built for.

    Returns:
        The same object.

    Raises:
        RecipeError, SiteError, OptionError, UnknownNameError: what cannot be meant, with the nearest that can.
        UsageError: a wrapper that does not allow it; says what to do.

    Example:
        >>> edits = [{"at": "stage:3 last", "block": "se"}]
        >>> recipe = {"version": 1, "name": "mine", "base": "test_resnet", "edits": edits}
        >>> model = timm.create_model("test_resnet")
        >>> attnsurgery.operate(model, recipe) is model
        True
        >>> [path for path, module in model.named_modules() if isinstance(module, attnsurgery.BLOCKS["se"])][-1]
        'layer3.0.se_2'
    """
    made = registry.as_recipe(recipe)
    host = _host(model, "operate")
    anatomy = survey(host, input_size)
    resolved = resolve_edits(made, anatomy)
    written = written_out(made, resolved)
    # rebuilt by its description, the model is surveyed at its own size of images
    done = _joined(host, made if input_size is None else written, anatomy)
    fixed = None if written == made else _joined(host, written, anatomy)
    surgery.operate(host, tuple(chain.from_iterable(resolved)))
    _describe_anew(host, done, fixed, anatomy.input_size[0])
    return model


def remove(model: nn.Module, *blocks: str, input_size: tuple[int, int, int] | None = None) -> nn.Module:
    """Take blocks out again, in place.

    Args:
        blocks: paths ('layer3.0.non_local'), patterns of them ('layer3.*.se'), or selectors of the places where they
            stand ('stage:3 last'); by default all, and then classes, state dict and description are the base's. What
            stays is named as if the others had never been there, and the description is of what stays.
        input_size: (C, H, W) of one image, for selectors; by default what the model is built for.

    Returns:
        The same object.

    Raises:
        SiteError: a name that means no block.
        SurgeryError: the blocks are there, but the record of how they came is not: the model was rebuilt since.
        UsageError: a wrapper that does not allow it; says what to do.

    Example:
        >>> model = timm.create_model("test_resnet_se_s3")
        >>> sorted(attnsurgery.remove(model).state_dict()) == sorted(timm.create_model("test_resnet").state_dict())
        True
    """
    host = _host(model, "remove")
    before = _kept_recipe(host)
    there = blocks_by_place(host)
    gone = named_blocks(host, blocks, input_size)
    if not blocks or len(gone) == len(there):
        surgery.remove(host)
        _describe_base(host, before)
        return model
    left = before and without(before, base_anatomy(host, input_size), there, gone)
    surgery.remove(host, gone)
    if left is not None:
        _describe(host, registry.GENERIC, base=left.base, recipe=left.as_dict(), start=None, settled=None)
    return model


def verify(model: nn.Module, input_size: tuple[int, int, int] | None = None) -> Report:
    """The proof that goes with a surgical model; see `Report`. The model itself is not run, but a copy of it.

    Raises:
        SurgeryError: a block is gone, the model was rebuilt since the operation, or its weights are not finite.
        UsageError: a model that cannot be compared as it is; says what to do.

    Example:
        >>> report = attnsurgery.verify(timm.create_model("test_resnet_nonlocal_s3"))
        >>> report.alive, report.max_abs_diff
        (True, 0.0)
        >>> report.params_after - report.params_before
        74592
    """
    _kept_recipe(_host(model, "verify"))
    return verify_model(model, input_size)


def recipe_of(model: nn.Module) -> Recipe | None:
    """The recipe a model was made by, as far as it says; None for a model without surgery."""
    model = bare(model)
    arguments: dict[str, Any] = getattr(model, "_model_args", {})
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    recipe: Recipe | None
    if arguments.get("settled") is not None:
        recipe = registry.as_recipe(arguments["settled"])
    elif arguments.get("recipe") is not None:
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


def _host(model: nn.Module, verb: Verb) -> nn.Module:
    """The model inside its wrappers."""
    _check_model(model)
    return unwrapped(model, verb)


def _kept_recipe(model: nn.Module) -> Recipe | None:
    """The recipe, after a look whether what it says is still in the model."""
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
        before, made = settled(before, base_anatomy(model)), settled(made, anatomy)
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    base = before.base if before else config.get("architecture")
    edits = [*(before.edits if before else ()), *made.edits]
    joined = {**made.as_dict(), "edits": [edit.model_dump(exclude_defaults=True) for edit in edits]}
    joined["max_attention_mb"] = sum(filter(None, limits)) if all(limits) else None
    return registry.as_recipe({**joined, "base": base if base and timm.is_model(base) else made.base})


_BEFORE = "_attnsurgery_described"
"""The attribute of a model that says how it described itself before it was operated on."""


def _describe_anew(model: nn.Module, done: Recipe, fixed: Recipe | None, channels: int) -> None:
    """The description of a model that was operated on, with a note of what it said before."""
    own = vars(model)
    if _BEFORE not in own and recipe_of(model) is None:
        names = ("pretrained_cfg", "default_cfg", "_model_args")
        config, default = getattr(model, "pretrained_cfg", None), getattr(model, "default_cfg", None)
        own[_BEFORE] = {
            "had": [name for name in names if name in own],
            "architecture": config.get("architecture") if isinstance(config, dict) else None,
            "apart": config != default and default is not None,
            "arguments": dict(own.get("_model_args") or {}),
            "in_chans": own.get("in_chans"),
        }
    said = getattr(model, "_model_args", {}).get("in_chans", (_config(model).get("input_size") or (3,))[0])
    more = {} if said == channels else {"in_chans": channels}
    if isinstance(own.get("in_chans"), int):  # a first convolution replaced since; timm saves this, not the argument
        own["in_chans"] = channels
    _describe(model, registry.GENERIC, base=done.base, recipe=done.as_dict(), start=None, **more)
    _describe(model, registry.GENERIC, settled=fixed and fixed.as_dict())


def _describe_base(model: nn.Module, before: Recipe | None) -> None:
    """The description that a model had before any surgery; for one that was built by a surgical name, its base's."""
    kept: dict[str, Any] | None = vars(model).get(_BEFORE)
    if kept is None:
        if before is not None:
            _describe(model, before.base.partition(".")[0], base=None, recipe=None, start=None, settled=None)
        return
    _describe(model, kept["architecture"])
    model._model_args = kept["arguments"]
    if kept["in_chans"] is not None:
        model.in_chans = kept["in_chans"]
    for name in ("pretrained_cfg", "default_cfg", "_model_args"):
        if name not in kept["had"]:
            vars(model).pop(name, None)
    vars(model).pop(_BEFORE)


def _describe(model: nn.Module, architecture: str | None, **arguments: Any) -> None:
    """What timm saves with the model; an argument of None is forgotten."""
    apart = vars(model).get(_BEFORE, {}).get("apart")  # a default_cfg of its own stays what it is
    config = dict(_config(model), architecture=architecture)
    model.pretrained_cfg = config  # type: ignore[assignment]
    if not apart:
        model.default_cfg = config  # type: ignore[assignment]
    kept = dict(getattr(model, "_model_args", {}), **arguments)
    model._model_args = {k: v for k, v in kept.items() if v is not None}  # type: ignore[assignment]


def _config(model: nn.Module) -> dict[str, Any]:
    found: Any = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    return found if isinstance(found, dict) else {}


def _named(name: str, input_size: tuple[int, int, int] | None = None) -> nn.Module:
    """The model of that name without its weights, for such images; a directory is named `local-dir:DIR`."""
    if ":" not in name:
        check_base(name, "model")
    elif name.startswith("local-dir:") and not Path(name.partition(":")[2], "config.json").is_file():
        raise UnknownNameError(f"{name!r} names no directory with a config.json, as attnsurgery apply writes it.")
    return weightless(name, input_size and input_size[1:])
