"""One training of the base, or of a probe with blocks, with settings on trial (`attnsurgery.search.tuning`)."""

from __future__ import annotations

import copy
import itertools
from typing import Any

from attnsurgery.errors import SearchError
from attnsurgery.search.execution.bench import Bench
from attnsurgery.search.execution.trial import build
from attnsurgery.search.space import NONE, BoundSpace
from attnsurgery.search.tuning import Part
from attnsurgery.search.watching import Watching


def try_training(bench: Bench, part: Part, seed: int, watch: Watching) -> dict[str, Any]:
    """Train the base or the probe, and score it on the validation images.

    Args:
        bench: with the settings that are on trial.
        part: which of the two is trained.
        seed: of the training.
        watch: told of progress.

    Returns:
        `metric`, `loss` and `seconds`; or the reason why the training `failed`.
    """
    settings = bench.final_evaluator.settings
    text = f"{settings.epochs} epochs at learning rate {settings.lr:g}"
    if part == "probe":
        text += f", blocks at {settings.new_lr_scale:g} times that"
    watch.listener.phase(f"choosing how to train: {bench.config.base if part == 'base' else 'a candidate'}, {text}")
    model = copy.deepcopy(bench.base)
    if part == "probe" and (recipe := bench.space.recipe_for(probe_of(bench.space))) is not None:
        model = build(bench, recipe)
    try:
        score = bench.final_evaluator.score(model, seed, watch=watch)
    except SearchError as error:
        return {"failed": str(error)}
    return {"metric": score.metric, "loss": score.loss, "seconds": score.seconds}


def probe_of(space: BoundSpace) -> dict[str, str]:
    """The assignment of the probe: blocks at every second place, up to the maximum number, of all kinds in turn."""
    assignment = space.nothing
    for turn, variable in zip(itertools.count(), space.variables[::2]):
        labels = [label for label in variable.choices if label != NONE]
        changed = {**assignment, variable.name: labels[turn % len(labels)]}
        if space.max_blocks is None or space.blocks(changed) <= space.max_blocks:
            assignment = changed
    return assignment
