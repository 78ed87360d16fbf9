"""What fits where the base alone is over a budget: smaller images, or smaller timm models of the same family.

Few and short measurements decide, on the search's own device and under its conditions. A larger image is not faster,
and each measurement predicts which size is to be tried next. Models are tried in the order of multiply-accumulates.
Where the base is over a budget for parameters or multiply-accumulates, these are counted and nothing is measured.
"""

from __future__ import annotations

import difflib
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import timm
import torch
from timm.models import model_entrypoint, split_model_name_tag
from torch import nn

from attnsurgery.errors import AttnSurgeryError
from attnsurgery.faults import Fault, fault_of
from attnsurgery.latency import Effort, backend_for
from attnsurgery.search.execution.baseline import timing_of
from attnsurgery.search.execution.bench import Bench
from attnsurgery.search.result.record import Record
from attnsurgery.search.watching import Watching
from attnsurgery.surgery.verify import count_macs
from attnsurgery.timm_plugin.architectures import for_images, weightless
from attnsurgery.timm_plugin.segmentation import parse

_SECONDS = 8.0
"""Time after which nothing more is tried, in s; five eighths of it are for sizes."""
_EFFORT = Effort(tolerance=0.02, max_seconds=0.3, min_rounds=3, max_warmup_seconds=0.2, placements=3, rounds=1)
"""Effort for one measurement."""
_MAX_SIBLINGS = 3
"""Largest number of other models that are measured."""
_MAX_COUNTED = 8
"""Largest number of other models whose multiply-accumulates are counted."""
_SMALL_IMAGE, _FINE_STEP, _STEP = 96, 8, 32
"""Images up to this many pixels a side are reduced in fine steps, larger ones in steps of 32 pixels."""
_MARGIN = 0.95
"""Share of a budget that the next size is chosen for, as the upper end of an interval has to keep to it."""
_SMALLEST = 16
"""Smallest height and width that is tried, in pixels."""
_SIZE_WORDS = [
    "atto",
    "femto",
    "pico",
    "nano",
    "tiny",
    "mini",
    "small",
    "medium",
    "base",
    "large",
    "xlarge",
    "huge",
    "giant",
]
"""Words for sizes in names of models, ascending."""


@dataclass(frozen=True, slots=True)
class Alternative:
    """A model and an image size that were tried in place of the base."""

    model: str
    """Its timm name."""
    height: int
    """Height of an image in pixels."""
    width: int
    """Width of an image in pixels."""
    within: bool
    """Whether its known costs are within the budgets, by the upper end of the interval of its latency."""
    costs: Mapping[str, float]
    """Its known costs by the names of budgets; the upper end of the interval of its latency."""
    ms: float | None = None
    """Latency, in ms; None if it was not measured."""


def what_fits(bench: Bench, base_ms: float | None, watch: Watching) -> list[Alternative]:
    """Try smaller images for the base, and then smaller models of its family, for a limited time.

    Args:
        bench: what trials are made on. Its base is over a budget.
        base_ms: the base's latency, in ms; None to compare parameters and multiply-accumulates alone.
        watch: says whether the user asked for an end.

    Raises:
        StopRequested: the user asked for an end.
    """
    if base_ms is not None and bench.backend.conditions.compiled:  # one measurement would take as long as compiling
        return []
    start, attempts = time.monotonic(), _Attempts(bench, base_ms, watch)
    if bench.costs.base["parameters"] <= bench.budgets.limits.get("parameters", math.inf):  # or sizes do not help
        attempts.until = start + _SECONDS * 5 / 8
        _try_sizes(attempts)
    attempts.until = start + _SECONDS
    _try_siblings(attempts)
    return attempts.tried


