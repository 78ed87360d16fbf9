"""Remove blocks: all of them, which restores the base exactly, or some, as if they had never been inserted.

The name of a block depends on the names that its host has already (`se`, `se_2`), so the remaining blocks are renamed.
A checkpoint of the result loads into the model that the shorter recipe builds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

import torch
from torch import nn

from attnsurgery.blocks import Block
from attnsurgery.blocks.loading import unwatch
from attnsurgery.errors import SurgeryError
from attnsurgery.graph.trace import uncut_copy
from attnsurgery.graph.wrappers import check_uncompiled, unwrapped, walk
from attnsurgery.surgery.graft import RECORD, Graft, Slot
from attnsurgery.surgery.owners import PATHS, Grids, child_for, copy_path, grafted_blocks, holder_of, joined, operated
from attnsurgery.surgery.replaced import Replaced
from attnsurgery.surgery.rewrite import surgical_class


def remove(model: nn.Module, paths: Collection[str] | None = None, put_back: bool = True) -> nn.Module:
    """Remove inserted blocks, in place; what they took the place of is put back.

    Args:
        model: a model, in a wrapper or not.
        paths: paths of the blocks, as `grafted_blocks` gives them. By default all blocks are removed, and classes,
            children and state dict are those of the base.
        put_back: False leaves what was taken out where it is, so that the model is the base without it.

    Returns:
        The same object; a model without surgery is returned as it is.

    Raises:
        UsageError: the model is in a wrapper that does not allow this; the message says what to do. The model is
            unchanged.
        SurgeryError: one of the remaining blocks is missing from the model. The model is unchanged.
    """
    original, model = model, unwrapped(model, "remove")
    owners = {path: (owner, grafts) for path, owner, grafts in operated(model)}
    check_uncompiled(model, owners, "remove")
    blocks = grafted_blocks(model)
    remaining = {path: [] if paths is None else _remaining(path, grafts, paths) for path, (_, grafts) in owners.items()}
    _check_present(remaining, blocks)
    sources = {graft.grid_source for grafts in remaining.values() for graft in grafts if graft.part != "map_source"}
    remaining = {
        path: [graft for graft in grafts if graft.part != "map_source" or path in sources]
        for path, grafts in remaining.items()
    }
    with torch.inference_mode(False):
        changes = _renamed(owners, remaining, blocks)
    # all checks are done; the model is changed from here on
    for path, (owner, grafts) in owners.items():
        for graft in reversed([graft for graft in grafts if graft.owns_block]):
            _take_out(owner, graft)
        for graft in grafts:
            owner.__dict__.pop(graft.grid_attribute, None)
        if put_back:
            _put_back(owner, {graft.replaces for graft in grafts} - {graft.replaces for graft in remaining[path]})
        owner.__dict__.pop(RECORD, None)
        owner.__class__ = getattr(type(owner), "uncut_class", type(owner))
    grids = Grids(model)
    for path, change in changes.items():
        owner, _ = owners[path]
        grids.share(owner, change.grafts)
        for name, block in change.blocks.items():
            setattr(*holder_of(owner, name), block)
        owner.__dict__[RECORD] = change.grafts
        owner.__class__ = change.cls
    _update_record(model, changes)
    return original


@dataclasses.dataclass
class _Change:
    """The remaining surgery on one owner, with new names of blocks."""

    grafts: tuple[Graft, ...]
    blocks: dict[str, nn.Module]
    """The blocks by their new names, in their wrappers if they have any."""
    cls: type[nn.Module]
    """The owner's new class."""


def _block_path(path: str, graft: Graft) -> str:
    """The path of a graft's block, which is a child of the first module of its span."""
    owner = graft.span[0] if graft.span else path
    return joined(owner, graft.child)


def _remaining(path: str, grafts: tuple[Graft, ...], removed: Collection[str]) -> list[Graft]:
    return [graft for graft in grafts if not graft.has_block or _block_path(path, graft) not in removed]


