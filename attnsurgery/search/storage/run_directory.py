"""The run directory: a search writes only into its own, and replaces or removes only files that it has written itself.

A mark file makes a directory a run directory; those of older versions are recognized by their study or journal. Every
file that the search writes is first listed with its digest. A file of another origin, or one that was changed since,
is renamed to NAME.kept-1 and never lost.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from attnsurgery.errors import SearchError, UsageError
from attnsurgery.search.files import LOCK, Journal, locked, write_atomically
from attnsurgery.search.storage.schema import FACT, FORMAT_KEY, STUDY, TRIALS, is_format

CONFIG = "config.yaml"
"""File of the run directory: the settings of the search, as `attnsurgery search --config` reads them."""
CONFIRMING = "confirming"
"""Folder of the run directory that holds the trained weights of finalists until there is a verdict."""
BEST = "best"
"""Folder of the run directory that holds the trained winner."""


def weights_of(record: Mapping[str, Any]) -> str:
    """Path, relative to the run directory, of the weights of the winner's first training for the verdict.

    Args:
        record: of the winner.
    """
    return f"{CONFIRMING}/{record['digest'][:16]}.safetensors"


WEIGHTS = "base.safetensors"
"""File of the run directory: the base's starting weights, from which all trials begin."""
SUPERNET_WEIGHTS = "supernet.safetensors"
"""File of the run directory: the weights of the trained supernet."""
IMAGES = ".images.json"
"""File of the run directory: the digests of image files. Files that have not changed are not read again."""

MARK = ".attnsurgery-run"
"""File that makes a directory a run directory."""
FILE_LIST = ".written.jsonl"
"""File that lists the files which the search has written: one JSON object a line, with name and digest."""
_NO_CONTENT = {".lock", ".DS_Store", ".gitkeep", ".gitignore", "lost+found"}
"""Names that an empty directory may contain."""
_SQLITE = b"SQLite format 3\0"


def check_free(folder: Path) -> None:
    """Make sure that a search may write into a directory; nothing is changed.

    Raises:
        UsageError: the path is a file, or a directory with other files that is no run directory.
        SearchError: the directory cannot be read.
    """
    try:
        if not folder.exists() and not folder.is_symlink():
            return
        if not folder.is_dir():
            raise UsageError(f"the run directory {folder} is a file. Name a directory that is new or empty.")
        names = (entry.name for entry in folder.iterdir())
        # a partly written mark is no content either
        entries = sorted(name for name in names if name not in _NO_CONTENT and MARK not in name)
    except OSError as error:
        raise SearchError(f"cannot look into the run directory {folder}: {error.strerror}.") from None
    if entries and not is_run(folder):
        some = ", ".join(entries[:3]) + ", ..." * (len(entries) > 3)
        raise UsageError(
            f"{folder} is no run directory and not empty: it holds {some}. A search writes into a directory that is "
            "new, empty, or that of a search, so that it never replaces files of others. Name another one."
        )


def is_run(folder: Path) -> bool:
    """Whether a directory is the run directory of a search."""
    return (folder / MARK).is_file() or _old_journal(folder / TRIALS) or _old_study(folder / STUDY)


def mark(folder: Path) -> None:
    """Make a directory a run directory. Weights in one of an older version are listed as the search's own.

    Raises:
        SearchError: the disk is full or not writable.
    """
    if (folder / MARK).is_file():
        return
    if is_run(folder):
        for path in folder.glob("*.safetensors"):
            _note(folder, path.name, digest_of(path))
    text = "This directory belongs to attnsurgery search. Without this file, no search resumes here.\n"
    write_atomically(folder / MARK, text)


