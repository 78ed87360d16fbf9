"""`attnsurgery export DIR --stock`: a surgical model as a plain timm model that needs no plugin."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attnsurgery.cli._options import AsJson


def export(
    directory: Annotated[Path, typer.Argument(help="A directory that 'apply' wrote, trained since or not.")],
    stock: Annotated[bool, typer.Option("--stock", help="As timm's own attention model, such as seresnet50.")] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Directory to write; by default DIR-<architecture>. Must not exist yet."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a surgical model so that timm alone loads it, after comparing the outputs bit for bit."""
    from attnsurgery.cli._console import busy, print_json, print_lines
    from attnsurgery.errors import UsageError
    from attnsurgery.stock import export_stock

    if not stock:
        raise UsageError("export writes one form: timm's own attention models. Say so with --stock.")
    with busy(f"exporting {directory}"):
        architecture, written = export_stock(directory, output)
    if as_json:
        print_json({"architecture": architecture, "output": str(written), "bit_equal": True})
        return
    print_lines(
        [
            f"architecture  {architecture}",
            "outputs       equal bit for bit, in eval and in train mode, also with every block moved",
            f"written       {written}; build it with timm.create_model('local-dir:{written}', pretrained=True)",
        ]
    )


def register(app: typer.Typer) -> None:
    app.command("export")(export)
