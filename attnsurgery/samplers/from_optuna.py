"""Optuna's own samplers, unchanged: to compare with, and for spaces in which the effects of blocks do not add up."""

from __future__ import annotations

from typing import ClassVar

import optuna
from optuna.samplers import TPESampler

from attnsurgery.samplers._base import SAMPLERS
from attnsurgery.samplers.places import Places


@SAMPLERS.register("tpe")
class TpeSampler(TPESampler):
    """Optuna's tree-structured Parzen estimator, which takes constraints into account."""

    def __init__(self, places: Places, seed: int, base_score: float | None = None) -> None:
        super().__init__(seed=seed, n_startup_trials=8)


@SAMPLERS.register("nsga2")
class Nsga2Sampler(optuna.samplers.NSGAIISampler):
    """Optuna's NSGA-II with a population of 16."""

    def __init__(self, places: Places, seed: int, base_score: float | None = None) -> None:
        super().__init__(seed=seed, population_size=16)


@SAMPLERS.register("random")
class RandomSampler(optuna.samplers.RandomSampler):
    """Random search: the choice at every place is drawn independently and uniformly."""

    draws_uniformly: ClassVar[bool] = True

    def __init__(self, places: Places, seed: int, base_score: float | None = None) -> None:
        super().__init__(seed=seed)
