"""Program arguments that make the surgical names known in child processes.

Processes that are started by `spawn` or `forkserver` begin with a new interpreter, which first unpickles the program's
arguments. Unpickling `Arguments` imports this package, so a worker knows every name that its parent knows.
"""

from __future__ import annotations


class Arguments(list[str]):
    """A list of strings for sys.argv; unpickling it makes the surgical names known."""

    def __reduce__(self) -> tuple[object, ...]:
        return _received, (list(self),)


def _received(arguments: list[str]) -> Arguments:
    """Called in the child process, after the import of this package has made the names known."""
    return Arguments(arguments)
