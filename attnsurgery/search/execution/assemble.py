"""Loads and builds all that trials need: base, data, space, latency backend, evaluators."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
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
from attnsurgery.data import SIZES, Data, Preprocessing, count_files, embedded_name, load_data, native_size
from attnsurgery.data.contents import load_digests
from attnsurgery.errors import AttnSurgeryError, SearchError, UsageError
from attnsurgery.evaluate import EVALUATORS, TrainSettings
from attnsurgery.graph.anatomy import Anatomy
from attnsurgery.graph.find import survey
from attnsurgery.latency import Conditions, Effort, LatencyBackend, backend_for
from attnsurgery.models.segmenter import Segmenter, has_decoder
from attnsurgery.samplers import SAMPLERS
from attnsurgery.search.budgets.calibrate import LatencyCache, base_key
from attnsurgery.search.budgets.costs import Costs
from attnsurgery.search.config import SearchConfig
from attnsurgery.search.device_lock import with_device_lock
from attnsurgery.search.execution.base_space import bind_space, read_space
from attnsurgery.search.execution.baseline import starting_weights
from attnsurgery.search.execution.bench import Bench, Fresh
from attnsurgery.search.execution.over_budget import refuse_over_budget
from attnsurgery.search.execution.pretrained_base import (
    can_reorder,
    label_names,
    mismatch,
    normalization,
    reorder,
    resolve_base,
)
from attnsurgery.search.execution.scorers import Alone, Scorer, Shared
from attnsurgery.search.execution.sizes import AtSize
from attnsurgery.search.execution.supernet import Supernet
from attnsurgery.search.execution.what_fits import what_fits
from attnsurgery.search.listener import Listener
from attnsurgery.search.result.limits import Budgets
from attnsurgery.search.rivals import rivals_of
from attnsurgery.search.rungs import SUPERNET, Rung, rungs_of
from attnsurgery.search.space import BoundSpace
from attnsurgery.search.storage.run_directory import IMAGES, SUPERNET_WEIGHTS, write_own
from attnsurgery.search.tuning import DEFAULT_RATE, SCALES, pilot_epochs
from attnsurgery.search.watching import Watching
from attnsurgery.settings import sides
from attnsurgery.tasks import Task, balanced_weights, task_of
from attnsurgery.timm_plugin.architectures import check_base, for_images, weightless

_TOLERANCE = 0.005
"""Half the 95 % interval at which a measurement may end, as a share of the latency."""
MANY_IMAGES = 1000
"""Number of image files from which on the base is measured before they are opened."""


def before_images(config: SearchConfig, backend: LatencyBackend | None = None) -> Bench | None:
    """What the base is measured on, before images are opened; None where they are few and soon read.

    Args:
        config: all settings.
        backend: measures latencies instead of the backend that the configuration names.

    Raises:
        AttnSurgeryError: as `assemble`.
    """
    try:
        count = count_files(config.data, task_of(config.task, config.metric).sources)
    except AttnSurgeryError:  # `assemble` reports it, and unknown names before it
        return None
    return assemble(config, Listener(), backend, decode=False, check=False) if count >= MANY_IMAGES else None


def save_digests(bench: Bench, folder: Path) -> None:
    """Save the digests of image files in the run directory; if they cannot be written, images are read again."""
    if bench.digests and bench.digests != load_digests(folder / IMAGES):
        with suppress(SearchError):
            write_own(folder, IMAGES, json.dumps(bench.digests))


def pick_device(device: str) -> str:
    """The device of a setting: 'auto' is CUDA where there is one, else the CPU; any other device is checked.

    Raises:
        UsageError: torch does not know the device, or the machine does not have it.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {device}: {reason}. Use auto, cpu, cuda or cuda:<number>.") from None
    return device


