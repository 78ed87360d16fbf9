"""`attnsurgery search [MODEL] --budget-ms MS`: searches for the best blocks and places under a budget."""

from __future__ import annotations

import itertools
import os
import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from attnsurgery.cli._options import STORAGE_VARIABLE, AsJson
from attnsurgery.cli._settings import Grouped, build_settings, with_settings
from attnsurgery.search.config import DEFAULT_BASE, SearchConfig
from attnsurgery.settings import flags_of, settings_of

_INTERRUPTED = 130


@with_settings(SearchConfig, file=True)
def search(
    model: Annotated[str | None, typer.Argument(help="Any timm name; by default the space's own small model.")] = None,
    new: Annotated[
        bool, typer.Option("--new", help="Start another search beside one that is there, in a directory of its own.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only say how large the space is, how much of it fits, and how long it takes."),
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Only print all settings, as a file that --config reads.")
    ] = False,
    as_json: AsJson = False,
    **settings: Any,
) -> None:
    """Search for the best blocks and places under a budget; the same command resumes where it stopped.

    At least one budget is needed; several hold together. Every setting may also come from the environment, such as
    ATTNSURGERY_BUDGET_MS, or from the file of --config.
    """
    from attnsurgery.search.workers.spawn import started_early

    starts_worker = settings.get("launcher", "local") == "local" and settings.get("workers", 1) != 0
    with nullcontext() if dry_run or print_config or not starts_worker else started_early():
        config = _config_of(model, settings)
        if new:
            config = config.model_copy(update={"output": _free(config.output)})
        if print_config:
            typer.echo(config.as_yaml(), nl=False)
        elif dry_run:
            _preview(config, as_json)
        else:
            _run(config, as_json)


def _config_of(model: str | None, settings: dict[str, Any]) -> SearchConfig:
    """All settings of the search for a base, from those that the user has set."""
    from attnsurgery.search.execution.assemble import pick_device
    from attnsurgery.search.execution.pretrained_base import resolve_base
    from attnsurgery.search.space import AUTO_SPACE, load

    if (storage := settings.get("storage")) and storage != os.environ.get(STORAGE_VARIABLE):
        _warn_of_password(storage)
    space = settings.get("space", SearchConfig.model_fields["space"].default)
    named = model or settings.get("base") or (None if space == AUTO_SPACE else load(space).base) or DEFAULT_BASE
    resolved = resolve_base(named, settings.get("checkpoint"))
    output = settings.get("output")
    device = pick_device(settings.get("device", "auto"))
    derived = {"base": resolved.base, "checkpoint": resolved.checkpoint, "device": device, "output": output or ""}
    config: SearchConfig = build_settings(SearchConfig, "search", {**settings, **derived})
    return _in_its_directory(config) if output is None else config


def _in_its_directory(config: SearchConfig) -> SearchConfig:
    """The settings with a run directory named by base, data, space and budgets."""
    from attnsurgery.search.result.limits import Budgets

    description = Budgets.of(config).describe().replace(" and ", "-").replace(" (", "-")
    budgets, data = description.replace(")", "").replace(" ", ""), _stem(config.data or "pairs")
    folder = Path("runs") / "-".join([config.base, data, _stem(config.space), budgets])
    if config.extend and not folder.exists():
        _check_extend(folder, f"{config.base}-{data}")
    return config.model_copy(update={"output": str(folder)})


def _preview(config: SearchConfig, as_json: bool) -> None:
    from attnsurgery.cli._console import print_error, print_json
    from attnsurgery.cli._search_view import print_preview, view
    from attnsurgery.search.execution.preview import preview
    from attnsurgery.search.watching import StopRequested

    with view(config) as listener, _stopping() as stop:
        try:
            result = preview(config, listener, stop.is_set)
        except StopRequested:
            result = None
    if result is None:
        print_error("stopped; nothing was written.")
        raise typer.Exit(_INTERRUPTED)
    if as_json:
        print_json(result.as_dict())
    else:
        print_preview(result, config)


def _run(config: SearchConfig, as_json: bool) -> None:
    from attnsurgery.cli._console import print_error, print_json
    from attnsurgery.cli._search_view import as_data, print_outcome, view
    from attnsurgery.search import run
    from attnsurgery.search.watching import StopRequested

    command = command_of(config)
    with view(config) as listener, _stopping() as stop:
        try:
            outcome = run(config, listener, stop.is_set, command=command)
        except StopRequested:
            outcome = None
    if outcome is None:
        print_error(f"stopped before the first trial; nothing is lost. Resume with:  {command}")
        raise typer.Exit(_INTERRUPTED)
    if as_json:
        print_json(as_data(outcome))
    else:
        print_outcome(outcome)
    if outcome.interrupted:
        print_error(f"stopped after {outcome.trained} of {config.trials} trained trials. Resume with:  {command}")
        raise typer.Exit(_INTERRUPTED)


def command_of(config: SearchConfig) -> str:
    """The command line of a search, without a password in the storage URL."""
    from attnsurgery.search.config import defaults_on
    from attnsurgery.search.execution.assemble import pick_device
    from attnsurgery.search.storage.urls import without_password

    usual = {name: info.default for name, info in SearchConfig.model_fields.items()}
    usual |= defaults_on(config.device, config.latency, config.dtype)
    usual["dtype"] = defaults_on(config.device, config.latency)["dtype"]
    usual["device"] = pick_device("auto")
    words = ["attnsurgery", "search", config.base]
    for name, setting in settings_of(SearchConfig).items():
        value: Any = getattr(config, name)
        if name == "extend" or setting.hidden or (value == usual[name] and name != "output"):
            continue
        flag, _, opposite = flags_of(name, setting, switch=isinstance(value, bool))[0].partition("/")
        if isinstance(value, bool):
            words.append(flag if value else opposite)
        else:
            words += [flag, without_password(value) if name == "storage" else f"{value}"]
    return shlex.join(words)


def _warn_of_password(storage: str) -> None:
    from attnsurgery.cli._console import print_hint
    from attnsurgery.search.storage.urls import has_password

    if has_password(storage):
        print_hint(
            "the password in --storage can be read by other users of this machine as long as the command runs: put the "
            f"URL into {STORAGE_VARIABLE} and leave --storage out, or the password where the driver looks for it, such "
            "as ~/.pgpass."
        )


def _check_extend(folder: Path, start: str) -> None:
    """Refuse --extend without --output if the directory does not exist but similar ones do.

    Raises:
        UsageError: lists the similar directories.
    """
    from attnsurgery.errors import UsageError
    from attnsurgery.search.storage.schema import STUDY

    beside = sorted(f"{study.parent}" for study in folder.parent.glob(f"{start}-*/{STUDY}"))
    if beside:
        raise UsageError(
            f"--extend resumes an existing search, and {folder} is none. Name the one to resume: "
            f"{' or '.join(f'--output {name}' for name in beside[:5])}."
        )


def _free(output: str) -> str:
    """The directory's name, or the name with the first free number after it."""
    names = itertools.chain([output], (f"{output}-{number}" for number in itertools.count(2)))
    return next(name for name in names if not Path(name).exists())


def _stem(name: str) -> str:
    """The name of a file or data set as part of a directory's name."""
    stem = Path(name).stem or "data"
    return "".join(letter if letter.isalnum() or letter in "_." else "_" for letter in stem)


@contextmanager
def _stopping() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C (or SIGTERM) sets; the second one ends the process at once."""
    stop = threading.Event()

    def request(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def register(app: typer.Typer) -> None:
    app.command("search", cls=Grouped)(search)
