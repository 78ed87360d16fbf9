"""Find the blocks of a model: the owners that surgery has changed, and the names of the blocks there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from attnsurgery.blocks import Block
from attnsurgery.graph.channel_layout import Grid
from attnsurgery.graph.wrappers import bare, submodule, walk
from attnsurgery.surgery.forward_graph import find_slot
from attnsurgery.surgery.graft import RECORD, Graft, Slot

PATHS = "_attnsurgery_blocks"
"""The attribute of a model with the paths of its blocks, by which a missing block is detected."""


def holder_of(owner: nn.Module, child: str) -> tuple[nn.Module, str]:
    """The module that holds a block, which is the owner or a child of it, and the block's name there."""
    host, _, name = child.rpartition(".")
    return submodule(owner, host), name


def operated(model: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[Graft, ...]]]:
    """Path without wrappers, module and grafts of each owner that was operated on."""
    for path, module in walk(model):
        grafts = module.__dict__.get(RECORD)
        if grafts:
            yield path, module, grafts


def grafted_blocks(model: nn.Module) -> dict[str, Block]:
    """All inserted blocks by their paths in the model; wrappers are left out of both."""
    blocks: dict[str, Any] = {}
    for path, owner, grafts in operated(model):
        for graft in grafts:
            if graft.owns_block:
                host, name = holder_of(owner, graft.child)
                block = getattr(host, name, None)
                if block is not None:
                    blocks[joined(path, graft.child)] = bare(block)
    return blocks


def joined(path: str, child: str) -> str:
    """The path of a child; the root has the empty path."""
    return f"{path}.{child}" if path else child


def copy_path(trial: nn.Module, path: str) -> None:
    """Replace the modules along `path` by copies, so that changes to them do not affect the model."""
    parent = trial
    for name in path.split("."):
        child = bare(parent._modules[name])  # type: ignore[arg-type]
        copied: nn.Module = object.__new__(type(child))
        copied.__dict__.update(child.__dict__)
        copied.__dict__["_modules"] = dict(child._modules)
        parent._modules[name] = copied
        parent = copied


class Grids:
    """The sizes of maps that modules share: one `Grid` for each map, which its source writes and owners read.

    Args:
        model: the model that was operated on.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._grids: dict[str, Grid] = {}

    def share(self, owner: nn.Module, grafts: Iterable[Graft]) -> None:
        """Give an owner the shared sizes that its grafts need."""
        for graft in grafts:
            if graft.grid_source and graft.grid and graft.grid_attribute not in owner.__dict__:
                source = submodule(self._model, graft.grid_source)
                grid = source.__dict__.get(graft.grid_attribute) or self._grids.setdefault(
                    graft.grid_attribute, Grid(*graft.grid)
                )
                owner.__dict__[graft.grid_attribute] = grid


def child_for(
    trial: nn.Module, block: type[Block], node: str | None, users: tuple[str, ...], span: tuple[str, ...], host: str
) -> tuple[str, Slot]:
    """The name of a block in its host, and the slot: a name that the host reserves for such a block, or a new one."""
    if not (users or span or host or block.gates):
        for name in (block.child_name, *block.slots):
            slot = find_slot(trial, name, node)
            if slot:
                return name, slot
    if host:
        return f"{host}.{_free_name(submodule(trial, host), block.child_name)}", "new"
    return _free_name(trial, block.child_name), "new"


def _free_name(owner: nn.Module, preferred: str) -> str:
    """`preferred`, or `preferred_2` ...; a name that the host has already, even as None, is called by its forward."""
    name, count = preferred, 1
    while hasattr(owner, name):
        count += 1
        name = f"{preferred}_{count}"
    return name
