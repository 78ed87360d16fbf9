"""A search as its run directory tells it: what was found so far, without model, data or device.

Nothing is written. A study in the run directory is copied first, as SQLite does that beside a running writer, so a
search that goes on there is not disturbed, and a study that lies where nothing can be written is read as well.
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
    """A search of a run directory."""

    outcome: Outcome
    fixed: Mapping[str, Any]
    """What may not change while it goes on, as `fixed_part` makes it."""


def read(folder: Path, storage: str | None = None) -> Saved:
    """What a run directory and its study hold.

    Args:
        storage: URL of the study, where that is not in the directory.

    Raises:
        UsageError: it is no run directory, or the storage has no such study.
        SearchError: it cannot be read, or nothing was made yet.
    """
    with _study(folder, storage) as study:
        kept = dict(study.user_attrs)
        if not is_format(kept.get(FORMAT_KEY)):
            raise UsageError(
                f"the study {study.study_name!r} of {folder} was not made by attnsurgery search. A run directory is "
                "what a search writes."
            )
        check_format(kept[FORMAT_KEY], str(folder))
        _check_written(kept, folder)
        with _readable(kept, folder):
            return Saved(_outcome(kept, _records(study, folder), folder), kept["config"])


def _outcome(kept: Mapping[str, Any], records: list[Record], folder: Path) -> Outcome:
    return Outcome(
        config=SearchConfig(**{**kept["asked"], "output": str(folder)}),
        folder=folder,
        about=About.from_dict(kept["about"]),
        base=Record.from_dict(kept["base"]["record"]),
        records=records,
        confirmation=_confirmation(kept, records),
        interrupted=kept.get("ended") == "interrupted",
        seconds=kept.get(SECONDS),
    )


def _check_written(kept: Mapping[str, Any], folder: Path) -> None:
    """
    Raises:
        SearchError: what a report needs was not written down, yet or at all.
    """
    if "record" not in (kept.get("base") or {}):
        raise SearchError(f"the search in {folder} has not come to its first trial. Let it go on, then report it.")
    if "about" not in kept:
        raise SearchError(
            f"the search in {folder} was begun by an older attnsurgery, which did not write down all that a report "
            "needs. Its own command, once more, does that."
        )


@contextmanager
def _readable(kept: Mapping[str, Any], folder: Path) -> Iterator[None]:
    """Says of data that lacks something, or has something unknown, who wrote it."""
    try:
        yield
    except (pydantic.ValidationError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise SearchError(
            f"the search in {folder} was written by another attnsurgery, which this one cannot read: {reason}. "
            f"It was {kept['about'].get('code', ['unknown'])[-1]}."
        ) from None


def _records(study: optuna.Study, folder: Path) -> list[Record]:
    """Every finished trial, in order; the journal has the last word, for what happens is written there first."""
    there = {trial.number for trial in study.get_trials(deepcopy=False)}
    found = {record.number: record for record in records_of(study)}
    written = trials_of(Journal(folder / TRIALS).read())
    found |= {number: record for number, record in written.items() if number in there}
    return [found[number] for number in sorted(found)]


def _confirmation(kept: Mapping[str, Any], records: list[Record]) -> Confirmation | None:
    """The verdict, if it is on what is the best by now and nothing more was asked for."""
    given = kept.get("confirmation")
    if kept.get("ended") != "finished" or not given:
        return None
    found = Confirmation.from_dict(given)
    return found if found.answers(contenders(records, found.rank_by)) else None


@contextmanager
def _study(folder: Path, storage: str | None) -> Iterator[optuna.Study]:
    with _url(folder, storage) as url, storage_errors(storage or f"{folder / STUDY}"):
        kept = optuna.storages.RDBStorage(url)
        try:
            name = study_name(kept, folder)
            if name is None:
                raise UsageError(_no_study(folder, storage, optuna.get_all_study_names(kept)))
            yield optuna.load_study(study_name=name, storage=kept)
        finally:
            kept.remove_session()
            kept.engine.dispose()


@contextmanager
def _url(folder: Path, storage: str | None) -> Iterator[str]:
    """Where Optuna finds the study: what was given, or a copy of the directory's own."""
    if storage:
        if not folder.is_dir():
            raise UsageError(_no_run(folder))
        yield storage
        return
    if not (folder / STUDY).is_file():
        raise UsageError(_no_run(folder))
    with TemporaryDirectory(prefix="attnsurgery-") as scratch:
        copied = Path(scratch) / STUDY
        copy_study(folder / STUDY, copied)
        yield url_of(copied)


def copy_study(study: Path, to: Path) -> None:
    """The database as of one moment, whoever writes to it."""
    try:
        # not read-only: what a dead writer left half-done has to be rolled back before anything can be read
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
    where = without_password(storage) if storage else f"{folder / STUDY}"
    listed = ", ".join(sorted(names)[:10]) or "none"
    return (
        f"{where} has no study {folder.resolve().name!r}, which the folder's name asks for; there are: {listed}. "
        "Give the folder the name that it had when its search began."
    )
