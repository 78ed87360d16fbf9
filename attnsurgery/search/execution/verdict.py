"""The jobs of the confirmation: measure and train finalists again, train and test winner and base, save the winner."""

from __future__ import annotations

import copy
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import timm
from torch import nn

from attnsurgery.checkpoint.base import load_weights
from attnsurgery.checkpoint.directory import write_directory
from attnsurgery.checkpoint.weights import read_state_dict
from attnsurgery.errors import SearchError
from attnsurgery.evaluate import Evaluator, evaluate
from attnsurgery.latency import Latency
from attnsurgery.recipe.schema import Recipe
from attnsurgery.recipe.text import dumps
from attnsurgery.search.execution.baseline import hash_of
from attnsurgery.search.execution.bench import Bench
from attnsurgery.search.execution.pictures import write_pictures
from attnsurgery.search.execution.trial import build
from attnsurgery.search.files import to_safetensors
from attnsurgery.search.result.answers import packed
from attnsurgery.search.result.record import Record, Timing
from attnsurgery.search.seeds import seed_of
from attnsurgery.search.storage.pictures import BASE
from attnsurgery.search.storage.run_directory import BEST, CONFIRMING, replace_own, weights_of, write_own
from attnsurgery.search.watching import Watching
from attnsurgery.timm_plugin.architectures import for_images

LONGER = 2
"""Epochs of a training for the verdict, relative to a trial, where the settings leave them to the search."""
AVERAGE = 0.1
"""Share of a training over which the weights of the trainings for the verdict are averaged."""
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


def train_again(bench: Bench, record: Mapping[str, Any], index: int, watch: Watching) -> dict[str, Any]:
    """Train a finalist from one of the seeds by which the winner is chosen.

    Args:
        bench: what trials are made on.
        record: of the finalist as JSON data.
        index: of the seed.
        watch: told of progress.

    Returns:
        "metric" and "loss" on the validation split; or the reason why it "failed".
    """
    settings = bench.final_evaluator.settings
    watch.listener.phase(
        f"confirming: trial {record['number']}, seed {index + 1}, learning rate {settings.lr:g}, blocks at "
        f"{settings.new_lr_scale:g} times that"
    )
    try:
        score = bench.final_evaluator.score(
            _initial_model(bench, record), seed_of(bench.config.seed, "confirm", index), watch=watch
        )
    except SearchError as error:
        return {"failed": str(error)}
    return {"metric": score.metric, "loss": score.loss}


def train_finally(
    bench: Bench, record: Mapping[str, Any] | None, index: int, watch: Watching, *, rival: bool = False
) -> dict[str, Any]:
    """Train the winner, or the base, from a seed that nothing is chosen by, and test it.

    The winner's weights from the first of these seeds are written to the run directory, to be saved as the winner; and
    the pictures of winner and base.

    Args:
        bench: what trials are made on.
        record: of the winner as JSON data; None for the base.
        index: of the seed.
        watch: told of progress.
        rival: True if the bench's base is a rival.

    Returns:
        "metric" and "loss" on the validation split; on the test split the number of "images", their values as `packed`
        writes them, and the "balanced" accuracy, if classes differ in size; the "epochs"; and the hash of the "weights"
        that were written. Or the reason why it "failed".
    """
    name_of_model = bench.config.base if record is None else f"trial {record['number']}, the winner"
    watch.listener.phase(f"confirming: {name_of_model}, seed {index + 1} of at most {bench.config.most_seeds}")
    evaluator, model = _lasting(bench), _initial_model(bench, record)
    try:
        score = evaluator.score(model, seed_of(bench.config.seed, "verdict", index), watch=watch)
        tested = evaluate(model, bench.data.test, evaluator.settings, bench.task, watch=watch)
    except SearchError as error:
        return {"failed": str(error)}
    result = {
        "metric": score.metric,
        "loss": score.loss,
        "epochs": score.epochs,
        "images": len(tested.values),
        **packed(tested.values.numpy()),
        "balanced": tested.balanced if bench.data.unbalanced else None,
    }
    if index == 0 and not rival:
        write_pictures(bench, model, record["digest"] if record else BASE)
    if record is None or index > 0:
        return result
    folder, name = Path(bench.config.output), weights_of(record)
    (folder / CONFIRMING).mkdir(exist_ok=True)
    write_own(folder, name, to_safetensors(model))
    return {**result, "weights": hash_of(folder / name)}


def _lasting(bench: Bench) -> Evaluator:
    """The evaluator of the trainings for the verdict, which are longer and average the weights."""
    evaluator, epochs = bench.final_evaluator, bench.config.final_epochs
    settings = evaluator.settings
    longer = LONGER * settings.epochs if isinstance(epochs, str) else epochs
    return type(evaluator)(evaluator.data, replace(settings, epochs=longer, average=AVERAGE), bench.task)


def save_winner(bench: Bench, record: Record, reference: Latency, watch: Watching) -> dict[str, Any]:
    """Measure the winner with the weights of `train_finally`, and save it.

    Returns:
        The "timing" as JSON data.

    Raises:
        CheckpointError: the winner cannot be saved; an earlier one is unchanged.
    """
    folder, winner = Path(bench.config.output), record.as_dict()
    best, path = _initial_model(bench, winner), folder / weights_of(winner)
    load_weights(best, read_state_dict(path), str(path))
    watch.listener.phase("confirming: measuring the winner again")
    with bench.backend.longer():
        timing = Timing.of(bench.backend.compare(bench.base, best, reference))
    if new_name := save(bench, best, Recipe.model_validate(record.recipe), folder):
        watch.listener.phase(f"{BEST} holds files that the search has not written, and is kept as {new_name}")
    return {"timing": asdict(timing)}


def _initial_model(bench: Bench, data: Mapping[str, Any] | None) -> nn.Module:
    return copy.deepcopy(bench.base) if data is None else build(bench, Recipe.model_validate(data["recipe"]))


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
    surgical = {"base": recipe.base, "recipe": recipe.as_dict()} if recipe.edits else {}
    arguments = {
        **surgical,
        "num_classes": bench.data.num_classes,
        "in_chans": bench.anatomy.input_size[0],
        **for_images(bench.config.base, bench.anatomy.input_size[1:]),
    }
    texts = {"recipe.yaml": dumps(recipe)}
    size, classes = bench.anatomy.input_size, bench.data.num_classes
    prepared = {name: value for name, value in asdict(bench.data.preprocessing).items() if name != "input_size"}
    config = {**getattr(model, "pretrained_cfg", {}), **prepared, "input_size": size, "num_classes": classes}
    config["label_names"] = list(bench.data.classes)
    model.pretrained_cfg = config  # type: ignore[assignment]
    # the base at another input size, without blocks, is a plain timm model
    architecture = "surgery" if surgical else timm.models.split_model_name_tag(recipe.base)[0]
    write_directory(model.cpu(), temporary, architecture=architecture, model_args=arguments, texts=texts)
    try:
        return replace_own(folder, BEST, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # exists only if it could not be renamed
