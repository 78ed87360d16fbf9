"""`attnsurgery latency MODEL`: how fast is it here, and how much slower than another?"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from attnsurgery.cli._options import AsJson, BatchSize, Dtype, MeasuredDevice, Mode


def latency(
    model: Annotated[str, typer.Argument(help="A timm name, a surgical name, or a directory.")],
    versus: Annotated[
        str | None, typer.Option("--vs", help="A second model, measured alternately with the first.")
    ] = None,
    device: MeasuredDevice = None,
    batch_size: BatchSize = 1,
    dtype: Dtype = "float32",
    mode: Mode = "eager",
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


def register(app: typer.Typer) -> None:
    app.command("latency")(latency)
