"""Loads the results of a search from its run directory, without model, data or device.

Nothing is written there. A study in the run directory is copied first, by SQLite's backup, which is safe beside a
running writer. So a running search is not disturbed, and a study on a read-only disk can be read as well.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import optuna
import pydantic

from attnsurgery.errors import SearchError, UsageError, did_you_mean
from attnsurgery.search.config import SearchConfig
from attnsurgery.search.files import Journal
from attnsurgery.search.result.about import About
from attnsurgery.search.result.confirmation import Confirmation
from attnsurgery.search.result.outcome import Outcome
from attnsurgery.search.result.record import Record, contenders
from attnsurgery.search.storage.schema import (
    FORMAT_KEY,
    REPEATS,
    SECONDS,
    STUDY,
    TRIALS,
    check_format,
    is_format,
    records_of,
    trials_of,
)
from attnsurgery.search.storage.urls import storage_errors, study_name, url_of, without_password


@dataclass(frozen=True)
class Saved:
    """A search as its run directory holds it."""

    outcome: Outcome
    """The results so far."""
    fixed: Mapping[str, Any]
    """What may not change when the search is resumed, as `fixed_part` makes it."""


def load_search(folder: Path, storage: str | None = None) -> Saved:
    """Load the search of a run directory.

    Args:
        folder: the run directory.
        storage: URL of the study; None if the study is in the run directory.

    Raises:
        UsageError: the folder is no run directory, or the storage has no such study.
        SearchError: the study cannot be read, or the search has no results yet.
    """
    with _study(folder, storage) as study:
        facts = dict(study.user_attrs)
        if not is_format(facts.get(FORMAT_KEY)):
            raise UsageError(
                f"the study {study.study_name!r} of {folder} was not made by attnsurgery search. A run directory is "
                "what a search writes."
            )
        check_format(facts[FORMAT_KEY], str(folder))
        _check_written(facts, folder)
        with _readable(facts, folder):
            return Saved(_outcome(facts, _records(study, folder), folder), facts["config"])


def _outcome(facts: Mapping[str, Any], records: list[Record], folder: Path) -> Outcome:
    return Outcome(
        config=SearchConfig(**{**facts["asked"], "output": str(folder)}),
        folder=folder,
        about=About.from_dict(facts["about"]),
        base=Record.from_dict(facts["base"]["record"]),
        records=records,
        confirmation=_confirmation(facts, records),
        interrupted=facts.get("ended") == "interrupted",
        seconds=facts.get(SECONDS),
        repeats=facts.get(REPEATS) or {},
    )


def _check_written(facts: Mapping[str, Any], folder: Path) -> None:
    """Make sure that the study holds all data that a report needs.

    Raises:
        SearchError: the search has not reached its first trial, or an older version wrote the study.
    """
    if "record" not in (facts.get("base") or {}):
        raise SearchError(f"the search in {folder} has not reached its first trial. Let it run, then report it.")
    if "about" not in facts:
        raise SearchError(
            f"the search in {folder} was started by an older attnsurgery, which did not store all that a report needs. "
            "Repeat the command of the search, and it is stored."
        )


@contextmanager
def _readable(facts: Mapping[str, Any], folder: Path) -> Iterator[None]:
    """Turn errors of missing or unknown data into one that names the version which wrote them."""
    try:
        yield
    except (pydantic.ValidationError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise SearchError(
            f"the search in {folder} was written by another attnsurgery, which this one cannot read: {reason}. "
            f"It was {facts['about'].get('code', ['unknown'])[-1]}."
        ) from None


def _records(study: optuna.Study, folder: Path) -> list[Record]:
    """Every finished trial, in order. Where study and journal differ, the journal holds: it is written first."""
    numbers = {trial.number for trial in study.get_trials(deepcopy=False)}
    records = {record.number: record for record in records_of(study)}
    journal = trials_of(Journal(folder / TRIALS).read())
    records |= {number: record for number, record in journal.items() if number in numbers}
    return [records[number] for number in sorted(records)]


def _confirmation(facts: Mapping[str, Any], records: list[Record]) -> Confirmation | None:
    """The confirmation, if the search finished and its finalists are still the best candidates."""
    data = facts.get("confirmation")
    if facts.get("ended") != "finished" or not data:
        return None
    confirmation = Confirmation.from_dict(data)
    return confirmation if confirmation.answers(contenders(records, confirmation.rank_by)) else None


@contextmanager
def _study(folder: Path, storage: str | None) -> Iterator[optuna.Study]:
    with _url(folder, storage) as url, storage_errors(storage or f"{folder / STUDY}"):
        database = optuna.storages.RDBStorage(url)
        try:
            name = study_name(database, folder)
            if name is None:
                raise UsageError(_no_study(folder, storage, optuna.get_all_study_names(database)))
            yield optuna.load_study(study_name=name, storage=database)
        finally:
            database.remove_session()
            database.engine.dispose()


@contextmanager
def _url(folder: Path, storage: str | None) -> Iterator[str]:
    """The URL of the study: `storage`, or that of a copy of the study in the run directory."""
    if storage:
        if not folder.is_dir():
            raise UsageError(_no_run(folder))
        yield storage
        return
    if not (folder / STUDY).is_file():
        raise UsageError(_no_run(folder))
    with TemporaryDirectory(prefix="attnsurgery-") as scratch:
        copy = Path(scratch) / STUDY
        copy_study(folder / STUDY, copy)
        yield url_of(copy)


def copy_study(study: Path, to: Path) -> None:
    """Copy a SQLite database as of one moment, also while another process writes to it.

    Raises:
        SearchError: the database cannot be read.
    """
    try:
        # not read-only: SQLite has to roll back the unfinished transaction of a dead writer before it can read
        uri = f"{study.resolve().as_uri()}?mode=rw"
        with closing(sqlite3.connect(uri, uri=True)) as source, closing(sqlite3.connect(to)) as target:
            source.backup(target)
    except sqlite3.Error as error:
        raise SearchError(f"{study} cannot be read: {error}.") from None


def _no_run(folder: Path) -> str:
    if not folder.is_dir():
        beside = [entry.parent.name for entry in folder.parent.glob(f"*/{STUDY}")]
        return (
            f"there is no folder {folder}.{did_you_mean(folder.name, beside)} A run directory is what a search writes."
        )
    elsewhere = (
        " Its study is kept elsewhere: give --storage, the URL of the search."
        if (folder / TRIALS).exists()
        else " A run directory is what attnsurgery search writes: see the last lines it printed, or its --output."
    )
    return f"{folder} is no run directory: it has no {STUDY}.{elsewhere}"


def _no_study(folder: Path, storage: str | None, names: list[str]) -> str:
    location = without_password(storage) if storage else f"{folder / STUDY}"
    listed = ", ".join(sorted(names)[:10]) or "none"
    return (
        f"{location} has no study {folder.resolve().name!r}, which the folder's name asks for; there are: {listed}. "
        "Give the folder the name that it had when its search began."
    )
