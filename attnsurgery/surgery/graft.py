"""Graft: the record of surgery on one module, which is kept on it and suffices to repeat or undo the surgery."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from attnsurgery.blocks import Start
from attnsurgery.graph.site import Layout

RECORD = "_attnsurgery"
"""The attribute of an owner with the tuple of its grafts."""

Slot = Literal["new", "none", "identity"]
"""What the block's name stood for before: 'new' is nothing; 'none' and 'identity' are a None or an Identity that the
host reserves for such a block and that its forward calls."""
Part = Literal["place", "point", "whole", "first", "middle", "last", "map_source", "removal"]
"""The role of the owner. 'place': the block replaces a tensor. 'point': the tensor is multiplied by the block's result.
'whole': the owner is a span of one. 'first', 'middle' and 'last': a module of a longer span; the first one holds the
block. 'map_source': it holds no block, but publishes the size of the map that it makes. 'removal': a module of it was
taken out, with no block in its place."""


@dataclass(frozen=True, slots=True)
class Graft:
    """Surgery on one owner for one block."""

    child: str
    """Path of the block, relative to the owner."""
    node: str | None
    """The fx node whose value the block takes; None for the owner's output."""
    layout: Layout
    """Layout of that tensor."""
    prefix_tokens: int
    """Number of its first tokens that the block does not change."""
    slot: Slot
    block: str
    """Name of the block in the catalog."""
    options: Mapping[str, Any]
    """All options of the block."""
    start: Start
    """How the block was initialized."""
    users: tuple[str, ...] = ()
    """The nodes for which the block's result replaces the value; empty means all its users."""
    span: tuple[str, ...] = ()
    """Paths of the modules of the span, the owner among them."""
    part: Part = "place"
    element: tuple[int, int] | None = None
    """Index of the tensor and number of tensors where the owner returns several; the number is 0 for a list."""
    grid: tuple[int, int] | None = None
    """(H, W) of an NLC tensor, for a block that needs it; with one of the next two, the size at the time of surgery."""
    grid_names: tuple[str, ...] = ()
    """The arguments of the owner that pass the grid in each forward."""
    grid_source: str = ""
    """Path of the module that makes the map and publishes its size in each forward."""
    replaces: str = ""
    """Path, relative to the owner, of the model's own attention module that was taken out; empty if none was."""

    @property
    def owns_block(self) -> bool:
        """True if the block is a child of this owner."""
        return self.part in ("place", "point", "whole", "first")

    @property
    def has_block(self) -> bool:
        """True if the surgery concerns a block, which this owner or another module of the span has."""
        return self.part not in ("map_source", "removal")

    @property
    def has_fixed_grid(self) -> bool:
        """True if the grid holds for one image size only."""
        return self.grid is not None and not self.grid_names and not self.grid_source

    @property
    def grid_attribute(self) -> str:
        """The attribute of modules that holds the shared size of the map."""
        return f"_attnsurgery_grid__{self.grid_source.replace('.', '__')}"

    @property
    def grid_expression(self) -> str:
        """Source text for height and width of the grid: arguments of the owner, the shared size, or numbers."""
        if len(self.grid_names) == 1:
            return f"{self.grid_names[0]}[0], {self.grid_names[0]}[1]"
        if self.grid_source:
            return f"self.{self.grid_attribute}.height, self.{self.grid_attribute}.width"
        return ", ".join(self.grid_names or map(str, self.grid or ()))

    @property
    def gate_attribute(self) -> str:
        """The attribute of a tensor that carries the gate through a span."""
        return f"_attnsurgery_{'__'.join(self.span[0].split('.'))}__{self.child}"
