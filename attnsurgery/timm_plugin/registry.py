"""Recipes and names as timm entry points: after `import attnsurgery`, timm builds `resnet50_nonlocal_s3` as any other.

`<arch>_<block>_s<stages>` and the segmentation models `<arch>_<decoder><stride>` exist for every timm architecture, and
registered recipes are names too. These are too many to enter at import. timm has its entry points in a dictionary,
which is replaced here by one that creates an entry when it is looked up. `timm.list_models` lists the names in zoo/ and
those that were looked up; the others are not listed, so that the listing stays readable.

`attnsurgery.timm_plugin.build_hook` operates on a model while timm builds it. These two files use timm's private names,
and only this one its tables; tests/test_registry.py reports which of them has moved.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timm import models
from timm.models import _builder, _registry
from timm.models._pretrained import DefaultCfg, PretrainedCfg

from attnsurgery.errors import RecipeError, UnknownNameError, did_you_mean
from attnsurgery.models import segmentation_model
from attnsurgery.timm_plugin import segmentation, zoo
from attnsurgery.timm_plugin.build_hook import build_surgical

if TYPE_CHECKING:
    from torch import nn

    from attnsurgery.recipe.schema import Recipe

GENERIC = "surgery"
"""The architecture with the arguments `base` and `recipe`, by which saved directories describe their models."""

_NAME_PATTERN = re.compile(r"(?P<base>[A-Za-z0-9]\w{0,150})_(?P<block>[a-z]+)(?:_s(?P<stages>[1-5]+))?", re.ASCII)
_BASE_PATTERN = re.compile(r"^base: *([\w.]+)", re.MULTILINE)
_SETTLED_ATTRIBUTE = "_attnsurgery_settled"
_UNRECORDED = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "device", "dtype")
_lock = threading.RLock()
_recipes: dict[str, Recipe] = {}
_segmentation: dict[str, segmentation.SegmentationName] = {}
"""The names of segmentation models that were looked up."""
_shipped: set[str] = set()
"""The surgical names that exist after the import."""


class _EntryPoints(dict[str, Callable[..., Any]]):
    """timm's table of entry points, which creates the entry of a surgical name at its first lookup."""

    def __contains__(self, name: object) -> bool:
        if super().__contains__(name):
            return True
        if sys._getframe(1).f_code is _registry.register_model.__code__:
            return False  # timm checks whether a name is taken; a surgical name that was not used yet is free
        return isinstance(name, str) and _resolve(name) is not None

    def __missing__(self, name: str) -> Callable[..., Any]:
        entry = _resolve(name)
        if entry is None:
            raise KeyError(name)
        return entry


def install() -> None:
    """Make the names known to timm; called once, at the import of this module."""
    if isinstance(_registry._model_entrypoints, _EntryPoints):
        return
    _registry._model_entrypoints = _EntryPoints(_registry._model_entrypoints)
    _enter(GENERIC, _generic, base=None)
    for path in sorted(Path(zoo.__file__).parent.glob("*.yaml")):
        base = _BASE_PATTERN.search(path.read_text())  # the whole recipe is parsed at the first lookup
        _enter(path.stem, functools.partial(_from_zoo, path), base=base and base[1])
    _shipped.update(_registry._module_to_models["zoo"])


def register(recipe: Recipe | Mapping[str, Any] | str | Path) -> str:
    """Make a recipe a model name: `timm.create_model(recipe.name)` builds it from then on.

    Args:
        recipe: a Recipe, the same as plain data, or the path of a YAML file.

    Returns:
        The name.

    Raises:
        RecipeError: not a recipe; or the name belongs to timm or to a different recipe.

    Example:
        >>> edits = [{"at": "stage:3 last", "block": "se"}]
        >>> recipe = {"version": 1, "name": "test_resnet_gated", "base": "test_resnet", "edits": edits}
        >>> attnsurgery.register(recipe)
        'test_resnet_gated'
        >>> timm.is_model("test_resnet_gated")
        True
    """
    parsed = as_recipe(recipe)
    name = parsed.name
    existing = _recipes.get(name)
    if existing is not None and existing == parsed:
        return name
    if existing is not None or name in _registry._model_entrypoints:
        raise RecipeError(f"the name {name!r} is taken by another model. Give the recipe a name of its own.")
    with _lock:
        _recipes[name] = parsed
        _enter(name, functools.partial(_build, parsed, name), base=parsed.base)
    return name


