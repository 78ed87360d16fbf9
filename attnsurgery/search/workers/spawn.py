"""Starts worker processes, the first one early if wanted: before this process imports torch.

The import takes seconds in either process, and a worker needs no settings for it. So the command line starts a worker
at once, and the launcher takes it over when the settings are known. This module imports nothing heavy.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import attnsurgery

COMMAND = (sys.executable, "-m", "attnsurgery.search.workers.worker")
"""Starts a worker on standard input and output."""
_waiting: list[subprocess.Popen[bytes]] = []
"""The process that was started early, until it is taken."""


def import_path() -> str:
    """PYTHONPATH of a worker: this attnsurgery, which need not be installed, and the PYTHONPATH of this process."""
    source = str(Path(attnsurgery.__file__).resolve().parents[1])
    return os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])


def spawn(log: Path | None, path: str) -> subprocess.Popen[bytes]:
    """Start a worker on pipes.

    Args:
        log: the file that its output is appended to; None until its first message names one.
        path: its PYTHONPATH.

    Raises:
        OSError: the process or its log cannot be created.
    """
    with Path(os.devnull if log is None else log).open("ab") as file:
        return subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C in the terminal does not reach it
        )


@contextmanager
def started_early() -> Iterator[None]:
    """A worker waits to be taken inside of the context; it is ended at the exit if nobody has taken it."""
    with suppress(OSError):  # the launcher starts one later, and reports it
        _waiting.append(spawn(None, import_path()))
    try:
        yield
    finally:
        if (process := take()) is not None:
            end(process)


def take() -> subprocess.Popen[bytes] | None:
    """The worker that was started early, if there is one and it still runs; from then on it is the caller's."""
    process = _waiting.pop() if _waiting else None
    if process is not None and process.poll() is not None:
        end(process)
        return None
    return process


def end(process: subprocess.Popen[bytes]) -> None:
    """End a worker whose answers nobody reads."""
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        assert stream is not None
        with suppress(OSError):
            stream.close()
