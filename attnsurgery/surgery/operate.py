"""The operation: everything is decided and built first, then the model is changed; after an error it is as it was."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from attnsurgery.blocks import Block
from attnsurgery.blocks._base import build_block
from attnsurgery.errors import SiteError, did_you_mean
from attnsurgery.graph.find import survey
from attnsurgery.graph.layout import Grid
from attnsurgery.graph.record import meta_twin
from attnsurgery.graph.site import Site
from attnsurgery.graph.trace import uncut_copy
from attnsurgery.surgery.graft import RECORD, Graft, Part, Slot
from attnsurgery.surgery.plan import Insertion, Plan
from attnsurgery.surgery.rewrite import find_slot, surgical_class

PATHS = "_attnsurgery_blocks"
"""The attribute of a model that says where blocks were put, so that a lost one is missed."""


def operate(model: nn.Module, plan: Plan) -> nn.Module:
    """Insert every block of the plan into the model, in place, in the order written.

    Args:
        model: the model the plan was made for; it may have been operated on before.

    Returns:
        The same object.

    Raises:
        SiteError: a site's owner is not in this model, or its forward cannot be cut there. The model is unchanged.
    """
    owners: dict[str, _Owner] = {}
    for insertion in plan:
        _prepare(model, insertion, owners)
    prepared = [owner.finished() for owner in owners.values()]
    shared: dict[str, Grid] = {}
    for path, owner, grafts, blocks, cls in prepared:
        for graft in grafts:
            if graft.grid_source and graft.grid and graft.told not in owner.__dict__:
                source = model.get_submodule(graft.grid_source)
                known = source.__dict__.get(graft.told) or shared.setdefault(graft.told, Grid(*graft.grid))
                owner.__dict__[graft.told] = known
        for name, block in blocks.items():
            setattr(*_held(owner, name), block)
        owner.__dict__[RECORD] = grafts
        owner.__class__ = cls
        if any(graft.fixed for graft in grafts) and hasattr(model, "set_input_size"):
            model.__dict__["set_input_size"] = functools.partial(_set_input_size, model)
        model.__dict__[PATHS] = (*model.__dict__.get(PATHS, ()), *(f"{path}.{name}" for name in blocks))
    return model


def remove(model: nn.Module) -> nn.Module:
    """Take every grafted block out again, in place: classes, children and state dict are those of the base.

    Returns:
        The same object; a model without surgery is returned as it is.
    """
    for _, owner, grafts in list(operated(model)):
        for graft in reversed([graft for graft in grafts if graft.held]):
            host, name = _held(owner, graft.child)
            if graft.slot == "identity":
                setattr(host, name, nn.Identity())
            else:
                delattr(host, name)
            if graft.slot == "none":
                setattr(host, name, None)
        for graft in grafts:
            owner.__dict__.pop(graft.told, None)
        del owner.__dict__[RECORD]
        owner.__class__ = getattr(type(owner), "uncut_class", type(owner))
    model.__dict__.pop(PATHS, None)
    model.__dict__.pop("set_input_size", None)
    return model


def _set_input_size(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """The model's own `set_input_size`, after which the blocks that work on a grid of tokens are told the new one."""
    cls: Any = type(model)
    cls.set_input_size(model, *args, **kwargs)
    anatomy = survey(remove(meta_twin(model)))
    for path, owner, grafts in operated(model):
        told = tuple(
            dataclasses.replace(
                graft, grid=anatomy.grid_at(graft.span[-1] if graft.span else path, graft.node, graft.element)
            )
            if graft.fixed
            else graft
            for graft in grafts
        )
        owner.__dict__[RECORD] = told
        owner.__class__ = surgical_class(owner, told)


def _held(owner: nn.Module, child: str) -> tuple[nn.Module, str]:
    """The module that holds a block, and the block's name there: the owner, or a child of it."""
    host, _, name = child.rpartition(".")
    return owner.get_submodule(host), name


def operated(model: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[Graft, ...]]]:
    """Path, module and record of every owner that was operated on."""
    for path, module in model.named_modules():
        grafts = module.__dict__.get(RECORD)
        if grafts:
            yield path, module, grafts


