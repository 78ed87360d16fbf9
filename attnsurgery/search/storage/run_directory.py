"""A run directory: a search writes into its own alone, and there replaces and removes only what it has written itself.

A directory is a run directory by its mark; one from before there were marks is known by its study or its journal. Every
file that the search writes there is noted with its digest first. Whatever else stands at the place of such a file, and
whatever was changed since, is renamed to NAME.kept-1 and stays.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
from collections.abc import Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from attnsurgery.errors import SearchError, UsageError
from attnsurgery.search.files import Journal, write_whole
from attnsurgery.search.storage.schema import FACT, FORMAT_KEY, STUDY, TRIALS, is_format

CONFIG = "config.yaml"
"""File of the run directory: the settings of the search, as `attnsurgery search --config` reads them."""
CONFIRMING = "confirming"
"""Folder of the run directory that holds what finalists were trained to, until there is a verdict."""
BEST = "best"
"""Folder of the run directory that holds the winner as it was trained."""


def weights_of(record: Mapping[str, Any] | None, index: int) -> str:
    """Where in the run directory the weights lie that the winner, or the base, has come to from one of the seeds."""
    return f"{CONFIRMING}/{'base' if record is None else record['digest'][:16]}-{index}.safetensors"


WEIGHTS = "base.safetensors"
"""What all trials of a run directory begin from."""
SUPERNET_WEIGHTS = "supernet.safetensors"
"""There, what a supernet was trained to."""
IMAGES = ".images.json"
"""There, the digests of image files: those that have not changed since are not read again."""

MARK = ".attnsurgery-run"
"""File that makes a directory a run directory."""
WRITTEN = ".written.jsonl"
"""File that lists what the search has written, a JSON object a line: name and digest."""
_NO_CONTENT = {".lock", ".DS_Store", ".gitkeep", ".gitignore", "lost+found"}
"""Entries of a directory that counts as empty all the same."""
_SQLITE = b"SQLite format 3\0"


def check_free(folder: Path) -> None:
    """Make sure that a search may write into a directory; nothing is changed.

    Raises:
        UsageError: it is a file, or holds something and is no run directory.
        SearchError: it cannot be looked at.
    """
    try:
        if not folder.exists() and not folder.is_symlink():
            return
        if not folder.is_dir():
            raise UsageError(f"the run directory {folder} is a file. Name a directory that is new or empty.")
        names = (entry.name for entry in folder.iterdir())
        held = sorted(name for name in names if name not in _NO_CONTENT and MARK not in name)  # nor a mark half written
    except OSError as error:
        raise SearchError(f"cannot look into the run directory {folder}: {error.strerror}.") from None
    if held and not is_run(folder):
        some = ", ".join(held[:3]) + ", ..." * (len(held) > 3)
        raise UsageError(
            f"{folder} is no run directory and not empty: it holds {some}. A search writes into a directory that is "
            "new, empty, or that of a search, so that it never replaces files of others. Name another one."
        )


def is_run(folder: Path) -> bool:
    """Whether a search has written it."""
    return (folder / MARK).is_file() or _old_journal(folder / TRIALS) or _old_study(folder / STUDY)


def mark(folder: Path) -> None:
    """Make a directory a run directory. Weights in one from before there were marks are noted as the search's own.

    Raises:
        SearchError: the disk is full or not writable.
    """
    if (folder / MARK).is_file():
        return
    if is_run(folder):
        for path in folder.glob("*.safetensors"):
            _note(folder, path.name, digest_of(path))
    text = "This directory belongs to attnsurgery search. Remove this file, and no search goes on here.\n"
    write_whole(folder / MARK, text)


def write_own(folder: Path, name: str, content: str | bytes) -> str:
    """Write a file of the search as a whole or not at all.

    Args:
        name: relative to the run directory.

    Returns:
        The new name of what stood there and was not the search's; '' if there was no such thing.

    Raises:
        SearchError: the disk is full or not writable; what was there before is there.
    """
    data = content.encode() if isinstance(content, str) else content
    kept = set_aside(folder, name)
    _note(folder, name, hashlib.sha256(data).hexdigest())
    write_whole(folder / name, data)
    return kept


def replace_own(folder: Path, name: str, made: Path) -> str:
    """Give a directory of the search its name.

    Args:
        name: relative to the run directory.
        made: the directory, under another name in the run directory.

    Returns:
        The new name of what stood there and was not the search's alone; '' if there was no such thing.

    Raises:
        SearchError: the disk is full or not writable.
    """
    for path in _files(made):
        _note(folder, f"{name}/{path.relative_to(made).as_posix()}", digest_of(path))
    kept = set_aside(folder, name)
    if (folder / name).exists():
        shutil.rmtree(folder / name)
    made.rename(folder / name)
    return kept


def remove_own(folder: Path, name: str) -> None:
    """Remove what the search has written under that name; of a directory, each such file, and itself if it is empty."""
    written = _written(folder)
    for path in _files(folder / name):
        if (path.relative_to(folder).as_posix(), digest_of(path)) in written:
            path.unlink()
    with suppress(OSError):  # there is something of others in it, or it is gone
        (folder / name).rmdir()


def set_aside(folder: Path, name: str) -> str:
    """Rename what stands under a name if it is not the search's; the new name, or ''.

    Raises:
        SearchError: it cannot be renamed.
    """
    path = folder / name
    if not (path.exists() or path.is_symlink()) or is_own(folder, name):
        return ""
    number = 1
    while (kept := folder / f"{name}.kept-{number}").exists() or kept.is_symlink():
        number += 1
    try:
        path.rename(kept)
    except OSError as error:
        raise SearchError(f"cannot rename {path} to {kept.name}: {error.strerror}. It stays as it is.") from None
    return kept.relative_to(folder).as_posix()


def is_own(folder: Path, name: str) -> bool:
    """Whether all that stands under a name is as the search has written it."""
    path = folder / name
    if path.is_symlink() or not path.exists():
        return False
    written = _written(folder)
    held = [path] if path.is_file() else list(path.rglob("*"))
    return bool(held) and all(
        entry.is_file()
        and not entry.is_symlink()
        and (entry.relative_to(folder).as_posix(), digest_of(entry)) in written
        for entry in held
    )


def digest_of(path: Path) -> str:
    """sha256 of a file's bytes, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return [entry for entry in path.rglob("*") if entry.is_file() and not entry.is_symlink()]


