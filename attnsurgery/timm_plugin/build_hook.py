"""Operates on a model while timm builds it: after the construction of the base, before the loading of weights.

Every family of timm builds its models by a global `build_model_with_cfg(model_cls, ...)`, which is replaced here in all
families by a function that wraps `model_cls`. So timm's own loading of weights, adaptation of classes and channels, and
feature extraction all get a surgical model.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from timm import models
from timm.models import _builder, _prune
from timm.models._pretrained import PretrainedCfg

if TYPE_CHECKING:
    from torch import nn

    from attnsurgery.recipe.schema import Recipe

_FAMILIES = ("timm.models.", "attnsurgery.models")
_lock = threading.RLock()
_pending: ContextVar[Callable[..., Any] | None] = ContextVar("attnsurgery_pending_operation", default=None)
"""The operation on the next model that is built in this context."""
_after_pruning: ContextVar[Callable[..., Any] | None] = ContextVar("attnsurgery_operation_after_pruning", default=None)
"""The operation on a pruned architecture, whose layers get their final width after it was built."""


def build_surgical(
    entry: Callable[..., nn.Module], recipe: Recipe, cfg: PretrainedCfg, name: str, pretrained: bool, kwargs: Any
) -> tuple[nn.Module, Recipe]:
    """Build a base through its own entry point with an operation in between.

    Args:
        entry: timm's entry point of the base.
        recipe: the edits.
        cfg: the pretrained configuration.
        name: the architecture that the model is to be called.
        pretrained: load the weights of `cfg`.
        kwargs: other arguments of the entry point.

    Returns:
        The model, and the settled recipe: with the values of all options that blocks derived from the size of their
        maps.
    """
    settled: Recipe | None = None

    def build_and_operate(model_cls: Callable[..., nn.Module], *args: Any, **model_kwargs: Any) -> nn.Module:
        nonlocal settled
        model = model_cls(*args, **model_kwargs)
        settled = _operate(model, recipe, _input_size(cfg, model_kwargs))
        return model

    _patch_builders(entry.__module__)
    token = _pending.set(build_and_operate)
    try:
        model: nn.Module = entry(pretrained=pretrained, pretrained_cfg=cfg, **kwargs)
    finally:
        _pending.reset(token)
    if settled is None:
        settled = _operate_on_built(model, recipe, cfg if pretrained else None, name)
    return model, settled


def _operate_on_built(model: nn.Module, recipe: Recipe, cfg: PretrainedCfg | None, name: str) -> Recipe:
    """Operate on a model of a user's architecture that is not built through timm's build_model_with_cfg.

    The base has loaded its own weights already; those of a saved directory are of the surgical model, and loaded here.
    """
    settled = _operate(model, recipe, None)
    if cfg is not None and cfg.source in ("local-dir", "file"):
        channels = getattr(model, "in_chans", 3)
        models.load_pretrained(model, cfg.to_dict(), getattr(model, "num_classes", 1000), channels, strict=True)
    config: Any = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    described = {**(config if isinstance(config, dict) else {}), "architecture": name}
    model.pretrained_cfg = model.default_cfg = described  # type: ignore[assignment]
    return settled


def _operate(model: nn.Module, recipe: Recipe, input_size: tuple[int, int, int] | None) -> Recipe:
    """Operate in place; returns the settled recipe."""
    from attnsurgery.graph.find import survey
    from attnsurgery.recipe.build import resolve_edits, with_explicit_options
    from attnsurgery.surgery.operate import operate

    resolved = resolve_edits(recipe, survey(model, input_size))
    operate(model, tuple(insertion for insertions in resolved for insertion in insertions))
    return with_explicit_options(recipe, resolved)


def _input_size(cfg: PretrainedCfg, model_kwargs: Mapping[str, Any]) -> tuple[int, int, int]:
    """(C, H, W) of the images that the model is being built for."""
    channels, height, width = cfg.input_size
    size = model_kwargs.get("img_size")
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
    return model_kwargs.get("in_chans", channels), height, width


def _patch_builders(module_name: str = "timm.models") -> None:
    """Replace every family's `build_model_with_cfg` by `_build_model`, which does nothing else without an operation.

    Args:
        module_name: the Python module of an architecture, which may be a user's own.
    """
    with _lock:
        _builder.adapt_model_from_file = _adapt_model
        for module in list(sys.modules.values()):
            name = getattr(module, "__name__", "")
            of_family = (name == module_name or name.startswith(_FAMILIES)) and module is not _builder
            if of_family and module.__dict__.get("build_model_with_cfg") is _builder.build_model_with_cfg:
                module.build_model_with_cfg = _build_model  # type: ignore[attr-defined]


@functools.wraps(_builder.build_model_with_cfg)
def _build_model(model_cls: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    operation = _pending.get()
    if operation is None:
        return _builder.build_model_with_cfg(model_cls, *args, **kwargs)
    token = _pending.set(None)  # a backbone that is built inside this model is not operated on
    try:
        if not kwargs.get("pruned"):
            return _builder.build_model_with_cfg(functools.partial(operation, model_cls), *args, **kwargs)
        return _build_pruned(operation, model_cls, *args, **kwargs)
    finally:
        _pending.reset(token)


def _build_pruned(operation: Callable[..., Any], model_cls: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Build a pruned architecture; the operation follows the adaptation of its layers."""
    arguments: dict[str, Any] = {}

    def recording(*inner_args: Any, **model_kwargs: Any) -> Any:
        arguments.update(model_kwargs)
        return model_cls(*inner_args, **model_kwargs)

    def operate_on(model: nn.Module) -> Any:
        return operation(lambda **_: model, **arguments)

    token = _after_pruning.set(operate_on)
    try:
        return _builder.build_model_with_cfg(recording, *args, **kwargs)
    finally:
        _after_pruning.reset(token)


@functools.wraps(_builder.adapt_model_from_file)
def _adapt_model(*args: Any, **kwargs: Any) -> Any:
    model = _prune.adapt_model_from_file(*args, **kwargs)
    operation = _after_pruning.get()
    return model if operation is None else operation(model)
