"""The base: its starting weights, its latency, and its scores on every rung."""

from __future__ import annotations

import copy
import hashlib
import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch
from torch import nn

from attnsurgery.catalog import NO_BLOCK
from attnsurgery.checkpoint.base import load_weights
from attnsurgery.checkpoint.weights import read_state_dict
from attnsurgery.data import FirstTask
from attnsurgery.evaluate import Score, TrainSettings, fit_head, train
from attnsurgery.latency import Latency, LatencyBackend
from attnsurgery.search.config import SearchConfig
from attnsurgery.search.execution.bench import Bench
from attnsurgery.search.execution.pretrained_base import (
    check_head,
    label_names,
)
from attnsurgery.search.execution.scorers import Candidate
from attnsurgery.search.files import to_safetensors
from attnsurgery.search.result.record import Timing
from attnsurgery.search.rungs import SUPERNET, rungs_of
from attnsurgery.search.space import Sides
from attnsurgery.search.storage.run_directory import WEIGHTS, write_own
from attnsurgery.search.tuning import pilot_epochs
from attnsurgery.search.watching import Watching
from attnsurgery.surgery.insertion import Insertion
from attnsurgery.surgery.operate import operate

_BASE_LR = 3.0
"""Learning rate of a base or a head trained from scratch, relative to that of fine-tuning."""


def starting_weights(bench: Bench, watch: Watching, name: str = WEIGHTS) -> str:
    """Load the starting weights from the run directory, or make and write them; return their hash.

    Args:
        bench: whose base gets the weights.
        watch: told of progress.
        name: of their file, relative to the run directory.

    Raises:
        CheckpointError: the weights in the run directory cannot be read.
        SearchError: training diverged, or the run directory cannot be written.
    """
    config, base = bench.config, bench.base
    folder = Path(config.output)
    path = folder / name
    if path.exists():
        load_weights(base, read_state_dict(path), str(path))
    else:
        usual = bench.evaluator.settings
        settings = replace(usual, epochs=config.base_epochs, lr=usual.lr * _BASE_LR)
        length = f"on {bench.data.name}, {config.base_epochs} epochs"
        if bench.fresh == "all" and bench.data.first is not None:
            _first_training(bench, bench.data.first, settings, watch)
        elif bench.fresh == "all":
            watch.listener.phase(f"training the base {config.base} {length}")
            train(base, bench.data.train, settings, config.seed, watch, criterion=bench.evaluator.criterion)
        elif bench.fresh == "nothing" and bench.data.is_classed and not label_names(config.checkpoint, base):
            bench.head = _check_head(bench, watch)
        if bench.fresh == "head":
            outputs = f"{bench.data.num_classes} {'classes' if bench.data.classes else 'outputs'}"
            watch.listener.phase(f"fitting a new head for {outputs} {length}")
            fit_head(base, bench.data.train, settings, config.seed, watch, bench.evaluator.criterion)
        path.parent.mkdir(exist_ok=True)
        write_own(folder, name, to_safetensors(base))
    base.to(config.device).eval()
    return hash_of(path)


def _first_training(bench: Bench, first: FirstTask, settings: TrainSettings, watch: Watching) -> None:
    """Train a base without weights on another task first; then it has a new head, as a pretrained model has.

    Args:
        bench: its base is trained in place.
        first: the other task.
        settings: how the base is trained, but for the number of epochs.
        watch: callbacks.
    """
    config, base = bench.config, bench.base
    epochs = first_epochs(config, first)
    watch.listener.phase(f"training the base {config.base} on {first.name} first, {epochs} epochs")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        base.reset_classifier(len(first.classes))  # type: ignore[operator]
        train(base, first.train, replace(settings, epochs=epochs), config.seed, watch)
        base.reset_classifier(bench.data.num_classes)  # type: ignore[operator]
    base.to(config.device)
    bench.fresh, bench.head = "head", f"trained from scratch on {first.name}, for {epochs} epochs"


def first_epochs(config: SearchConfig, first: FirstTask) -> int:
    """Number of epochs in which a base without weights is trained on another task first."""
    return max(config.base_epochs, pilot_epochs(len(first.train), config.train_batch_size))


