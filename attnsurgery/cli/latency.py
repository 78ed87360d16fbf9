"""`attnsurgery latency MODEL`: how fast is it here, and how much slower than another?"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from attnsurgery.cli._options import AsJson, BatchSize, Dtype, MeasuredDevice, Mode

if TYPE_CHECKING:
    from torch import nn

    from attnsurgery.latency import LatencyBackend

_REPEATS = 20


def latency(
    model: Annotated[str, typer.Argument(help="A timm name, a surgical name, or a directory.")],
    versus: Annotated[
        str | None, typer.Option("--vs", help="A second model, measured alternately with the first.")
    ] = None,
    device: MeasuredDevice = None,
    batch_size: BatchSize = 1,
    dtype: Dtype = "float32",
    mode: Mode = "eager",
    self_test: Annotated[
        bool,
        typer.Option(
            "--self-test", help="Compare the model with itself, 20 times: how far is the meter to be trusted?"
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure one forward of a model in eval mode; with --vs the ratio of two, which a noisy machine disturbs least."""
    import torch

    from attnsurgery.cli._console import busy, print_comparison, print_json, print_latencies
    from attnsurgery.cli._models import open_model
    from attnsurgery.graph.find import input_size_of
    from attnsurgery.latency import Conditions, backend_for

    first = open_model(model)
    second = open_model(versus) if versus else None
    conditions = Conditions(
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        dtype=dtype,
        batch_size=batch_size,
        input_size=input_size_of(first),
        mode=mode,  # type: ignore[arg-type]
    )
    backend = backend_for(conditions)
    if self_test:
        _self_test(model, first, versus, backend, as_json)
        return
    with busy(f"measuring on {conditions.device}"):
        if second is None:
            found = backend.measure(first)
        else:
            compared = backend.compare(first, second)
    if versus is None and as_json:
        print_json({"model": model, "conditions": asdict(conditions), **asdict(found)})
    elif versus is None:
        print_latencies([(model, found)], conditions)
    elif as_json:
        print_json({"model": model, "vs": versus, "conditions": asdict(conditions), **asdict(compared)})
    else:
        print_comparison(model, versus, compared, conditions)


def _self_test(name: str, model: nn.Module, versus: str | None, backend: LatencyBackend, as_json: bool) -> None:
    from attnsurgery.cli._console import busy, print_json, print_self_test
    from attnsurgery.errors import UsageError
    from attnsurgery.latency.self_test import self_test

    if versus:
        raise UsageError("--self-test compares MODEL with itself, and --vs with another: give one of them.")
    with busy(f"measuring on {backend.conditions.device}"):
        found = self_test(backend, model, _REPEATS)
    if as_json:
        print_json({"model": name, "conditions": asdict(backend.conditions), **found.as_dict()})
    else:
        print_self_test(name, found, backend.conditions, backend.versions())
    if not found.passed:
        raise typer.Exit(1)


def register(app: typer.Typer) -> None:
    app.command("latency")(latency)
