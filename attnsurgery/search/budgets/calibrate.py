"""Measure candidates of a space for the latency model, and keep what was measured for the next time.

What is kept depends on the machine, the software, the conditions and the base, all of which name the file it is in, and
on the kinds of blocks in a candidate; spaces share it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
from torch import nn

from attnsurgery.errors import SearchError
from attnsurgery.graph.anatomy import Anatomy
from attnsurgery.graph.find import input_size_of, survey
from attnsurgery.latency import Conditions, Effort, LatencyBackend, backend_for
from attnsurgery.latency.model import Floats, Kind, LatencyModel, Measured
from attnsurgery.recipe.build import resolve
from attnsurgery.samplers.places import Picks
from attnsurgery.search.budgets.costs import Costs
from attnsurgery.search.device_lock import alone_on_device
from attnsurgery.search.files import Journal
from attnsurgery.search.space import BoundSpace, SearchSpace, bind
from attnsurgery.surgery.operate import operate
from attnsurgery.timm_plugin.architectures import check_base

_DRAWN = 64
"""So many candidates are drawn, and that one measured of which the model knows least."""
_FOLDS = 4
"""Each tells how wrong a model is that was told the others."""
EFFORT = Effort(tolerance=0.003, max_seconds=1.0, min_rounds=2, placements=2)
"""Of one candidate: many measured roughly say more than few measured well."""
Z_INTERVAL = 3.92
"""Width of a 95 % interval in standard errors."""

Measure = Callable[[Picks], Measured]


@dataclass(frozen=True, slots=True)
class Quality:
    """How wrong the model is on candidates that it was not told."""

    candidates: int
    mean: float
    """Mean absolute error of the time, as a share of it."""
    worst: float
    spearman: float
    """Rank correlation of predicted and measured times."""
    noise: float
    """Standard error of one measurement, as a share of it, the median; the errors have it in them."""


class LatencyCache:
    """What was measured on this machine under these conditions, in one file of the user's cache.

    The folder is $ATTNSURGERY_CACHE, or attnsurgery in $XDG_CACHE_HOME or ~/.cache.
    """

    def __init__(self, backend: LatencyBackend, base: Mapping[str, Any]) -> None:
        self.key = {"versions": backend.versions(), "conditions": asdict(backend.conditions), "base": dict(base)}
        digest = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:16]
        # Not by platformdirs, which since 4.12 ignores a relative $XDG_CACHE_HOME: these files would move.
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self.path = (
            Path(os.environ.get("ATTNSURGERY_CACHE") or Path(home) / "attnsurgery") / "latency" / f"{digest}.jsonl"
        )

    def read(self) -> tuple[list[Measured], dict[str, Kind]]:
        """All that is there, with the kinds of blocks in it.

        A file that does not read is as good as none: then all is measured anew.
        """
        try:
            entries = [entry for entry in Journal(self.path).read() if "counts" in entry]
            kinds = {key: Kind(**kind) for entry in entries for key, kind in entry["kinds"].items()}
            return [Measured(entry["counts"], entry["ratio"], entry["sigma"]) for entry in entries], kinds
        except (SearchError, OSError, TypeError, KeyError, ValueError):
            return [], {}

    def add(self, measured: Measured, kinds: Mapping[str, Kind]) -> None:
        """Keep one more.

        Raises:
            SearchError: the disk is full or not writable.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SearchError(f"cannot make {self.path.parent}: {error.strerror}. Set ATTNSURGERY_CACHE.") from None
        journal = Journal(self.path)
        if not self.path.exists():
            journal.append(self.key)
        journal.append(asdict(measured) | {"kinds": {key: asdict(kinds[key]) for key in measured.counts}})


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` has found."""

    model: str
    space: str
    conditions: str
    base_ms: float
    kinds: int
    """Kinds of blocks that the space has here."""
    measured: int
    before: int
    """Of these, measured earlier."""
    quality: Quality | None
    """None of too few candidates."""
    path: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def calibrate(
    model: str,
    space: SearchSpace,
    conditions: Callable[[tuple[int, int, int]], Conditions],
    seconds: float,
    *,
    classes: int | None = None,
    input_size: int | None = None,
    backend: str | None = None,
    on_measured: Callable[[int], None] | None = None,
) -> Calibration:
    """Measure candidates of the space for so long, and keep them.

    Args:
        model: any timm name; its weights do not matter.
        conditions: from (C, H, W) of the images to the conditions.
        classes: of the classifier; by default the model's own.
        on_measured: told the number of candidates measured so far.

    Raises:
        UnknownNameError, SiteError, OptionError: no such model, or a space that does not fit it.
        UsageError: conditions that this machine or model does not have.
        SearchError: the cache cannot be written.
    """
    check_base(model, "MODEL")
    base: nn.Module = timm.create_model(model, **({} if classes is None else {"num_classes": classes})).eval()
    channels, height, width = input_size_of(base)
    size = (channels, input_size, input_size) if input_size else (channels, height, width)
    anatomy = survey(base, size)
    bound = bind(space, anatomy, model)
    costs = Costs.count(bound, anatomy, base)
    meter = alone_on_device(backend_for(conditions(size), backend, EFFORT))
    base = base.to(meter.conditions.device)
    cache = LatencyCache(meter, base_key(base, model))
    measurements, kinds = cache.read()
    count_before = len(measurements)
    base_ms = meter.measure(base).p50_ms
    for measurement in calibrated(
        bound, costs, measurements, kinds, in_place(base, anatomy, bound, costs, meter), seconds
    ):
        cache.add(measurement, costs.kinds)
        measurements.append(measurement)
        if on_measured:
            on_measured(len(measurements) - count_before)
    return Calibration(
        model=model,
        space=bound.name,
        conditions=meter.describe(),
        base_ms=base_ms,
        kinds=len(costs.kinds),
        measured=len(measurements),
        before=count_before,
        quality=quality(costs.base["macs"], {**kinds, **costs.kinds}, measurements),
        path=str(cache.path),
    )


def base_key(base: nn.Module, name: str) -> dict[str, Any]:
    """What of a base its latency depends on."""
    return {"name": name.partition(".")[0], "classes": getattr(base, "num_classes", None)}


def in_place(base: nn.Module, anatomy: Anatomy, space: BoundSpace, costs: Costs, backend: LatencyBackend) -> Measure:
    """Measures candidates by building them from the base and comparing the two."""

    def measure(picks: Picks) -> Measured:
        recipe = space.recipe_of(space.places.params(picks))
        assert recipe is not None, "a candidate has a block"
        model = operate(copy.deepcopy(base), resolve(recipe, anatomy)).to(backend.conditions.device)
        comparison = backend.compare(base, model)
        return Measured(
            dict(costs.counts(picks)), comparison.ratio, (comparison.ratio_high - comparison.ratio_low) / Z_INTERVAL
        )

    return measure


def calibrated(
    space: BoundSpace,
    costs: Costs,
    measured_before: Sequence[Measured],
    kinds: Mapping[str, Kind],
    measure: Measure,
    seconds: float,
    seed: int = 0,
) -> Iterator[Measured]:
    """Measure one candidate after another for so long, each time the one that would tell most.

    Args:
        measured_before: measured before, of these `kinds` or of the space's own.
    """
    rng = np.random.default_rng(seed)
    everything = {**kinds, **costs.kinds}
    measurements = list(measured_before)
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        model = LatencyModel(costs.base["macs"], everything, measurements)
        drawn = [picks for _ in range(_DRAWN) if (picks := space.places.drawn(rng, lambda _: True))]
        if not drawn:
            return
        measurements.append(measure(max(drawn, key=lambda picks: model.gain(costs.counts(picks)))))
        yield measurements[-1]


def quality(base_macs: int, kinds: Mapping[str, Kind], measured: Sequence[Measured]) -> Quality | None:
    """The error on every candidate, of a model that was told three quarters of the others; None of fewer than 8."""
    if len(measured) < 2 * _FOLDS:
        return None
    predicted = np.empty(len(measured))
    for fold in range(_FOLDS):
        training = [measurement for index, measurement in enumerate(measured) if index % _FOLDS != fold]
        model = LatencyModel(base_macs, kinds, training)
        predicted[fold::_FOLDS] = [model.predict(measurement.counts).ratio for measurement in measured[fold::_FOLDS]]
    true = np.array([measurement.ratio for measurement in measured])
    errors = np.abs(predicted / true - 1.0)
    noise = float(np.median([measurement.sigma / measurement.ratio for measurement in measured]))
    return Quality(len(measured), float(errors.mean()), float(errors.max()), spearman(predicted, true), noise)


def spearman(first: Floats, second: Floats) -> float:
    """Rank correlation of two series without ties."""
    ranks = np.stack([np.argsort(np.argsort(series)) for series in (first, second)])
    matrix: Any = np.corrcoef(ranks)
    return float(matrix[0, 1])
