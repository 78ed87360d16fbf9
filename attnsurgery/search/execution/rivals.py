"""The jobs of rivals: build a rival as the base is built, measure it, and make its starting weights.

A rival gets a bench of its own, on which the jobs of the base train and test it: the same images at its own size and
normalization, the same splits, the same settings.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from timm.models import split_model_name_tag

from attnsurgery.checkpoint.weights import read_state_dict
from attnsurgery.errors import AttnSurgeryError, UsageError
from attnsurgery.graph.find import survey
from attnsurgery.latency import Latency, LatencyBackend
from attnsurgery.search.execution.assemble import images_of, untrained
from attnsurgery.search.execution.baseline import latency_beside_base, starting_weights, timing_of
from attnsurgery.search.execution.bench import Bench
from attnsurgery.search.execution.pretrained_base import normalization, resolve_base
from attnsurgery.search.execution.scorers import Alone
from attnsurgery.search.execution.sizes import at_size
from attnsurgery.search.execution.trial import build
from attnsurgery.search.execution.what_fits import siblings
from attnsurgery.search.listener import Listener
from attnsurgery.search.result.record import Timing
from attnsurgery.search.rivals import Rival
from attnsurgery.search.storage.run_directory import CONFIRMING
from attnsurgery.search.watching import Watching
from attnsurgery.settings import sides
from attnsurgery.surgery.verify import count_macs
from attnsurgery.timm_plugin.architectures import check_base, for_images, weightless
from attnsurgery.timm_plugin.registry import recipe_by_name

_MOST_COUNTED = 16
"""Largest number of models whose multiply-accumulates are counted to find those to propose."""


def bench_of(bench: Bench, key: str, watch: Watching) -> Bench:
    """The bench of a rival, with its starting weights if they have been made.

    Args:
        bench: that of the search; it remembers the benches of its rivals.
        key: of the rival.
        watch: told of progress.

    Raises:
        AttnSurgeryError: the rival does not exist, or cannot be built for these images.
    """
    if key not in bench.rivals:
        bench.rivals[key] = _build(bench, Rival.of(key))
    rival = bench.rivals[key]
    if not rival.weights and (Path(rival.config.output) / _weights_of(key)).exists():
        rival.weights = starting_weights(rival, watch, _weights_of(key))
    evaluator = type(bench.evaluator)(rival.data, bench.evaluator.settings, bench.task)
    return replace(rival, evaluator=evaluator, rungs=(Alone(evaluator),))


def _build(bench: Bench, rival: Rival) -> Bench:
    own = bench.anatomy.input_size
    size = (own[0], *(sides(rival.size) if rival.size else own[1:]))
    recipe = recipe_by_name(rival.model)
    if recipe is not None and _arch(recipe.base) == _arch(
        bench.config.base
    ):  # the base with blocks of the user's choice
        if rival.size:
            raise UsageError(f"--against {rival.key}: give {rival.model} without a size; it has that of the search.")
        return replace(bench, base=build(bench, recipe.model_copy(update={"base": bench.config.base})))
    if rival.model == bench.config.base:
        data = bench.data.at(size[1:])
        model = copy.deepcopy(at_size(bench.base, rival.model, own[1:], size[1:]))
        config, fresh, weights = bench.config, bench.fresh, bench.weights
    else:
        resolved = resolve_base(rival.model, None)
        check_base(resolved.base, "--against")
        name = bench.task.model_of(resolved.base)
        config = bench.config.model_copy(update={"base": name, "checkpoint": resolved.checkpoint})
        config = config.model_copy(update={"pretrained": config.pretrained and not resolved.checkpoint})
        normalized = normalization(resolved.checkpoint)
        data, _ = images_of(config, bench.task, size, normalized, Listener(), decode=False, check=False)
        checkpoint = read_state_dict(resolved.checkpoint) if resolved.checkpoint else None
        model, fresh, _ = untrained(config, data, checkpoint, for_images(config.base, size[1:]), Listener())
        weights = ""
    return replace(
        bench,
        config=config,
        base=model.to(config.device).eval(),
        anatomy=survey(model, size),
        data=data,
        backend=_backend(bench, size),
        fresh=fresh,
        weights=weights,
    )


def _arch(name: str) -> str:
    return str(split_model_name_tag(name)[0])


def _backend(bench: Bench, size: tuple[int, int, int]) -> LatencyBackend:
    """Measures under the conditions of the search, at an input size."""
    conditions = replace(bench.backend.conditions, input_size=size)
    if conditions == bench.backend.conditions:
        return bench.backend
    backend = type(bench.backend)(conditions, bench.backend.effort)
    backend.lock = bench.backend.lock
    return backend


def _weights_of(key: str) -> str:
    """Path of a rival's starting weights, relative to the run directory."""
    return f"{CONFIRMING}/start-{hashlib.sha256(key.encode()).hexdigest()[:12]}.safetensors"


