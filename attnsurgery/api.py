"""The main functions: inspect a model, plan, operate, verify the result, bypass blocks, remove them.

They add to attnsurgery.surgery what timm has to save. A model that was operated on describes itself, in the arguments
that timm saves, as the architecture `surgery` with its base and recipe, so `save_for_hf` and `local-dir:` restore it.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import timm
from torch import nn

from attnsurgery.errors import RecipeError, SurgeryError, UnknownNameError, UsageError
from attnsurgery.graph.anatomy import Anatomy
from attnsurgery.graph.find import survey
from attnsurgery.graph.wrappers import Verb, bare, unwrapped
from attnsurgery.recipe.build import resolve_edits, settled, with_explicit_options
from attnsurgery.recipe.plan import Plan, plan_recipe
from attnsurgery.recipe.schema import Recipe
from attnsurgery.recipe.without import without
from attnsurgery.surgery import operate as surgery
from attnsurgery.surgery.bypass import bypass
from attnsurgery.surgery.parameters import block_parameters, freeze_base
from attnsurgery.surgery.replaced import check_restorable
from attnsurgery.surgery.select_blocks import base_anatomy, blocks_by_place, select_blocks
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
    """All sites of a model, each with its address, shape, layout and stage.

    Args:
        model: a built timm model, or a name, which is built without allocating weights.
        input_size: (C, H, W) of one image; by default the size that the model is built for.

    Returns:
        The anatomy of the model: its sites, which selectors are resolved against.

    Raises:
        UnknownNameError: timm has no such model.
        UsageError: the model is in a wrapper that does not allow this; the message says what to do.
        SurgeryError: the model does not run on images of that size.

    Example:
        >>> anatomy = attnsurgery.inspect("test_resnet")
        >>> [site.address for site in anatomy.blocks(3)]
        ['layer3.0']
        >>> anatomy.site("layer3.0").shape
        (192, 10, 10)
    """
    if isinstance(model, str):
        return survey(_model_of_name(model, input_size), input_size, spend=True)
    return survey(model, input_size)


def plan(
    model: nn.Module | str,
    recipe: Recipe | Mapping[str, Any] | str | Path,
    input_size: tuple[int, int, int] | None = None,
) -> Plan:
    """Which block the recipe would put at which site, and what each block would cost.

    The model is not changed, and no weights are allocated.

    Args:
        model: a built timm model, or a name; the recipe's `base` need not be its architecture.
        recipe: a Recipe, the same as plain data, or the path of a YAML file.
        input_size: (C, H, W) of one image; by default the size that the model is built for.

    Raises:
        RecipeError, SiteError, OptionError, UnknownNameError: `operate` would refuse the recipe.

    Example:
        >>> edits = [{"at": "stage:3 last", "block": "se"}]
        >>> recipe = {"version": 1, "name": "mine", "base": "test_resnet", "edits": edits}
        >>> plan = attnsurgery.plan("test_resnet", recipe)
        >>> plan.params_added, plan.macs_added
        (6352, 6144)
    """
    if isinstance(model, str):
        built = _model_of_name(model, input_size)
    else:
        _check_model(model)
        built = model
    return plan_recipe(registry.as_recipe(recipe), built, input_size)


def operate(
    model: nn.Module,
    recipe: Recipe | Mapping[str, Any] | str | Path,
    input_size: tuple[int, int, int] | None = None,
) -> nn.Module:
    """Insert the recipe's blocks into a built model, in place.

    All blocks are checked and built first, so an error leaves the model unchanged.

    Args:
        model: any timm model, bare, in a wrapper (docs/wrappers.md) or inside a larger module; the recipe's `base` need
            not be its architecture, only its selectors must match.
        recipe: a Recipe, the same as plain data, or the path of a YAML file.
        input_size: (C, H, W) of one image; by default the size that the model is built for.

    Returns:
        The same object.

    Raises:
        RecipeError, SiteError, OptionError, UnknownNameError: the recipe is invalid for this model; the message names
            the nearest valid alternative.
        UsageError: the model is in a wrapper that does not allow this; the message says what to do.

    Example:
        >>> edits = [{"at": "stage:3 last", "block": "se"}]
        >>> recipe = {"version": 1, "name": "mine", "base": "test_resnet", "edits": edits}
        >>> model = timm.create_model("test_resnet")
        >>> attnsurgery.operate(model, recipe) is model
        True
        >>> [path for path, module in model.named_modules() if isinstance(module, attnsurgery.BLOCKS["se"])][-1]
        'layer3.0.se_2'
    """
    recipe = registry.as_recipe(recipe)
    if not recipe.edits:
        raise RecipeError(f"the recipe {recipe.name!r} puts no block anywhere: it only says an input size.")
    host = _host(model, "operate")
    anatomy = survey(host, input_size)
    resolved = resolve_edits(recipe, anatomy)
    explicit = with_explicit_options(recipe, resolved)
    # when timm rebuilds the model from its description, it is surveyed at its own image size
    total = _joined(host, recipe if input_size is None else explicit, anatomy)
    explicit_total = None if explicit == recipe else _joined(host, explicit, anatomy)
    surgery.operate(host, tuple(chain.from_iterable(resolved)))
    _describe_surgery(host, total, explicit_total, anatomy.input_size[0])
    return model


def remove(model: nn.Module, *blocks: str, input_size: tuple[int, int, int] | None = None) -> nn.Module:
    """Remove blocks from a model, in place.

    Args:
        model: a surgical model, in a wrapper or not.
        blocks: paths ('layer3.0.non_local'), patterns of paths ('layer3.*.se'), or selectors of sites with blocks
            ('stage:3 last'). By default all blocks are removed and what was taken out of the base is put back, so that
            classes, state dict and description are the base's again. Otherwise the remaining blocks are renamed as if
            the others had never been inserted, and the description is that of the remaining blocks.
        input_size: (C, H, W) of one image, for selectors; by default the size that the model is built for.

    Returns:
        The same object.

    Raises:
        SiteError: an entry of `blocks` matches no block.
        SurgeryError: the model has blocks but no record of the operation, because it was rebuilt since; or it was
            loaded from a file that has no weights for an attention of the base that was taken out.
        UsageError: the model is in a wrapper that does not allow this; the message says what to do.

    Example:
        >>> model = timm.create_model("test_resnet_se_s3")
        >>> sorted(attnsurgery.remove(model).state_dict()) == sorted(timm.create_model("test_resnet").state_dict())
        True
    """
    host = _host(model, "remove")
    before = _checked_recipe(host)
    paths_by_place = blocks_by_place(host)
    removed_paths = select_blocks(host, blocks, input_size)
    check_restorable(host)
    takes_out = any(graft.part == "removal" for _, _, grafts in surgery.operated(host) for graft in grafts)
    if not blocks or (len(removed_paths) == len(paths_by_place) and not takes_out):
        surgery.remove(host)
        _describe_base(host, before)
        return model
    after = before and without(before, base_anatomy(host, input_size), paths_by_place, removed_paths)
    surgery.remove(host, removed_paths)
    if after is not None:
        _describe(host, registry.GENERIC, base=after.base, recipe=after.as_dict(), start=None, settled=None)
    return model


def verify(model: nn.Module, input_size: tuple[int, int, int] | None = None) -> Report:
    """Check a surgical model against its base and report the differences; see `Report`.

    A copy of the model is run, not the model itself.

    Args:
        model: a surgical model on any device, in a wrapper or not.
        input_size: (C, H, W) of one image; by default the size that the model is built for.

    Raises:
        SurgeryError: a block is missing, the model was rebuilt since the operation, or its weights are not finite.
        UsageError: the model cannot be compared in its present form; the message says what to do.

    Example:
        >>> report = attnsurgery.verify(timm.create_model("test_resnet_nonlocal_s3"))
        >>> report.alive, report.max_abs_diff
        (True, 0.0)
        >>> report.params_after - report.params_before
        74592
    """
    _checked_recipe(_host(model, "verify"))
    return verify_model(model, input_size)


def recipe_of(model: nn.Module) -> Recipe | None:
    """The recipe in a model's own description; None for a model without surgery."""
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
        recipe = registry.recipe_by_name(config.get("architecture") or "")
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


