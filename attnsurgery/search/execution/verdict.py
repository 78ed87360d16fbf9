"""The jobs of the confirmation: measure and train finalists again, compare the winner with the base, save it."""

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
from attnsurgery.search.files import to_safetensors
from attnsurgery.search.result.confirmation import SIGNIFICANT, Confirmation, Verdict
from attnsurgery.search.result.record import Record, Timing
from attnsurgery.search.result.statistics import gain_of
from attnsurgery.search.seeds import seed_of
from attnsurgery.search.storage.run_directory import BEST, CONFIRMING, replace_own, weights_of, write_own
from attnsurgery.search.watching import Watching
from attnsurgery.timm_plugin.architectures import for_images

_LENGTHS = (2.0, 8.0)
"""Lengths of the measurements of a finalist, relative to its trial; the second is made if the first is undecided."""


def measure_again(bench: Bench, record: Record, reference: Latency, watch: Watching) -> Timing:
    """Measure a finalist twice as long as in its trial; eight times as long if its interval contains the budget."""
    watch.listener.phase(f"confirming: measuring trial {record.number} again")
    candidate = build(bench, Recipe.model_validate(record.recipe))
    for times in _LENGTHS:
        watch.step()
        with bench.backend.longer(times):
            timing = Timing.of(bench.backend.compare(bench.base, candidate, reference))
        measured = replace(record, timing=timing)
        if bench.budgets.check(measured, "high").within or not bench.budgets.check(measured, "low").within:
            break
    return timing


def train_again(
    bench: Bench, record: Mapping[str, Any] | None, index: int, watch: Watching, *, final: bool
) -> dict[str, Any]:
    """Train a finalist, or the base, from one of the seeds of the confirmation.

    Args:
        bench: what trials are made on.
        record: of the finalist as JSON data; None for the base.
        index: of the seed.
        watch: told of progress.
        final: use a seed that nothing is chosen by, and write the weights to the run directory for the verdict.

    Returns:
        "top1" and "loss" on the validation split, and of a final training the hash of its "weights"; or the reason why
        it "failed".
    """
    name_of_model = "the base" if record is None else f"trial {record['number']}{', the winner' if final else ''}"
    watch.listener.phase(f"confirming: {name_of_model}, seed {index + 1} of {bench.config.confirm_seeds}")
    model = _initial_model(bench, record)
    try:
        score = bench.final_evaluator.score(
            model, seed_of(bench.config.seed, "verdict" if final else "confirm", index), watch=watch
        )
    except SearchError as error:
        return {"failed": str(error)}
    result = {"top1": score.top1, "loss": score.loss}
    if not final:
        return result
    folder, name = Path(bench.config.output), weights_of(record, index)
    (folder / CONFIRMING).mkdir(exist_ok=True)
    write_own(folder, name, to_safetensors(model))
    return {**result, "weights": hash_of(folder / name)}


def final_verdict(bench: Bench, record: Record, reference: Latency, watch: Watching) -> Confirmation:
    """Compare winner and base, with the weights of `train_again`, on the test split; measure and save the winner.

    Raises:
        CheckpointError: the winner cannot be saved; an earlier one is unchanged.
    """
    folder, winner, recipe = Path(bench.config.output), record.as_dict(), Recipe.model_validate(record.recipe)
    rights: dict[bool, list[torch.Tensor]] = {}
    for base in (True, False):
        for index in range(bench.config.confirm_seeds):
            watch.step()
            model = _initial_model(bench, None if base else winner)
            path = folder / weights_of(None if base else winner, index)
            load_weights(model, read_state_dict(path), str(path))
            rights.setdefault(base, []).append(
                accuracy(model, bench.data.test, bench.final_evaluator.settings, watch=watch)[2]
            )
            if not base and index == 0:
                best = model
    watch.listener.phase("confirming: measuring the winner again")
    with bench.backend.longer():
        timing = Timing.of(bench.backend.compare(bench.base, best, reference))
    if new_name := save(bench, best, recipe, folder):
        watch.listener.phase(f"{BEST} holds files that the search has not written, and is kept as {new_name}")
    confirmation = compare_on_test(
        record.digest or "", rights[True], rights[False], bench.final_evaluator.settings.epochs, timing
    )
    return replace(confirmation, balanced=_balanced(bench, rights))


def _balanced(bench: Bench, rights: Mapping[bool, Sequence[torch.Tensor]]) -> tuple[float, float] | None:
    """The mean balanced accuracies of base and winner on the test images; None if the classes are of similar sizes.

    Args:
        bench: holds the test images.
        rights: (N,) booleans for each seed, true where an image was classified correctly; the base's under True.
    """
    base, winner = (
        [bench.data.balanced(bench.data.test, right_N) for right_N in rights[side]] for side in (True, False)
    )
    means = [fmean(share for share in side if share is not None) for side in (base, winner) if None not in side]
    return (means[0], means[1]) if len(means) == 2 else None


def _initial_model(bench: Bench, data: Mapping[str, Any] | None) -> nn.Module:
    return copy.deepcopy(bench.base) if data is None else build(bench, Recipe.model_validate(data["recipe"]))


def compare_on_test(
    digest: str, base: Sequence[torch.Tensor], winner: Sequence[torch.Tensor], epochs: int, timing: Timing
) -> Confirmation:
    """The verdict on the winner from its answers and the base's on the same N test images.

    Args:
        digest: of the winner.
        base: (N,) booleans for each seed, true where the base classified an image correctly.
        winner: the same for the winner.
        epochs: length of each training.
        timing: the winner's latency.
    """
    base_SN, winner_SN = (torch.stack(list(rights)).numpy() for rights in (base, winner))
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
    """Write `best` of a run directory: a timm directory, which `timm.create_model("local-dir:...", pretrained=True)`
    rebuilds.

    Args:
        bench: what trials are made on.
        model: the trained winner.
        recipe: of the winner.
        folder: the run directory.

    Returns:
        The new name of an earlier `best` with files that the search has not written; '' if there was none, or if it was
        the search's own and is replaced.

    Raises:
        CheckpointError, SearchError: `best` cannot be written; an earlier one is unchanged.
    """
    for leftover in folder.glob(f".{BEST}.*.new*"):  # left by a search that died
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = folder / f".{BEST}.{secrets.token_hex(4)}.new"
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
    write_directory(model.cpu(), temporary, architecture="surgery", model_args=arguments, texts=texts)
    try:
        return replace_own(folder, BEST, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # exists only if it could not be renamed