def as_recipe(recipe: Recipe | Mapping[str, Any] | str | Path) -> Recipe:
    """A Recipe from a Recipe, plain data, or the path of a YAML file.

    Raises:
        RecipeError: it is no recipe.
    """
    from attnsurgery.recipe import text
    from attnsurgery.recipe.schema import Recipe

    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, (str, Path)):
        return text.load(recipe)
    if not isinstance(recipe, Mapping):
        raise RecipeError(f"a recipe is a Recipe, a dictionary or a path, and not {type(recipe).__name__}.")
    try:
        as_json = json.dumps(recipe, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"a recipe is plain data, and this one is not: {error}.") from None
    return text.loads(as_json, "recipe")  # JSON is YAML: one reader, one set of messages


def recipe_by_name(name: str) -> Recipe | None:
    """The recipe that a surgical model name stands for; None for a name that is not surgical."""
    arch, tag = _registry.split_model_name_tag(name)
    entry = dict.get(_registry._model_entrypoints, arch)
    if entry is not None and entry.__module__ != zoo.__name__:
        return None  # a name of timm's own, or one that other code has registered
    if arch not in _recipes:
        of_zoo = arch in zoo.__all__ and _zoo_file(arch).is_file()
        if of_zoo:
            _recipes[arch] = as_recipe(_zoo_file(arch))
        elif dict.__contains__(_registry._model_entrypoints, arch) or _resolve(arch) is None or arch in _segmentation:
            return None
    recipe = _recipes[arch]
    return recipe.model_copy(update={"base": f"{recipe.base}.{tag}"}) if tag else recipe


def flatten(recipe: Recipe) -> Recipe:
    """The same surgery on a plain base: where `base` is a surgical name, the edits of that name come first.

    A limit on attention applies to the blocks of one recipe: two limits are added, and a single one applies to all
    blocks.

    Raises:
        RecipeError: the base is the recipe itself, possibly by way of other recipes.
    """
    from attnsurgery.recipe.text import keep_origin

    original, bases = recipe, {recipe.base}
    while (inner := recipe_by_name(recipe.base)) is not None:
        if inner.base in bases:
            raise RecipeError(f"the recipe {recipe.name!r} has itself as its base, by way of {inner.base!r}.")
        bases.add(inner.base)
        limits = [limit for limit in (inner.max_attention_mb, recipe.max_attention_mb) if limit is not None]
        joined = {"base": inner.base, "edits": [*inner.edits, *recipe.edits], "max_attention_mb": sum(limits) or None}
        recipe = recipe.model_copy(update=joined)
    return recipe if recipe is original else keep_origin(recipe, original)


@contextmanager
def as_in_a_fresh_process() -> Iterator[None]:
    """A context with only the names that a new process knows, without those registered or looked up since."""
    with _lock:
        table = _registry._model_entrypoints
        entered = {name for name, entry in table.items() if entry.__module__ == zoo.__name__ and name not in _shipped}
        entries = {name: table.pop(name) for name in entered}
        recipes = {name: _recipes.pop(name) for name in entered if name in _recipes}
        try:
            yield
        finally:
            table.update(entries)
            _recipes.update(recipes)


def names_for(arch: str) -> list[str]:
    """The names of an architecture with each kind of block in all stages, and in each stage."""
    return [f"{arch}_{suffix}{stage}" for suffix in _suffixes() for stage in ("", "_s1", "_s2", "_s3", "_s4")]


def grafted_names() -> list[str]:
    """Every surgical name that timm lists at present."""
    return sorted(name for name in _registry._module_to_models["zoo"] if name != GENERIC and name not in _segmentation)


def _zoo_file(name: str) -> Path:
    return Path(zoo.__file__).parent / f"{name}.yaml"


def _suffixes() -> dict[str, str]:
    """By the spelling of each block in names, its name in the catalog."""
    from attnsurgery.blocks import BLOCKS

    return {BLOCKS[name].model_suffix: name for name in BLOCKS if BLOCKS[name].model_suffix}


