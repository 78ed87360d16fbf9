"""The application: all commands of this folder, and the options before the command's name."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from attnsurgery.cli._errors import Settings, with_error_messages

_COMMANDS = __name__.rpartition(".")[0]
"""The name of the package whose modules are commands; it imports this module."""
_VERSIONED = ("attnsurgery", "timm", "torch", "optuna")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code.

    Args:
        argv: arguments without the program's name; by default those of the process.
    """
    build_app()(args=None if argv is None else list(argv), prog_name="attnsurgery")


def build_app() -> typer.Typer:
    """The application with every command of this folder."""
    app = typer.Typer(
        help="Put attention blocks into timm models, prove that nothing else changed, and search for the best places.",
        context_settings={"help_option_names": ["--help", "-h"]},
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    app.callback()(_options)
    for module in pkgutil.iter_modules(sys.modules[_COMMANDS].__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{_COMMANDS}.{module.name}").register(app)
    for command in app.registered_commands:
        assert command.callback is not None
        command.callback = with_error_messages(command.callback)
    return app


def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    show_version: Annotated[
        bool, typer.Option("--version", help="Show versions and exit.", is_eager=True, callback=lambda on: _version(on))
    ] = False,
) -> None:
    Settings.debug = debug


def _version(show: bool) -> None:
    if show:
        typer.echo(", ".join(f"{name} {_version_of(name)}" for name in _VERSIONED))
        raise typer.Exit


def _version_of(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed)"