def grafted_blocks(model: nn.Module) -> dict[str, Block]:
    """Every grafted block by its path in the model."""
    found = {}
    for path, owner, grafts in operated(model):
        for graft in grafts:
            if graft.held:
                host, name = _held(owner, graft.child)
                block = getattr(host, name, None)
                if block is not None:
                    found[f"{path}.{graft.child}" if path else graft.child] = block
    return found


class _Owner:
    """A module to be operated on: what will be grafted onto it, tried on a copy; the module is not touched."""

    def __init__(self, model: nn.Module, path: str) -> None:
        self.path = path
        self.module = _owner(model, path)
        self.trial = uncut_copy(self.module)
        self.grafts: list[Graft] = list(self.module.__dict__.get(RECORD, ()))
        self.blocks: dict[str, Block] = {}

    def finished(self) -> Prepared:
        """The new class with all that goes with it."""
        grafts = tuple(self.grafts)
        try:
            return self.path, self.module, grafts, self.blocks, surgical_class(self.trial, grafts)
        except SiteError as error:
            raise SiteError(f"{self.path!r}: {error}") from None


Prepared = tuple[str, nn.Module, tuple[Graft, ...], dict[str, Block], type[nn.Module]]


def _prepare(model: nn.Module, insertion: Insertion, owners: dict[str, _Owner]) -> None:
    """Build the block and note on every owner concerned what becomes of it."""
    site = insertion.site
    span = site.span or (site.owner,)
    for path in span:
        if path not in owners:
            owners[path] = _Owner(model, path)
    first = owners[span[0]]
    place = site.node, site.users, site.span, site.element
    if any((g.node, g.users, g.span, g.element) == place and g.block == insertion.block for g in first.grafts):
        raise SiteError(f"there is a {insertion.block!r} at {site.address!r} already.")
    device, dtype = _home(first.module, model)
    block = build_block(insertion.block, site.channels, insertion.options, insertion.start, device=device, dtype=dtype)
    if site.span and not block.gates:
        raise SiteError(f"{insertion.block!r} takes no span: {site.address!r}.")
    free = block.order_free(insertion.options)
    name, slot = _child(first.trial, type(block), site)
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
                # a block that does not ask how positions lie takes images of any size
                grid=None if free else site.grid,
                grid_names=() if free else site.grid_names,
                grid_source="" if free else site.grid_source,
            )
        )
    if site.grid_source and not free:
        _ask(model, site, owners)


def _ask(model: nn.Module, site: Site, owners: dict[str, _Owner]) -> None:
    """Let the module that makes the map say how large it is."""
    source = site.grid_source
    if source not in owners:
        owners[source] = _Owner(model, source)
    if not any(graft.part == "tells" for graft in owners[source].grafts):
        teller = Graft(
            child="",
            node=None,
            layout=site.source_layout,
            prefix_tokens=0,
            slot="new",
            block="",
            options={},
            start="identity",
            part="tells",
            grid=site.grid,
            grid_source=source,
        )
        owners[source].grafts.append(teller)


def _child(trial: nn.Module, block: type[Block], site: Site) -> tuple[str, Slot]:
    """The name the block gets in its host: of a place the host keeps free for it, else a new one."""
    if not (site.users or site.span or site.host or block.gates):
        for name in (block.child_name, *block.slots):
            slot = find_slot(trial, name, site.node)
            if slot:
                return name, slot
    if site.host:
        return f"{site.host}.{_free_name(trial.get_submodule(site.host), block.child_name)}", "new"
    return _free_name(trial, block.child_name), "new"


def _owner(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        near = did_you_mean(path, (name for name, _ in model.named_modules()))
        raise SiteError(f"the plan cuts into {path!r}, which {type(model).__name__} does not have.{near}") from None


def _home(owner: nn.Module, model: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
    """Device and dtype of the tensors around the cut."""
    for module in (owner, model):
        for parameter in module.parameters():
            if parameter.is_floating_point():
                return parameter.device, parameter.dtype
    return None, None


def _free_name(owner: nn.Module, wanted: str) -> str:
    """`wanted`, or `wanted_2` ...: a name the host already uses, even as None, would be run by its own forward."""
    name, count = wanted, 1
    while hasattr(owner, name):
        count += 1
        name = f"{wanted}_{count}"
    return name
