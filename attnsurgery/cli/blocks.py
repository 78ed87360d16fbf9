"""`attnsurgery blocks [NAME]`: what can be inserted, with which options."""

from __future__ import annotations

from typing import Annotated

import typer


def blocks(
    name: Annotated[str | None, typer.Argument(help="One block: its description and options in full.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print names and JSON schemas of the options.")] = False,
) -> None:
    """List the attention blocks, or describe one with its options."""
    import inspect

    from attnsurgery.blocks import BLOCKS
    from attnsurgery.blocks._base import options_model
    from attnsurgery.cli._console import print_json, print_lines, print_table

    if as_json:
        names = [name] if name else list(BLOCKS)
        print_json({block: options_model(BLOCKS[block]).model_json_schema() for block in names})
    elif name is None:
        rows = []
        for block in BLOCKS:
            summary = inspect.cleandoc(BLOCKS[block].__doc__ or "").partition("\n\n")[0].replace("\n", " ")
            rows.append((block, BLOCKS[block].model_suffix and f"_{BLOCKS[block].model_suffix}", summary))
        print_table(["block", "in names", "what it does"], rows, words=3)
    else:
        block_class = BLOCKS[name]
        defaults = {field: info.default for field, info in options_model(block_class).model_fields.items()}
        print_lines([name, "", *inspect.cleandoc(block_class.__doc__ or "").splitlines(), "", "Defaults:"])
        print_lines(f"    {option}: {_yaml(value)}" for option, value in defaults.items())


def _yaml(value: object) -> str:
    """The value as a recipe spells it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def register(app: typer.Typer) -> None:
    app.command("blocks")(blocks)