def measure_rival(bench: Bench, key: str, reference: Latency, watch: Watching) -> dict[str, Any]:
    """The costs of a rival.

    A rival is measured in turns with the base, or between two measurements of it if its input size is another one. So a
    drift of the machine moves both.

    Args:
        bench: that of the search.
        key: of the rival.
        reference: the base's latency.
        watch: told of progress.

    Returns:
        "costs": the "timing" as JSON data, "parameters", "macs" and "peak_mb" if there is a budget for it; or the
        reason why it "failed".
    """
    watch.listener.phase(f"measuring a rival: {Rival.of(key).words}")
    try:
        rival = bench_of(bench, key, watch)
    except AttnSurgeryError as error:
        return {"failed": str(error)}
    if rival.anatomy.input_size == bench.anatomy.input_size:
        with rival.backend.longer():
            timing = Timing.of(rival.backend.compare(bench.base, rival.base, reference))
    else:
        timing = timing_of(latency_beside_base(bench, rival.backend, rival.base, reference))
        timing = replace(timing, ratio=timing.ms / reference.p50_ms)
    costs = {
        "timing": asdict(timing),
        "parameters": sum(parameter.numel() for parameter in rival.base.parameters()),
        "macs": count_macs(rival.base, rival.anatomy.input_size),
        "peak_mb": rival.peak_mb(rival.base),
    }
    return {"costs": costs}


def start_rival(bench: Bench, key: str, watch: Watching) -> dict[str, Any]:
    """Make the starting weights of a rival, as those of the base are made.

    Returns:
        The hash of the "start", and which part of it was "fresh"; or the reason why it "failed".
    """
    try:
        rival = bench_of(bench, key, watch)
        if not rival.weights:
            bench.rivals[key].weights = starting_weights(rival, watch, _weights_of(key))
    except AttnSurgeryError as error:
        return {"failed": str(error)}
    return {"start": bench.rivals[key].weights, "fresh": rival.fresh}


def propose_rivals(bench: Bench, payload: Mapping[str, Any], watch: Watching) -> dict[str, Any]:
    """The "names" of timm's models of the same family with published weights, the most expensive first.

    Only those whose predicted latency is within the budget are named; it is predicted from the base's latency and the
    multiply-accumulates of both.

    Args:
        bench: that of the search.
        payload: has the `reference`, the base's latency.
        watch: told of progress.
    """
    watch.listener.phase("looking for models of the same family that fit the budget")
    size, base_macs = bench.anatomy.input_size, bench.costs.base["macs"]
    budget_ms = bench.budgets.limits.get("latency")
    most = base_macs * (budget_ms / payload["reference"].p50_ms if budget_ms else 2.0)
    macs: dict[str, int] = {}
    for name in siblings(bench.config.base, pretrained=True, larger=True)[:_MOST_COUNTED]:
        watch.step()
        try:
            count = count_macs(weightless(name, size[1:]), size)
        except (AttnSurgeryError, RuntimeError, AssertionError, ValueError, TypeError):
            continue  # it cannot take such images
        if 0.5 * base_macs <= count <= most:
            macs[name] = count
    return {"names": sorted(macs, key=lambda name: macs[name], reverse=True)}