class _Attempts:
    """Measures models and sizes, while there is time.

    Args:
        bench: what trials are made on.
        base_ms: the base's latency, in ms; None if latencies are not measured.
        watch: says whether the user asked for an end.
    """

    def __init__(self, bench: Bench, base_ms: float | None, watch: Watching) -> None:
        self.bench, self.base_ms = bench, base_ms
        self.tried: list[Alternative] = []
        self.until = 0.0
        """Time after which nothing more is measured, on the monotonic clock, in s."""
        self._watch = watch
        self._longest_s = 0.0
        self._takes_any_size = False
        """Whether the base is known to take images of any size as it is."""

    @property
    def over(self) -> bool:
        """Whether there is no time for another measurement, which may take as long as the longest so far.

        Raises:
            StopRequested: the user asked for an end.
        """
        self._watch.wait()
        return time.monotonic() + self._longest_s > self.until

    def attempt(self, name: str, size: tuple[int, int]) -> Alternative | None:
        """Determine the costs of a model under the conditions of the search, with an input size.

        Returns:
            The result; None where the model cannot take such images, or they do not fit into memory.
        """
        start = time.monotonic()
        try:
            alternative = self._alternative(name, size)
        except (AttnSurgeryError, RuntimeError, AssertionError, ValueError, TypeError) as error:
            if fault_of(error) is Fault.DEVICE:
                raise
            return None
        finally:
            self._longest_s = max(self._longest_s, time.monotonic() - start)
        self.tried.append(alternative)
        return alternative

    def _alternative(self, name: str, size: tuple[int, int]) -> Alternative:
        bench = self.bench
        model, input_size = self._model(name, size), (bench.anatomy.input_size[0], *size)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        macs = count_macs(model, input_size) if "macs" in bench.budgets.limits else None
        record = Record(-1, "pending", parameters=parameters, macs=macs)
        if self.base_ms is not None and bench.budgets.check(record).within:
            self._watch.listener.phase(f"measuring what fits: {name} at {size[0]} x {size[1]}")
            conditions = replace(bench.backend.conditions, input_size=input_size)
            backend = backend_for(conditions, bench.config.latency, _EFFORT)
            backend.lock = bench.backend.lock
            record = replace(record, timing=timing_of(backend.measure(model)))
            if "memory" in bench.budgets.limits:
                record = replace(record, peak_mb=backend.peak_bytes(model) / 1e6)
        check = bench.budgets.check(record, "high")
        costs = {cost: bench.budgets.limits[cost] * (1 + share) for cost, share in check.by.items()}
        return Alternative(name, *size, check.within, costs, record.timing.ms if record.timing else None)

    def _model(self, name: str, size: tuple[int, int]) -> nn.Module:
        """The base, or a model with random weights, which suffice for a latency."""
        bench = self.bench
        if name == bench.config.base and self._takes_any_size:
            return bench.base
        sized = for_images(name, size)
        if name == bench.config.base and not sized and not for_images(name, bench.anatomy.input_size[1:]):
            self._takes_any_size = True
            return bench.base
        with torch.random.fork_rng(devices=[]):
            model: nn.Module = timm.create_model(name, num_classes=bench.data.num_classes, **sized)
            return model


def _try_sizes(attempts: _Attempts) -> None:
    """Look for the largest image size at which the base fits."""
    bench = attempts.bench
    height, width = bench.anatomy.input_size[1:]
    sizes = _smaller_sizes(bench.base, (height, width))
    limits = bench.budgets.limits
    costs = {"macs": float(bench.costs.base["macs"])} | ({"latency": attempts.base_ms} if attempts.base_ms else {})
    pixels, low, high = height * width, 0, len(sizes)
    while low < high and not attempts.over:  # the sizes from `low` to before `high` are still to be decided
        # the next one is the largest that would fit if costs were proportional to the number of pixels
        shares = [limits.get(name, math.inf) / max(cost, 1e-9) for name, cost in costs.items()]
        most_pixels = pixels * _MARGIN * min(shares)
        index = sum(math.prod(size) <= most_pixels for size in sizes) - 1
        index = min(max(index, low), high - 1)
        alternative = attempts.attempt(bench.config.base, sizes[index])
        if alternative is None:
            del sizes[index]
            high -= 1
            continue
        pixels, costs = alternative.height * alternative.width, dict(alternative.costs)
        if alternative.within:
            low = index + 1
        else:
            high = index


def _smaller_sizes(base: nn.Module, size: tuple[int, int]) -> list[tuple[int, int]]:
    """Image sizes (H, W) below the present one, ascending: multiples of the patch size, or of 8 or 32 pixels.

    The ratio of height to width stays as it is, up to the size of a step.
    """
    shorter, longer = min(size), max(size)
    step = _FINE_STEP if shorter <= _SMALL_IMAGE else _STEP
    patch = getattr(getattr(base, "patch_embed", None), "patch_size", 1)
    patch = max(patch) if isinstance(patch, Sequence) else patch
    if isinstance(patch, int):
        step = patch * math.ceil(step / patch)
    sizes = []
    for side in range(step, shorter, step):
        other = step * max(1, round(side * longer / shorter / step))
        if side >= _SMALLEST:
            sizes.append((side, other) if size[0] <= size[1] else (other, side))
    return sizes


