"""Which candidate to try next: samplers for an Optuna study whose parameters are places and what goes there."""

from attnsurgery.samplers._base import AGAIN, BLOCKS, SAMPLERS, Sampler
from attnsurgery.samplers.places import Places

__all__ = ["AGAIN", "BLOCKS", "SAMPLERS", "Places", "Sampler"]
