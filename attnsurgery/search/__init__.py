"""The search: which blocks, where, under a latency budget; an Optuna study whose candidates are recipes."""

from attnsurgery.search.config import DEFAULT_BASE, SearchConfig
from attnsurgery.search.confirm import Confirmation
from attnsurgery.search.listener import Listener
from attnsurgery.search.outcome import Outcome
from attnsurgery.search.record import Record, Timing
from attnsurgery.search.space import BoundSpace, SearchSpace, bind, find
from attnsurgery.search.study import run

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
