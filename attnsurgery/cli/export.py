"""`attnsurgery export DIR`: a surgical model as a plain timm model that needs no plugin, or as an ONNX file."""

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
    onnx: Annotated[
        Path | None, typer.Option("--onnx", help="ONNX file to write, for one size of input. Must not exist yet.")
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check/--no-check", help="Compare the ONNX file with the model in ONNX Runtime before writing."),
    ] = True,
    batch_size: Annotated[int, typer.Option(min=1, help="Images that the ONNX file takes at a time.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Write a surgical model for use without attnsurgery, after comparing the outputs."""
    from attnsurgery.errors import UsageError

    if stock and onnx:
        raise UsageError("--stock writes a directory and --onnx a file: give one of them.")
    if onnx:
        if output:
            raise UsageError("--onnx names the file to write; --output goes with --stock.")
        _export_onnx(directory, onnx, check, batch_size, as_json)
    elif stock:
        _export_stock(directory, output, as_json)
    else:
        raise UsageError("export writes timm's own attention models or ONNX files. Say so with --stock or --onnx FILE.")


def _export_stock(directory: Path, output: Path | None, as_json: bool) -> None:
    from attnsurgery.checkpoint.stock import export_stock
    from attnsurgery.cli._console import building, busy, print_json, print_lines

    with busy(f"exporting {directory}"):
        architecture, path = export_stock(directory, output)
    if as_json:
        print_json({"architecture": architecture, "output": str(path), "bit_equal": True})
        return
    print_lines(
        [
            f"architecture  {architecture}",
            "outputs       equal bit for bit, in eval and in train mode, also with every block moved",
            f"written       {path}",
            f"build it      {building(path, plugin=False)}",
        ]
    )


def _export_onnx(directory: Path, path: Path, check: bool, batch_size: int, as_json: bool) -> None:
    from attnsurgery.checkpoint.directory import refuse_existing
    from attnsurgery.cli._console import busy, print_json, print_lines
    from attnsurgery.cli._models import open_model
    from attnsurgery.graph.find import input_size_of
    from attnsurgery.latency.exported import INPUT, export_onnx

    refuse_existing(path)
    model = open_model(str(directory))
    input_size = input_size_of(model)
    with busy(f"exporting {directory}"):
        difference = export_onnx(model, path, input_size, batch_size=batch_size, check=check)
    shape = [batch_size, *input_size]
    if as_json:
        print_json({"output": str(path), "input": INPUT, "shape": shape, "largest_difference": difference})
        return
    checked = "not compared" if difference is None else f"differ by at most {difference:.1e} of the largest, in ONNX"
    moved = "" if difference is None else " Runtime on the CPU, also with every block moved"
    print_lines(
        [
            f"input         {INPUT!r}, float32, {'x'.join(map(str, shape))}",
            f"outputs       {checked}{moved}",
            f"written       {path}",
        ]
    )


def register(app: typer.Typer) -> None:
    app.command("export")(export)
