"""Operate on a model: all blocks are checked and built first, so an error leaves the model unchanged."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import nn

from attnsurgery.blocks import Block
from attnsurgery.blocks._base import build_block
from attnsurgery.blocks.loading import watch
from attnsurgery.catalog import NO_BLOCK
from attnsurgery.errors import SiteError
from attnsurgery.graph.attention import is_attention
from attnsurgery.graph.find import survey
from attnsurgery.graph.site import Site
from attnsurgery.graph.submodels import feature_infos
from attnsurgery.graph.trace import uncut_copy
from attnsurgery.graph.twin import meta_twin
from attnsurgery.graph.wrappers import bare, check_forward, check_uncompiled, submodule, unwrapped
from attnsurgery.surgery.graft import RECORD, Graft, Part
from attnsurgery.surgery.insertion import Insertion, Insertions
from attnsurgery.surgery.owners import PATHS, Grids, child_for, copy_path, grafted_blocks, holder_of, joined, operated
from attnsurgery.surgery.remove import remove
from attnsurgery.surgery.replaced import Replaced
from attnsurgery.surgery.rewrite import surgical_class

__all__ = ["PATHS", "grafted_blocks", "operate", "operated", "remove"]


def operate(model: nn.Module, insertions: Insertions) -> nn.Module:
    """Insert blocks into the model, in place and in order.

    Args:
        model: the model whose sites the insertions name, in a wrapper or not; it may have been operated on before.
        insertions: the blocks and their sites.

    Returns:
        The same object.

    Raises:
        SiteError: a site's owner is not in this model, or a block cannot be inserted into its forward there. The model
            is unchanged.
        UsageError: the model is in a wrapper that does not allow this; the message says what to do. The model is
            unchanged.
    """
    original, model = model, unwrapped(model, "operate")
    owners: dict[str, _Owner] = {}
    with torch.inference_mode(False):  # a parameter that is created in that mode can never be trained
        for insertion in insertions:
            _prepare(model, insertion, owners)
        check_uncompiled(model, owners, "operate")
        prepared = [owner.finished() for owner in owners.values()]
    grids = Grids(model)
    for path, owner, grafts, blocks, cls in prepared:
        grids.share(owner, grafts)
        for name, module in (*owners[path].stand_ins.items(), *blocks.items()):
            setattr(*holder_of(owner, name), module)
        owner.__dict__[RECORD] = grafts
        owner.__class__ = cls
        resized = _resized(model, path) if any(graft.has_fixed_grid for graft in grafts) else None
        if resized is not None:
            resized.__dict__["set_input_size"] = functools.partial(_set_input_size, resized)
        model.__dict__[PATHS] = (*model.__dict__.get(PATHS, ()), *(joined(path, name) for name in blocks))
    watch(model)
    return original


def _resized(model: nn.Module, path: str) -> nn.Module | None:
    """The model around an owner whose `set_input_size` changes the image size: the root or a timm model in it."""
    while path:
        path = path.rpartition(".")[0]
        enclosing = submodule(model, path)
        if hasattr(type(enclosing), "set_input_size") and (not path or feature_infos(enclosing)):
            return enclosing
    return None


def _set_input_size(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Call the model's own `set_input_size` and update the grid of blocks that work on a grid of tokens."""
    cls: Any = type(model)
    cls.set_input_size(model, *args, **kwargs)
    anatomy = survey(remove(meta_twin(model)))
    paths = [path for path, _, _ in operated(model)]
    for path, owner, grafts in operated(model):

        def resized(graft: Graft, path: str = path) -> Graft:
            if not graft.span:
                last = path
            else:  # the span's paths may begin at a larger module that holds this model
                last = next((owner for owner in paths if f".{graft.span[-1]}".endswith(f".{owner}")), path)
            return dataclasses.replace(graft, grid=anatomy.grid_at(last, graft.node, graft.element))

        updated = tuple(resized(graft) if graft.has_fixed_grid else graft for graft in grafts)
        owner.__dict__[RECORD] = updated
        owner.__class__ = surgical_class(owner, updated)


