"""Recipes and names as timm entry points: after `import attnsurgery`, timm builds `resnet50_nonlocal_s3` as any other.

`<arch>_<block>_s<stages>` exists for every timm architecture, and more come by registering recipes: too many to enter
one by one at import. timm keeps its entry points in a dictionary; the one put in its place here makes a name when it
is asked for. What ships in zoo/ and what has been asked for is listed by `timm.list_models`; the rest is not, so the
listing stays readable.

The cut is made between the construction of the base and the loading of weights: every timm family builds through a
global `build_model_with_cfg(model_cls, ...)`, and `model_cls` is where the operation is slipped in. So timm's own
weight loading, its adaptation of classes and channels and its feature extraction all see a surgical model.

Everything that reaches into timm's private names is in this file; tests/test_registry.py says which of them has moved.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import re
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timm import models
from timm.models import _builder, _prune, _registry
from timm.models._pretrained import DefaultCfg, PretrainedCfg

from attnsurgery.errors import RecipeError, UnknownNameError, did_you_mean
from attnsurgery.timm_plugin import zoo

if TYPE_CHECKING:
    from torch import nn

    from attnsurgery.recipe.schema import Recipe

GENERIC = "surgery"
"""The architecture that takes `base=` and `recipe=`: how a saved directory describes itself."""

_NAME = re.compile(r"(?P<base>[A-Za-z0-9]\w{0,150})_(?P<block>[a-z]+)(?:_s(?P<stages>[1-5]+))?", re.ASCII)
_BASE = re.compile(r"^base: *([\w.]+)", re.MULTILINE)
_SETTLED = "_attnsurgery_settled"
_NOT_KEPT = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "device", "dtype")
_FAMILIES = ("timm.models.", "attnsurgery.models")
_lock = threading.RLock()
_pending: ContextVar[Callable[..., Any] | None] = ContextVar("attnsurgery_pending_operation", default=None)
_adapted: ContextVar[Callable[..., Any] | None] = ContextVar("attnsurgery_adapted_operation", default=None)
_recipes: dict[str, Recipe] = {}
_shipped: set[str] = set()
"""The surgical names that are there from the start."""


class _EntryPoints(dict[str, Callable[..., Any]]):
    """timm's table of entry points; a surgical name is entered the first time anyone asks for it."""

    def __contains__(self, name: object) -> bool:
        if super().__contains__(name):
            return True
        if sys._getframe(1).f_code is _registry.register_model.__code__:
            return False  # timm asks whether a name is taken, and one that nobody has used is free
        return isinstance(name, str) and _resolve(name) is not None

    def __missing__(self, name: str) -> Callable[..., Any]:
        entry = _resolve(name)
        if entry is None:
            raise KeyError(name)
        return entry


def install() -> None:
    """Make the names known to timm; called once, when this file has been read."""
    if isinstance(_registry._model_entrypoints, _EntryPoints):
        return
    _registry._model_entrypoints = _EntryPoints(_registry._model_entrypoints)
    importlib.import_module("attnsurgery.models")  # which registers its names as timm's own files do
    _enter(GENERIC, _generic, base=None)
    for path in sorted(Path(zoo.__file__).parent.glob("*.yaml")):
        base = _BASE.search(path.read_text())  # the whole recipe is read, strictly, when the name is asked for
        _enter(path.stem, functools.partial(_from_zoo, path), base=base and base[1])
    _shipped.update(_registry._module_to_models["zoo"])


def register(recipe: Recipe | Mapping[str, Any] | str | Path) -> str:
    """Make a recipe a model name: `timm.create_model(recipe.name)` builds it from then on.

    Args:
        recipe: a Recipe, the same as plain data, or a path of a YAML file.

    Returns:
        The name.

    Raises:
        RecipeError: not a recipe; or the name is one of timm's own, or was given to a different recipe before.

    Example:
        >>> edits = [{"at": "stage:3 last", "block": "se"}]
        >>> recipe = {"version": 1, "name": "test_resnet_gated", "base": "test_resnet", "edits": edits}
        >>> attnsurgery.register(recipe)
        'test_resnet_gated'
        >>> timm.is_model("test_resnet_gated")
        True
    """
    made = as_recipe(recipe)
    name = made.name
    known = _recipes.get(name)
    if known is not None and known == made:
        return name
    if known is not None or name in _registry._model_entrypoints:
        raise RecipeError(f"the name {name!r} is taken by another model. Give the recipe a name of its own.")
    with _lock:
        _recipes[name] = made
        _enter(name, functools.partial(_build, made, name), base=made.base)
    return name


