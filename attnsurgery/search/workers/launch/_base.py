"""What starts workers, and the line to each of them.

A launcher decides where a worker runs; what it is told and what it answers is the same everywhere, JSON objects that
attnsurgery/search/workers/worker.py reads and writes.
"""

from __future__ import annotations

import os
import shlex
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

import attnsurgery
from attnsurgery.catalog import Catalog
from attnsurgery.errors import UsageError
from attnsurgery.search.config import SearchConfig

Message = Mapping[str, Any]
"""JSON data."""


@dataclass(frozen=True, slots=True)
class WorkerExited:
    """The last that is heard of a worker."""

    reason: str
    """How it ended, as the end of a sentence."""
    out_of_memory: bool = False
    """Half a batch may do what a whole one could not."""


OnMessage = Callable[[Message | WorkerExited], None]
"""Told what a worker says, from any thread; WorkerExited at last, and once."""


class Link(ABC):
    """A worker that was started, and the line to it."""

    queued: bool = False
    """It has no machine yet, so it is given nothing to do."""

    @abstractmethod
    def tell(self, message: Message) -> None:
        """Send a message; to a worker that is gone, nothing happens."""

    @abstractmethod
    def end(self) -> None:
        """End it at once, whatever it does; harmless when it is gone."""


class Launcher(ABC):
    """Starts workers of one search.

    Laws, which tests/contracts/test_pool.py checks of every launcher: a worker is an interpreter of its own; it hears
    messages in the order in which they were told; when it ends, however it does, WorkerExited is heard; none outlives
    `close`, or the end of the search's own process, by more than a moment.

    Args:
        config: of the search; `launcher_args` says what this launcher is asked for.
    """

    name: str = ""
    takes: frozenset[str] | None = frozenset()
    """The names that `launcher_args` may use; None where that is for others to say."""

    def __init__(self, config: SearchConfig) -> None:
        self.config = config
        self.size = max(1, config.workers)
        self.asked = _pairs(config.launcher_args)
        unknown = [] if self.takes is None else sorted(self.asked.keys() - self.takes)
        if unknown:
            known, others = ", ".join(sorted(self.takes or ())) or "nothing", ", ".join(unknown)
            raise UsageError(f"--launcher-args: {config.launcher} does not take {others}. It takes {known}.")

    def begin(self, index: int) -> dict[str, Any]:
        """What a worker is told first."""
        config = self.config.model_copy(update={"device": self.device(index)})
        return {
            "config": config.model_dump(exclude={"storage"}),  # which may hold a password
            "threads": self.threads,
        }

    @property
    def threads(self) -> int:
        """CPU threads of each worker: as many as this process has, shared out where they train on the CPU."""
        return max(1, torch.get_num_threads() // (self.size if self._on_cpu else 1))

    def device(self, index: int) -> str:
        """What a worker measures and trains on, as torch names it there."""
        return self.config.device

    @property
    def _on_cpu(self) -> bool:
        return torch.device(self.config.device).type == "cpu"

    def log(self, index: int) -> Path:
        """Where whatever a worker prints goes."""
        return Path(self.config.output) / f"worker-{index}.log"

    @abstractmethod
    def start(self, index: int, heard: OnMessage) -> Link:
        """Start a worker, which then says that it lives.

        Raises:
            SearchError: it cannot be started.
        """

    def close(self) -> None:
        """Leave nothing behind that nobody needs; the workers have ended."""
        for index in range(self.size):
            with suppress(OSError):
                if not self.log(index).stat().st_size:
                    self.log(index).unlink()


LAUNCHERS: Catalog[Launcher] = Catalog("launcher", "attnsurgery.search.workers.launch", group="attnsurgery.launchers")

COMMAND = (sys.executable, "-m", "attnsurgery.search.workers.worker")
"""Begins a worker that reads its standard input and answers on its standard output."""


def import_path() -> str:
    """PYTHONPATH of a worker: this attnsurgery, also where it runs without being installed, and what it is here."""
    source = str(Path(attnsurgery.__file__).resolve().parents[1])
    return os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])


def last_line(path: Path, most: int = 2000) -> str:
    """What a log ends with; '' where there is none."""
    try:
        with path.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - most))
            lines = log.read().decode(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1].strip() if lines else ""


def missing(name: str, extra: str, error: ImportError) -> UsageError:
    """That a launcher needs a package which an extra of this one installs."""
    install = f"pip install 'attnsurgery[{extra}]'"
    return UsageError(f"--launcher {name} needs a package that is missing: {error}. Install it with  {install}")


def _pairs(text: str) -> dict[str, Any]:
    """'time=2 partition=gpu' as data; values are what YAML makes of them.

    Raises:
        UsageError: it does not read so.
    """
    found: dict[str, Any] = {}
    try:
        for word in shlex.split(text):
            key, equals, value = word.partition("=")
            if not (key and equals):
                raise ValueError(word)
            found[key] = yaml.safe_load(value)
    except (ValueError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())
        raise UsageError(f"--launcher-args {text!r} does not read as NAME=VALUE NAME=VALUE ...: {said}.") from None
    return found
