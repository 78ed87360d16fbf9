"""A run directory made whole again: the study from the journal, the journal from the study, whichever can be read.

Both hold all that a search has come to. What one of them lacks, or what is damaged in it, is taken from the other, and
where both have it the journal has the last word, for it is written first. The old files stay beside the new ones.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pydantic
from optuna.trial import TrialState, create_trial

from attnsurgery.errors import SearchError, UsageError
from attnsurgery.samplers import AGAIN
from attnsurgery.search.files import locked, write_whole
from attnsurgery.search.layout import (
    FACT,
    FORMAT_KEY,
    HOW,
    SLOT,
    STUDY,
    TRIALS,
    Terms,
    check_format,
    facts_of,
    promoted_key,
    records_of,
    trials_of,
)
from attnsurgery.search.opening import study_name
from attnsurgery.search.record import Record, trained

_BESIDE_A_STUDY = tuple(f"{STUDY}-{suffix}" for suffix in ("journal", "wal", "shm"))


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
    with locked(folder):
        entries, damaged = _readable_lines(folder / TRIALS)
        kept = _kept(folder / STUDY)
        facts, records, name = kept if kept else ({}, {}, folder.resolve().name)
        facts = {**facts, **facts_of(entries)}
        written = _trials(entries, folder)
        everything = {**records, **written}
        check_format(facts.get(FORMAT_KEY), str(folder))
        if "config" not in facts:
            raise SearchError(
                f"{folder} cannot be repaired: neither {STUDY} nor {TRIALS} says what the search was. "
                "Nothing was changed."
            )
        made = _study_beside(folder, name, facts, everything)
        lines = [{FACT: key, "value": value} for key, value in facts.items()]
        lines += [everything[number].as_dict() for number in sorted(everything)]
        old = _kept_aside(folder)
        write_whole(folder / TRIALS, "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines))
        for name in _BESIDE_A_STUDY:  # what SQLite keeps beside the old database is not for the new one
            (folder / name).unlink(missing_ok=True)
        made.replace(folder / STUDY)
    return Repaired(
        folder=folder,
        trials=len(everything),
        trained=len(trained(everything.values())),
        from_study=len(records) if kept else None,
        from_journal=len(written),
        damaged_lines=damaged,
        kept=old,
    )


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


def _kept(path: Path) -> tuple[dict[str, Any], dict[int, Record], str] | None:
    """Facts, trials and name of a study; None if it cannot be read."""
    if not path.is_file() or not path.stat().st_size:
        return None
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", uri=True)) as connection:
            if connection.execute("PRAGMA integrity_check").fetchone() != ("ok",):
                return None
        storage = optuna.storages.RDBStorage(f"sqlite:///{path.resolve()}")
        try:
            name = study_name(storage, path.parent)
            if name is None:
                return None
            study = optuna.load_study(study_name=name, storage=storage)
            facts = {key: value for key, value in study.user_attrs.items() if not key.startswith(promoted_key(""))}
            return facts, {record.number: record for record in records_of(study)}, name
        finally:
            storage.remove_session()
            storage.engine.dispose()
    except Exception:  # whatever SQLite, SQLAlchemy and Optuna say of a damaged database
        return None


def _study_beside(folder: Path, name: str, facts: Mapping[str, Any], records: Mapping[int, Record]) -> Path:
    """A new study with all trials under their own numbers."""
    try:
        terms = Terms.of(facts["config"])
    except (KeyError, TypeError, pydantic.ValidationError) as error:
        raise SearchError(
            f"{folder} cannot be repaired: what it says of its search does not read: {' '.join(str(error).split())}. "
            "Nothing was changed."
        ) from None
    path = folder / f".{STUDY}.new"
    path.unlink(missing_ok=True)
    storage = optuna.storages.RDBStorage(f"sqlite:///{path.resolve()}")
    try:
        study = optuna.create_study(storage=storage, study_name=name, direction="maximize")
        for key, value in facts.items():
            study.set_user_attr(key, value)
        for number in range(1 + max(records, default=-1)):
            record = records.get(number)
            if record is None:  # its process died before there was anything to keep
                study.add_trial(create_trial(state=TrialState.FAIL, user_attrs={AGAIN: True}))
                continue
            study.enqueue_trial(dict(record.assignment))
            trial = study.ask(terms.distributions)
            trial.set_user_attr(SLOT, number if record.slot is None else record.slot)
            trial.set_user_attr(HOW, {"drawn": record.drawn, "fell_back": record.fell_back})
            trial.set_user_attr("record", record.as_dict())
            if record.promotions or record.halted:
                study.set_user_attr(promoted_key(number), record.as_dict())
            terms.settle(study, trial, record)
    finally:
        storage.remove_session()
        storage.engine.dispose()
    return path


def _kept_aside(folder: Path) -> tuple[str, ...]:
    """Copies of the old files, under names that are free."""
    number = 1
    while list(folder.glob(f"*.before-repair-{number}")):
        number += 1
    there = [name for name in (STUDY, *_BESIDE_A_STUDY, TRIALS) if (folder / name).exists()]
    for name in there:
        shutil.copy2(folder / name, folder / f"{name}.before-repair-{number}")
    return tuple(f"{name}.before-repair-{number}" for name in there)
