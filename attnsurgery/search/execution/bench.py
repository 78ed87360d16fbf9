"""The bench: all that trials need, with the base and its weights, data, space, latency backend and evaluators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import timm
from torch import nn

from attnsurgery import __version__
from attnsurgery.data import Data
from attnsurgery.evaluate import EVALUATORS, Evaluator
from attnsurgery.graph.anatomy import Anatomy
from attnsurgery.latency import LatencyBackend
from attnsurgery.samplers.places import Picks, Places
from attnsurgery.search.budgets.calibrate import LatencyCache
from attnsurgery.search.budgets.costs import Costs, picks_of
from attnsurgery.search.compatibility import VERSIONS, WEIGHTS_GIVEN
from attnsurgery.search.config import SearchConfig
from attnsurgery.search.execution.scorers import Alone, Scorer
from attnsurgery.search.execution.sizes import AtSize, at_size
from attnsurgery.search.result.limits import Budgets
from attnsurgery.search.result.record import Record
from attnsurgery.search.space import BoundSpace, Sides
from attnsurgery.search.tuning import Training, Tuned
from attnsurgery.tasks import Task

Fresh = Literal["all", "head", "nothing"]
"""Which part of the base is trained before the search begins."""


@dataclass
class Bench:
    """All that trials need."""

    config: SearchConfig
    """All settings of the search."""
    base: nn.Module
    """The base with its starting weights, on the device, in eval mode. It is copied and never changed."""
    anatomy: Anatomy
    """The sites of the base."""
    space: BoundSpace
    """The search space for the base."""
    task: Task
    """The loss that trains, and the metric that judges."""
    data: Data
    """The images in their splits."""
    rungs: tuple[Scorer, ...]
    """From the lowest rung, on which every trial is scored, to the top rung, which decides."""
    evaluator: Evaluator
    """The evaluator of the top rung."""
    backend: LatencyBackend
    """Measures latencies."""
    budgets: Budgets
    """Limits that candidates have to keep to."""
    costs: Costs
    """The exact costs of all candidates."""
    places: Places
    """The space as samplers see it, with the budgets that are known exactly."""
    latency_cache: LatencyCache
    """Latencies that this machine has measured before."""
    fresh: Fresh
    """Which part of the base is trained before the search begins."""
    head: str = ""
    """What the check of a pretrained classifier without class names found; '' if there was none."""
    source_digest: str | None = None
    """Digest of the weights that the base came with, from a file or published; None if it came without weights."""
    digests: dict[str, list[Any]] = field(default_factory=dict)
    """Digests of the image files, as `attnsurgery.data.contents` stores them."""
    weights: str = ""
    """Hash of the starting weights."""
    rivals: dict[str, Bench] = field(default_factory=dict)
    """The benches of rivals by their keys, as far as they were needed in this process."""
    tuned: Tuned | None = None
    """How base and candidates are trained, in the process that gives jobs; None if the settings say all."""
    at_sizes: tuple[AtSize, ...] = ()
    """What trials at the other input sizes of the space are made on, in its order."""

    @property
    def final_evaluator(self) -> Evaluator:
        """The evaluator that trains finalists for the confirmation."""
        if self.evaluator.final:
            return self.evaluator
        return EVALUATORS["finetune"](self.evaluator.data, self.evaluator.settings, self.task)

    def training(self, *, base: bool = False) -> Training | None:
        """How the base, or else a candidate, is trained where that was chosen; None if the configuration says all."""
        if self.tuned is None:
            return None
        return self.tuned.base if base else self.tuned.candidates

    def changed(self, pieces: int, training: Training | None) -> Bench:
        """The same bench with other settings of its trainings.

        Args:
            pieces: number of parts that each training batch is split into, to save memory.
            training: learning rates, and the epochs of the top rung; None for those of the configuration.
        """
        if pieces == 1 and training is None:
            return self
        settings = replace(self.evaluator.settings, pieces=pieces)
        if training is not None:
            settings = replace(settings, lr=training.lr, new_lr_scale=training.block_lr_scale, epochs=training.epochs)
        evaluator = type(self.evaluator)(self.data, settings, self.task)
        lower = tuple(rung.changed(pieces, training) for rung in self.rungs[:-1])
        return replace(self, rungs=(*lower, Alone(evaluator)), evaluator=evaluator)

    def at(self, size: Sides | None) -> Bench:
        """The same bench for candidates of an input size of the space; None for the base's own."""
        if size is None or size == self.anatomy.input_size[1:]:
            return self
        there = next(other for other in self.at_sizes if other.size == size)
        data = self.data.at(size)
        return replace(
            self,
            base=at_size(self.base, self.config.base, self.anatomy.input_size[1:], size),
            anatomy=there.anatomy,
            data=data,
            rungs=tuple(rung.on(data) for rung in self.rungs),
            evaluator=type(self.evaluator)(data, self.evaluator.settings, self.task),
            backend=there.backend,
            latency_cache=there.latency_cache,
        )

    def at_size_of(self, record: Record | Mapping[str, Any] | None) -> Bench:
        """The same bench for a candidate, whose record may be JSON data; None for the base."""
        recipe = record.recipe if isinstance(record, Record) else (record or {}).get("recipe")
        size = (recipe or {}).get("input_size")
        return self.at(None if size is None else (size[0], size[1]))

    def picks(self, assignment: Mapping[str, str]) -> Picks:
        """A candidate as samplers see it."""
        return picks_of(self.places, assignment)

    def peak_mb(self, model: nn.Module) -> float | None:
        """Peak memory of one forward pass, in MB, if there is a budget for it, else None."""
        return self.backend.peak_bytes(model) / 1e6 if "memory" in self.budgets.limits else None

    def environment(self) -> dict[str, Any]:
        """What the names in the configuration stand for: digests of images and weights, choices, versions."""
        return {
            "images": self.data.fingerprint,
            WEIGHTS_GIVEN: self.source_digest,
            "weights": self.weights,
            "choices": self.space.as_dict(),
            "conditions": asdict(self.backend.conditions),
            VERSIONS: self.versions(),
        }

    def versions(self) -> dict[str, str]:
        """Versions of software and machine, for latencies and training."""
        return self.backend.versions() | {"attnsurgery": __version__, "timm": timm.__version__}