def _try_siblings(attempts: _Attempts) -> None:
    """Look for the largest smaller model of the family that fits, by the multiply-accumulates of each."""
    bench = attempts.bench
    size = bench.anatomy.input_size
    if bench.config.checkpoint or attempts.over:
        return
    macs = _macs_of_siblings(attempts, bench.config.base, bench.config.pretrained)
    limits = bench.budgets.limits
    ms_per_mac = (attempts.base_ms or 0.0) / max(1, bench.costs.base["macs"])
    names = sorted(macs, key=lambda name: macs[name], reverse=True)
    for remaining in range(_MAX_SIBLINGS, 0, -1):
        if not names or attempts.over:
            return
        fitting = [name for name in names if macs[name] * ms_per_mac <= limits.get("latency", math.inf)]
        name = fitting[0] if fitting and remaining > 1 else names[-1]  # the last one tried is the smallest
        alternative = attempts.attempt(name, (size[1], size[2]))
        if alternative and alternative.within:
            return
        if alternative and alternative.ms:
            ms_per_mac = alternative.ms / max(1, macs[name])
            names = [other for other in names if macs[other] < macs[name]]
        else:
            names.remove(name)


def _macs_of_siblings(attempts: _Attempts, base: str, pretrained: bool) -> dict[str, int]:
    """The multiply-accumulates of the smaller models of a family that keep to the exact budgets, by name."""
    bench = attempts.bench
    macs: dict[str, int] = {}
    for name in siblings(base, pretrained)[:_MAX_COUNTED]:
        if attempts.over:
            break
        try:
            twin = weightless(name, bench.anatomy.input_size[1:])
            with torch.device("meta"):
                twin.reset_classifier(bench.data.num_classes)  # type: ignore[operator]
            parameters = sum(parameter.numel() for parameter in twin.parameters())
            if parameters < bench.costs.base["parameters"]:
                costs = Record(-1, "pending", parameters=parameters, macs=count_macs(twin, bench.anatomy.input_size))
                if bench.budgets.check(costs).within:
                    macs[name] = costs.macs or 0
        except (AttnSurgeryError, RuntimeError, AssertionError, ValueError, TypeError):
            continue  # it cannot take such images
    return macs


def siblings(base: str, pretrained: bool = False, larger: bool = False) -> list[str]:
    """timm's other models of a family.

    First those whose names differ in size alone, and then those of the same first word; the most similar names first.

    Args:
        base: timm name of a model.
        pretrained: only models with published weights.
        larger: also those that a word such as "large" calls larger.
    """
    arch = split_model_name_tag(base)[0]
    if (parts := parse(arch)) is not None:  # a segmentation model: the same decoder on another backbone
        return [f"{name}_{parts.decoder}{parts.stride}" for name in siblings(parts.arch, pretrained, larger)]
    module = model_entrypoint(arch).__module__.rpartition(".")[2]
    names = {split_model_name_tag(name)[0] for name in timm.list_models(module=module, pretrained=pretrained)}
    family = [name for name in names if name != arch and _word(name) == _word(arch)]
    others = [name for name in family if larger or _rank(name) <= _rank(arch)]

    def distance(name: str) -> tuple[bool, float, str]:
        similarity = difflib.SequenceMatcher(None, name, arch, autojunk=False).ratio()
        return _without_size(name) != _without_size(arch), -similarity, name

    return sorted(others, key=distance)


def _word(name: str) -> str:
    return re.split(r"[^a-z]", name)[0]


def _without_size(name: str) -> str:
    """A name without numbers and words for a size."""
    return "_".join(word for word in re.sub(r"\d+", "", name).split("_") if word not in _SIZE_WORDS)


def _rank(name: str) -> int:
    """The place of a name's word for a size, from the smallest; -1 if it has none."""
    return max((_SIZE_WORDS.index(word) for word in name.split("_") if word in _SIZE_WORDS), default=-1)
