"""`attnsurgery apply RECIPE --checkpoint IN --output DIR`: operate on trained weights."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attnsurgery.cli._options import NewDirectory, WeightsKey, WeightsPrefix

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
        typer.Option(
            "--checkpoint",
            "-c",
            help="Weights of the base: .safetensors, .pth, .ckpt or a timm directory. Or a directory with a surgical "
            "model, whose blocks stay.",
        ),
    ] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Take timm's published weights instead.")] = False,
    key: WeightsKey = None,
    prefix: WeightsPrefix = None,
    start: Annotated[StartChoice | None, typer.Option(help="Replace the start of every edit.")] = None,
    delta: Annotated[
        bool, typer.Option("--delta", help="Write only what differs from the base; 'attnsurgery merge' makes it whole.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Put the blocks of a recipe into a trained model, prove the result, and write a timm directory."""
    from attnsurgery.checkpoint.delta import save_operated
    from attnsurgery.checkpoint.directory import refuse_existing
    from attnsurgery.checkpoint.operated import operated_base, write_operated
    from attnsurgery.checkpoint.weights import Layout
    from attnsurgery.cli._console import building, busy, print_json, print_lines, print_report
    from attnsurgery.cli.delta import saved_lines
    from attnsurgery.recipe.text import load

    loaded = load(recipe)
    begin: Start | None = None if start is None else start.value
    saved = None
    refuse_existing(output)
    with busy(f"operating on {loaded.base}"):
        result = operated_base(loaded, checkpoint, pretrained=pretrained, start=begin, layout=Layout(key, prefix))
        if delta:
            saved = save_operated(result, checkpoint, output)
        else:
            write_operated(result, output)
    if as_json:
        more = {"delta": saved.as_dict()} if saved else {}
        print_json({"output": str(output), "weights": result.source_notes, **result.report.as_dict(), **more})
        return
    print_report(result.report)
    if result.source_notes:
        print_lines([f"weights    {checkpoint}: {result.source_notes}"])
    print_lines(["checked    rebuilt from the written files, as a new process does: weights, blocks, outputs"])
    if saved:
        print_lines(saved_lines(saved, output))
    else:
        print_lines([f"written    {output}", f"build it   {building(output)}"])


def register(app: typer.Typer) -> None:
    app.command("apply")(apply)
