"""`attnsurgery exec SCRIPT [ARGS]`: any Python script, with the surgical names known to timm.

timm's train.py can import attnsurgery by an option; validate.py, benchmark.py and most other scripts cannot. The script
runs as Python would run it, with its `__main__`, `__file__`, sys.argv, and its own folder first in sys.path. Processes
that it starts through multiprocessing know the names as well, by any start method.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from attnsurgery.cli._errors import INTERRUPTED

_NOT_THE_SCRIPTS = {__file__, "<frozen runpy>"}


def execute(
    script: Annotated[str, typer.Argument(help="A Python file; with -m, the name of a module.")],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[ARGS]...", help="Passed on to it.")] = None,
    module: Annotated[bool, typer.Option("-m", help="Run a module by its name, as 'python -m' does.")] = False,
) -> None:
    """Run a Python script as 'python SCRIPT ARGS' would, with the surgical names known; its exit code is passed on."""
    import attnsurgery  # noqa: F401  (makes the names known)

    folder = os.getcwd() if module else str(Path(script).resolve().parent)
    with _script_environment([script, *(arguments or [])], folder):
        run = _module_runner(script) if module else _file_runner(script)
        try:
            run()
        except (Exception, KeyboardInterrupt) as error:  # the script's own, shown as Python shows it
            _show(error)
            raise typer.Exit(INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1) from None


def _file_runner(script: str) -> Callable[[], None]:
    from attnsurgery.errors import UsageError

    path = Path(script)
    if not path.is_file():
        is_module = path.suffix != ".py" and _is_module(script)
        near = f" There is a module of that name: attnsurgery exec -m {script}." if is_module else ""
        raise UsageError(f"there is no script {script!r}.{near}")

    def run() -> None:
        # as Python does it: __file__ is absolute, and argv[0] is what was typed; runpy.run_path makes both the same
        main = ModuleType("__main__")
        main.__file__ = str(path.absolute())
        sys.modules["__main__"] = main
        exec(compile(path.read_bytes(), main.__file__, "exec", dont_inherit=True), main.__dict__)

    return run


def _module_runner(name: str) -> Callable[[], None]:
    import runpy

    from attnsurgery.errors import UsageError

    if Path(name).suffix == ".py" or not _is_module(name):
        near = f" There is a file of that name: attnsurgery exec {name}." if Path(name).is_file() else ""
        raise UsageError(f"there is no module {name!r}.{near}")

    def run() -> None:
        runpy.run_module(name, run_name="__main__", alter_sys=True)

    return run


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # a package on the way is missing, or it is no name at all
        return False


@contextmanager
def _script_environment(argv: list[str], folder: str) -> Iterator[None]:
    """Set sys.argv, sys.path and `__main__` as Python does for a script.

    Args:
        argv: the script and its arguments.
        folder: the first entry of sys.path.
    """
    from attnsurgery.timm_plugin.in_children import Arguments

    before = sys.argv, sys.path[:], sys.modules["__main__"]
    sys.argv = Arguments(argv)
    sys.path[: 0 if sys.flags.safe_path else 1] = [folder]
    try:
        yield
    finally:
        sys.argv, sys.path[:], sys.modules["__main__"] = before


def _show(error: Exception | KeyboardInterrupt) -> None:
    """Show an uncaught error of the script by sys.excepthook, from the script's first frame on."""
    step = error.__traceback__
    while step is not None and step.tb_frame.f_code.co_filename in _NOT_THE_SCRIPTS:
        step = step.tb_next
    sys.excepthook(type(error), error.with_traceback(step), step)


def register(app: typer.Typer) -> None:
    own_options_end = {"ignore_unknown_options": True, "allow_interspersed_args": False}
    app.command("exec", context_settings=own_options_end)(execute)