def prepare(
    config: SearchConfig,
    folder: Path,
    listener: Listener,
    stop: Callable[[], bool],
    backend: LatencyBackend | None = None,
) -> Bench:
    """Load and build everything; train the base if it comes without weights.

    Args:
        config: all settings.
        folder: the run directory, instead of the configuration's.
        listener: told of progress.
        stop: whether the user asked for an end.
        backend: measures latencies instead of the backend that the configuration names.

    Raises:
        AttnSurgeryError: as `assemble`.
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
    """Load and build everything but the weights of a base that comes without any; nothing is written.

    Args:
        config: all settings.
        listener: told of progress.
        backend: measures latencies instead of the backend that the configuration names.
        decode: decode images now; False decodes them when they are needed.
        check: open all images once and report what is unusual; False if the search itself has done that.

    Raises:
        UnknownNameError: no such base, space, sampler, evaluator or backend; nothing was read yet.
        RecipeError, SiteError, OptionError: the space cannot be parsed, or does not fit the base.
        NothingFeasibleError: no candidate can keep to the budgets for parameters and multiply-accumulates.
        UsageError, SearchError: the data or the device cannot be used, or settings exclude each other.
        CheckpointError: the weights cannot be read or downloaded.
    """
    if config.pretrained and config.checkpoint:
        raise UsageError("--pretrained and --checkpoint both say where the base's weights come from; give one.")
    task = task_of(config.task, config.metric)
    if config.class_weights != "none" and not task.weighs_classes:
        raise UsageError(f"--class-weights {config.class_weights}: --task {config.task} has a loss without them.")
    resolved = resolve_base(config.base, config.checkpoint)
    check_base(resolved.base, "MODEL")
    config = config.model_copy(update={"base": task.model_of(resolved.base), "checkpoint": resolved.checkpoint})
    for rival in rivals_of(config):
        check_base(resolve_base(rival.model, None).base, "--against")
    space_file = read_space(config)
    weights = read_state_dict(config.checkpoint) if config.checkpoint else None
    size = _input_size(config, weights, task)
    sized = for_images(config.base, size[1:])
    given_backend, backend = backend, backend or _backend(config, size)
    *lower, top = rungs_of(config)
    SAMPLERS[config.sampler]  # raises for an unknown name, before images are read and the base is trained
    normalized = normalization(config.checkpoint)
    data, digests = images_of(config, task, size, normalized, listener, decode, check)
    if config.class_weights != "none":
        task = task.weighted(balanced_weights(data.train.labels, data.num_classes))
    config = config.model_copy(update={"augment": data.augment})
    settings = _train_settings(config, len(data.train))
    base, untrained_part, source_digest = untrained(config, data, weights, sized, listener if check else Listener())
    base.pretrained_cfg = {**(getattr(base, "pretrained_cfg", None) or {}), **normalized}  # type: ignore[assignment]
    anatomy = survey(base, size)
    space, others = bind_space(space_file, base, anatomy, config, listener.note if check else lambda reason: None)
    budgets, costs = Budgets.of(config), Costs.count(space, anatomy, base, others)
    for choice in space.left_out if check else ():  # a worker need not say it again
        listener.phase(f"left out of the space: {choice}")
    rungs = [_scorer(rung, config, base, space, anatomy, data, settings, task) for rung in lower]
    evaluator = EVALUATORS[top.evaluator](data, settings, task)
    places = replace(space.places, budgets=costs.block_budgets(budgets))
    bench = Bench(
        config=config,
        base=base,
        anatomy=anatomy,
        space=space,
        task=task,
        data=data,
        rungs=(*rungs, Alone(evaluator)),
        evaluator=evaluator,
        backend=backend,
        budgets=budgets,
        costs=costs,
        places=places,
        latency_cache=LatencyCache(backend, base_key(base, config.base)),
        fresh=untrained_part,
        source_digest=source_digest,
        digests=digests,
        at_sizes=tuple(_at_size(there, base, config, given_backend) for there, _ in others),
    )
    refuse_over_budget(bench, None, lambda: what_fits(bench, None, Watching(listener, lambda: False)))
    costs.check_feasible(space.places, budgets)
    return bench


def images_of(
    config: SearchConfig,
    task: Task,
    size: tuple[int, int, int],
    normalized: Mapping[str, Any],
    listener: Listener,
    decode: bool,
    check: bool,
) -> tuple[Data, dict[str, list[Any]]]:
    """The images in their splits, and the digests of their files.

    Args:
        config: all settings.
        task: finds the images and their targets.
        size: (C, H, W) of an image.
        normalized: `mean` and `std` of pretrained weights, if they have them.
        listener: told of progress.
        decode: as in `assemble`.
        check: as in `assemble`.
    """
    if check:
        name = embedded_name(config.data)
        listener.phase(f"reading {f'the embedded {name}' if name else config.data}")
    digests = load_digests(Path(config.output) / IMAGES)
    data = load_data(
        config.data,
        replace(Preprocessing.of(weightless(config.base), size), **normalized),
        config.seed,
        augment=config.augment,
        group_by=config.group_by,
        on_load=listener.loading,
        decode=decode,
        check=check,
        known=digests,
        find=task.sources,
    )
    if check:
        listener.data(data.describe(), data.notes)
    return data, digests


def _train_settings(config: SearchConfig, images: int) -> TrainSettings:
    """How each candidate is trained on the top rung. What the search is to choose has a value to begin with.

    Args:
        config: all settings.
        images: number of training images.
    """
    epochs, lr, scale = config.epochs, config.lr, config.block_lr_scale
    return TrainSettings(
        epochs=pilot_epochs(images, config.train_batch_size) if isinstance(epochs, str) else epochs,
        batch_size=config.train_batch_size,
        lr=DEFAULT_RATE if isinstance(lr, str) else lr,
        new_lr_scale=SCALES[-1] if isinstance(scale, str) else scale,
        device=config.device,
        amp=config.train_dtype == "bfloat16",
        channels_last=config.channels_last,
        tf32=config.tf32,
    )


def conditions_of(config: SearchConfig, size: tuple[int, int, int]) -> Conditions:
    """The conditions of a latency measurement.

    Args:
        config: all settings.
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
    return with_device_lock(backend_for(conditions_of(config, size), config.latency, effort))


