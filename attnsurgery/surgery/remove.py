"""Taking blocks out again: all of them, which gives the base back exactly, or some, which leaves the model as if those
had never been put in.

Names of blocks follow from what stands at their host already (`se`, `se_2`), so what is left is named anew, and a
checkpoint of it loads into the model that the shorter recipe builds.
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
from attnsurgery.graph.wrappers import bare, check_uncompiled, unwrapped, walk
from attnsurgery.surgery.graft import RECORD, Graft, Slot
from attnsurgery.surgery.owners import PATHS, Grids, child_for, grafted_blocks, held_at, joined, operated
from attnsurgery.surgery.rewrite import surgical_class


def remove(model: nn.Module, paths: Collection[str] | None = None) -> nn.Module:
    """Take grafted blocks out again, in place.

    Args:
        paths: of the blocks, as `grafted_blocks` names them; by default all, and then classes, children and state dict
            are those of the base.

    Returns:
        The same object; a model without surgery is returned as it is.

    Raises:
        UsageError: a wrapper that does not allow it; says what to do. The model is unchanged.
        SurgeryError: some shall go, and one of the others is not there any more. The model is unchanged.
    """
    original, model = model, unwrapped(model, "remove")
    owners = {path: (owner, grafts) for path, owner, grafts in operated(model)}
    check_uncompiled(model, owners, "remove")
    blocks = grafted_blocks(model)
    left = {path: [] if paths is None else _left(path, grafts, paths) for path, (_, grafts) in owners.items()}
    _check_there(left, blocks)
    told = {graft.grid_source for grafts in left.values() for graft in grafts if graft.part != "tells"}
    left = {path: [graft for graft in grafts if graft.part != "tells" or path in told] for path, grafts in left.items()}
    with torch.inference_mode(False):
        names = _renamed({path: owners[path] for path in left}, left, blocks)
    # planned; from here on the model changes
    for owner, grafts in owners.values():
        for graft in reversed([graft for graft in grafts if graft.held]):
            _take_out(owner, graft)
        for graft in grafts:
            owner.__dict__.pop(graft.told, None)
        owner.__dict__.pop(RECORD, None)
        owner.__class__ = getattr(type(owner), "uncut_class", type(owner))
    grids = Grids(model)
    for path, kept in names.items():
        owner, _ = owners[path]
        grids.share(owner, kept.grafts)
        for name, block in kept.blocks.items():
            setattr(*held_at(owner, name), block)
        owner.__dict__[RECORD] = kept.grafts
        owner.__class__ = kept.cls
    _remember(model, names)
    return original


@dataclasses.dataclass
class _Kept:
    """What stays at one owner, under its new names."""

    grafts: tuple[Graft, ...]
    blocks: dict[str, nn.Module]
    """As they stand there: in a wrapper, if something has wrapped them."""
    cls: type[nn.Module]


def _first(path: str, graft: Graft) -> str:
    """The path of the block that a graft is of: it is a child of the first module of its span."""
    owner = graft.span[0] if graft.span else path
    return joined(owner, graft.child)


def _left(path: str, grafts: tuple[Graft, ...], gone: Collection[str]) -> list[Graft]:
    return [graft for graft in grafts if graft.part == "tells" or _first(path, graft) not in gone]


def _check_there(left: dict[str, list[Graft]], blocks: Mapping[str, Block]) -> None:
    for path, grafts in left.items():
        for graft in grafts:
            if graft.part != "tells" and _first(path, graft) not in blocks:
                raise SurgeryError(
                    f"the block {_first(path, graft)!r} is gone: something replaced what it was in after surgery. Take "
                    "all blocks out (attnsurgery.remove(model)) and operate anew."
                )


def _renamed(
    owners: dict[str, tuple[nn.Module, tuple[Graft, ...]]], left: dict[str, list[Graft]], blocks: dict[str, Block]
) -> dict[str, _Kept]:
    """Every owner that keeps something, with its blocks named in order as if the others had never been there."""
    names: dict[str, tuple[str, Slot]] = {}
    trials = {path: _without_blocks(*owners[path]) for path, grafts in left.items() if grafts}
    held: dict[str, dict[str, nn.Module]] = {path: {} for path in trials}
    for path, trial in trials.items():
        for graft in left[path]:
            if not graft.held:
                continue
            was = _first(path, graft)
            host = graft.child.rpartition(".")[0]
            name, slot = child_for(trial, type(blocks[was]), graft.node, graft.users, graft.span, host)
            names[was] = name, slot
            home, child = held_at(owners[path][0], graft.child)
            held[path][name] = getattr(home, child)
            home, child = held_at(trial, name)
            home.__dict__.pop(child, None)
            home._modules[child] = blocks[was]
    found = {}
    for path, trial in trials.items():
        grafts = tuple(
            graft
            if graft.part == "tells"
            else dataclasses.replace(graft, child=names[was][0], slot=names[was][1] if graft.held else graft.slot)
            for graft in left[path]
            for was in (_first(path, graft),)
        )
        found[path] = _Kept(grafts, held[path], surgical_class(trial, grafts))
    return found


def _without_blocks(owner: nn.Module, grafts: tuple[Graft, ...]) -> nn.Module:
    """A shallow copy of an owner as it was before any surgery."""
    trial = uncut_copy(owner)
    trial.__dict__.pop(RECORD, None)
    for host in {graft.child.rpartition(".")[0] for graft in grafts if "." in graft.child}:
        _replace(trial, host)
    for graft in reversed([graft for graft in grafts if graft.held]):
        _take_out(trial, graft)
    return trial


def _replace(trial: nn.Module, path: str) -> None:
    """Put copies of the modules on the way to `path` into a trial, so that a change there stays in the trial."""
    at = trial
    for name in path.split("."):
        child = bare(at._modules[name])  # type: ignore[arg-type]
        copied: nn.Module = object.__new__(type(child))
        copied.__dict__.update(child.__dict__)
        copied.__dict__["_modules"] = dict(child._modules)
        at._modules[name] = copied
        at = copied


def _take_out(owner: nn.Module, graft: Graft) -> None:
    """Give the owner back what was at the block's place."""
    host, name = held_at(owner, graft.child)
    if graft.slot == "identity":
        setattr(host, name, nn.Identity())
    elif hasattr(host, name):
        delattr(host, name)
    if graft.slot == "none":
        setattr(host, name, None)


def _remember(model: nn.Module, kept: dict[str, _Kept]) -> None:
    """What the model itself says about its blocks."""
    paths = [joined(path, name) for path, left in kept.items() for name in left.blocks]
    if paths:
        model.__dict__[PATHS] = tuple(paths)
    else:
        model.__dict__.pop(PATHS, None)
        unwatch(model)
    if not any(graft.fixed for left in kept.values() for graft in left.grafts):
        for _, module in walk(model):
            if hasattr(type(module), "set_input_size"):  # ours, set on the object
                module.__dict__.pop("set_input_size", None)