@contextmanager
def opened(folder: Path) -> Iterator[None]:
    """Create a run directory and hold its lock.

    If an error ends the search before it has written anything, directories that were created here are removed again.

    Raises:
        SearchError: the directory cannot be created, or another search is running in it.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SearchError(f"cannot make the run directory {folder}: {error.strerror}.") from None
    with locked(folder):
        try:
            yield
        except BaseException:
            if created and {entry.name for entry in folder.iterdir()} <= {LOCK, MARK}:
                with suppress(OSError):
                    for name in (MARK, LOCK):
                        (folder / name).unlink(missing_ok=True)
                    for path in created:
                        path.rmdir()
            raise


def write_own(folder: Path, name: str, content: str | bytes) -> str:
    """Write a file of the search completely or not at all.

    Args:
        folder: the run directory.
        name: of the file, relative to the run directory.
        content: of the file.

    Returns:
        The new name of an earlier file that was not the search's own; '' if there was none.

    Raises:
        SearchError: the disk is full or not writable; the earlier file is unchanged.
    """
    data = content.encode() if isinstance(content, str) else content
    new_name = set_aside(folder, name)
    _note(folder, name, hashlib.sha256(data).hexdigest())
    write_atomically(folder / name, data)
    return new_name


def replace_own(folder: Path, name: str, source: Path) -> str:
    """Move a new directory of the search to its final name, in place of an earlier one.

    Args:
        folder: the run directory.
        name: of the directory, relative to the run directory.
        source: the new directory, under another name in the run directory.

    Returns:
        The new name of an earlier directory that was not wholly the search's own; '' if there was none.

    Raises:
        SearchError: the disk is full or not writable.
    """
    for path in _files(source):
        _note(folder, f"{name}/{path.relative_to(source).as_posix()}", digest_of(path))
    new_name = set_aside(folder, name)
    if (folder / name).exists():
        shutil.rmtree(folder / name)
    source.rename(folder / name)
    return new_name


def remove_own(folder: Path, name: str) -> None:
    """Remove a file of the search, or all such files of a directory and then the directory if it is empty."""
    written_files = _own_files(folder)
    for path in _files(folder / name):
        if (path.relative_to(folder).as_posix(), digest_of(path)) in written_files:
            path.unlink()
    with suppress(OSError):  # the directory has other files, or does not exist
        (folder / name).rmdir()


def set_aside(folder: Path, name: str) -> str:
    """Rename a file or directory that is not the search's own; return the new name, or '' if nothing was renamed.

    Raises:
        SearchError: the file or directory cannot be renamed.
    """
    path = folder / name
    if not (path.exists() or path.is_symlink()) or is_own(folder, name):
        return ""
    number = 1
    while (target := folder / f"{name}.kept-{number}").exists() or target.is_symlink():
        number += 1
    try:
        path.rename(target)
    except OSError as error:
        raise SearchError(f"cannot rename {path} to {target.name}: {error.strerror}. It stays as it is.") from None
    return target.relative_to(folder).as_posix()


def is_own(folder: Path, name: str) -> bool:
    """Whether a file, or every file of a directory, is unchanged since the search wrote it."""
    path = folder / name
    if path.is_symlink() or not path.exists():
        return False
    written_files = _own_files(folder)
    entries = [path] if path.is_file() else list(path.rglob("*"))
    return bool(entries) and all(
        entry.is_file()
        and not entry.is_symlink()
        and (entry.relative_to(folder).as_posix(), digest_of(entry)) in written_files
        for entry in entries
    )


def digest_of(path: Path) -> str:
    """The SHA-256 digest of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return [entry for entry in path.rglob("*") if entry.is_file() and not entry.is_symlink()]


def _note(folder: Path, name: str, digest: str) -> None:
    if (name, digest) not in _own_files(folder):
        Journal(folder / FILE_LIST).append({"name": name, "digest": digest})


def _own_files(folder: Path) -> set[tuple[str, str]]:
    """Names and digests of all files that the search has ever written; unreadable lines are skipped."""
    return {
        (entry["name"], entry["digest"])
        for entry in _objects(folder / FILE_LIST)
        if isinstance(entry.get("name"), str) and isinstance(entry.get("digest"), str)
    }


def _old_journal(path: Path) -> bool:
    """Whether a file is the journal of a search: one of its lines has our format."""
    return any(entry.get(FACT) == FORMAT_KEY and is_format(entry.get("value")) for entry in _objects(path))


def _old_study(path: Path) -> bool:
    """Whether a file is an Optuna database that holds the study of a search."""
    try:
        with path.open("rb") as file:
            if file.read(len(_SQLITE)) != _SQLITE:
                return False
        uri = f"{path.resolve().as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True)) as connection:
            rows = connection.execute("SELECT value_json FROM study_user_attributes WHERE key = ?", (FORMAT_KEY,))
            return any(is_format(json.loads(value)) for (value,) in rows)
    except (OSError, sqlite3.Error, ValueError):
        return False


def _objects(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that are JSON objects."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return []
    objects = []
    for line in lines:
        with suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict):
                objects.append(entry)
    return objects
