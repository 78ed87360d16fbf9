"""One trial: build the candidate, prove that it starts as the base, measure it, train it if it is within the budget."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import nn

from attnsurgery.errors import AttnSurgeryError, SurgeryError
from attnsurgery.evaluate.proxies import grad_norm, synflow
from attnsurgery.faults import Fault, fault_of
from attnsurgery.latency import Latency
from attnsurgery.recipe.build import resolve
from attnsurgery.recipe.schema import Recipe
from attnsurgery.search.execution.bench import Bench
from attnsurgery.search.execution.scorers import Candidate
from attnsurgery.search.result.record import Promotion, Record, Timing
from attnsurgery.search.seeds import seed_of
from attnsurgery.search.watching import Watching
from attnsurgery.surgery.operate import operate

_PROXY_BATCH = 64


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


def outlined(bench: Bench, number: int, assignment: Mapping[str, str], predicted_ms: float | None = None) -> Record:
    """All that is known of a candidate before it is built; it is pending until more is known."""
    recipe = bench.space.recipe_of(assignment)
    return Record(
        number=number,
        state="pending",
        assignment=dict(assignment),
        recipe=recipe.as_dict() if recipe else None,
        digest=recipe.digest() if recipe else "",
        blocks=bench.space.blocks(assignment),
        parameters=bench.costs.of("parameters", bench.picks(assignment)),
        macs=bench.costs.of("macs", bench.picks(assignment)),
        predicted_ms=predicted_ms,
    )


def at_once(bench: Bench, record: Record, seen: Mapping[str, Record]) -> Record | None:
    """What becomes of a candidate of which that is known without building it; None of others.

    Args:
        seen: earlier records by digest, the base as it is under ''.
    """
    if (earlier := seen.get(record.digest or "")) is not None:
        return _again(record, earlier)
    if bench.space.max_blocks is not None and record.blocks > bench.space.max_blocks:
        return replace(record, state="too_many_blocks")
    check = bench.budgets.check(record)
    if not check.within:
        return replace(record, state="over_budget", reason=check.words)
    return None


def run_trial(bench: Bench, record: Record, reference: Latency, watch: Watching) -> Record:
    """Build the candidate that is outlined, measure it, and train it if it is within the budget.

    Raises:
        StopAsked: the user asked for an end.
        RuntimeError and others: of a device that is broken or out of memory (`attnsurgery.faults`), which tells
            nothing of the candidate.
    """
    try:
        return _measure_and_train(bench, record, Recipe.model_validate(record.recipe), reference, watch)
    except Exception as error:
        if not _of_the_candidate(error):
            raise
        return replace(record, state="failed", reason=reason_of(error))


def _measure_and_train(bench: Bench, record: Record, recipe: Recipe, reference: Latency, watch: Watching) -> Record:
    candidate = build(bench, recipe)
    timing = Timing.of(bench.backend.compare(bench.base, candidate, reference))
    watch.listener.timed(record.number, timing)
    record = replace(record, timing=timing, peak_mb=bench.peak_mb(candidate))
    check = bench.budgets.check(record)
    if not check.within:
        return replace(record, state="over_budget", reason=check.words)
    record = replace(record, proxies=proxies(bench, recipe, candidate, watch))
    score = bench.rungs[0].score(Candidate(candidate, record.assignment), train_seed(bench), watch)
    return replace(
        record,
        state="trained",
        top1=score.top1,
        loss=score.loss,
        balanced=score.balanced,
        seconds=score.seconds,
        epochs=score.epochs,
    )


def proxies(bench: Bench, recipe: Recipe, candidate: nn.Module, watch: Watching) -> dict[str, float]:
    """Scores of a candidate as it is before training; without those that cannot be taken of this model, or for which
    memory does not suffice.

    Raises:
        StopAsked: the user asked for an end.
        RuntimeError and others: the device is broken.
    """
    opened = recipe.model_copy(update={"edits": [edit.model_copy(update={"start": "paper"}) for edit in recipe.edits]})
    pieces = bench.evaluator.settings.pieces

    def gradient() -> float:
        batches = bench.data.train.train_batches(_PROXY_BATCH, bench.config.device, train_seed(bench), epoch=0)
        return grad_norm(candidate, *next(batches), pieces=pieces)

    ways: dict[str, Callable[[], float]] = {
        "grad_norm": gradient,
        "synflow": lambda: synflow(_operated(bench, opened), bench.anatomy.input_size),
    }
    found: dict[str, float] = {}
    for name, way in ways.items():
        watch.step()
        try:
            value = way()
        except (RuntimeError, ValueError, MemoryError) as error:
            if fault_of(error) is Fault.DEVICE:
                raise
            continue
        if math.isfinite(value):
            found[name] = value
    return found


def promote(bench: Bench, record: Record, watch: Watching) -> Record:
    """The record with its score on the rung above its own, or with the reason why it has none.

    Raises:
        StopAsked, RuntimeError: as `run_trial`.
    """
    recipe, rung = Recipe.model_validate(record.recipe), bench.rungs[record.reached + 1]
    try:
        score = rung.score(Candidate(build(bench, recipe), record.assignment), train_seed(bench), watch)
    except Exception as error:
        if not _of_the_candidate(error):
            raise
        return replace(record, halted=reason_of(error))
    return replace(record, promotions=(*record.promotions, Promotion.of(score)))


def _of_the_candidate(error: Exception) -> bool:
    """True of an error that comes again wherever this candidate is built, measured or trained."""
    of_models = isinstance(error, AttnSurgeryError | RuntimeError | ValueError)
    of_kernels = type(error).__module__.startswith("triton.")  # such as OutOfResources, which is no RuntimeError
    return (of_models or of_kernels) and fault_of(error) is None


def train_seed(bench: Bench) -> int:
    """One for all trials: every candidate sees the same images in the same order, so differences are its own."""
    return seed_of(bench.config.seed, "train")


def reason_of(error: Exception) -> str:
    """What the error says, in one line; of a device's, the first line, for torch says below how to look for kernels."""
    text = str(error).strip()
    if fault_of(error) is not None:
        text = text.partition("\n")[0]
    return " ".join(text.split())[:500] or type(error).__name__


def _again(record: Record, earlier: Record) -> Record:
    """The same candidate once more costs nothing and is told the same."""
    return replace(
        earlier,
        number=record.number,
        state="duplicate",
        assignment=record.assignment,
        promotions=(),
        seconds=0.0,
        attempts=1,
        duplicate_of=earlier.number,
    )
