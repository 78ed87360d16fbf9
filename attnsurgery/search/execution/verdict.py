"""What a worker does for the verdict: measures finalists again, trains them again, judges and saves the winner."""

from __future__ import annotations

import copy
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from attnsurgery.checkpoint.base import load_weights
from attnsurgery.checkpoint.directory import write_directory
from attnsurgery.checkpoint.weights import read_state_dict
from attnsurgery.errors import SearchError
from attnsurgery.evaluate import accuracy
from attnsurgery.latency import Latency
from attnsurgery.recipe.schema import Recipe
from attnsurgery.recipe.text import dumps
from attnsurgery.search.execution.baseline import hash_of
from attnsurgery.search.execution.bench import Bench
from attnsurgery.search.execution.trial import build
from attnsurgery.search.files import packed
from attnsurgery.search.result.confirmation import SIGNIFICANT, Confirmation, Verdict
from attnsurgery.search.result.record import Record, Timing
from attnsurgery.search.result.statistics import gain_of
from attnsurgery.search.seeds import seed_of
from attnsurgery.search.storage.run_directory import BEST, CONFIRMING, replace_own, weights_of, write_own
from attnsurgery.search.watching import Watching
from attnsurgery.timm_plugin.architectures import for_images

_LOOKS = (2.0, 8.0)
"""Times as long as in its trial a finalist is measured; the second look where the first leaves it open."""


def measured_again(bench: Bench, record: Record, reference: Latency, watch: Watching) -> Timing:
    """Twice as long as in its trial, or eight times where that does not tell on which side of the budget it is."""
    watch.listener.phase(f"confirming: measuring trial {record.number} again")
    candidate = build(bench, Recipe.model_validate(record.recipe))
    for times in _LOOKS:
        watch.step()
        with bench.backend.carefully(times):
            timing = Timing.of(bench.backend.compare(bench.base, candidate, reference))
        measured = replace(record, timing=timing)
        if bench.budgets.check(measured, "high").within or not bench.budgets.check(measured, "low").within:
            break
    return timing


def trained_again(
    bench: Bench, record: Mapping[str, Any] | None, index: int, watch: Watching, *, final: bool
) -> dict[str, Any]:
    """Train a finalist, or the base, from one of the seeds of the confirmation.

    Args:
        final: from a seed that nothing is chosen by; the weights go to the run directory, for the verdict.

    Returns:
        "top1" and "loss" on the validation split, and of a final training the hash of its "weights"; or why it
        "failed".
    """
    name_of_model = "the base" if record is None else f"trial {record['number']}{', the winner' if final else ''}"
    watch.listener.phase(f"confirming: {name_of_model}, seed {index + 1} of {bench.config.confirm_seeds}")
    model = _begun(bench, record)
    try:
        score = bench.judge.score(
            model, seed_of(bench.config.seed, "verdict" if final else "confirm", index), watch=watch
        )
    except SearchError as error:
        return {"failed": str(error)}
    result = {"top1": score.top1, "loss": score.loss}
    if not final:
        return result
    folder, name = Path(bench.config.output), weights_of(record, index)
    (folder / CONFIRMING).mkdir(exist_ok=True)
    write_own(folder, name, packed(model))
    return {**result, "weights": hash_of(folder / name)}


def judged(bench: Bench, record: Record, reference: Latency, watch: Watching) -> Confirmation:
    """Winner against base on the test split, as `trained_again` has left both; the winner is measured again and saved.

    Raises:
        CheckpointError: the winner cannot be saved; an older one is still there.
    """
    folder, winner, recipe = Path(bench.config.output), record.as_dict(), Recipe.model_validate(record.recipe)
    rights: dict[bool, list[torch.Tensor]] = {}
    for base in (True, False):
        for index in range(bench.config.confirm_seeds):
            watch.step()
            model = _begun(bench, None if base else winner)
            path = folder / weights_of(None if base else winner, index)
            load_weights(model, read_state_dict(path), str(path))
            rights.setdefault(base, []).append(accuracy(model, bench.data.test, bench.judge.settings, watch=watch)[2])
            if not base and index == 0:
                best = model
    watch.listener.phase("confirming: measuring the winner again")
    with bench.backend.carefully():
        timing = Timing.of(bench.backend.compare(bench.base, best, reference))
    if kept := save(bench, best, recipe, folder):
        watch.listener.phase(f"{BEST} holds what the search has not written, and is kept as {kept}")
    found = judge(record.digest or "", rights[True], rights[False], bench.config.epochs, timing)
    return replace(found, balanced=_balanced(bench, rights))


def _balanced(bench: Bench, rights: Mapping[bool, Sequence[torch.Tensor]]) -> tuple[float, float] | None:
    """Of base and winner, from which test images each got right, by whether it is the base."""
    base, winner = ([bench.data.balanced(bench.data.test, one) for one in rights[side]] for side in (True, False))
    means = [fmean(share for share in side if share is not None) for side in (base, winner) if None not in side]
    return (means[0], means[1]) if len(means) == 2 else None


def _begun(bench: Bench, data: Mapping[str, Any] | None) -> nn.Module:
    return copy.deepcopy(bench.base) if data is None else build(bench, Recipe.model_validate(data["recipe"]))


def judge(
    digest: str, base: Sequence[torch.Tensor], winner: Sequence[torch.Tensor], epochs: int, timing: Timing
) -> Confirmation:
    """From which images each got right, (N,) booleans a seed, to a verdict."""
    base_SN, winner_SN = (torch.stack(list(some)).numpy() for some in (base, winner))
    gain = gain_of(winner_SN, base_SN)
    verdict: Verdict = "no significant difference"
    if gain.p_value < SIGNIFICANT:
        verdict = "better" if gain.mean > 0 else "worse"
    return Confirmation(
        digest=digest,
        images=base_SN.shape[1],
        seeds=len(base),
        epochs=epochs,
        base_top1=float(base_SN.mean()),
        winner_top1=float(winner_SN.mean()),
        low=gain.low,
        high=gain.high,
        p_value=gain.p_value,
        verdict=verdict,
        timing=timing,
    )


def save(bench: Bench, model: nn.Module, recipe: Recipe, folder: Path) -> str:
    """`best` of a run directory, a timm directory that `timm.create_model("local-dir:...", pretrained=True)` rebuilds.

    Returns:
        The new name of an older one with something in it that the search has not written; '' where there was none, or
        it was the search's alone, and is replaced.

    Raises:
        CheckpointError, SearchError: it cannot be written; an older one is still there.
    """
    for left in folder.glob(f".{BEST}.*.new*"):  # by a search that died
        shutil.rmtree(left, ignore_errors=True)
    beside = folder / f".{BEST}.{secrets.token_hex(4)}.new"
    arguments = {
        "base": recipe.base,
        "recipe": recipe.as_dict(),
        "num_classes": bench.data.num_classes,
        "in_chans": bench.anatomy.input_size[0],
        **for_images(bench.config.base, bench.anatomy.input_size[1:]),
    }
    texts = {"recipe.yaml": dumps(recipe)}
    size, classes = bench.anatomy.input_size, bench.data.num_classes
    config = {**getattr(model, "pretrained_cfg", {}), "input_size": size, "num_classes": classes}
    config["label_names"] = list(bench.data.classes)
    model.pretrained_cfg = config  # type: ignore[assignment]
    write_directory(model.cpu(), beside, architecture="surgery", model_args=arguments, texts=texts)
    try:
        return replace_own(folder, BEST, beside)
    finally:
        shutil.rmtree(beside, ignore_errors=True)  # it is there still where it could not be put in its place