def _checked_recipe(model: nn.Module) -> Recipe | None:
    """The recipe of the model.

    Raises:
        SurgeryError: the model has a recipe but no record of its blocks.
    """
    recipe = recipe_of(model)
    if recipe is not None and not any(surgery.operated(model)):
        raise SurgeryError(
            f"the model's description names the recipe {recipe.name!r}, but the model was rebuilt since (torch.fx and "
            "reparameterization do that), so its blocks can be neither checked nor removed."
        )
    return recipe


def _joined(model: nn.Module, recipe: Recipe, anatomy: Anatomy) -> Recipe:
    """The recipe of all earlier operations and this one, on the model's own architecture.

    A limit holds for the blocks of one recipe, so the joined recipe has the sum of the limits if each part sets one.
    """
    before = recipe_of(model)
    limits = [part.max_attention_mb for part in (before, recipe) if part is not None]
    if before is not None and any(limits):  # each part keeps the options that were resolved under its own limit
        before, recipe = settled(before, base_anatomy(model)), settled(recipe, anatomy)
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    base = before.base if before else config.get("architecture")
    edits = [*(before.edits if before else ()), *recipe.edits]
    joined = {**recipe.as_dict(), "edits": [edit.model_dump(exclude_defaults=True) for edit in edits]}
    joined["max_attention_mb"] = sum(filter(None, limits)) if all(limits) else None
    return registry.as_recipe({**joined, "base": base if base and timm.is_model(base) else recipe.base})


