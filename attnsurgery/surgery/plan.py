"""Plan: every cut decided, nothing done. Data without tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from attnsurgery.blocks import Start
from attnsurgery.graph.site import Site


@dataclass(frozen=True, slots=True)
class Insertion:
    """One block at one site."""

    site: Site
    block: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """Every option, defaults filled in."""
    start: Start = "identity"


Plan = tuple[Insertion, ...]