class _Owner:
    """A module to be operated on, with its grafts and blocks; they are tried on a copy, and the module is unchanged."""

    def __init__(self, model: nn.Module, path: str) -> None:
        self.path = path
        self.module = submodule(model, path)
        check_forward(path, self.module)
        self.trial = uncut_copy(self.module)
        self.grafts: list[Graft] = list(self.module.__dict__.get(RECORD, ()))
        self.blocks: dict[str, Block] = {}
        self.stand_ins: dict[str, Replaced] = {}

    def take_out(self, path: str) -> str:
        """Put a stand-in into the place of a module, in the copy; returns the module's path relative to the owner.

        Raises:
            SiteError: the owner has no such module now, because an earlier operation has changed it.
        """
        child = path.removeprefix(f"{self.path}.")
        host = child.rpartition(".")[0]
        if host:
            copy_path(self.trial, host)
        holder, name = holder_of(self.trial, child)
        original = getattr(holder, name, None)
        if not isinstance(original, nn.Module) or not is_attention(bare(original)):
            raise SiteError(f"{path!r} is no attention module of this model any more, so no block can take its place.")
        holder._modules[name] = self.stand_ins[child] = Replaced(original)
        return child

    def finished(self) -> Prepared:
        """The module with its new class, grafts and blocks.

        Raises:
            SiteError: the blocks cannot be inserted into its forward.
        """
        grafts = tuple(self.grafts)
        try:
            return self.path, self.module, grafts, self.blocks, surgical_class(self.trial, grafts)
        except SiteError as error:
            raise SiteError(f"{self.path!r}: {error}") from None


Prepared = tuple[str, nn.Module, tuple[Graft, ...], dict[str, Block], type[nn.Module]]
"""Path of an owner, the owner, its grafts, its new blocks by name, and its new class."""


def _prepare(model: nn.Module, insertion: Insertion, owners: dict[str, _Owner]) -> None:
    """Build the block and add a graft to each owner concerned.

    Raises:
        SiteError: the site cannot hold the block, or holds one of that name already.
    """
    site = insertion.site
    if site.refused:
        raise SiteError(f"{site.address!r} can hold no block: {site.refused}.")
    span = site.span or (site.owner,)
    for path in span:
        if path not in owners:
            owners[path] = _Owner(model, path)
    first = owners[span[0]]
    place = site.node, site.users, site.span, site.element
    if any((g.node, g.users, g.span, g.element) == place and g.block == insertion.block for g in first.grafts):
        raise SiteError(f"there is a {insertion.block!r} at {site.address!r} already.")
    replaces = first.take_out(insertion.replaced.path) if insertion.replaced else ""
    if insertion.block == NO_BLOCK:
        first.grafts.append(_removal(insertion, replaces))
        return
    device, dtype = _device_and_dtype(first.module, model)
    block = build_block(insertion.block, site.channels, insertion.options, insertion.start, device=device, dtype=dtype)
    if site.span and not block.gates:
        raise SiteError(f"{insertion.block!r} takes no span: {site.address!r}.")
    free = block.order_free(insertion.options)
    name, slot = child_for(first.trial, type(block), site.node, site.users, site.span, site.host)
    block.grafted = True
    block.train(first.module.training)
    first.blocks[name] = block
    if "." not in name:
        first.trial.__dict__.pop(name, None)
        first.trial._modules[name] = block
    for index, path in enumerate(span):
        part: Part = "first" if index == 0 else "last" if index == len(span) - 1 else "middle"
        owners[path].grafts.append(
            Graft(
                child=name,
                node=site.node,
                layout=site.layout,
                prefix_tokens=site.prefix_tokens,
                slot=slot,
                block=insertion.block,
                options=dict(insertion.options),
                start=insertion.start,
                users=site.users,
                span=site.span,
                part=("point" if block.gates else "place") if not site.span else "whole" if len(span) == 1 else part,
                element=site.element,
                # a block that does not depend on the order of positions works at any image size
                grid=None if free else site.grid,
                grid_names=() if free else site.grid_names,
                grid_source="" if free else site.grid_source,
                replaces=replaces if index == 0 else "",
            )
        )
    if site.grid_source and not free:
        _report_map_size(model, site, owners)


def _removal(insertion: Insertion, replaces: str) -> Graft:
    """The record that a module was taken out and nothing was put in its place."""
    return Graft(
        child="",
        node=None,
        layout=insertion.site.layout,
        prefix_tokens=0,
        slot="none",
        block=NO_BLOCK,
        options={},
        start="identity",
        part="removal",
        replaces=replaces,
    )


def _report_map_size(model: nn.Module, site: Site, owners: dict[str, _Owner]) -> None:
    """Make the module that produces the map publish its size in each forward."""
    source = site.grid_source
    if source not in owners:
        owners[source] = _Owner(model, source)
    if not any(graft.part == "map_source" for graft in owners[source].grafts):
        reporter = Graft(
            child="",
            node=None,
            layout=site.source_layout,
            prefix_tokens=0,
            slot="new",
            block="",
            options={},
            start="identity",
            part="map_source",
            grid=site.grid,
            grid_source=source,
        )
        owners[source].grafts.append(reporter)


def _device_and_dtype(owner: nn.Module, model: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
    """Device and dtype of the owner's parameters, or of the model's where it has none."""
    for module in (owner, model):
        for parameter in module.parameters():
            if parameter.is_floating_point():
                return parameter.device, parameter.dtype
    return None, None