_BEFORE = "_attnsurgery_described"
"""The attribute of a model that holds its description before surgery."""


def _describe_surgery(model: nn.Module, recipe: Recipe, explicit: Recipe | None, channels: int) -> None:
    """Write the description of a model that was operated on, and save the one from before the first operation.

    Args:
        model: the model.
        recipe: the recipe of all operations.
        explicit: the same with all options explicit; None if that makes no difference.
        channels: the number of channels of the images.
    """
    attributes = vars(model)
    if _BEFORE not in attributes and recipe_of(model) is None:
        names = ("pretrained_cfg", "default_cfg", "_model_args")
        config, default = getattr(model, "pretrained_cfg", None), getattr(model, "default_cfg", None)
        attributes[_BEFORE] = {
            "had": [name for name in names if name in attributes],
            "architecture": config.get("architecture") if isinstance(config, dict) else None,
            "apart": config != default and default is not None,
            "arguments": dict(attributes.get("_model_args") or {}),
            "in_chans": attributes.get("in_chans"),
        }
    described = getattr(model, "_model_args", {}).get("in_chans", (_config(model).get("input_size") or (3,))[0])
    in_chans = {} if described == channels else {"in_chans": channels}
    # timm saves this attribute and not the argument; the first convolution may have been replaced since
    if isinstance(attributes.get("in_chans"), int):
        attributes["in_chans"] = channels
    _describe(model, registry.GENERIC, base=recipe.base, recipe=recipe.as_dict(), start=None, **in_chans)
    _describe(model, registry.GENERIC, settled=explicit and explicit.as_dict())


def _describe_base(model: nn.Module, before: Recipe | None) -> None:
    """Restore the description from before any surgery; a model that was built by a surgical name gets its base's."""
    saved: dict[str, Any] | None = vars(model).get(_BEFORE)
    if saved is None:
        if before is not None:
            _describe(model, before.base.partition(".")[0], base=None, recipe=None, start=None, settled=None)
        return
    _describe(model, saved["architecture"])
    model._model_args = saved["arguments"]
    if saved["in_chans"] is not None:
        model.in_chans = saved["in_chans"]
    for name in ("pretrained_cfg", "default_cfg", "_model_args"):
        if name not in saved["had"]:
            vars(model).pop(name, None)
    vars(model).pop(_BEFORE)


def _describe(model: nn.Module, architecture: str | None, **arguments: Any) -> None:
    """Set the architecture and arguments that timm saves with the model; an argument of None is removed."""
    separate_default = vars(model).get(_BEFORE, {}).get("apart")  # such a default_cfg is left unchanged
    config = dict(_config(model), architecture=architecture)
    model.pretrained_cfg = config  # type: ignore[assignment]
    if not separate_default:
        model.default_cfg = config  # type: ignore[assignment]
    merged = dict(getattr(model, "_model_args", {}), **arguments)
    model._model_args = {k: v for k, v in merged.items() if v is not None}  # type: ignore[assignment]


def _config(model: nn.Module) -> dict[str, Any]:
    config: Any = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    return config if isinstance(config, dict) else {}


def _model_of_name(name: str, input_size: tuple[int, int, int] | None = None) -> nn.Module:
    """The model of that name without weights, for images of that size; `local-dir:DIR` stands for a directory."""
    if ":" not in name:
        check_base(name, "model")
    elif name.startswith("local-dir:") and not Path(name.partition(":")[2], "config.json").is_file():
        raise UnknownNameError(f"{name!r} names no directory with a config.json, as attnsurgery apply writes it.")
    return weightless(name, input_size and input_size[1:])
