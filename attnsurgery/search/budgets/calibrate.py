"""Calibration: measures candidates of a space for the latency model, and caches the measurements.

Measurements depend on machine, software, conditions and base, and each combination has its own cache file. Within a
file, they depend only on the kinds of blocks in a candidate, so spaces share them.
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
from attnsurgery.search.device_lock import with_device_lock
from attnsurgery.search.files import Journal
from attnsurgery.search.space import BoundSpace, SearchSpace, bind
from attnsurgery.settings import image_size, sides
from attnsurgery.surgery.operate import operate
from attnsurgery.timm_plugin.architectures import check_base, for_images, weightless

_DRAWN = 64
"""Number of candidates that are drawn for each measurement; the one with the largest expected gain is measured."""
_FOLDS = 4
"""Number of folds of the cross-validation."""
EFFORT = Effort(tolerance=0.003, max_seconds=1.0, min_rounds=2, placements=2)
"""Effort for one candidate: many rough measurements say more than few precise ones."""
Z_INTERVAL = 3.92
"""Width of a 95 % interval in standard errors."""

Measure = Callable[[Picks], Measured]


@dataclass(frozen=True, slots=True)
class Quality:
    """The cross-validated error of the latency model."""

    candidates: int
    """Number of candidates."""
    mean: float
    """Mean absolute error of the latency, relative to it."""
    worst: float
    """Largest absolute error, relative to the latency."""
    spearman: float
    """Rank correlation of predicted and measured latencies."""
    noise: float
    """Median of the relative standard errors of the measurements, which the errors include."""


class LatencyCache:
    """The measurements of this machine under the same conditions, in one file of the user's cache.

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
        """All measurements, and the kinds of blocks in them; none if the file cannot be read."""
        try:
            entries = [entry for entry in Journal(self.path).read() if "counts" in entry]
            kinds = {key: Kind(**kind) for entry in entries for key, kind in entry["kinds"].items()}
            return [Measured(entry["counts"], entry["ratio"], entry["sigma"]) for entry in entries], kinds
        except (SearchError, OSError, TypeError, KeyError, ValueError):
            return [], {}

    def add(self, measured: Measured, kinds: Mapping[str, Kind]) -> None:
        """Append a measurement.

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
    """The result of `calibrate`."""

    model: str
    """The timm name of the base."""
    space: str
    """Name of the search space."""
    conditions: str
    """The conditions of the latency in words."""
    base_ms: float
    """Latency of the base, in ms."""
    kinds: int
    """Number of kinds of blocks in the space for this model."""
    measured: int
    """Number of measured candidates in the cache."""
    before: int
    """How many of them were measured earlier."""
    quality: Quality | None
    """The error of the latency model; None if there are too few candidates."""
    path: str
    """The cache file."""
    input_size: tuple[int, int, int]
    """(C, H, W) of an image."""

    def as_dict(self) -> dict[str, Any]:
        """JSON data."""
        return asdict(self)


def calibrate(
    model: str,
    space: SearchSpace,
    conditions: Callable[[tuple[int, int, int]], Conditions],
    seconds: float,
    *,
    classes: int | None = None,
    input_size: tuple[int, int] | None = None,
    backend: str | None = None,
    on_measured: Callable[[int], None] | None = None,
) -> Calibration:
    """Measure candidates of a space at one input size for a while, and cache the measurements.

    Args:
        model: any timm name; its weights do not matter.
        space: the search space; its own input sizes are ignored (`calibrate_sizes`).
        conditions: returns the conditions for (C, H, W) of an image.
        seconds: how long to measure.
        classes: number of classes; by default the model's own.
        input_size: height and width of an image; by default the model's own.
        backend: name of the latency backend; by default the device's own.
        on_measured: called with the number of candidates measured so far.

    Raises:
        UnknownNameError, SiteError, OptionError: no such model, or a space that does not fit it.
        UsageError: conditions that this machine or model does not support.
        SearchError: the cache cannot be written.
    """
    check_base(model, "MODEL")
    number = {} if classes is None else {"num_classes": classes}
    base: nn.Module = timm.create_model(model, **number, **for_images(model, input_size)).eval()
    channels, height, width = input_size_of(base)
    size = (channels, *(input_size or (height, width)))
    anatomy = survey(base, size)
    bound = bind(space.model_copy(update={"input_sizes": None}), anatomy, model)
    costs = Costs.count(bound, anatomy, base)
    meter = with_device_lock(backend_for(conditions(size), backend, EFFORT))
    base = base.to(meter.conditions.device)
    cache = LatencyCache(meter, base_key(base, model))
    measurements, kinds = cache.read()
    count_before = len(measurements)
    base_ms = meter.measure(base).p50_ms
    for measurement in measure_informative(
        bound, costs, measurements, kinds, measure_by_building(base, anatomy, bound, costs, meter), seconds
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
        input_size=size,
    )


def calibrate_sizes(
    model: str,
    space: SearchSpace,
    conditions: Callable[[tuple[int, int, int]], Conditions],
    seconds: float,
    *,
    classes: int | None = None,
    input_size: tuple[int, int] | None = None,
    backend: str | None = None,
    on_measured: Callable[[int], None] | None = None,
) -> list[Calibration]:
    """`calibrate` at each input size of a space, its own first; the time is divided equally among them.

    What is measured at one size says nothing of another, so each has a latency model of its own.
    """
    check_base(model, "MODEL")
    listed = [sides(image_size(size)) for size in space.input_sizes or ()]  # type: ignore[arg-type]
    own = input_size or input_size_of(weightless(model))[1:]
    sizes = dict.fromkeys([own, *listed])
    before = 0
    results: list[Calibration] = []
    for size in sizes:

        def measured(count: int, before: int = before) -> None:
            if on_measured:
                on_measured(before + count)

        result = calibrate(
            model,
            space,
            conditions,
            seconds / len(sizes),
            classes=classes,
            input_size=size,
            backend=backend,
            on_measured=measured,
        )
        before += result.measured - result.before
        results.append(result)
    return results


def base_key(base: nn.Module, name: str) -> dict[str, Any]:
    """The properties of a base that its latency depends on: architecture and number of classes."""
    return {"name": name.partition(".")[0], "classes": getattr(base, "num_classes", None)}


def measure_by_building(
    base: nn.Module, anatomy: Anatomy, space: BoundSpace, costs: Costs, backend: LatencyBackend
) -> Measure:
    """A function that builds a candidate from the base and measures the two alternately."""

    def measure(picks: Picks) -> Measured:
        recipe = space.recipe_for(space.places.params(picks))
        assert recipe is not None, "a candidate has a block"
        model = operate(copy.deepcopy(base), resolve(recipe, anatomy)).to(backend.conditions.device)
        comparison = backend.compare(base, model)
        return Measured(
            dict(costs.counts(picks)), comparison.ratio, (comparison.ratio_high - comparison.ratio_low) / Z_INTERVAL
        )

    return measure


def measure_informative(
    space: BoundSpace,
    costs: Costs,
    measured_before: Sequence[Measured],
    kinds: Mapping[str, Kind],
    measure: Measure,
    seconds: float,
    seed: int = 0,
) -> Iterator[Measured]:
    """Measure one candidate after another, each time the one with the largest expected gain for the latency model.

    Args:
        space: whose candidates are measured.
        costs: of its candidates.
        measured_before: earlier measurements, of these `kinds` or of the space's own.
        kinds: of blocks in earlier measurements.
        measure: measures a candidate.
        seconds: how long to measure.
        seed: of the draws.
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
    """The cross-validated error of the latency model; None for fewer than 8 candidates."""
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
    """Spearman's rank correlation of two series; NaN if all values of one are equal."""
    from scipy.stats import spearmanr

    return float(spearmanr(first, second).statistic)