def _check_present(remaining: dict[str, list[Graft]], blocks: Mapping[str, Block]) -> None:
    """
    Raises:
        SurgeryError: a block of a remaining graft is missing.
    """
    for path, grafts in remaining.items():
        for graft in grafts:
            if graft.has_block and _block_path(path, graft) not in blocks:
                raise SurgeryError(
                    f"the block {_block_path(path, graft)!r} is missing: a module that held it was replaced after "
                    "surgery. Remove all blocks (attnsurgery.remove(model)) and operate again."
                )


def _renamed(
    owners: dict[str, tuple[nn.Module, tuple[Graft, ...]]],
    remaining: dict[str, list[Graft]],
    blocks: dict[str, Block],
) -> dict[str, _Change]:
    """The changes of all owners that keep a graft, with blocks named as if the others had never been inserted."""
    names: dict[str, tuple[str, Slot]] = {}
    trials = {path: _without_blocks(*owners[path]) for path, grafts in remaining.items() if grafts}
    children: dict[str, dict[str, nn.Module]] = {path: {} for path in trials}
    for path, trial in trials.items():
        for graft in remaining[path]:
            if not graft.owns_block:
                continue
            block_path = _block_path(path, graft)
            host = graft.child.rpartition(".")[0]
            block = blocks[block_path]
            name, slot = child_for(trial, type(block), graft.node, graft.users, graft.span, host)
            names[block_path] = name, slot
            holder, child = holder_of(owners[path][0], graft.child)
            children[path][name] = getattr(holder, child)
            holder, child = holder_of(trial, name)
            holder.__dict__.pop(child, None)
            holder._modules[child] = block
    changes = {}
    for path, trial in trials.items():
        grafts = tuple(
            _with_name(graft, *names[_block_path(path, graft)]) if graft.has_block else graft
            for graft in remaining[path]
        )
        changes[path] = _Change(grafts, children[path], surgical_class(trial, grafts))
    return changes


def _with_name(graft: Graft, name: str, slot: Slot) -> Graft:
    return dataclasses.replace(graft, child=name, slot=slot if graft.owns_block else graft.slot)


def _without_blocks(owner: nn.Module, grafts: tuple[Graft, ...]) -> nn.Module:
    """A shallow copy of an owner in its state before any surgery."""
    trial = uncut_copy(owner)
    trial.__dict__.pop(RECORD, None)
    for host in {graft.child.rpartition(".")[0] for graft in grafts if "." in graft.child}:
        copy_path(trial, host)
    for graft in reversed([graft for graft in grafts if graft.owns_block]):
        _take_out(trial, graft)
    return trial


def _put_back(owner: nn.Module, children: Collection[str]) -> None:
    """Put modules that were taken out of an owner back in their places."""
    for child in children:
        holder, name = holder_of(owner, child)
        if child and isinstance(stand_in := getattr(holder, name, None), Replaced):
            setattr(holder, name, stand_in.restored())


def _take_out(owner: nn.Module, graft: Graft) -> None:
    """Remove a block from its owner and restore what its name stood for before."""
    host, name = holder_of(owner, graft.child)
    if graft.slot == "identity":
        setattr(host, name, nn.Identity())
    elif hasattr(host, name):
        delattr(host, name)
    if graft.slot == "none":
        setattr(host, name, None)


def _update_record(model: nn.Module, changes: dict[str, _Change]) -> None:
    """Update the attributes of the model itself that depend on its blocks."""
    paths = [joined(path, name) for path, change in changes.items() for name in change.blocks]
    if paths:
        model.__dict__[PATHS] = tuple(paths)
    else:
        model.__dict__.pop(PATHS, None)
        unwatch(model)
    if not any(graft.has_fixed_grid for change in changes.values() for graft in change.grafts):
        for _, module in walk(model):
            if hasattr(type(module), "set_input_size"):  # set by `operate`
                module.__dict__.pop("set_input_size", None)
