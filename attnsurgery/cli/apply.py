"""`attnsurgery apply RECIPE --checkpoint IN --output DIR`: operate on trained weights."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attnsurgery.cli._options import NewDirectory

if TYPE_CHECKING:
    from attnsurgery.blocks import Start


class StartChoice(StrEnum):
    identity = "identity"
    paper = "paper"


def apply(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML); its format: attnsurgery schema recipe.")],
    output: NewDirectory,
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", "-c", help="Weights of the base: .safetensors, .pth or a timm directory."),
    ] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Take timm's published weights instead.")] = False,
    start: Annotated[StartChoice | None, typer.Option(help="Replace the start of every edit.")] = None,
    delta: Annotated[
        bool, typer.Option("--delta", help="Write only what differs from the base; 'attnsurgery merge' makes it whole.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Put the blocks of a recipe into a trained model, prove the result, and write a timm directory."""
    from attnsurgery import checkpoint as files
    from attnsurgery.cli._console import busy, print_json, print_lines, print_report
    from attnsurgery.cli.delta import told
    from attnsurgery.delta import apply_as_delta
    from attnsurgery.recipe.text import load

    read = load(recipe)
    begin: Start | None = None if start is None else start.value
    saved = None
    with busy(f"operating on {read.base}"):
        if delta:
            report, saved = apply_as_delta(read, checkpoint, output, pretrained=pretrained, start=begin)
        else:
            report = files.apply(read, checkpoint, output, pretrained=pretrained, start=begin)
    if as_json:
        print_json({"output": str(output), **report.as_dict(), **({"delta": saved.as_dict()} if saved else {})})
        return
    print_report(report)
    if saved:
        print_lines(told(saved, output))
    else:
        print_lines([f"written    {output}; build it with timm.create_model('local-dir:{output}', pretrained=True)"])


def register(app: typer.Typer) -> None:
    app.command("apply")(apply)
