"""What surgery did to one module: the note it leaves there, from which it can be done again and undone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from attnsurgery.blocks import Start
from attnsurgery.graph.site import Layout

RECORD = "_attnsurgery"
"""The attribute of an owner that says what was grafted onto it."""

Slot = Literal["new", "none", "identity"]
Part = Literal["place", "point", "whole", "first", "middle", "last", "tells"]


@dataclass(frozen=True, slots=True)
class Graft:
    """What surgery did to one owner, kept on it; enough to do it again and to undo it."""

    child: str
    node: str | None
    """The fx node whose value the block takes; None is the owner's output."""
    layout: Layout
    prefix_tokens: int
    slot: Slot
    """'new': a child that was not there. 'none', 'identity': a place the host kept free, which its forward calls."""
    block: str
    options: Mapping[str, Any]
    start: Start
    users: tuple[str, ...] = ()
    """The nodes for which the block's result replaces the value; empty is all."""
    span: tuple[str, ...] = ()
    """Paths of the modules of the span, this owner among them."""
    part: Part = "place"
    """What this owner is to the span: all of it, or its first module, which holds the block, or a later one. 'point' is
    a place that is multiplied with what the block makes of it; 'tells' is no place at all, but a module that makes a
    map and says how large it is."""
    element: tuple[int, int] | None = None
    """Where the owner returns several tensors: which, of how many (0: a list)."""
    grid: tuple[int, int] | None = None
    """(H, W) of an NLC tensor, for a block that needs it."""
    grid_names: tuple[str, ...] = ()
    """The arguments of the owner that say it; then `grid` is only what they said at the time of surgery."""
    grid_source: str = ""
    """Or the module that makes the map."""

    @property
    def held(self) -> bool:
        """True if the block is this owner's child."""
        return self.part in ("place", "point", "whole", "first")

    @property
    def fixed(self) -> bool:
        """True if the grid is that of one size of images."""
        return self.grid is not None and not self.grid_names and not self.grid_source

    @property
    def told(self) -> str:
        """The attribute under which modules share the size of a map."""
        return f"_attnsurgery_grid__{self.grid_source.replace('.', '__')}"

    @property
    def size(self) -> str:
        """The grid as text, in terms of the owner's arguments where they say it."""
        if len(self.grid_names) == 1:
            return f"{self.grid_names[0]}[0], {self.grid_names[0]}[1]"
        if self.grid_source:
            return f"self.{self.told}.height, self.{self.told}.width"
        return ", ".join(self.grid_names or map(str, self.grid or ()))

    @property
    def carrier(self) -> str:
        """The attribute of a tensor in which the gate travels through a span."""
        return f"_attnsurgery_{'__'.join(self.span[0].split('.'))}__{self.child}"
