"""Study and journal of a run directory written anew, beside the old ones and then in their place.

The old files stay, under other names. Whoever dies in between leaves a directory that can be read: what is done here
can be done again.
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
from attnsurgery.search.files import write_whole
from attnsurgery.search.result.record import Record
from attnsurgery.search.storage.schema import (
    CLOCK,
    FACT,
    HOW,
    RECORD,
    SECONDS,
    SLOT,
    STUDY,
    TRIALS,
    Terms,
    promoted_key,
)
from attnsurgery.search.storage.urls import url_of

_BESIDE_A_STUDY = tuple(f"{STUDY}-{suffix}" for suffix in ("journal", "wal", "shm"))


def remake(
    folder: Path,
    name: str,
    terms: Terms,
    facts: Mapping[str, Any],
    records: Mapping[int, Record],
    clocks: Mapping[int, float],
    before: str,
) -> tuple[str, ...]:
    """Put a study with these trials, each under its own number, and its journal in the place of what is there.

    Args:
        name: of the study.
        terms: what the study is told the trials by.
        facts: data of the whole search.
        records: by number; one that is lacking is a trial that has failed, for its number is taken.
        clocks: the search's own time at the end of trials, s, where it is known.
        before: what the old files are kept for: 'repair' makes study.db.before-repair-1.

    Returns:
        The names of the old files.
    """
    made = _study_beside(folder, name, terms, facts, records)
    lines = [{FACT: key, "value": value} for key, value in facts.items() if key != SECONDS]
    for number in sorted(records):
        clock = {CLOCK: clocks[number]} if number in clocks else {}
        lines.append({**records[number].as_dict(), **clock})
    old = _kept_aside(folder, before)
    write_whole(folder / TRIALS, "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines))
    for beside in _BESIDE_A_STUDY:  # what SQLite keeps beside the old database is not for the new one
        (folder / beside).unlink(missing_ok=True)
    put(made, folder / STUDY)
    return old


def put(path: Path, target: Path) -> Path:
    """Give a file the name of another, which then is it or the one of before, whatever happens."""
    return path.replace(target)


def clocks_of(entries: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """From the lines of a journal: the search's own time at the end of every trial, s."""
    return {entry["number"]: float(entry[CLOCK]) for entry in entries if CLOCK in entry and "number" in entry}


def _study_beside(
    folder: Path, name: str, terms: Terms, facts: Mapping[str, Any], records: Mapping[int, Record]
) -> Path:
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
            trial.set_user_attr(HOW, {"drawn": record.drawn, "fell_back": record.fell_back})
            trial.set_user_attr(RECORD, record.as_dict())
            if record.promotions or record.halted:
                study.set_user_attr(promoted_key(number), record.as_dict())
            terms.settle(study, trial, record)
    finally:
        storage.remove_session()
        storage.engine.dispose()
    return path


def _kept_aside(folder: Path, before: str) -> tuple[str, ...]:
    """Copies of the old files, under names that are free."""
    number = 1
    while list(folder.glob(f"*.before-{before}-{number}")):
        number += 1
    there = [name for name in (STUDY, *_BESIDE_A_STUDY, TRIALS) if (folder / name).exists()]
    for name in there:
        shutil.copy2(folder / name, folder / f"{name}.before-{before}-{number}")
    return tuple(f"{name}.before-{before}-{number}" for name in there)
