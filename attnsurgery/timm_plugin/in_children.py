"""Arguments of a program that carry the surgical names into the processes it starts.

Processes started by `spawn` or `forkserver` begin with an empty interpreter and are sent the program's arguments first,
pickled. Reading `Arguments` imports this package, so a worker knows every name that its parent knew.
"""

from __future__ import annotations


class Arguments(list[str]):
    """A list of strings for sys.argv that brings the names along to wherever it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return _received, (list(self),)


def _received(arguments: list[str]) -> Arguments:
    """Called in the process that was started; the import of this file's package has made the names known by then."""
    return Arguments(arguments)
