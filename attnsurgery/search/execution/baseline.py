"""The base: its starting weights, its latency, and its scores on every rung."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import replace
from pathlib import Path

import torch

from attnsurgery.checkpoint.base import load_weights
from attnsurgery.checkpoint.weights import read_state_dict
from attnsurgery.evaluate import (
    Score,
    fit_head,
    train,
)
from attnsurgery.latency import Latency
from attnsurgery.search.execution.bench import Bench
from attnsurgery.search.execution.given_base import (
    check_head,
    label_names,
)
from attnsurgery.search.execution.scorers import Candidate
from attnsurgery.search.files import packed
from attnsurgery.search.rungs import SUPERNET, rungs_of
from attnsurgery.search.storage.run_directory import WEIGHTS, write_own
from attnsurgery.search.watching import Watching

_BASE_LR = 3.0
"""A base or a head from scratch learns this many times faster than a fine-tuning may."""


def starting_weights(bench: Bench, watch: Watching) -> str:
    """Load them from the run directory, or make them and put them there; their hash.

    Raises:
        CheckpointError: those of the run directory cannot be read.
        SearchError: training diverged, or the run directory cannot be written.
    """
    config, base = bench.config, bench.base
    path = Path(config.output) / WEIGHTS
    if path.exists():
        load_weights(base, read_state_dict(path), str(path))
    else:
        usual = bench.evaluator.settings
        settings = replace(usual, epochs=config.base_epochs, lr=usual.lr * _BASE_LR)
        length = f"on {bench.data.name}, {config.base_epochs} epochs"
        if bench.fresh == "all":
            watch.listener.phase(f"training the base {config.base} {length}")
            train(base, bench.data.train, settings, config.seed, watch)
        elif bench.fresh == "nothing" and not label_names(config.checkpoint, base):
            bench.head = _judge_head(bench, watch)
        if bench.fresh == "head":
            watch.listener.phase(f"fitting a new head for {bench.data.num_classes} classes {length}")
            fit_head(base, bench.data.train, settings, config.seed, watch)
        write_own(path.parent, path.name, packed(base))
    base.to(config.device).eval()
    return hash_of(path)


def _judge_head(bench: Bench, watch: Watching) -> str:
    """Ask the validation images whether a classifier without names is theirs; if not, another is drawn, to be fitted.

    Returns:
        What was found, for people.
    """
    found = check_head(bench.base, bench.data, bench.evaluator.settings, watch)
    watch.listener.phase(found.words())
    if found.fits:
        return found.words()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(bench.config.seed)
        bench.base.reset_classifier(bench.data.num_classes)  # type: ignore[operator]
    bench.base.to(bench.config.device)
    bench.fresh = "head"
    return f"{found.words()}; a new one was fitted"


def hash_of(path: Path) -> str:
    """What tells weights from others."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def base_latency(bench: Bench, watch: Watching) -> Latency:
    """The base's own: the scale of every other."""
    watch.listener.phase("measuring the base")
    with bench.backend.carefully():
        return bench.backend.measure(bench.base)


def base_scores(bench: Bench, seed: int, watch: Watching) -> list[Score]:
    """The base trained as each candidate is, on every rung from the lowest; a supernet is trained for all on the way.

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
