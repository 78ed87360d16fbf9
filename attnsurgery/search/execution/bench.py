"""What trials are made on: base with its weights, data, places, latency backend, evaluator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import timm
from torch import nn

from attnsurgery import __version__
from attnsurgery.evaluate import (
    EVALUATORS,
    Data,
    Evaluator,
)
from attnsurgery.graph.anatomy import Anatomy
from attnsurgery.latency import LatencyBackend
from attnsurgery.samplers.places import Picks, Places
from attnsurgery.search.budgets.calibrate import Shelf
from attnsurgery.search.budgets.costs import Costs, picks_of
from attnsurgery.search.compatibility import VERSIONS, WEIGHTS_GIVEN
from attnsurgery.search.config import SearchConfig
from attnsurgery.search.execution.scorers import Scorer
from attnsurgery.search.result.limits import Budgets
from attnsurgery.search.space import BoundSpace

Fresh = Literal["all", "head", "nothing"]


@dataclass
class Bench:
    """What trials are made on."""

    config: SearchConfig
    base: nn.Module
    """With its starting weights, on the device, in eval mode; only ever copied."""
    anatomy: Anatomy
    space: BoundSpace
    data: Data
    rungs: tuple[Scorer, ...]
    """From the lowest, which every trial is scored on, to the top, which decides."""
    evaluator: Evaluator
    """Of the top rung."""
    backend: LatencyBackend
    budgets: Budgets
    costs: Costs
    places: Places
    """The space as samplers see it, with the budgets that are known exactly."""
    shelf: Shelf
    """Latencies that this machine has measured before."""
    fresh: Fresh
    """What of the base has to be trained before the search begins."""
    head: str = ""
    """What became of a classifier that came with weights, and whose classes have no names."""
    given: str | None = None
    """Digest of the weights that the base came with, from a file or published; None where it came without."""
    digests: dict[str, list[Any]] = field(default_factory=dict)
    """Of the image files, as `attnsurgery.evaluate.contents` keeps them."""
    weights: str = ""
    """Hash of the starting weights."""

    @property
    def judge(self) -> Evaluator:
        """Has the last word on the winner."""
        if self.evaluator.final:
            return self.evaluator
        return EVALUATORS["finetune"](self.evaluator.data, self.evaluator.settings)

    def in_pieces(self, pieces: int) -> Bench:
        """The same, with training batches passed in so many pieces."""
        if pieces == 1:
            return self
        settings = replace(self.evaluator.settings, pieces=pieces)
        rungs = tuple(rung.in_pieces(pieces) for rung in self.rungs)
        return replace(self, rungs=rungs, evaluator=type(self.evaluator)(self.data, settings))

    def picks(self, assignment: Mapping[str, str]) -> Picks:
        """A candidate as samplers see it."""
        return picks_of(self.places, assignment)

    def peak_mb(self, model: nn.Module) -> float | None:
        """Memory of a forward, where there is a budget for it."""
        return self.backend.peak_bytes(model) / 1e6 if "memory" in self.budgets.most else None

    def environment(self) -> dict[str, Any]:
        """What stands behind the names of the configuration."""
        return {
            "images": self.data.fingerprint,
            WEIGHTS_GIVEN: self.given,
            "weights": self.weights,
            "choices": self.space.as_dict(),
            "conditions": asdict(self.backend.conditions),
            VERSIONS: self.versions(),
        }

    def versions(self) -> dict[str, str]:
        """Of software and machine, for the latency and for the training."""
        return self.backend.versions() | {"attnsurgery": __version__, "timm": timm.__version__}
