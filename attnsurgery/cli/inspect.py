"""`attnsurgery inspect MODEL`: where blocks can go, and how large the tensors are there."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer


def inspect(
    model: Annotated[str, typer.Argument(help="A timm name, a surgical name, or a directory.")],
    everything: Annotated[bool, typer.Option("--all", help="Show the sites inside blocks, too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print every site as JSON.")] = False,
) -> None:
    """Show the stages of a model and its sites: the addresses that recipes select."""
    from attnsurgery.cli._console import busy, print_anatomy, print_json
    from attnsurgery.cli._models import open_model
    from attnsurgery.graph.find import survey

    with busy(f"building {model}"):
        anatomy = survey(open_model(model, weights=False))
    if as_json:
        print_json(
            {
                "name": anatomy.name,
                "input_size": anatomy.input_size,
                "stages": anatomy.stages,
                "sites": [asdict(site) for site in anatomy.sites],
            }
        )
    else:
        print_anatomy(anatomy, everything)


def register(app: typer.Typer) -> None:
    app.command("inspect")(inspect)
