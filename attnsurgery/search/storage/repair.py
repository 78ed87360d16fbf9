"""A run directory made whole again: the study from the journal, the journal from the study, whichever can be read.

Both hold all that a search has come to. What one of them lacks, or what is damaged in it, is taken from the other, and
where both have it the journal has the last word, for it is written first. The old files stay beside the new ones.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pydantic

from attnsurgery.errors import SearchError, UsageError
from attnsurgery.search.files import LOCK, locked
from attnsurgery.search.result.record import Record, trained
from attnsurgery.search.storage.rebuild import clocks_of, remake
from attnsurgery.search.storage.schema import (
    FACT,
    FORMAT_KEY,
    SECONDS,
    STUDY,
    TRIALS,
    Terms,
    check_format,
    facts_in,
    facts_of,
    records_of,
    trials_of,
)
from attnsurgery.search.storage.urls import study_name, url_of

_Kept = tuple[dict[str, Any], dict[int, Record], str]
"""Facts, trials and name of a study."""


@dataclass(frozen=True)
class Repaired:
    """What a repair has found and made."""

    folder: Path
    trials: int
    trained: int
    from_study: int | None
    """Trials that the old study had; None if it could not be read."""
    from_journal: int
    """Trials that the old journal had, in the lines that could be read."""
    damaged_lines: int
    kept: tuple[str, ...]
    """The old files, under their new names."""


def repair(folder: Path) -> Repaired:
    """Make study and journal of a run directory anew.

    Raises:
        UsageError: it is no run directory.
        SearchError: it is in use, or neither study nor journal tells what the search was; nothing was changed then.
    """
    if not (folder / STUDY).exists() and not (folder / TRIALS).exists():
        raise UsageError(f"{folder} is no run directory: it has neither {STUDY} nor {TRIALS}.")
    if not (folder / LOCK).exists():
        _readable(folder)  # so that no lock file is left where nothing can be done
    with locked(folder):
        entries, damaged, kept, facts, written = _readable(folder)
        records, name = (kept[1], kept[2]) if kept else ({}, folder.resolve().name)
        everything = {**records, **written}
        clocks = clocks_of(entries)
        if clocks:
            facts = {SECONDS: max(clocks.values()), **facts}
        old = remake(folder, name, _terms(facts, folder), facts, everything, clocks, "repair")
    return Repaired(
        folder=folder,
        trials=len(everything),
        trained=len(trained(everything.values())),
        from_study=len(records) if kept else None,
        from_journal=len(written),
        damaged_lines=damaged,
        kept=old,
    )


def _readable(folder: Path) -> tuple[list[dict[str, Any]], int, _Kept | None, dict[str, Any], dict[int, Record]]:
    """Lines of the journal, how many are damaged, what the study holds, the facts of both, trials of the journal.

    Raises:
        SearchError: neither tells what the search was.
    """
    entries, damaged = _readable_lines(folder / TRIALS)
    kept = _kept(folder / STUDY)
    facts = {**(kept[0] if kept else {}), **facts_of(entries)}
    written = _trials(entries, folder)
    check_format(facts.get(FORMAT_KEY), str(folder))
    if "config" not in facts:
        raise SearchError(
            f"{folder} cannot be repaired: neither {STUDY} nor {TRIALS} says what the search was. Nothing was changed."
        )
    return entries, damaged, kept, facts, written


def _readable_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of a journal that read as JSON objects, and how many do not."""
    if not path.exists():
        return [], 0
    found, damaged = [], 0
    for line in path.read_bytes().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if isinstance(entry, dict) and (FACT in entry or "number" in entry):
            found.append(entry)
        else:
            damaged += 1
    return found, damaged


def _trials(entries: list[dict[str, Any]], folder: Path) -> dict[int, Record]:
    try:
        return trials_of(entries)
    except (TypeError, KeyError) as error:
        raise SearchError(
            f"{folder / TRIALS} has trials of another attnsurgery, which this one cannot read: {error}. "
            "Nothing was changed."
        ) from None


def _kept(path: Path) -> _Kept | None:
    """Facts, trials and name of a study; None if it cannot be read."""
    if not path.is_file() or not path.stat().st_size:
        return None
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", uri=True)) as connection:
            if connection.execute("PRAGMA integrity_check").fetchone() != ("ok",):
                return None
        storage = optuna.storages.RDBStorage(url_of(path))
        try:
            name = study_name(storage, path.parent)
            if name is None:
                return None
            study = optuna.load_study(study_name=name, storage=storage)
            return facts_in(study), {record.number: record for record in records_of(study)}, name
        finally:
            storage.remove_session()
            storage.engine.dispose()
    except Exception:  # whatever SQLite, SQLAlchemy and Optuna say of a damaged database
        return None


def _terms(facts: Mapping[str, Any], folder: Path) -> Terms:
    try:
        return Terms.of(facts["config"])
    except (KeyError, TypeError, pydantic.ValidationError) as error:
        raise SearchError(
            f"{folder} cannot be repaired: what it says of its search does not read: {' '.join(str(error).split())}. "
            "Nothing was changed."
        ) from None
