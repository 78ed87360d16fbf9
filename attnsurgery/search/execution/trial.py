"""One trial: build a candidate, check that its outputs equal the base's, measure it, train it if within the budget."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from attnsurgery.catalog import NO_BLOCK
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
    """The base with its starting weights and the blocks of a recipe; its outputs equal the base's bit for bit.

    Where blocks take the place of attention that the base has, they equal those of the base without that attention.

    Raises:
        SiteError, OptionError: the recipe does not fit the base.
        SurgeryError: the outputs differ.
    """
    candidate = _operated(bench, recipe)
    generator = torch.Generator().manual_seed(0)
    x_BCHW = torch.randn(2, *bench.anatomy.input_size, generator=generator).to(bench.config.device)
    with torch.inference_mode():
        expected, actual = _without_replaced(bench, recipe)(x_BCHW), candidate(x_BCHW)
    if not torch.equal(expected, actual):
        worst = float((expected - actual).abs().max())
        raise SurgeryError(f"the candidate does not start as the base: outputs differ by up to {worst:.3g}.")
    return candidate


def _without_replaced(bench: Bench, recipe: Recipe) -> nn.Module:
    """The base without the attention that a recipe takes out; the base itself where it takes none out."""
    taken_out = [insertion for insertion in resolve(recipe, bench.anatomy) if insertion.replaced]
    if not taken_out:
        return bench.base
    removals = tuple(replace(insertion, block=NO_BLOCK, options={}) for insertion in taken_out)
    return operate(copy.deepcopy(bench.base), removals)


def _operated(bench: Bench, recipe: Recipe) -> nn.Module:
    model = copy.deepcopy(bench.base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(bench.config.seed, "blocks", recipe.digest()))
        operate(model, resolve(recipe, bench.anatomy))
    return model.to(bench.config.device).eval()


def outline(bench: Bench, number: int, assignment: Mapping[str, str], predicted_ms: float | None = None) -> Record:
    """The pending record of a candidate, with all that is known before it is built.

    Args:
        bench: what trials are made on.
        number: of the trial.
        assignment: a label for every variable.
        predicted_ms: the predicted latency, if it is certainly over the budget.
    """
    recipe = bench.space.recipe_for(assignment)
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


def settle_early(bench: Bench, record: Record, known_records: Mapping[str, Record]) -> Record | None:
    """The record of a candidate whose result is known without building it; None if it has to be built.

    Args:
        bench: what trials are made on.
        record: the candidate's outline.
        known_records: earlier records by digest; the base without blocks under ''.
    """
    if (previous := known_records.get(record.digest or "")) is not None:
        return _again(record, previous)
    if objection := bench.space.objection(record.assignment):
        return replace(record, state="failed", reason=objection)
    if bench.space.max_blocks is not None and record.blocks > bench.space.max_blocks:
        return replace(record, state="too_many_blocks")
    check = bench.budgets.check(record)
    if not check.within:
        return replace(record, state="over_budget", reason=check.words)
    return None


def run_trial(bench: Bench, record: Record, reference: Latency, watch: Watching) -> Record:
    """Build the candidate of an outline, measure it, and train it if it is within the budget.

    Args:
        bench: what trials are made on.
        record: the candidate's outline.
        reference: the base's latency.
        watch: told of progress.

    Raises:
        StopRequested: the user asked for an end.
        RuntimeError and others: the device failed or ran out of memory (`attnsurgery.faults`), which says nothing about
            the candidate.
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
    record = replace(record, proxies=proxy_scores(bench, recipe, candidate, watch))
    score = bench.rungs[0].score(Candidate(candidate, record.assignment), train_seed(bench), watch)
    return replace(
        record,
        state="trained",
        metric=score.metric,
        loss=score.loss,
        balanced=score.balanced,
        seconds=score.seconds,
        epochs=score.epochs,
    )


def proxy_scores(bench: Bench, recipe: Recipe, candidate: nn.Module, watch: Watching) -> dict[str, float]:
    """Training-free scores of a candidate, by name. A score that this model or the memory does not allow is left out.

    Raises:
        StopRequested: the user asked for an end.
        RuntimeError and others: the device is broken.
    """
    opened = recipe.model_copy(update={"edits": [edit.model_copy(update={"start": "paper"}) for edit in recipe.edits]})
    pieces = bench.evaluator.settings.pieces

    def gradient() -> float:
        batches = bench.data.train.train_batches(_PROXY_BATCH, bench.config.device, train_seed(bench), epoch=0)
        return grad_norm(candidate, *next(batches), pieces, bench.task.criterion(0.0))

    measures: dict[str, Callable[[], float]] = {
        "grad_norm": gradient,
        "synflow": lambda: synflow(_operated(bench, opened), bench.anatomy.input_size),
    }
    scores: dict[str, float] = {}
    for name, measure in measures.items():
        watch.step()
        try:
            value = measure()
        except (RuntimeError, ValueError, MemoryError) as error:
            if fault_of(error) is Fault.DEVICE:
                raise
            continue
        if math.isfinite(value):
            scores[name] = value
    return scores


def promote(bench: Bench, record: Record, watch: Watching) -> Record:
    """The record with its score on the next rung, or with the reason why it has none.

    Raises:
        StopRequested, RuntimeError: as `run_trial`.
    """
    recipe, rung = Recipe.model_validate(record.recipe), bench.rungs[record.reached + 1]
    try:
        score = rung.score(Candidate(build(bench, recipe), record.assignment), train_seed(bench), watch)
    except Exception as error:
        if not _of_the_candidate(error):
            raise
        return replace(record, halted=reason_of(error))
    return replace(record, promotions=(*record.promotions, Promotion.of(score)))


def train_second(bench: Bench, record: Record, watch: Watching) -> dict[str, Any]:
    """Train a candidate on the lowest rung once more, from another seed than all trials.

    Returns:
        "metric" and "loss" on the validation split; or the reason why it "failed".

    Raises:
        StopRequested, RuntimeError: as `run_trial`.
    """
    watch.listener.phase(f"trial {record.number} from a second seed: is the ranking reliable?")
    recipe, seed = Recipe.model_validate(record.recipe), seed_of(bench.config.seed, "repeat")
    try:
        score = bench.rungs[0].score(Candidate(build(bench, recipe), record.assignment), seed, watch)
    except Exception as error:
        if not _of_the_candidate(error):
            raise
        return {"failed": reason_of(error)}
    return {"metric": score.metric, "loss": score.loss}


def _of_the_candidate(error: Exception) -> bool:
    """Whether the candidate itself causes an error, so that it would recur in another attempt."""
    of_models = isinstance(error, AttnSurgeryError | RuntimeError | ValueError)
    of_kernels = type(error).__module__.startswith("triton.")  # for example OutOfResources, which is no RuntimeError
    return (of_models or of_kernels) and fault_of(error) is None


def train_seed(bench: Bench) -> int:
    """The seed of all trials: every candidate sees the same images in the same order, so that only blocks differ."""
    return seed_of(bench.config.seed, "train")


def reason_of(error: Exception) -> str:
    """The message of an error in one line. Of a device fault, the first line: below it, torch explains debugging."""
    text = str(error).strip()
    if fault_of(error) is not None:
        text = text.partition("\n")[0]
    return " ".join(text.split())[:500] or type(error).__name__


def _again(record: Record, earlier: Record) -> Record:
    """The record of a duplicate: the results of the earlier trial, at no cost."""
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
