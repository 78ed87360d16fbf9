"""Files that are there as a whole or not at all, and a journal whose last line may be torn."""

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
"""File of a run directory that whoever works there holds locked."""


def write_whole(path: Path, content: str | bytes) -> None:
    """Write beside, flush to the disk, then rename: a reader sees the old file or the new one.

    Names of files that are no UTF-8 are written with backslashes: no report is lost for them.

    Raises:
        SearchError: the disk is full or not writable; the old file is still there.
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


def packed(model: nn.Module) -> bytes:
    """All tensors of a model as the bytes of a safetensors file."""
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
    return safetensors.torch.save(tensors)


def write_weights(path: Path, model: nn.Module) -> None:
    """The file that `packed` makes, as a whole or not at all.

    Raises:
        SearchError: the disk is full or not writable.
    """
    write_whole(path, packed(model))


class Journal:
    """One JSON object a line, on the disk before `append` returns.

    A process that dies while writing leaves a torn last line. It is left out when reading, and cut off before the next
    line is written, so that one torn line never spoils the ones after it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, entry: dict[str, Any]) -> None:
        """Add a line.

        Raises:
            SearchError: the disk is full or not writable; what was there stays readable.
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
        """Every whole line.

        Raises:
            SearchError: a line before the last does not read; the message says which.
        """
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().split(b"\n")
        entries: list[dict[str, Any]] = []
        for number, line in enumerate(lines[:-1], start=1):  # after the last newline: nothing, or a torn line
            try:
                entries.append(json.loads(line))
            except ValueError:
                if number == len(lines) - 1:
                    break
                raise SearchError(
                    f"{self.path}:{number} is damaged and is not the last line. Of a search, attnsurgery repair "
                    f"{self.path.parent} makes it whole."
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
