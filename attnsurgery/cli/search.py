"""`attnsurgery search [MODEL] --budget-ms MS`: which blocks, where, within so many milliseconds?"""

from __future__ import annotations

import itertools
import os
import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnsurgery.cli._options import (
    STORAGE_VARIABLE,
    AsJson,
    BatchSize,
    ChannelsLast,
    ColdCache,
    CudnnBenchmark,
    Dtype,
    LatencyName,
    Mode,
    Tf32,
    Threads,
)

if TYPE_CHECKING:
    from attnsurgery.search import SearchConfig

_INTERRUPTED = 130
_POWERS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}


def amount(text: str) -> int:
    """A number with K, M, G or B behind it."""
    number = text.strip().upper().rstrip("KMGB")
    try:
        return round(float(number) * _POWERS[text.strip().upper()[len(number) :]])
    except (ValueError, KeyError, OverflowError):
        raise typer.BadParameter(f"{text!r} is no number such as 25600000, 25.6M or 4.1G.") from None


def search(
    model: Annotated[str | None, typer.Argument(help="Any timm name; by default the space's own small model.")] = None,
    budget_ms: Annotated[float | None, typer.Option(help="Most milliseconds that one forward may take.")] = None,
    budget_ips: Annotated[
        float | None, typer.Option(help="Minimum throughput of the measured forward, in images per second.")
    ] = None,
    budget_params: Annotated[
        int | None, typer.Option(parser=amount, metavar="N", help="Most parameters, such as 26M.")
    ] = None,
    budget_macs: Annotated[
        int | None,
        typer.Option(parser=amount, metavar="N", help="Most multiply-accumulates of one image, such as 4.2G."),
    ] = None,
    budget_mb: Annotated[
        float | None, typer.Option(help="Most memory that one forward may take at a time, in MB.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Image folder, or a name such as hfds/cifar10; by default the embedded digits."),
    ] = None,
    augment: Annotated[
        str | None,
        typer.Option(
            help="How training images are varied: none; shift; light, which also mirrors them left to right; or timm, "
            "random resized crops. By default light, or shift where mirrored images seem to be of another class."
        ),
    ] = None,
    group_by: Annotated[
        str | None,
        typer.Option(
            metavar="PATTERN",
            help="A regular expression on images' paths, such as 'patient\\d+': images with the same match stay in one "
            "split.",
        ),
    ] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Begin with timm's published weights.")] = False,
    checkpoint: Annotated[Path | None, typer.Option(help="Begin with the weights in this file.")] = None,
    space: Annotated[
        str, typer.Option(help="A space that ships (tiny, se, non_local, dual, residual, full) or a file.")
    ] = "tiny",
    trials: Annotated[int, typer.Option(help="Candidates within the budget to train, over all runs.", min=1)] = 10,
    epochs: Annotated[int, typer.Option(help="Epochs of each trial, and of the confirmation.", min=1)] = 3,
    base_epochs: Annotated[int, typer.Option(help="Epochs of a base without weights, or of a new head.", min=1)] = 2,
    learning_rate: Annotated[float, typer.Option("--lr", help="Highest learning rate.")] = 1e-3,
    train_batch_size: Annotated[int, typer.Option(help="Images in one training step.", min=2)] = 64,
    finalists: Annotated[
        int, typer.Option(help="So many of the best are trained again; the best of these is the winner.", min=1)
    ] = 3,
    rank_by: Annotated[str, typer.Option(help="What orders candidates on validation images: top1 or loss.")] = "top1",
    confirm_seeds: Annotated[int, typer.Option(help="Trainings of each finalist, then of winner and base.", min=1)] = 2,
    input_size: Annotated[int | None, typer.Option(help="Pixels a side; by default what fits model and data.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    batch_size: BatchSize = 1,
    dtype: Dtype = None,
    mode: Mode = None,
    channels_last: ChannelsLast = None,
    tf32: Tf32 = False,
    cudnn_benchmark: CudnnBenchmark = False,
    cold_cache: ColdCache = False,
    threads: Threads = 1,
    latency: LatencyName = None,
    train_dtype: Annotated[
        str | None,
        typer.Option(help="Of training: float32, or bfloat16 (mixed precision), which is the default on CUDA."),
    ] = None,
    evaluator: Annotated[
        str, typer.Option(help="How a trial is trained: finetune; blocks on a frozen model; or supernet, all at once.")
    ] = "finetune",
    rungs: Annotated[
        str,
        typer.Option(
            metavar="'NAME:EPOCHS ...'",
            help="Cheaper trainings that come first, such as 'blocks:1'; the best of each go on to the next.",
        ),
    ] = "",
    halving: Annotated[int, typer.Option(help="One candidate in so many goes on to the next rung.", min=2)] = 3,
    sampler: Annotated[str, typer.Option(help="Which candidate is next: additive, tpe, nsga2 or random.")] = "additive",
    seed: Annotated[int, typer.Option(help="The same seed makes the same search.", min=0)] = 0,
    workers: Annotated[
        int,
        typer.Option(help="Processes that measure and train, one a GPU; 0: none beside this one.", min=0, max=1024),
    ] = 1,
    launcher: Annotated[
        str, typer.Option(help="What starts workers: local; ray, on a cluster; or submitit, as jobs of Slurm.")
    ] = "local",
    launcher_args: Annotated[
        str,
        typer.Option(metavar="'NAME=VALUE ...'", help="What the launcher is asked for, such as 'slurm_partition=gpu'."),
    ] = "",
    in_step: Annotated[
        bool,
        typer.Option(
            "--in-step", help="Several workers wait for each other, so that the same seed makes the same search."
        ),
    ] = False,
    extend: Annotated[
        bool,
        typer.Option(
            "--extend",
            help="Go on though a budget, the machine or its software are others now, or the space offers more.",
        ),
    ] = False,
    new: Annotated[
        bool, typer.Option("--new", help="Begin another search beside one that is there, in a directory of its own.")
    ] = False,
    lease_seconds: Annotated[
        float,
        typer.Option(help="At a --storage that others share, what a search does not renew for so long is taken over."),
    ] = 60.0,
    patience_minutes: Annotated[
        float, typer.Option(help="A worker that gives no sign of life for so long is ended, and its trial begun again.")
    ] = 10.0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Run directory; by default runs/<name>.")
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            help=f"Optuna storage URL; by default {STORAGE_VARIABLE} of the environment, where others do not read a "
            "password, or SQLite in the run directory."
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only say how large the space is, how much of it fits, and how long it takes."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Search for the best blocks and places under a budget; the same command goes on where it stopped.

    At least one budget is needed; several hold together.
    """
    from attnsurgery.search.execution.assemble import pick_device
    from attnsurgery.search.execution.given_base import plain
    from attnsurgery.search.result.limits import Budgets
    from attnsurgery.search.space import load

    if storage is None:
        storage = os.environ.get(STORAGE_VARIABLE) or None
    else:
        _warn_of_password(storage)
    begun = plain(model or load(space).base or _default_base(), None if checkpoint is None else str(checkpoint))
    base = begun.base
    config = _config(
        budget_ms=budget_ms,
        budget_ips=budget_ips,
        budget_params=budget_params,
        budget_macs=budget_macs,
        budget_mb=budget_mb,
        base=base,
        space=space,
        data=data,
        augment=augment,
        group_by=group_by,
        pretrained=pretrained,
        checkpoint=begun.checkpoint,
        trials=trials,
        epochs=epochs,
        base_epochs=base_epochs,
        lr=learning_rate,
        train_batch_size=train_batch_size,
        finalists=finalists,
        confirm_seeds=confirm_seeds,
        rank_by=rank_by,
        input_size=input_size,
        device=pick_device(device),
        batch_size=batch_size,
        dtype=dtype,
        mode=mode,
        channels_last=channels_last,
        tf32=tf32,
        cudnn_benchmark=cudnn_benchmark,
        cold_cache=cold_cache,
        train_dtype=train_dtype,
        threads=threads,
        latency=latency,
        evaluator=evaluator,
        rungs=rungs,
        halving=halving,
        sampler=sampler,
        seed=seed,
        workers=workers,
        launcher=launcher,
        launcher_args=launcher_args,
        in_step=in_step,
        extend=extend,
        lease_seconds=lease_seconds,
        patience_minutes=patience_minutes,
        output="" if output is None else str(output),
        storage=storage,
    )
    if output is None:
        said = Budgets.of(config).describe().replace(" and ", "-").replace(" (", "-")
        budgets = said.replace(")", "").replace(" ", "")
        named = Path("runs") / "-".join([base, _stem(data or "digits"), _stem(space), budgets])
        config = config.model_copy(update={"output": str(named)})
        if extend and not named.exists():
            _ask_which(named, "-".join([base, _stem(data or "digits")]))
    if new:
        config = config.model_copy(update={"output": _free(config.output)})
    if dry_run:
        _preview(config, as_json)
    else:
        _run(config, as_json)


def _preview(config: SearchConfig, as_json: bool) -> None:
    from attnsurgery.cli._console import print_error, print_json
    from attnsurgery.cli._search_view import print_preview, view
    from attnsurgery.search.execution.preview import preview
    from attnsurgery.search.watching import StopAsked

    with view(config) as listener, _stopping() as stop:
        try:
            found = preview(config, listener, stop.is_set)
        except StopAsked:
            found = None
    if found is None:
        print_error("stopped; nothing was written.")
        raise typer.Exit(_INTERRUPTED)
    if as_json:
        print_json(found.as_dict())
    else:
        print_preview(found, config)


def _run(config: SearchConfig, as_json: bool) -> None:
    from attnsurgery.cli._console import print_error, print_json
    from attnsurgery.cli._search_view import as_data, print_outcome, view
    from attnsurgery.search import run
    from attnsurgery.search.watching import StopAsked

    command = command_of(config)
    with view(config) as listener, _stopping() as stop:
        try:
            outcome = run(config, listener, stop.is_set, command=command)
        except StopAsked:
            outcome = None
    if outcome is None:
        print_error(f"stopped before the first trial; nothing is lost. Go on with:  {command}")
        raise typer.Exit(_INTERRUPTED)
    if as_json:
        print_json(as_data(outcome))
    else:
        print_outcome(outcome)
    if outcome.interrupted:
        print_error(f"stopped after {outcome.trained} of {config.trials} trained trials. Go on with:  {command}")
        raise typer.Exit(_INTERRUPTED)


def command_of(config: SearchConfig) -> str:
    """The command line that does this search; a password in the storage URL is left out."""
    from attnsurgery.search import SearchConfig
    from attnsurgery.search.config import defaults_on
    from attnsurgery.search.execution.assemble import pick_device
    from attnsurgery.search.storage.urls import without_password

    usual = {name: info.default for name, info in SearchConfig.model_fields.items()}
    usual |= defaults_on(config.device, config.latency, config.dtype)
    usual["dtype"] = defaults_on(config.device, config.latency)["dtype"]
    usual["device"] = pick_device("auto")
    words = ["attnsurgery", "search", config.base]
    for name in usual:
        value: Any = getattr(config, name)
        if name in ("base", "extend") or (value == usual[name] and name != "output"):
            continue
        if name == "channels_last":
            words.append("--channels-last" if value else "--channels-first")
            continue
        flag = "--" + name.replace("_", "-")
        words += [flag] if value is True else [flag, without_password(value) if name == "storage" else f"{value}"]
    return shlex.join(words)


def _config(**fields: Any) -> SearchConfig:
    import pydantic

    from attnsurgery.errors import UsageError
    from attnsurgery.search import SearchConfig

    try:
        return SearchConfig(**fields)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        option = "--" + str(first["loc"][0]).replace("_", "-")
        raise UsageError(
            f"{option} cannot be {first['input']!r}: {first['msg']}. See attnsurgery search --help."
        ) from None


def _default_base() -> str:
    from attnsurgery.search import DEFAULT_BASE

    return DEFAULT_BASE


def _warn_of_password(storage: str) -> None:
    from attnsurgery.cli._console import print_hint
    from attnsurgery.search.storage.urls import has_password

    if has_password(storage):
        print_hint(
            "the password in --storage can be read by other users of this machine as long as the command runs: put the "
            f"URL into {STORAGE_VARIABLE} and leave --storage out, or the password where the driver looks for it, such "
            "as ~/.pgpass."
        )


def _ask_which(named: Path, start: str) -> None:
    """
    Raises:
        UsageError: there is nothing to extend where the directory's name leads, and something beside it.
    """
    from attnsurgery.errors import UsageError
    from attnsurgery.search.storage.schema import STUDY

    beside = sorted(f"{found.parent}" for found in named.parent.glob(f"{start}-*/{STUDY}"))
    if beside:
        raise UsageError(
            f"--extend goes on with a search that is there, and {named} is none. Say which one is meant: "
            f"{' or '.join(f'--output {name}' for name in beside[:5])}."
        )


def _free(output: str) -> str:
    """The directory's name, or with the first number behind it that is free."""
    names = itertools.chain([output], (f"{output}-{number}" for number in itertools.count(2)))
    return next(name for name in names if not Path(name).exists())


def _stem(name: str) -> str:
    """A file or data set name as a part of a directory's name."""
    stem = Path(name).stem or "data"
    return "".join(letter if letter.isalnum() or letter in "_." else "_" for letter in stem)


@contextmanager
def _stopping() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C (or SIGTERM) sets; the second one ends the process at once."""
    stop = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def register(app: typer.Typer) -> None:
    app.command("search")(search)
