"""`attnsurgery merge DELTA --base FILE --output DIR`: a delta and its base as a whole timm directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def merge(
    directory: Annotated[
        Path, typer.Argument(metavar="DELTA", help="A directory that 'delta' or 'apply --delta' wrote.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write; must not exist yet.")],
    base: Annotated[
        Path | None,
        typer.Option("--base", "-b", help="Weights of the base: .safetensors, .pth or a timm directory."),
    ] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="The base is timm's published weights.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Put a delta and the weights of its base together again, bit for bit."""
    from attnsurgery.cli._console import busy, print_json, print_lines
    from attnsurgery.cli.delta import check_base_given
    from attnsurgery.delta import merge_delta

    check_base_given(base, pretrained)
    with busy(f"merging {directory} with its base"):
        proven = merge_delta(directory, base, output)
    if as_json:
        print_json({"output": str(output), "digest": proven})
        return
    print_lines(
        [
            f"weights    {proven}, those that were saved",
            f"written    {output}; build it with timm.create_model('local-dir:{output}', pretrained=True)",
        ]
    )


def register(app: typer.Typer) -> None:
    app.command("merge")(merge)
