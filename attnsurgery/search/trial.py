"""One trial: build the candidate, prove that it starts as the base, measure it, train it if it is within the budget."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace

import torch
from torch import nn

from attnsurgery.errors import AttnSurgeryError, SurgeryError
from attnsurgery.evaluate.proxies import grad_norm, synflow
from attnsurgery.latency import Latency
from attnsurgery.recipe.build import resolve
from attnsurgery.recipe.schema import Recipe
from attnsurgery.search.listener import Listener
from attnsurgery.search.prepare import Bench
from attnsurgery.search.record import Promotion, Record, Timing
from attnsurgery.search.scorers import Candidate
from attnsurgery.search.watching import StopAsked, Watching
from attnsurgery.surgery.operate import operate

_PROXY_BATCH = 64


def seed_of(*parts: object) -> int:
    """A seed that depends on its parts alone, the same on every machine."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big")


def build(bench: Bench, recipe: Recipe) -> nn.Module:
    """The base with its starting weights, operated; its outputs are proved equal to the base's, bit for bit.

    Raises:
        SiteError, OptionError: the recipe does not fit.
        SurgeryError: the outputs differ.
    """
    candidate = _operated(bench, recipe)
    generator = torch.Generator().manual_seed(0)
    x_BCHW = torch.randn(2, *bench.anatomy.input_size, generator=generator).to(bench.config.device)
    with torch.inference_mode():
        expected, got = bench.base(x_BCHW), candidate(x_BCHW)
    if not torch.equal(expected, got):
        worst = float((expected - got).abs().max())
        raise SurgeryError(f"the candidate does not start as the base: outputs differ by up to {worst:.3g}.")
    return candidate


def _operated(bench: Bench, recipe: Recipe) -> nn.Module:
    model = copy.deepcopy(bench.base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(bench.config.seed, "blocks", recipe.digest()))
        operate(model, resolve(recipe, bench.anatomy))
    return model.to(bench.config.device).eval()


def run_trial(
    bench: Bench,
    number: int,
    assignment: Mapping[str, str],
    seen: Mapping[str, Record],
    reference: Latency,
    foretold_ms: float | None,
    listener: Listener,
    stop: Callable[[], bool],
) -> Record:
    """What became of the candidate.

    Args:
        seen: earlier records by digest, the base as it is under ''.
        foretold_ms: its latency, where that is known to be over the budget without a measurement.
    """
    recipe = bench.space.recipe_of(assignment)
    record = Record(
        number=number,
        state="failed",
        assignment=dict(assignment),
        recipe=recipe.as_dict() if recipe else None,
        digest=recipe.digest() if recipe else "",
        blocks=bench.space.blocks(assignment),
        parameters=bench.costs.of("parameters", bench.picks(assignment)),
        macs=bench.costs.of("macs", bench.picks(assignment)),
        foretold_ms=foretold_ms,
    )
    listener.asked(number, recipe.name if recipe else "the base as it is")
    if (earlier := seen.get(record.digest or "")) is not None:
        return _again(record, earlier)
    if bench.space.max_blocks is not None and record.blocks > bench.space.max_blocks:
        return replace(record, state="too_many_blocks")
    assert recipe is not None, "the base as it is always is among the seen"
    if over := bench.budgets.over(record):
        return replace(record, state="over_budget", reason=over)
    try:
        return _measure_and_train(bench, record, recipe, reference, listener, stop)
    except StopAsked:
        return replace(record, state="interrupted", reason="stopped by the user")
    except (AttnSurgeryError, RuntimeError, ValueError) as error:
        return replace(record, state="failed", reason=_reason(error))


def _measure_and_train(
    bench: Bench, record: Record, recipe: Recipe, reference: Latency, listener: Listener, stop: Callable[[], bool]
) -> Record:
    candidate = build(bench, recipe)
    timing = Timing.of(bench.backend.compare(bench.base, candidate, reference))
    listener.timed(record.number, timing)
    record = replace(record, timing=timing, peak_mb=bench.peak_mb(candidate))
    if over := bench.budgets.over(record):
        return replace(record, state="over_budget", reason=over)
    record = replace(record, proxies=proxies(bench, recipe, candidate))
    watch = Watching(listener, stop)
    score = bench.rungs[0].score(Candidate(candidate, record.assignment), train_seed(bench), watch)
    return replace(
        record, state="trained", top1=score.top1, loss=score.loss, seconds=score.seconds, epochs=score.epochs
    )


def proxies(bench: Bench, recipe: Recipe, candidate: nn.Module) -> dict[str, float]:
    """Scores of a candidate as it is before training; without those that cannot be taken of this model."""
    opened = recipe.model_copy(update={"edits": [edit.model_copy(update={"start": "paper"}) for edit in recipe.edits]})
    x_BCHW, labels_B = next(
        bench.data.train.train_batches(_PROXY_BATCH, bench.config.device, train_seed(bench), epoch=0)
    )
    ways: dict[str, Callable[[], float]] = {
        "grad_norm": lambda: grad_norm(candidate, x_BCHW, labels_B),
        "synflow": lambda: synflow(_operated(bench, opened), bench.anatomy.input_size),
    }
    found: dict[str, float] = {}
    for name, way in ways.items():
        with suppress(RuntimeError, ValueError):
            if math.isfinite(value := way()):
                found[name] = value
    return found


def promote(bench: Bench, record: Record, listener: Listener, stop: Callable[[], bool]) -> Record:
    """The record with its score on the rung above its own, or with the reason why it has none.

    Raises:
        StopAsked: the user asked for an end.
    """
    recipe = Recipe.model_validate(record.recipe)
    rung, watch = bench.rungs[record.reached + 1], Watching(listener, stop)
    try:
        score = rung.score(Candidate(build(bench, recipe), record.assignment), train_seed(bench), watch)
    except (AttnSurgeryError, RuntimeError, ValueError) as error:
        return replace(record, halted=_reason(error))
    return replace(record, promotions=(*record.promotions, Promotion.of(score)))


def train_seed(bench: Bench) -> int:
    """One for all trials: every candidate sees the same images in the same order, so differences are its own."""
    return seed_of(bench.config.seed, "train")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__


def _again(record: Record, earlier: Record) -> Record:
    """The same candidate once more costs nothing and is told the same."""
    return replace(
        earlier,
        number=record.number,
        state="duplicate",
        assignment=record.assignment,
        promotions=(),
        seconds=0.0,
        duplicate_of=earlier.number,
    )
