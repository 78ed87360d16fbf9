"""Optuna's own samplers, as they come: to compare with, and for spaces in which blocks do not add up."""

from __future__ import annotations

import optuna
from optuna.samplers import TPESampler

from attnsurgery.samplers._base import SAMPLERS
from attnsurgery.samplers.places import Places


@SAMPLERS.register("tpe")
class TpeSampler(TPESampler):
    """Optuna's tree-structured Parzen estimator, which knows constraints."""

    def __init__(self, places: Places, seed: int, base_score: float | None = None) -> None:
        super().__init__(seed=seed, n_startup_trials=8)


@SAMPLERS.register("nsga2")
class Nsga2Sampler(optuna.samplers.NSGAIISampler):
    """Optuna's NSGA-II, in small generations."""

    def __init__(self, places: Places, seed: int, base_score: float | None = None) -> None:
        super().__init__(seed=seed, population_size=16)


@SAMPLERS.register("random")
class RandomSampler(optuna.samplers.RandomSampler):
    """Every place by itself, uniformly."""

    draws_uniformly = True

    def __init__(self, places: Places, seed: int, base_score: float | None = None) -> None:
        super().__init__(seed=seed)