def as_recipe(recipe: Recipe | Mapping[str, Any] | str | Path) -> Recipe:
    """A Recipe from what people hold: itself, plain data, or the path of a YAML file.

    Raises:
        RecipeError: it is none.
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


def recipe_of(name: str) -> Recipe | None:
    """The recipe that a surgical model name stands for; None for a name that is not surgical."""
    arch, tag = _registry.split_model_name_tag(name)
    entry = dict.get(_registry._model_entrypoints, arch)
    if entry is not None and entry.__module__ != zoo.__name__:
        return None  # timm's own, or a name that somebody else has taken since
    if arch not in _recipes:
        of_zoo = arch in zoo.__all__ and _zoo_file(arch).is_file()
        if of_zoo:
            _recipes[arch] = as_recipe(_zoo_file(arch))
        elif dict.__contains__(_registry._model_entrypoints, arch) or _resolve(arch) is None:
            return None
    recipe = _recipes[arch]
    return recipe.model_copy(update={"base": f"{recipe.base}.{tag}"}) if tag else recipe


def flattened(recipe: Recipe) -> Recipe:
    """The same surgery on a base without any: where `base` is a surgical name, the edits behind that name come first.

    A limit on attention is for the blocks of one recipe; two limits are added up, and one alone holds for all blocks.

    Raises:
        RecipeError: the base is, in the end, the recipe itself.
    """
    from attnsurgery.recipe.text import keep_origin

    written, seen = recipe, {recipe.base}
    while (inner := recipe_of(recipe.base)) is not None:
        if inner.base in seen:
            raise RecipeError(f"the recipe {recipe.name!r} has itself as its base, by way of {inner.base!r}.")
        seen.add(inner.base)
        limits = [limit for limit in (inner.max_attention_mb, recipe.max_attention_mb) if limit is not None]
        joined = {"base": inner.base, "edits": [*inner.edits, *recipe.edits], "max_attention_mb": sum(limits) or None}
        recipe = recipe.model_copy(update=joined)
    return recipe if recipe is written else keep_origin(recipe, written)


@contextmanager
def as_in_a_fresh_process() -> Iterator[None]:
    """Only the names that a new process knows: what was registered, or asked for, since is forgotten meanwhile."""
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
    """The names of one surgical block per stage, and in all stages, for a timm architecture."""
    return [f"{arch}_{suffix}{stage}" for suffix in _suffixes() for stage in ("", "_s1", "_s2", "_s3", "_s4")]


def grafted_names() -> list[str]:
    """Every surgical name timm lists at this moment."""
    return sorted(name for name in _registry._module_to_models["zoo"] if name != GENERIC)


def _zoo_file(name: str) -> Path:
    return Path(zoo.__file__).parent / f"{name}.yaml"


def _suffixes() -> dict[str, str]:
    """How blocks are spelled in names, and what they are called in the catalog."""
    from attnsurgery.blocks import BLOCKS

    return {BLOCKS[name].model_suffix: name for name in BLOCKS if BLOCKS[name].model_suffix}


def _resolve(name: str) -> Callable[..., Any] | None:
    """The entry point of `<base>_<block>_s<stages>`, entered into timm's table; None for other names."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    base, suffix, stages = match["base"], match["block"], match["stages"]
    with _lock:
        table = _registry._model_entrypoints
        known: Callable[..., Any] | None = dict.get(table, name)
        if known is not None:
            return known
        if base == GENERIC or (not dict.__contains__(table, base) and _resolve(base) is None):
            return None
        block = _suffixes().get(suffix)
        if block is None or base in _registry._deprecated_models:
            return None
        _recipes[name] = _named_recipe(name, base, block, stages)
        _enter(name, functools.partial(_build, _recipes[name], name), base=_recipes[name].base)
        entered: Callable[..., Any] = dict.__getitem__(table, name)
        return entered


