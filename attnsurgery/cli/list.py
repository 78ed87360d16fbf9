"""`attnsurgery list [PATTERN]`: lists surgical names that timm.create_model takes."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Annotated

import typer

_HINT = "Any <timm architecture>_<block>_s<stages> is made when it is asked for; see some: attnsurgery list resnet50"


def list_names(
    pattern: Annotated[
        str | None,
        typer.Argument(help="An architecture, or a pattern such as 'convnext_*_s3'; without it, what ships."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the names as a JSON list.")] = False,
) -> None:
    """List surgical model names."""
    from attnsurgery.cli._console import print_hint, print_json, print_lines

    names = _matching(pattern)
    if as_json:
        print_json(names)
        return
    print_lines(names)
    if pattern is None:
        print_hint(_HINT)


def _matching(pattern: str | None) -> list[str]:
    import timm

    from attnsurgery.errors import UnknownNameError, did_you_mean
    from attnsurgery.timm_plugin import registry

    entered = registry.grafted_names()
    if pattern is None:
        return entered
    bases = sorted(set(timm.list_models()) - set(entered) - {registry.GENERIC})
    every = {*entered, *(name for base in bases for name in registry.names_for(base))}
    wildcard = f"{pattern}_*" if pattern in bases else pattern
    if names := sorted(name for name in every if fnmatchcase(name, wildcard)):
        return names
    raise UnknownNameError(f"no surgical name matches {pattern!r}.{did_you_mean(pattern, bases)} {_HINT}")


def register(app: typer.Typer) -> None:
    app.command("list")(list_names)