def _resolve(name: str) -> Callable[..., Any] | None:
    """The entry point of `<base>_<block>_s<stages>` or `<arch>_<decoder><stride>`, entered into timm's table.

    Returns:
        None for other names.
    """
    match = _NAME_PATTERN.fullmatch(name)
    if match is None:
        return _resolve_segmentation(name)
    base, suffix, stages = match["base"], match["block"], match["stages"]
    with _lock:
        table = _registry._model_entrypoints
        existing: Callable[..., Any] | None = dict.get(table, name)
        if existing is not None:
            return existing
        if base == GENERIC or (not dict.__contains__(table, base) and _resolve(base) is None):
            return None
        block = _suffixes().get(suffix)
        if block is None or base in _registry._deprecated_models:
            return None
        _recipes[name] = _named_recipe(name, base, block, stages)
        _enter(name, functools.partial(_build, _recipes[name], name), base=_recipes[name].base)
        entered: Callable[..., Any] = dict.__getitem__(table, name)
        return entered


def _resolve_segmentation(name: str) -> Callable[..., Any] | None:
    """The entry point of `<arch>_<decoder><stride>`, entered into timm's table; None for other names."""
    with _lock:
        table = _registry._model_entrypoints
        existing: Callable[..., Any] | None = dict.get(table, name)
        parts = segmentation.parse(name)
        if existing is not None or parts is None:
            return existing
        arch = parts.arch
        if arch == GENERIC or (not dict.__contains__(table, arch) and _resolve(arch) is None):
            return None
        recipe = recipe_by_name(arch)
        plain = flatten(recipe).base if recipe else arch
        if plain in _segmentation or arch in _registry._deprecated_models:  # a segmentation model is no backbone
            return None
        _segmentation[name] = parts
        _enter(name, functools.partial(_build_segmentation, name, parts), base=arch)
        entered: Callable[..., Any] = dict.__getitem__(table, name)
        return entered


def _named_recipe(name: str, base: str, block: str, stages: str | None) -> Recipe:
    """The recipe of `<base>_<block>_s<stages>`; the edits of a surgical base come first."""
    from attnsurgery.blocks import BLOCKS
    from attnsurgery.recipe.schema import Edit, Recipe

    inner = recipe_by_name(base)
    edit = Edit(at=f"stage:{stages or '*'} {BLOCKS[block].model_place}", block=block)
    edits = [*inner.edits, edit] if inner else [edit]
    if inner is not None:  # a limit of the base applies to the added block too
        return inner.model_copy(update={"name": name, "edits": edits})
    return Recipe(version=1, name=name, base=base, edits=edits)