def _named_recipe(name: str, base: str, block: str, stages: str | None) -> Recipe:
    """The recipe that a name spells; on a base that is surgical itself, its edits come first."""
    from attnsurgery.blocks import BLOCKS
    from attnsurgery.recipe.schema import Edit, Recipe

    inner = recipe_of(base)
    edit = Edit(at=f"stage:{stages or '*'} {BLOCKS[block].model_place}", block=block)
    edits = [*inner.edits, edit] if inner else [edit]
    if inner is not None:  # a limit that it sets holds for the added block, too
        return inner.model_copy(update={"name": name, "edits": edits})
    return Recipe(version=1, name=name, base=base, edits=edits)


def _enter(name: str, entry: Callable[..., Any], base: str | None) -> None:
    """Register with timm, under our name and with the base's pretrained configurations."""
    if base is not None:
        configurations = _configurations(base)
        if configurations.tags:  # an architecture of the user's own may have none registered
            zoo.default_cfgs[name] = configurations

    def entry_point(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        model: nn.Module = entry(pretrained=pretrained, **kwargs)
        # timm keeps them since 1.0.31; a saved directory is built with them again
        kept = {k: v for k, v in kwargs.items() if k not in _NOT_KEPT}
        model._model_args = {**kept, **vars(model).pop(_SETTLED, {})}  # type: ignore[assignment]
        return model

    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__module__ = zoo.__name__
    entry_point.__doc__ = f"{base or 'Any timm model'} after surgery; built by attnsurgery."
    setattr(zoo, name, _registry.register_model(entry_point))


def _configurations(base: str) -> DefaultCfg:
    """The base's pretrained configurations under their tags; the hub addresses, being complete, stay the base's."""
    arch, only = _registry.split_model_name_tag(base)
    cfgs = {key.partition(".")[2]: cfg for key, cfg in _registry.get_arch_pretrained_cfgs(arch).items()}
    if only in cfgs:  # a recipe whose base names a tag: that one comes first
        cfgs = {only: cfgs[only], **cfgs}
    return DefaultCfg(tags=deque(cfgs), cfgs=cfgs, is_pretrained=any(cfg.has_weights for cfg in cfgs.values()))


def _from_zoo(path: Path, **kwargs: Any) -> nn.Module:
    recipe = recipe_of(path.stem)
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
    made = as_recipe(recipe)
    if base is not None:
        made = made.model_copy(update={"base": base})
    return _build(made, GENERIC, pretrained=pretrained, **kwargs)


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
    """Build the recipe's base through its own entry point, with the operation slipped in before weights are loaded.

    Args:
        settled: the recipe with what blocks took from the size of their maps when such a model was first built; then
            that counts, so that the model is the same at another size of images.
    """
    if settled is not None:
        recipe = as_recipe(settled)
    recipe = flattened(recipe)
    arch, tag = _registry.split_model_name_tag(recipe.base)
    if not dict.__contains__(_registry._model_entrypoints, arch):
        near = did_you_mean(arch, dict.keys(_registry._model_entrypoints))
        raise UnknownNameError(f"recipe {recipe.name!r}: timm has no base {arch!r}.{near}")
    if start is not None:
        recipe = recipe.model_copy(
            update={"edits": [edit.model_copy(update={"start": _checked_start(start)}) for edit in recipe.edits]}
        )
    cfg = _configuration(name, arch, tag, pretrained_cfg, pretrained_cfg_overlay)
    used = False
    done: Recipe | None = None

    def operated(model_cls: Callable[..., nn.Module], *args: Any, **model_kwargs: Any) -> nn.Module:
        nonlocal used, done
        used = True
        model = model_cls(*args, **model_kwargs)
        done = _cut(model, recipe, _input_size(cfg, model_kwargs))
        return model

    entry = _registry._model_entrypoints[arch]
    _patch_builders(entry.__module__)
    token = _pending.set(operated)
    try:
        model: nn.Module = entry(pretrained=pretrained, pretrained_cfg=cfg, **kwargs)
    finally:
        _pending.reset(token)
    if not used:
        done = _cut_afterwards(model, recipe, cfg if pretrained else None, name)
    if done is not None and done != recipe:
        vars(model)[_SETTLED] = {"settled": done.as_dict()}
    return model


def _cut_afterwards(model: nn.Module, recipe: Recipe, cfg: PretrainedCfg | None, name: str) -> Recipe:
    """For an architecture of the user's own that is not built through timm's build_model_with_cfg.

    What weights the base has, it has loaded by itself; those of a saved directory are of the surgical model.
    """
    done = _cut(model, recipe, None)
    if cfg is not None and cfg.source in ("local-dir", "file"):
        channels = getattr(model, "in_chans", 3)
        models.load_pretrained(model, cfg.to_dict(), getattr(model, "num_classes", 1000), channels, strict=True)
    known: Any = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    described = {**(known if isinstance(known, dict) else {}), "architecture": name}
    model.pretrained_cfg = model.default_cfg = described  # type: ignore[assignment]
    return done


def _checked_start(start: str) -> str:
    if start not in ("identity", "paper"):
        raise RecipeError(f"start={start!r}: a block starts as 'identity' or 'paper'.")
    return start


def _configuration(name: str, arch: str, tag: str, asked: Any, overlay: dict[str, Any] | None) -> PretrainedCfg:
    """The pretrained configuration, under our name: from the argument, else the tag, else the base's default."""
    variant = name if name in _registry._model_pretrained_cfgs or name in _registry._model_default_cfgs else arch
    cfg = _builder.resolve_pretrained_cfg(variant, pretrained_cfg=asked or tag or None, pretrained_cfg_overlay=overlay)
    if cfg.source == "local-dir" and not hasattr(models, "get_model_args"):
        # before 1.0.31 timm takes the safetensors of a directory for a pickle, and reads those of a file
        weights = Path(str(cfg.file), "model.safetensors")
        cfg = dataclasses.replace(cfg, source="", file=str(weights)) if weights.is_file() else cfg
    return dataclasses.replace(cfg, architecture=name)


def _input_size(cfg: PretrainedCfg, model_kwargs: Mapping[str, Any]) -> tuple[int, int, int]:
    """(C, H, W) of the images that the model is being built for."""
    channels, height, width = cfg.input_size
    size = model_kwargs.get("img_size")
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
    return model_kwargs.get("in_chans", channels), height, width


def _patch_builders(home: str = "timm.models") -> None:
    """Put `_building` in the place of every family's `build_model_with_cfg`; it is inert until an operation pends.

    Args:
        home: the Python module of an architecture, which may be none of timm's.
    """
    with _lock:
        _builder.adapt_model_from_file = _adapting
        for module in list(sys.modules.values()):
            named = getattr(module, "__name__", "")
            of_family = (named == home or named.startswith(_FAMILIES)) and module is not _builder
            if of_family and module.__dict__.get("build_model_with_cfg") is _builder.build_model_with_cfg:
                module.build_model_with_cfg = _building  # type: ignore[attr-defined]


@functools.wraps(_builder.build_model_with_cfg)
def _building(model_cls: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    operation = _pending.get()
    if operation is None:
        return _builder.build_model_with_cfg(model_cls, *args, **kwargs)
    token = _pending.set(None)  # a backbone built inside this model is not the model asked for
    try:
        if not kwargs.get("pruned"):
            return _builder.build_model_with_cfg(functools.partial(operation, model_cls), *args, **kwargs)
        return _building_pruned(operation, model_cls, *args, **kwargs)
    finally:
        _pending.reset(token)


def _building_pruned(operation: Callable[..., Any], model_cls: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The layers of a pruned architecture change their width after it is built, so the cut comes after that."""
    given: dict[str, Any] = {}

    def remembering(*inner: Any, **model_kwargs: Any) -> Any:
        given.update(model_kwargs)
        return model_cls(*inner, **model_kwargs)

    def adapted(model: nn.Module) -> Any:
        return operation(lambda **_: model, **given)

    token = _adapted.set(adapted)
    try:
        return _builder.build_model_with_cfg(remembering, *args, **kwargs)
    finally:
        _adapted.reset(token)


@functools.wraps(_builder.adapt_model_from_file)
def _adapting(*args: Any, **kwargs: Any) -> Any:
    model = _prune.adapt_model_from_file(*args, **kwargs)
    cut = _adapted.get()
    return model if cut is None else cut(model)


def _cut(model: nn.Module, recipe: Recipe, input_size: tuple[int, int, int] | None) -> Recipe:
    """Operate; returns the recipe with every option written out that a block has taken from the size of its map."""
    from attnsurgery.graph.find import survey
    from attnsurgery.recipe.build import resolve_edits, with_explicit_options
    from attnsurgery.surgery.operate import operate

    resolved = resolve_edits(recipe, survey(model, input_size))
    operate(model, tuple(insertion for made in resolved for insertion in made))
    return with_explicit_options(recipe, resolved)


install()
