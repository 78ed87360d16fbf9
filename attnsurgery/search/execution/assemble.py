"""Loads and builds everything that a search stands on, once."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from attnsurgery.checkpoint.base import build_base, trained_sizes
from attnsurgery.checkpoint.difference import digest
from attnsurgery.checkpoint.weights import StateDict, read_state_dict
from attnsurgery.errors import SearchError, UsageError
from attnsurgery.evaluate import (
    EVALUATORS,
    Data,
    Preprocessing,
    TrainSettings,
    load_data,
    native_size,
)
from attnsurgery.evaluate.contents import load_digests
from attnsurgery.graph.anatomy import Anatomy
from attnsurgery.graph.find import survey
from attnsurgery.latency import Conditions, Effort, LatencyBackend, backend_for
from attnsurgery.samplers import SAMPLERS
from attnsurgery.search.budgets.calibrate import Shelf, base_key
from attnsurgery.search.budgets.costs import Costs
from attnsurgery.search.config import SearchConfig
from attnsurgery.search.device_lock import alone_on_device
from attnsurgery.search.execution.baseline import starting_weights
from attnsurgery.search.execution.bench import Bench, Fresh
from attnsurgery.search.execution.given_base import (
    can_reorder,
    label_names,
    normalization,
    other_classes,
    plain,
    reordered,
)
from attnsurgery.search.execution.scorers import Alone, Scorer, Shared
from attnsurgery.search.execution.supernet import Supernet
from attnsurgery.search.listener import Listener
from attnsurgery.search.result.limits import Budgets
from attnsurgery.search.rungs import SUPERNET, Rung, rungs_of
from attnsurgery.search.space import BoundSpace, bind, load
from attnsurgery.search.storage.run_directory import IMAGES, SUPERNET_WEIGHTS, write_own
from attnsurgery.search.watching import Watching
from attnsurgery.timm_plugin.architectures import check_base, for_images, weightless

_TOLERANCE = 0.005
_DEFAULT_SIZE = 48


def keep_digests(bench: Bench, folder: Path) -> None:
    """Keep in the run directory what was found of image files; where that cannot be, they are read again."""
    if bench.digests and bench.digests != load_digests(folder / IMAGES):
        with suppress(SearchError):
            write_own(folder, IMAGES, json.dumps(bench.digests))


def pick_device(asked: str) -> str:
    """'auto' is CUDA where there is one, else the CPU; anything else is checked.

    Raises:
        UsageError: torch does not know the device, or sees none of it.
    """
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=asked)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {asked}: {reason}. Use auto, cpu, cuda or cuda:<number>.") from None
    return asked


def prepare(
    config: SearchConfig,
    folder: Path,
    listener: Listener,
    stop: Callable[[], bool],
    backend: LatencyBackend | None = None,
) -> Bench:
    """Load and build everything; train the base if it comes without weights.

    Args:
        folder: the run directory; taken in place of the configuration's.

    Raises:
        what `assemble` raises.
        CheckpointError: the run directory's weights cannot be read.
    """
    bench = assemble(config.model_copy(update={"output": str(folder)}), listener, backend)
    bench.weights = starting_weights(bench, Watching(listener, stop))
    return bench


def assemble(
    config: SearchConfig,
    listener: Listener,
    backend: LatencyBackend | None = None,
    *,
    decode: bool = True,
    check: bool = True,
) -> Bench:
    """Load and build everything but the weights of a base that comes without; nothing is written.

    Args:
        decode: False leaves images alone until they are needed, if ever.
        check: open all images once and say what is to be said of them; False where the search itself has done that.

    Raises:
        UnknownNameError: no such base, space, sampler, evaluator or backend; nothing was read yet.
        RecipeError, SiteError, OptionError: the space does not read, or does not fit the base.
        NothingFeasibleError: no candidate can keep to the budgets for parameters and multiply-accumulates.
        UsageError, SearchError: the data, the device, or a choice of both weights that exclude each other.
        CheckpointError: the weights cannot be read or fetched.
    """
    if config.pretrained and config.checkpoint:
        raise UsageError("--pretrained and --checkpoint both say where the base's weights come from; give one.")
    named = plain(config.base, config.checkpoint)
    config = config.model_copy(update={"base": named.base, "checkpoint": named.checkpoint})
    check_base(config.base, "MODEL")
    space_file = load(config.space)
    weights = read_state_dict(config.checkpoint) if config.checkpoint else None
    size = _input_size(config, weights)
    sized = for_images(config.base, size[1:])
    backend = backend or _backend(config, size)
    *lower, top = rungs_of(config)
    SAMPLERS[config.sampler]  # whatever the configuration names exists, before images are read and bases trained
    if check:
        listener.phase(f"reading {config.data or 'the embedded digits'}")
    twin = weightless(config.base)
    normalized = normalization(config.checkpoint)
    fitted = replace(Preprocessing.of(twin, size), **normalized)
    data = load_data(
        config.data,
        fitted,
        config.seed,
        augment=config.augment,
        group_by=config.group_by,
        on_load=listener.loading,
        decode=decode,
        check=check,
        known=(digests := load_digests(Path(config.output) / IMAGES)),
    )
    config = config.model_copy(update={"augment": data.augment})
    if check:
        listener.data(data.describe(), data.notes)
    settings = TrainSettings(
        epochs=config.epochs,
        batch_size=config.train_batch_size,
        lr=config.lr,
        device=config.device,
        amp=config.train_dtype == "bfloat16",
        channels_last=config.channels_last,
        tf32=config.tf32,
    )
    base, fresh, given = _untrained(config, data.classes, weights, sized, listener if check else Listener())
    base.pretrained_cfg = {**(getattr(base, "pretrained_cfg", None) or {}), **normalized}  # type: ignore[assignment]
    anatomy = survey(base, size)
    space = bind(space_file, anatomy, config.base)
    budgets, costs = Budgets.of(config), Costs.count(space, anatomy, base)
    costs.check_feasible(space.places, budgets)
    for choice in space.left_out:
        listener.phase(f"left out of the space: {choice}")
    rungs = [_scorer(rung, config, base, space, anatomy, data, settings) for rung in lower]
    evaluator = EVALUATORS[top.evaluator](data, settings)
    places = replace(space.places, budgets=costs.budgets(budgets))
    shelf = Shelf(backend, base_key(base, config.base))
    scorers = (*rungs, Alone(evaluator))
    made = Bench(config, base, anatomy, space, data, scorers, evaluator, backend, budgets, costs, places, shelf, fresh)
    made.given, made.digests = given, digests
    return made


def conditions_of(config: SearchConfig, size: tuple[int, int, int]) -> Conditions:
    """What a latency is measured under.

    Args:
        size: (C, H, W) of an image.
    """
    return Conditions(
        device=config.device,
        dtype=config.dtype,
        batch_size=config.batch_size,
        input_size=size,
        mode=config.mode,
        channels_last=config.channels_last,
        tf32=config.tf32,
        cudnn_benchmark=config.cudnn_benchmark,
        cold_cache=config.cold_cache,
        threads=config.threads or torch.get_num_threads(),
    )


def _backend(config: SearchConfig, size: tuple[int, int, int]) -> LatencyBackend:
    effort = Effort(tolerance=_TOLERANCE, max_seconds=config.latency_seconds)
    return alone_on_device(backend_for(conditions_of(config, size), config.latency, effort))


def _scorer(
    rung: Rung,
    config: SearchConfig,
    base: nn.Module,
    space: BoundSpace,
    anatomy: Anatomy,
    data: Data,
    settings: TrainSettings,
) -> Scorer:
    settings = replace(settings, epochs=rung.epochs)
    if rung.evaluator != SUPERNET:
        return Alone(EVALUATORS[rung.evaluator](data, settings))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        supernet = Supernet(base, space, anatomy)
    return Shared(supernet, base, data, settings, Path(config.output) / SUPERNET_WEIGHTS)


def _input_size(config: SearchConfig, weights: StateDict | None) -> tuple[int, int, int]:
    """What was asked for; else the model's own where its weights expect it; else near the images' own size."""
    model = weightless(config.base)
    channels, height, width = Preprocessing.of(model).input_size
    if weights is not None:
        channels = trained_sizes(config.base, weights, str(config.checkpoint)).get("in_chans", channels)
    if config.input_size:
        return channels, config.input_size, config.input_size
    fixed = bool((getattr(model, "pretrained_cfg", None) or {}).get("fixed_input_size"))
    if config.pretrained or config.checkpoint or fixed:
        return channels, height, width
    if config.data is None:
        return channels, min(_DEFAULT_SIZE, height), min(_DEFAULT_SIZE, width)
    native = max(32, 32 * round(native_size(config.data) / 32))
    return channels, min(native, height), min(native, width)


def _untrained(
    config: SearchConfig,
    classes: Sequence[str],
    weights: StateDict | None,
    sized: Mapping[str, Any],
    listener: Listener,
) -> tuple[nn.Module, Fresh, str | None]:
    """The base for these classes, with the weights it was given, or fresh ones that depend on the seed alone.

    Args:
        weights: of the checkpoint, if there is one.
        sized: arguments of the architecture for the size of the images.

    Returns:
        The model, what of it is to be trained, and the digest of the weights that it was given.
    """
    fresh: Fresh = "nothing" if config.pretrained or config.checkpoint else "all"
    img_size = sized.get("img_size")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if weights is not None:
            model = build_base(config.base, weights, str(config.checkpoint), img_size)
        elif config.pretrained:
            model = build_base(config.base, img_size=img_size)
        else:
            model = timm.create_model(config.base, num_classes=len(classes), **sized)
        given = None if fresh == "all" else digest(model.state_dict()).removeprefix("sha256:")[:16]
        names = label_names(config.checkpoint, model) if fresh == "nothing" else ()
        if getattr(model, "num_classes", len(classes)) != len(classes):
            model.reset_classifier(len(classes))  # type: ignore[operator]
            fresh = "head"
        elif names and list(names) != list(classes):
            if sorted(names) == sorted(classes) and can_reorder(model, len(classes)):
                reordered(model, names, classes)
                listener.phase("the outputs of the given classifier are put into the order of the images' classes")
            else:
                listener.phase(f"{other_classes(names, classes)}: a new one is fitted")
                model.reset_classifier(len(classes))  # type: ignore[operator]
                fresh = "head"
    return model, fresh, given