def _enter(name: str, entry: Callable[..., Any], base: str | None) -> None:
    """Register an entry point with timm under a surgical name, with the base's pretrained configurations."""
    if base is not None:
        configurations = _configurations(base)
        if name in _segmentation:
            configurations = segmentation.configurations(configurations, _segmentation[name])
        if configurations.tags:  # an architecture of the user's own may have none registered
            zoo.default_cfgs[name] = configurations

    def entry_point(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        model: nn.Module = entry(pretrained=pretrained, **kwargs)
        # timm records them since 1.0.31; the model of a saved directory is built from them
        recorded = {k: v for k, v in kwargs.items() if k not in _UNRECORDED}
        model._model_args = {**recorded, **vars(model).pop(_SETTLED_ATTRIBUTE, {})}  # type: ignore[assignment]
        return model

    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__module__ = zoo.__name__
    what = "as a segmentation model" if name in _segmentation else "after surgery"
    entry_point.__doc__ = f"{base or 'Any timm model'} {what}; built by attnsurgery."
    setattr(zoo, name, _registry.register_model(entry_point))


def _configurations(base: str) -> DefaultCfg:
    """The base's pretrained configurations by tag; their hub addresses are complete and stay the same."""
    arch, only = _registry.split_model_name_tag(base)
    cfgs = {key.partition(".")[2]: cfg for key, cfg in _registry.get_arch_pretrained_cfgs(arch).items()}
    if only in cfgs:  # a recipe whose base has a tag: that configuration is the default
        cfgs = {only: cfgs[only], **cfgs}
    return DefaultCfg(tags=deque(cfgs), cfgs=cfgs, is_pretrained=any(cfg.has_weights for cfg in cfgs.values()))


def _from_zoo(path: Path, **kwargs: Any) -> nn.Module:
    recipe = recipe_by_name(path.stem)
    assert recipe is not None
    return _build(recipe, path.stem, **kwargs)


def _generic(
    pretrained: bool = False,
    base: str | None = None,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    **kwargs: Any,
) -> nn.Module:
    if recipe is None:
        raise RecipeError(
            f"the architecture {GENERIC!r} needs a recipe: timm.create_model('{GENERIC}', base='resnet50', recipe=...)."
        )
    parsed = as_recipe(recipe)
    if base is not None:
        parsed = parsed.model_copy(update={"base": base})
    return _build(parsed, GENERIC, pretrained=pretrained, **kwargs)


def _build(
    recipe: Recipe,
    name: str,
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    start: str | None = None,
    settled: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build the recipe's base through its own entry point, with the operation before weights are loaded.

    Args:
        recipe: the edits.
        name: the surgical name.
        pretrained, pretrained_cfg, pretrained_cfg_overlay: as in timm.
        start: replaces the start of every edit.
        settled: the settled recipe of a saved model, with the values of all options that blocks derived from the size
            of their maps. It replaces `recipe`, so that the model is the same for another size of images.
        kwargs: other arguments of the base.
    """
    if settled is not None:
        recipe = as_recipe(settled)
    recipe = flatten(recipe)
    arch, tag = _registry.split_model_name_tag(recipe.base)
    if not dict.__contains__(_registry._model_entrypoints, arch):
        near = did_you_mean(arch, dict.keys(_registry._model_entrypoints))
        raise UnknownNameError(f"recipe {recipe.name!r}: timm has no base {arch!r}.{near}")
    if start is not None:
        recipe = recipe.model_copy(
            update={"edits": [edit.model_copy(update={"start": _check_start(start)}) for edit in recipe.edits]}
        )
    cfg = _configuration(name, arch, tag, pretrained_cfg, pretrained_cfg_overlay)
    entry = _registry._model_entrypoints[arch]
    model, settled_recipe = build_surgical(entry, recipe, cfg, name, pretrained, kwargs)
    if settled_recipe != recipe:
        vars(model)[_SETTLED_ATTRIBUTE] = {"settled": settled_recipe.as_dict()}
    return model


def _build_segmentation(
    name: str,
    parts: segmentation.SegmentationName,
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a segmentation model; a configuration under a surgical name is that of surgery on it."""
    if isinstance(pretrained_cfg, PretrainedCfg) and pretrained_cfg.architecture not in (None, parts.arch):
        cfg = _builder.resolve_pretrained_cfg(name, pretrained_cfg, pretrained_cfg_overlay)
    else:
        arch, tag = _registry.split_model_name_tag(parts.arch)
        cfg = _configuration(name, arch, tag, pretrained_cfg, pretrained_cfg_overlay)
    kwargs["pretrained_cfg"] = segmentation.configuration(cfg, parts)
    return segmentation_model(name, *parts, pretrained, **kwargs)


def _check_start(start: str) -> str:
    if start not in ("identity", "paper"):
        raise RecipeError(f"start={start!r}: a block starts as 'identity' or 'paper'.")
    return start


def _configuration(name: str, arch: str, tag: str, requested: Any, overlay: dict[str, Any] | None) -> PretrainedCfg:
    """The pretrained configuration under the surgical name: the requested one, else the tag's, else the default."""
    variant = name if name in _registry._model_pretrained_cfgs or name in _registry._model_default_cfgs else arch
    cfg = _builder.resolve_pretrained_cfg(
        variant, pretrained_cfg=requested or tag or None, pretrained_cfg_overlay=overlay
    )
    if cfg.source == "local-dir" and not hasattr(models, "get_model_args"):
        # before 1.0.31 timm reads the safetensors of a directory as a pickle, and those of a file correctly
        weights = Path(str(cfg.file), "model.safetensors")
        cfg = dataclasses.replace(cfg, source="", file=str(weights)) if weights.is_file() else cfg
    return dataclasses.replace(cfg, architecture=name)


install()