def _at_size(anatomy: Anatomy, base: nn.Module, config: SearchConfig, given: LatencyBackend | None) -> AtSize:
    """What trials at another input size are made on.

    Args:
        anatomy: the sites of the base at that size.
        base: the base.
        config: all settings.
        given: a backend that measures instead of the one that the configuration names.
    """
    size = anatomy.input_size
    backend = copy.copy(given) if given else _backend(config, size)
    backend.conditions = replace(backend.conditions, input_size=size)
    return AtSize(size[1:], anatomy, backend, LatencyCache(backend, base_key(base, config.base)))


def _scorer(
    rung: Rung,
    config: SearchConfig,
    base: nn.Module,
    space: BoundSpace,
    anatomy: Anatomy,
    data: Data,
    settings: TrainSettings,
    task: Task,
) -> Scorer:
    assert rung.epochs is not None, "only the top rung may be left to the search"
    settings = replace(settings, epochs=rung.epochs)
    if rung.evaluator != SUPERNET:
        return Alone(EVALUATORS[rung.evaluator](data, settings, task))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        supernet = Supernet(base, space, anatomy)
    return Shared(supernet, base, data, settings, task, Path(config.output) / SUPERNET_WEIGHTS)


def _input_size(config: SearchConfig, weights: StateDict | None, task: Task) -> tuple[int, int, int]:
    """(C, H, W) of an image: as configured; else as the weights expect it; else near the images' own size."""
    model = weightless(config.base)
    channels, height, width = Preprocessing.of(model).input_size
    if weights is not None:
        channels = trained_sizes(config.base, weights, str(config.checkpoint)).get("in_chans", channels)
    if config.input_size:
        return channels, *sides(config.input_size)
    fixed = bool((getattr(model, "pretrained_cfg", None) or {}).get("fixed_input_size"))
    if config.pretrained or config.checkpoint or fixed:
        return channels, height, width
    if name := embedded_name(config.data):
        *sizes, last = SIZES[name]
        return channels, *next((size for size in sizes if _takes(model, (channels, *size))), last)
    native = max(32, 32 * round(native_size(str(config.data), task.sources) / 32))
    return channels, min(native, height), min(native, width)


def _takes(model: nn.Module, size: tuple[int, int, int]) -> bool:
    """Whether a model can process images of this (C, H, W)."""
    device = next(iter(model.parameters()), torch.empty(0)).device
    try:
        with torch.no_grad():
            model.eval()(torch.empty(1, *size, device=device))
    except Exception:  # each layer has its own way of refusing a map that is too small
        return False
    return True


def untrained(
    config: SearchConfig,
    data: Data,
    weights: StateDict | None,
    sized: Mapping[str, Any],
    listener: Listener,
) -> tuple[nn.Module, Fresh, str | None]:
    """The base for the data, with its pretrained weights, or with random ones that depend only on the seed.

    Args:
        config: all settings.
        data: its classes, or the number of outputs.
        weights: of the checkpoint, if there is one.
        sized: arguments of the architecture for the size of the images.
        listener: told of progress.

    Returns:
        The model, the part of it that is still to be trained, and the digest of its pretrained weights.
    """
    classes, outputs = data.classes, data.num_classes
    untrained_part: Fresh = "nothing" if config.pretrained or config.checkpoint else "all"
    img_size = sized.get("img_size")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if weights is not None:
            model = build_base(config.base, weights, str(config.checkpoint), img_size)
        elif config.pretrained:
            model = build_base(config.base, img_size=img_size)
        else:
            model = timm.create_model(config.base, num_classes=outputs, **sized)
        source_digest = None if untrained_part == "all" else digest(model.state_dict()).removeprefix("sha256:")[:16]
        if untrained_part == "nothing" and isinstance(model, Segmenter) and not has_decoder(model, weights or {}):
            untrained_part = "head"  # the weights are those of the backbone
        names = label_names(config.checkpoint, model) if untrained_part == "nothing" else ()
        if getattr(model, "num_classes", outputs) != outputs:
            model.reset_classifier(outputs)  # type: ignore[operator]
            untrained_part = "head"
        elif names and list(names) != list(classes):
            if sorted(names) == sorted(classes) and can_reorder(model, outputs):
                reorder(model, names, classes)
                listener.phase("the outputs of the pretrained classifier are reordered as the images' classes")
            else:
                listener.phase(f"{mismatch(names, classes)}: a new one is fitted")
                model.reset_classifier(outputs)  # type: ignore[operator]
                untrained_part = "head"
    return model, untrained_part, source_digest
