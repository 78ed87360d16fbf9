"""Rebuilds study and journal of a run directory beside the old ones, then puts them in their place.

The old files stay under other names. A process that dies in between leaves a readable directory, and the rebuild can be
repeated.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState, create_trial

from attnsurgery.samplers import AGAIN
from attnsurgery.search.files import write_atomically
from attnsurgery.search.result.record import Record
from attnsurgery.search.storage.schema import (
    CLOCK,
    FACT,
    ORIGIN,
    RECORD,
    SECONDS,
    SLOT,
    STUDY,
    TRIALS,
    Terms,
    promoted_key,
)
from attnsurgery.search.storage.urls import url_of

_COMPANIONS = tuple(f"{STUDY}-{suffix}" for suffix in ("journal", "wal", "shm"))
"""Files that SQLite keeps beside a database."""


def rebuild(
    folder: Path,
    name: str,
    terms: Terms,
    facts: Mapping[str, Any],
    records: Mapping[int, Record],
    clocks: Mapping[int, float],
    before: str,
) -> tuple[str, ...]:
    """Replace study and journal by new ones with these trials, each under its own number.

    Args:
        folder: the run directory.
        name: of the study.
        terms: how the study is told the trials.
        facts: data of the whole search.
        records: of trials by number. A missing number becomes a failed trial, because numbers cannot be skipped.
        clocks: the search time at the end of trials where it is known, in s, by trial number.
        before: the reason, for the names of the old files: 'repair' makes study.db.before-repair-1.

    Returns:
        The new names of the old files.
    """
    new_study = _build_study(folder, name, terms, facts, records)
    lines = [{FACT: key, "value": value} for key, value in facts.items() if key != SECONDS]
    for number in sorted(records):
        clock = {CLOCK: clocks[number]} if number in clocks else {}
        lines.append({**records[number].as_dict(), **clock})
    old = _copy_old_files(folder, before)
    write_atomically(folder / TRIALS, "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines))
    for companion in _COMPANIONS:  # SQLite's files of the old database do not belong to the new one
        (folder / companion).unlink(missing_ok=True)
    replace_file(new_study, folder / STUDY)
    return old


def replace_file(path: Path, target: Path) -> Path:
    """Replace one file by another in one step: a reader sees the old file or the new one."""
    return path.replace(target)


def clocks_of(entries: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """The search time at the end of every trial, in s, by trial number, from the lines of a journal."""
    return {entry["number"]: float(entry[CLOCK]) for entry in entries if CLOCK in entry and "number" in entry}


def _build_study(
    folder: Path, name: str, terms: Terms, facts: Mapping[str, Any], records: Mapping[int, Record]
) -> Path:
    """A new database in the run directory with the study; its path."""
    path = folder / f".{STUDY}.new"
    path.unlink(missing_ok=True)
    storage = optuna.storages.RDBStorage(url_of(path))
    try:
        study = optuna.create_study(storage=storage, study_name=name, direction="maximize")
        for key, value in facts.items():
            study.set_user_attr(key, value)
        for number in range(1 + max(records, default=-1)):
            record = records.get(number)
            if record is None:
                study.add_trial(create_trial(state=TrialState.FAIL, user_attrs={AGAIN: True}))
                continue
            study.enqueue_trial(dict(record.assignment))
            trial = study.ask(terms.distributions)
            trial.set_user_attr(SLOT, number if record.slot is None else record.slot)
            trial.set_user_attr(ORIGIN, {"drawn": record.drawn, "fell_back": record.fell_back})
            trial.set_user_attr(RECORD, record.as_dict())
            if record.promotions or record.halted:
                study.set_user_attr(promoted_key(number), record.as_dict())
            terms.settle(study, trial, record)
    finally:
        storage.remove_session()
        storage.engine.dispose()
    return path


def _copy_old_files(folder: Path, before: str) -> tuple[str, ...]:
    """Copy the old files to free names, which are returned."""
    number = 1
    while list(folder.glob(f"*.before-{before}-{number}")):
        number += 1
    names = [name for name in (STUDY, *_COMPANIONS, TRIALS) if (folder / name).exists()]
    for name in names:
        shutil.copy2(folder / name, folder / f"{name}.before-{before}-{number}")
    return tuple(f"{name}.before-{before}-{number}" for name in names)
