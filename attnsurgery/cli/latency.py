"""`attnsurgery latency MODEL`: measures the latency of a model, also relative to another one."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnsurgery.cli._options import AsJson, InputSize
from attnsurgery.cli._settings import Grouped, with_settings
from attnsurgery.search.config import MEASURING, SearchConfig
from attnsurgery.settings import sides

if TYPE_CHECKING:
    from torch import nn

    from attnsurgery.latency import LatencyBackend

_REPEATS = 20


@with_settings(SearchConfig, [MEASURING], without=["batch_size"])
def latency(
    model: Annotated[str, typer.Argument(help="A timm name, a surgical name, or a directory.")],
    versus: Annotated[
        str | None, typer.Option("--vs", help="A second model, measured alternately with the first.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights of MODEL: .safetensors, .pth or a timm directory.")
    ] = None,
    batch_size: Annotated[
        str, typer.Option(metavar="N[,N...]", help="Images in one measured forward; several are measured in turn.")
    ] = "1",
    input_size: InputSize = None,
    self_test: Annotated[
        bool,
        typer.Option(
            "--self-test", help="Compare the model with itself, 20 times: how far is the meter to be trusted?"
        ),
    ] = False,
    as_json: AsJson = False,
    **settings: Any,
) -> None:
    """Measure one forward of a model in eval mode; with --vs the ratio of two, which a noisy machine disturbs least.

    The defaults are those of a search, so the result can be compared with a search's budget.
    """
    from attnsurgery.cli._models import measured_conditions, open_model
    from attnsurgery.errors import UsageError
    from attnsurgery.graph.find import input_size_of
    from attnsurgery.latency import backend_for
    from attnsurgery.search.device_lock import with_device_lock

    batch_sizes = _batch_sizes(batch_size)
    if self_test and (versus or len(batch_sizes) > 1):
        raise UsageError("--self-test compares MODEL with itself at one batch size: leave --vs out, give one size.")
    first = open_model(model)
    if checkpoint is not None:
        _load(first, checkpoint)
    second = open_model(versus) if versus else None
    channels, height, width = input_size_of(first)
    size = (channels, *((height, width) if input_size is None else sides(input_size)))
    backends = [
        with_device_lock(
            backend_for(
                measured_conditions({**settings, "batch_size": images}, size, "latency"), settings.get("latency")
            )
        )
        for images in batch_sizes
    ]
    if self_test:
        _self_test(model, first, backends[0], as_json)
    elif second is None or versus is None:
        _measure(model, first, backends, as_json)
    else:
        _compare((model, versus), (first, second), backends, as_json)


def _batch_sizes(text: str) -> list[int]:
    """The batch sizes in a text such as '1,8,64'.

    Raises:
        UsageError: the text is no list of numbers above 0.
    """
    from attnsurgery.errors import UsageError

    try:
        sizes = [int(size) for size in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise UsageError(f"--batch-size {text!r} is no number of images above 0, or several such as 1,8,64.")
    return sizes


def _load(model: nn.Module, checkpoint: Path) -> None:
    """Load weights; latency hardly depends on them, unless they are sparse or denormal."""
    from attnsurgery.checkpoint.base import load_weights, match_names
    from attnsurgery.checkpoint.weights import read

    load_weights(model, match_names(model, read(checkpoint)).tensors, str(checkpoint))


def _measure(name: str, model: nn.Module, backends: list[LatencyBackend], as_json: bool) -> None:
    from attnsurgery.cli._console import busy, print_json, print_latencies, print_singles

    rows: list[dict[str, Any]] = []
    for backend in backends:
        conditions = backend.conditions
        with busy(f"measuring on {conditions.device}"):
            result, singles = backend.measure(model), backend.singles(model)
        rows.append({"model": name, "conditions": asdict(conditions), **asdict(result), "singles": asdict(singles)})
        if not as_json:
            print_latencies([(name, result)], backend.describe())
            print_singles(result, singles)
    if as_json:
        print_json(rows if len(rows) > 1 else rows[0])


def _compare(
    names: tuple[str, str], models: tuple[nn.Module, nn.Module], backends: list[LatencyBackend], as_json: bool
) -> None:
    from attnsurgery.cli._console import busy, print_comparison, print_json

    rows: list[dict[str, Any]] = []
    for backend in backends:
        conditions = backend.conditions
        with busy(f"measuring on {conditions.device}"):
            comparison = backend.compare(*models)
        rows.append({"model": names[0], "vs": names[1], "conditions": asdict(conditions), **asdict(comparison)})
        if not as_json:
            print_comparison(*names, comparison, backend.describe())
    if as_json:
        print_json(rows if len(rows) > 1 else rows[0])


def _self_test(name: str, model: nn.Module, backend: LatencyBackend, as_json: bool) -> None:
    from attnsurgery.cli._console import busy, print_json, print_self_test
    from attnsurgery.latency.self_test import self_test

    with busy(f"measuring on {backend.conditions.device}"):
        result = self_test(backend, model, _REPEATS)
    if as_json:
        print_json({"model": name, "conditions": asdict(backend.conditions), **result.as_dict()})
    else:
        print_self_test(name, result, backend.describe(), backend.versions())
    if not result.passed:
        raise typer.Exit(1)


def register(app: typer.Typer) -> None:
    app.command("latency", cls=Grouped)(latency)