def _check_head(bench: Bench, watch: Watching) -> str:
    """Test on the validation images whether a classifier without class names fits; if not, replace it by a new one.

    Returns:
        The result in words.
    """
    check = check_head(bench.base, bench.data, bench.evaluator.settings, watch)
    watch.listener.phase(check.words())
    if check.fits:
        return check.words()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(bench.config.seed)
        bench.base.reset_classifier(bench.data.num_classes)  # type: ignore[operator]
    bench.base.to(bench.config.device)
    bench.fresh = "head"
    return f"{check.words()}; a new one was fitted"


def hash_of(path: Path) -> str:
    """The first 16 hexadecimal digits of the SHA-256 digest of a weights file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def base_latency(bench: Bench, watch: Watching) -> Latency:
    """The base's latency, which those of candidates are relative to."""
    watch.listener.phase("measuring the base")
    with bench.backend.longer():
        return bench.backend.measure(bench.base)


def base_latency_at(bench: Bench, size: Sides, reference: Latency, watch: Watching) -> Latency:
    """The base's latency at another input size, on the scale of that at its own size.

    Args:
        bench: what trials are made on.
        size: height and width of an image.
        reference: the base's latency at its own size.
        watch: told of progress.
    """
    sized = bench.at(size)
    watch.listener.phase(f"measuring the base at {size[0]} x {size[1]} pixels")
    return latency_beside_base(bench, sized.backend, sized.base, reference)


def latency_beside_base(bench: Bench, backend: LatencyBackend, model: nn.Module, reference: Latency) -> Latency:
    """The latency of a model at another input size than the base's, on the scale of the base's latency.

    It is measured between two measurements of the base, so that a machine that is faster or slower than when the
    reference was measured moves both.

    Args:
        bench: what trials are made on.
        backend: measures at the model's input size.
        model: is measured.
        reference: the base's latency, as it was measured before.
    """
    if bench.backend.conditions.compiled:  # each measurement compiles the model
        with backend.longer():
            return backend.measure(model)
    before = bench.backend.measure(bench.base)
    with backend.longer():
        latency = backend.measure(model)
    own = [before, bench.backend.measure(bench.base)]
    scale = reference.p50_ms / fmean(measured.p50_ms for measured in own)
    noise = math.hypot(latency.noise, fmean(measured.noise for measured in own))
    return replace(latency, p50_ms=scale * latency.p50_ms, p90_ms=scale * latency.p90_ms, noise=noise)


def least_ratio(bench: Bench, latency: Latency, watch: Watching) -> float:
    """A lower bound of any candidate's latency, as a ratio to the base's at this size, where that matters.

    It is 1 where blocks only add to the base, and where the base is within the budget. Where blocks can take the place
    of attention that the base has, it is the lower end of the interval of the base without all of that.

    Args:
        bench: what trials are made on, at the size.
        latency: the base's, on it.
        watch: told of progress.
    """
    budget_ms = bench.budgets.limits.get("latency")
    addresses = bench.space.replaceable
    if budget_ms is None or timing_of(latency).low_ms <= budget_ms or not addresses:
        return 1.0
    watch.listener.phase("measuring the base without its own attention")
    sites = [site for site in bench.anatomy.sites if site.address in addresses]
    removals = tuple(Insertion(site, NO_BLOCK, replaced=bench.anatomy.own_attention(site)) for site in sites)
    bare = operate(copy.deepcopy(bench.base), removals).to(bench.config.device)
    return min(1.0, bench.backend.compare(bench.base, bare, latency).ratio_low)


def timing_of(latency: Latency) -> Timing:
    """The latency of the base, or of another model that is not compared with it, and its 95 % interval."""
    half = latency.noise * latency.p50_ms
    return Timing(latency.p50_ms, latency.p50_ms - half, latency.p50_ms + half, 1.0)


def base_scores(bench: Bench, seed: int, watch: Watching) -> list[Score]:
    """The scores of the base, trained as each candidate is, on every rung from the lowest. This trains a supernet, too.

    Raises:
        SearchError: training diverged.
    """
    scores = []
    for scorer, rung in zip(bench.rungs, rungs_of(bench.config), strict=True):
        shared = rung.evaluator == SUPERNET
        watch.listener.phase(
            f"training all candidates at once: {rung}" if shared else f"training the base as each candidate: {rung}"
        )
        scores.append(scorer.score(Candidate(copy.deepcopy(bench.base), bench.space.nothing), seed, watch))
    return scores
