"""Atomic file writes, a journal that survives a crash while writing, and the lock of a run directory."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors.torch
from filelock import FileLock, Timeout
from torch import nn

from attnsurgery.errors import SearchError

LOCK = ".lock"
"""File of a run directory that the search running there holds locked."""


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file completely or not at all: write a temporary file, flush it to the disk, rename it.

    Characters that UTF-8 cannot encode, as in some file names, are written as backslash escapes.

    Raises:
        SearchError: the disk is full or not writable; the old file is unchanged.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise SearchError(f"cannot write {path}: {error.strerror}. What was there before is unchanged.") from error


def to_safetensors(model: nn.Module) -> bytes:
    """All tensors of a model as the bytes of a safetensors file."""
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
    return safetensors.torch.save(tensors)


def write_weights(path: Path, model: nn.Module) -> None:
    """Write the file that `to_safetensors` makes, completely or not at all.

    Raises:
        SearchError: the disk is full or not writable.
    """
    write_atomically(path, to_safetensors(model))


class Journal:
    """A file with one JSON object in each line, which is on the disk when `append` returns.

    A process that dies while writing leaves an incomplete last line. It is ignored when reading, and removed before the
    next line is written, so that it never damages later lines.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, entry: dict[str, Any]) -> None:
        """Add a line.

        Raises:
            SearchError: the disk is full or not writable; earlier lines stay readable.
        """
        line = json.dumps(entry, sort_keys=True).encode() + b"\n"
        try:
            with self.path.open("ab+") as file:
                _cut_torn_tail(file)
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise SearchError(f"cannot write {self.path}: {error.strerror}. Lines before it are kept.") from error

    def read(self) -> list[dict[str, Any]]:
        """The objects of all complete lines.

        Raises:
            SearchError: a line before the last is damaged; the message has its number.
        """
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().split(b"\n")
        entries: list[dict[str, Any]] = []
        for number, line in enumerate(lines[:-1], start=1):  # after the last newline: nothing, or an incomplete line
            try:
                entries.append(json.loads(line))
            except ValueError:
                if number == len(lines) - 1:
                    break
                raise SearchError(
                    f"{self.path}:{number} is damaged and is not the last line. If it is of a search, attnsurgery "
                    f"repair {self.path.parent} repairs it."
                ) from None
        return entries


def _cut_torn_tail(file: Any) -> None:
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return
    file.seek(size - 1)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)
    file.seek(0, os.SEEK_END)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a run directory: one search at a time. The lock goes with the process, however that ends.

    Raises:
        SearchError: another process holds it, or the file system has no locks.
    """
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise SearchError(
            f"another search is running in {folder}. Wait for it, or give this one another --output."
        ) from None
    except OSError as error:
        raise SearchError(f"cannot lock {folder / LOCK}: {error.strerror}. Give another --output.") from error
    try:
        yield
    finally:
        lock.release()
