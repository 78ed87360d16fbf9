"""Samplers, which choose the next candidate: for an Optuna study whose parameters are the choices at places."""

from attnsurgery.samplers._base import AGAIN, BLOCKS, SAMPLERS, Sampler
from attnsurgery.samplers.places import Places

__all__ = ["AGAIN", "BLOCKS", "SAMPLERS", "Places", "Sampler"]
