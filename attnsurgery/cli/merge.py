"""`attnsurgery merge DELTA --base FILE --output DIR`: a delta and its base as a whole timm directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attnsurgery.cli._options import (
    AsJson,
    BasePretrained,
    BaseWeights,
    NewDirectory,
    WeightsKey,
    WeightsPrefix,
    check_base_source,
)


def merge(
    directory: Annotated[
        Path, typer.Argument(metavar="DELTA", help="A directory that 'delta' or 'apply --delta' wrote.")
    ],
    output: NewDirectory,
    base: BaseWeights = None,
    pretrained: BasePretrained = False,
    key: WeightsKey = None,
    prefix: WeightsPrefix = None,
    as_json: AsJson = False,
) -> None:
    """Put a delta and the weights of its base together again, bit for bit."""
    from attnsurgery.checkpoint.delta import merge_delta
    from attnsurgery.checkpoint.weights import Layout
    from attnsurgery.cli._console import building, busy, print_json, print_lines

    check_base_source(base, pretrained)
    with busy(f"merging {directory} with its base"):
        proven = merge_delta(directory, base, output, Layout(key, prefix))
    if as_json:
        print_json({"output": str(output), "digest": proven})
        return
    print_lines(
        [
            f"weights    {proven}, those that were saved",
            f"written    {output}",
            f"build it   {building(output)}",
        ]
    )


def register(app: typer.Typer) -> None:
    app.command("merge")(merge)
