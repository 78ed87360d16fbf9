"""The search: which blocks, where, under a latency budget; an Optuna study whose candidates are recipes."""

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
