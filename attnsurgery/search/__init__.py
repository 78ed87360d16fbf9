"""The search for blocks and their places under a budget, as an Optuna study whose candidates are recipes."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnsurgery.search.config import DEFAULT_BASE, SearchConfig
    from attnsurgery.search.coordinator.search import run
    from attnsurgery.search.listener import Listener
    from attnsurgery.search.result.confirmation import Confirmation
    from attnsurgery.search.result.outcome import Outcome
    from attnsurgery.search.result.record import Record, Timing
    from attnsurgery.search.space import BoundSpace, SearchSpace, bind, find

__all__ = [
    "DEFAULT_BASE",
    "BoundSpace",
    "Confirmation",
    "Listener",
    "Outcome",
    "Record",
    "SearchConfig",
    "SearchSpace",
    "Timing",
    "bind",
    "find",
    "run",
]

_HOMES = {
    "DEFAULT_BASE": "config",
    "BoundSpace": "space",
    "Confirmation": "result.confirmation",
    "Listener": "listener",
    "Outcome": "result.outcome",
    "Record": "result.record",
    "SearchConfig": "config",
    "SearchSpace": "space",
    "Timing": "result.record",
    "bind": "space",
    "find": "space",
    "run": "coordinator.search",
}
"""The module of each name. Names are imported when they are used: the settings need no torch, so `--help` is fast."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
