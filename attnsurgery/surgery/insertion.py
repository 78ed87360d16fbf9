"""Insertion: one block at one site, decided but not carried out. It is data without tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from attnsurgery.blocks import Start
from attnsurgery.graph.attention import OwnAttention
from attnsurgery.graph.site import Site


@dataclass(frozen=True, slots=True)
class Insertion:
    """One block at one site."""

    site: Site
    """Where the block goes."""
    block: str
    """The block's name in the catalog."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """All options of the block, with defaults filled in."""
    start: Start = "identity"
    """How the block is initialized."""
    replaced: OwnAttention | None = None
    """The model's own attention module that is taken out; the block may then be `NO_BLOCK`."""


Insertions = tuple[Insertion, ...]
"""The insertions of one operation, in the order in which they are carried out."""
