"""`attnsurgery exec SCRIPT [ARGS]`: any Python script, with the surgical names known to timm.

timm's train.py can import us by an option of its own; validate.py, benchmark.py and most others cannot.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer


def execute(
    script: Annotated[Path, typer.Argument(help="A Python file.")],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[ARGS]...", help="Passed on to it.")] = None,
) -> None:
    """Run a Python script as 'python SCRIPT ARGS' would, with the surgical names known; its exit code is passed on."""
    import runpy

    import attnsurgery  # noqa: F401  (makes the names known)
    from attnsurgery.errors import UsageError

    if not script.is_file():
        raise UsageError(f"there is no script {str(script)!r}.")
    with _as_if_started(script, arguments or []):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except KeyboardInterrupt:
            raise
        except Exception as error:  # the script's own, shown as Python shows it, without our frames
            _print_own_part(error, script)
            raise typer.Exit(1) from None


@contextmanager
def _as_if_started(script: Path, arguments: list[str]) -> Iterator[None]:
    argv, path = sys.argv[:], sys.path[:]
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))
    try:
        yield
    finally:
        sys.argv, sys.path[:] = argv, path


def _print_own_part(error: Exception, script: Path) -> None:
    step = error.__traceback__
    while step is not None and step.tb_frame.f_code.co_filename != str(script):
        step = step.tb_next
    traceback.print_exception(error.with_traceback(step or error.__traceback__), file=sys.stderr)


def register(app: typer.Typer) -> None:
    own_options_end = {"ignore_unknown_options": True, "allow_interspersed_args": False}
    app.command("exec", context_settings=own_options_end)(execute)
