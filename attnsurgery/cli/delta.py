"""`attnsurgery delta DIR --base FILE --output DELTA`: saves only the tensors of a model that differ from its base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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

if TYPE_CHECKING:
    from attnsurgery.checkpoint.delta import Saved


def delta(
    directory: Annotated[Path, typer.Argument(help="A timm directory: what 'apply' wrote, trained since or not.")],
    output: NewDirectory,
    base: BaseWeights = None,
    pretrained: BasePretrained = False,
    key: WeightsKey = None,
    prefix: WeightsPrefix = None,
    as_json: AsJson = False,
) -> None:
    """Write only what differs from the base: blocks, statistics, the head, whatever was fine-tuned."""
    from attnsurgery.checkpoint.delta import save_delta
    from attnsurgery.checkpoint.weights import Layout
    from attnsurgery.cli._console import busy, print_json, print_lines

    check_base_source(base, pretrained)
    with busy(f"comparing {directory} with its base"):
        saved = save_delta(directory, base, output, Layout(key, prefix))
    if as_json:
        print_json({"output": str(output), **saved.as_dict()})
        return
    print_lines(saved_lines(saved, output))


def saved_lines(saved: Saved, output: Path) -> list[str]:
    """The summary of a saved delta, one line each."""
    dropped = f", {len(saved.dropped)} dropped" if saved.dropped else ""
    share = saved.bytes / max(saved.whole_bytes, 1)
    return [
        f"base       {saved.base}, {saved.base_digest}",
        f"tensors    {saved.kept} of the base kept out, {len(saved.changed)} changed, {len(saved.added)} new{dropped}",
        f"size       {saved.bytes / 1e6:.2f} MB instead of {saved.whole_bytes / 1e6:.2f} MB ({share:.1%})",
        f"written    {output}; make it whole with: attnsurgery merge {output} --base FILE --output DIR",
    ]


def register(app: typer.Typer) -> None:
    app.command("delta")(delta)
