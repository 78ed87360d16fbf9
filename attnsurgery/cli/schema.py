"""`attnsurgery schema WHAT`: prints JSON schemas, for editors that complete and check YAML."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer


class What(StrEnum):
    recipe = "recipe"
    space = "space"
    options = "options"


def schema(
    what: Annotated[What, typer.Argument(help="A recipe, a search space, or the options of every block.")],
) -> None:
    """Print a JSON schema (draft 2020-12)."""
    from attnsurgery.cli._console import print_json

    print_json(_schema(what))


def _schema(schema_name: What) -> dict[str, Any]:
    from attnsurgery.recipe.json_schema import DIALECT, json_schema, options_schema

    if schema_name is What.recipe:
        return json_schema()
    if schema_name is What.options:
        return options_schema()
    from attnsurgery.search.space import SearchSpace

    return {"$schema": DIALECT, **SearchSpace.model_json_schema()}


def register(app: typer.Typer) -> None:
    app.command("schema")(schema)
