"""The latency of a model under given conditions, and the ratio of two models that are measured alternately."""

from attnsurgery.latency._base import LATENCY, LatencyBackend, backend_for
from attnsurgery.latency.conditions import MODES, Conditions, device_defaults
from attnsurgery.latency.protocol import Effort
from attnsurgery.latency.result import Comparison, Latency, Singles
from attnsurgery.settings import Mode

__all__ = [
    "LATENCY",
    "MODES",
    "Comparison",
    "Conditions",
    "Effort",
    "Latency",
    "LatencyBackend",
    "Mode",
    "Singles",
    "backend_for",
    "device_defaults",
]
