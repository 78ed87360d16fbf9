"""Launchers start workers; a link is the connection to one of them.

A launcher decides where a worker runs. The messages are the same everywhere: JSON objects, which
attnsurgery/search/workers/worker.py reads and writes.
"""

from __future__ import annotations

import os
import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from attnsurgery.catalog import Catalog
from attnsurgery.errors import UsageError
from attnsurgery.search.config import SearchConfig

Message = Mapping[str, Any]
"""JSON data."""


@dataclass(frozen=True, slots=True)
class WorkerExited:
    """The last message of a worker."""

    reason: str
    """How it ended, as a clause without a full stop."""
    out_of_memory: bool = False
    """Whether memory ran out, so that smaller batches may help."""


OnMessage = Callable[[Message | WorkerExited], None]
"""Called with each message of a worker, from any thread; the last one is WorkerExited, once."""


class Link(ABC):
    """The connection to a worker that was started."""

    queued: bool = False
    """True while the worker waits for a machine; it gets no jobs then."""

    @abstractmethod
    def send(self, message: Message) -> None:
        """Send a message; without effect if the worker has exited."""

    @abstractmethod
    def end(self) -> None:
        """End the worker at once, also in the middle of a job; without effect if it has exited."""


class Launcher(ABC):
    """Starts workers of one search.

    Laws, which tests/contracts/test_pool.py checks for every launcher: a worker is an interpreter of its own; it gets
    messages in the order in which they were sent; however it ends, WorkerExited is reported; no worker outlives `close`
    or the search's own process by more than a moment.

    Args:
        config: of the search; `launcher_args` has the arguments of the launcher.

    Raises:
        UsageError: the launcher has no such argument.
    """

    name: str = ""
    """The name of the launcher in `--launcher`."""
    argument_names: frozenset[str] | None = frozenset()
    """The names that `launcher_args` may use; None if another library checks them."""
    package: str = ""
    """The Python package that the launcher needs besides the dependencies of this one, if any."""
    local_arguments: str = ""
    """The `launcher_args` with which workers start on this machine, as in the tests."""
    prepares: bool = False
    """Whether `prepare` saves time, so that the launcher is made before images are read, and not after."""

    def __init__(self, config: SearchConfig) -> None:
        self.config = config
        self.decode = True
        """Whether workers decode the images when they start; their first job may need none."""
        self.arguments = _pairs(config.launcher_args)
        unknown = [] if self.argument_names is None else sorted(self.arguments.keys() - self.argument_names)
        if unknown:
            names, extra = ", ".join(sorted(self.argument_names or ())) or "nothing", ", ".join(unknown)
            raise UsageError(f"--launcher-args: {config.launcher} does not take {extra}. It takes {names}.")

    @property
    def size(self) -> int:
        """Number of workers."""
        return max(1, self.config.workers)

    def prepare(self) -> None:
        """Begin what the first start needs whatever the final settings are, without waiting for it."""
        return

    def begin(self, index: int) -> dict[str, Any]:
        """The first message to a worker."""
        config = self.config.model_copy(update={"device": self.device(index)})
        return {
            "config": config.model_dump(exclude={"storage"}),  # which may hold a password
            "threads": self.threads,
            "decode": self.decode,
        }

    @property
    def threads(self) -> int:
        """CPU threads of each worker: those of this process, divided among the workers if they train on the CPU."""
        return max(1, torch.get_num_threads() // (self.size if self._on_cpu else 1))

    def device(self, index: int) -> str:
        """The device that a worker measures and trains on, as torch names it there."""
        return self.config.device

    @property
    def _on_cpu(self) -> bool:
        return torch.device(self.config.device).type == "cpu"

    def log(self, index: int) -> Path:
        """The file that a worker's output goes to."""
        return Path(self.config.output) / f"worker-{index}.log"

    @abstractmethod
    def start(self, index: int, on_message: OnMessage) -> Link:
        """Start a worker, which then sends a sign of life.

        Args:
            index: number of the worker's place, from 0.
            on_message: called with its messages.

        Raises:
            SearchError: the worker cannot be started.
        """

    def close(self) -> None:
        """Remove what is not needed after the workers have ended, such as empty logs."""
        for index in range(self.size):
            with suppress(OSError):
                if not self.log(index).stat().st_size:
                    self.log(index).unlink()


LAUNCHERS: Catalog[Launcher] = Catalog("launcher", "attnsurgery.search.workers.launch", group="attnsurgery.launchers")


def last_line(path: Path, most: int = 2000) -> str:
    """The last line of a log; '' if there is none.

    Args:
        path: of the log.
        most: number of bytes at its end that are read.
    """
    try:
        with path.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - most))
            lines = log.read().decode(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1].strip() if lines else ""


def missing(name: str, extra: str, error: ImportError) -> UsageError:
    """The error that a launcher needs a package which an extra of this package installs."""
    install = f"pip install 'attnsurgery[{extra}]'"
    return UsageError(f"--launcher {name} needs a package that is missing: {error}. Install it with  {install}")


def _pairs(text: str) -> dict[str, Any]:
    """Parse 'time=2 partition=gpu'; values are parsed as YAML.

    Raises:
        UsageError: the text cannot be parsed.
    """
    pairs: dict[str, Any] = {}
    try:
        for word in shlex.split(text):
            key, equals, value = word.partition("=")
            if not (key and equals):
                raise ValueError(word)
            pairs[key] = yaml.safe_load(value)
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"--launcher-args {text!r} does not read as NAME=VALUE NAME=VALUE ...: {reason}.") from None
    return pairs
