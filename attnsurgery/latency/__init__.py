"""How fast: latency of a model with its conditions, and the ratio of two models measured alternately."""

from attnsurgery.latency._base import LATENCY, Comparison, Conditions, Latency, LatencyBackend, Mode, backend_for
from attnsurgery.latency.protocol import Effort

__all__ = [
    "LATENCY",
    "Comparison",
    "Conditions",
    "Effort",
    "Latency",
    "LatencyBackend",
    "Mode",
    "backend_for",
]
