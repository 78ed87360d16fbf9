"""Turns every error of a command into one paragraph on stderr and an exit code.

The codes are 0 success, 1 failure, 2 wrong usage, 3 nothing feasible, 130 interrupted. `--debug` also shows the
traceback.
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
    """The values of options before the command's name; one process runs one command."""

    debug = False


def with_error_messages(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command whose errors become a message and an exit code."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
            raise  # typer handles these
        except KeyboardInterrupt as error:
            _print_error("interrupted.", error)
            raise typer.Exit(INTERRUPTED) from None
        except AttnSurgeryError as error:
            _print_error(str(error), error)
            raise typer.Exit(error.exit_code) from None
        except Exception as error:
            _print_error(_unforeseen(error), error)
            raise typer.Exit(1) from None

    return run


def _unforeseen(error: Exception) -> str:
    """The message of an error that attnsurgery did not raise itself."""
    message = " ".join(str(error).split())[:500]
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}." if error.filename else f"{error.strerror}."
    if type(error).__name__ in {"MemoryError", "OutOfMemoryError"}:
        return f"out of memory. A smaller --batch-size or another --device may help. {message}".rstrip()
    return (
        f"this is a bug in attnsurgery: {type(error).__name__}: {message.rstrip('.')}. "
        "Run it again as 'attnsurgery --debug ...' and report the traceback."
    )


def _print_error(message: str, error: BaseException) -> None:
    from attnsurgery.cli._console import print_error

    if Settings.debug:
        traceback.print_exception(error, file=sys.stderr)
    print_error(message)