def _note(folder: Path, name: str, digest: str) -> None:
    if (name, digest) not in _written(folder):
        Journal(folder / WRITTEN).append({"name": name, "digest": digest})


def _written(folder: Path) -> set[tuple[str, str]]:
    """Names and digests of all that the search has ever written; lines that do not read are left out."""
    return {
        (entry["name"], entry["digest"])
        for entry in _objects(folder / WRITTEN)
        if isinstance(entry.get("name"), str) and isinstance(entry.get("digest"), str)
    }


def _old_journal(path: Path) -> bool:
    """Whether a file is the journal of a search: a line of it has our format."""
    return any(entry.get(FACT) == FORMAT_KEY and is_format(entry.get("value")) for entry in _objects(path))


def _old_study(path: Path) -> bool:
    """Whether a file is a database of Optuna that holds the study of a search."""
    try:
        with path.open("rb") as file:
            if file.read(len(_SQLITE)) != _SQLITE:
                return False
        uri = f"{path.resolve().as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True)) as connection:
            found = connection.execute("SELECT value_json FROM study_user_attributes WHERE key = ?", (FORMAT_KEY,))
            return any(is_format(json.loads(value)) for (value,) in found)
    except (OSError, sqlite3.Error, ValueError):
        return False


def _objects(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that read as JSON objects."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        with suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict):
                found.append(entry)
    return found
