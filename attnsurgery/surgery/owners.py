"""Where blocks are in a model: the owners that surgery has changed, and the names that blocks have there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from attnsurgery.blocks import Block
from attnsurgery.graph.channel_layout import Grid
from attnsurgery.graph.wrappers import bare, submodule, walk
from attnsurgery.surgery.graft import RECORD, Graft, Slot
from attnsurgery.surgery.rewrite import find_slot

PATHS = "_attnsurgery_blocks"
"""The attribute of a model that says where blocks were put, so that a lost one is missed."""


def held_at(owner: nn.Module, child: str) -> tuple[nn.Module, str]:
    """The module that holds a block, and the block's name there: the owner, or a child of it."""
    host, _, name = child.rpartition(".")
    return submodule(owner, host), name


def operated(model: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[Graft, ...]]]:
    """Path without wrappers, module and record of every owner that was operated on."""
    for path, module in walk(model):
        grafts = module.__dict__.get(RECORD)
        if grafts:
            yield path, module, grafts


def grafted_blocks(model: nn.Module) -> dict[str, Block]:
    """Every grafted block by its path in the model, wrappers left out of both."""
    found: dict[str, Any] = {}
    for path, owner, grafts in operated(model):
        for graft in grafts:
            if graft.held:
                host, name = held_at(owner, graft.child)
                block = getattr(host, name, None)
                if block is not None:
                    found[joined(path, graft.child)] = bare(block)
    return found


def joined(path: str, child: str) -> str:
    return f"{path}.{child}" if path else child


class Grids:
    """The sizes of maps that modules share: one object for a map, held by who tells it and who is told."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._made: dict[str, Grid] = {}

    def share(self, owner: nn.Module, grafts: Iterable[Graft]) -> None:
        for graft in grafts:
            if graft.grid_source and graft.grid and graft.told not in owner.__dict__:
                source = submodule(self._model, graft.grid_source)
                known = source.__dict__.get(graft.told) or self._made.setdefault(graft.told, Grid(*graft.grid))
                owner.__dict__[graft.told] = known


def child_for(
    trial: nn.Module, block: type[Block], node: str | None, users: tuple[str, ...], span: tuple[str, ...], host: str
) -> tuple[str, Slot]:
    """The name the block gets in its host: of a place the host keeps free for it, else a new one."""
    if not (users or span or host or block.gates):
        for name in (block.child_name, *block.slots):
            slot = find_slot(trial, name, node)
            if slot:
                return name, slot
    if host:
        return f"{host}.{_free_name(submodule(trial, host), block.child_name)}", "new"
    return _free_name(trial, block.child_name), "new"


def _free_name(owner: nn.Module, wanted: str) -> str:
    """`wanted`, or `wanted_2` ...: a name the host already uses, even as None, would be run by its own forward."""
    name, count = wanted, 1
    while hasattr(owner, name):
        count += 1
        name = f"{wanted}_{count}"
    return name
