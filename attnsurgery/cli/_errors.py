"""Turns every error of a command into one paragraph on stderr and an exit code.

0 done, 1 failed, 2 wrong usage, 3 nothing feasible, 130 interrupted. With `--debug` the traceback is shown as well.
"""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Callable
from typing import Any

import typer

from attnsurgery.errors import AttnSurgeryError

INTERRUPTED = 130


class Settings:
    """What the options before the command's name say; one process runs one command."""

    debug = False


def guarded(command: Callable[..., Any]) -> Callable[..., Any]:
    """`command`, whose errors end the process as this file's first lines promise."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
            raise  # typer's own business
        except KeyboardInterrupt as error:
            _tell("interrupted.", error)
            raise typer.Exit(INTERRUPTED) from None
        except AttnSurgeryError as error:
            _tell(str(error), error)
            raise typer.Exit(error.exit_code) from None
        except Exception as error:
            _tell(_unforeseen(error), error)
            raise typer.Exit(1) from None

    return run


def _unforeseen(error: Exception) -> str:
    """What an error that is none of ours means to people."""
    said = " ".join(str(error).split())[:500]
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}." if error.filename else f"{error.strerror}."
    if type(error).__name__ in {"MemoryError", "OutOfMemoryError"}:
        return f"out of memory. A smaller --batch-size or another --device may do. {said}".rstrip()
    return (
        f"this is a bug in attnsurgery: {type(error).__name__}: {said.rstrip('.')}. "
        "Run it again as 'attnsurgery --debug ...' and report the traceback."
    )


def _tell(message: str, error: BaseException) -> None:
    from attnsurgery.cli._console import print_error

    if Settings.debug:
        traceback.print_exception(error, file=sys.stderr)
    print_error(message)
