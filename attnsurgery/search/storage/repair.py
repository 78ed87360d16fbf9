"""Repairs a run directory: rebuilds the study from the journal and the journal from the study, as far as they are read.

Both hold all results of a search. What is missing or damaged in one of them is taken from the other. Where they differ,
the journal holds, because it is written first. The old files stay beside the new ones.
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
from attnsurgery.search.storage.rebuild import clocks_of, rebuild
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

_StudyData = tuple[dict[str, Any], dict[int, Record], str]
"""Facts, trials and name of a study."""


@dataclass(frozen=True)
class Repaired:
    """The result of a repair."""

    folder: Path
    """The run directory."""
    trials: int
    """Number of trials in the new study and journal."""
    trained: int
    """How many of them are trained candidates within the budget."""
    from_study: int | None
    """Number of trials in the old study; None if it could not be read."""
    from_journal: int
    """Number of trials in the readable lines of the old journal."""
    damaged_lines: int
    """Number of unreadable lines of the old journal."""
    kept: tuple[str, ...]
    """New names of the old files."""


def repair(folder: Path) -> Repaired:
    """Rebuild study and journal of a run directory.

    Raises:
        UsageError: the folder is no run directory.
        SearchError: the run directory is in use, or neither study nor journal holds the settings of the search. Nothing
            was changed.
    """
    if not (folder / STUDY).exists() and not (folder / TRIALS).exists():
        raise UsageError(f"{folder} is no run directory: it has neither {STUDY} nor {TRIALS}.")
    if not (folder / LOCK).exists():
        _readable(folder)  # fails before a lock file is created
    with locked(folder):
        entries, damaged, study, facts, in_journal = _readable(folder)
        records, name = (study[1], study[2]) if study else ({}, folder.resolve().name)
        everything = {**records, **in_journal}
        clocks = clocks_of(entries)
        if clocks:
            facts = {SECONDS: max(clocks.values()), **facts}
        old = rebuild(folder, name, _terms(facts, folder), facts, everything, clocks, "repair")
    return Repaired(
        folder=folder,
        trials=len(everything),
        trained=len(trained(everything.values())),
        from_study=len(records) if study else None,
        from_journal=len(in_journal),
        damaged_lines=damaged,
        kept=old,
    )


def _readable(folder: Path) -> tuple[list[dict[str, Any]], int, _StudyData | None, dict[str, Any], dict[int, Record]]:
    """Lines of the journal, number of damaged lines, data of the study, facts of both, trials of the journal.

    Raises:
        SearchError: neither study nor journal holds the settings of the search.
    """
    entries, damaged = _readable_lines(folder / TRIALS)
    study = _read_study(folder / STUDY)
    facts = {**(study[0] if study else {}), **facts_of(entries)}
    in_journal = _trials(entries, folder)
    check_format(facts.get(FORMAT_KEY), str(folder))
    if "config" not in facts:
        raise SearchError(
            f"{folder} cannot be repaired: neither {STUDY} nor {TRIALS} says what the search was. Nothing was changed."
        )
    return entries, damaged, study, facts, in_journal


def _readable_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of a journal that are JSON objects of a search, and the number of other lines."""
    if not path.exists():
        return [], 0
    entries, damaged = [], 0
    for line in path.read_bytes().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if isinstance(entry, dict) and (FACT in entry or "number" in entry):
            entries.append(entry)
        else:
            damaged += 1
    return entries, damaged


def _trials(entries: list[dict[str, Any]], folder: Path) -> dict[int, Record]:
    try:
        return trials_of(entries)
    except (TypeError, KeyError) as error:
        raise SearchError(
            f"{folder / TRIALS} has trials of another attnsurgery, which this one cannot read: {error}. "
            "Nothing was changed."
        ) from None


def _read_study(path: Path) -> _StudyData | None:
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
    except Exception:  # a damaged database raises errors of SQLite, SQLAlchemy or Optuna
        return None


def _terms(facts: Mapping[str, Any], folder: Path) -> Terms:
    try:
        return Terms.of(facts["config"])
    except (KeyError, TypeError, pydantic.ValidationError) as error:
        raise SearchError(
            f"{folder} cannot be repaired: the settings of its search cannot be read: {' '.join(str(error).split())}. "
            "Nothing was changed."
        ) from None
