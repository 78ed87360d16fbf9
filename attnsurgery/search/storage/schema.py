"""The data model of study and journal: keys, formats, and how a finished trial is reported to the study."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import TrialState

from attnsurgery.errors import SearchError
from attnsurgery.samplers import BLOCKS
from attnsurgery.search.config import SearchConfig
from attnsurgery.search.result.limits import Budgets
from attnsurgery.search.result.older import renamed
from attnsurgery.search.result.record import Record, State
from attnsurgery.settings import RankBy

STUDY, TRIALS = "study.db", "trials.jsonl"
"""Files of a run directory: the study, and its journal."""
RECORD = "record"
"""User attribute of a trial: its record."""
FINAL_STATES: frozenset[State] = frozenset({"trained", "over_budget", "failed"})
"""States of a candidate that is not tried again."""
FACT, CLOCK = "fact", "clock"
"""Keys of the journal. A line with the first holds data of the whole search; the second is the search time, in s."""
SECONDS = "seconds"
"""User attribute of the study: the search time, in s. In the journal, the last trial has it as its clock."""
REPEATS = "repeats"
"""User attribute of the study: by digest, the candidates that were trained from a second seed, with both scores."""
FORMAT_KEY, FORMAT = "format", 1
"""The key of the format version in study and journal, and the version; newer versions are not read."""
SLOT, ORIGIN, ATTEMPTS = "slot", "how", "begun"
"""User attributes of a trial: how many candidates were asked for before it, set once its candidate is complete; who
chose it; how often work on it has begun."""


@dataclass(frozen=True)
class Terms:
    """What decides how a trial is reported to its study; the same for all trials of a study."""

    choices: Mapping[str, Sequence[str]]
    """The labels of every variable of the space."""
    max_blocks: int | None
    """Maximum number of blocks in one candidate."""
    budgets: Budgets
    """The limits that the study's constraints are relative to."""
    rank_by: RankBy
    """The score that is the value of a trial."""

    @classmethod
    def of(cls, fixed: Mapping[str, Any]) -> Terms:
        """The terms of a search from its settings as `fixed_part` stores them."""
        settings = {name: fixed[name] for name in SearchConfig.model_fields if name in fixed}
        choices = fixed["choices"]
        budgets = Budgets.of(SearchConfig(**settings))
        return cls(choices["variables"], choices["max_blocks"], budgets, fixed["rank_by"])

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        return {name: CategoricalDistribution(tuple(labels)) for name, labels in self.choices.items()}

    def settle(self, study: optuna.Study, trial: optuna.trial.Trial, record: Record) -> None:
        """Finish a running trial of the study with the result in its record."""
        check = self.budgets.check(record)
        for name, share in check.by.items():
            trial.set_constraint(name, share)
        if self.max_blocks is not None:
            trial.set_constraint(BLOCKS, float(record.blocks - self.max_blocks))
        score = record.score_on(0, self.rank_by)
        if record.state != "too_many_blocks" and score is not None:
            study.tell(trial, score)  # also if it is over a budget now, but was trained when the budget was wider
        elif record.state == "too_many_blocks" or not check.within:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, state=TrialState.FAIL)


def facts_of(entries: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Data of the whole search from the lines of a journal; the last line of each key holds."""
    return {entry[FACT]: renamed(entry["value"]) for entry in entries if FACT in entry}


def facts_in(study: optuna.Study) -> dict[str, Any]:
    """Data of the whole search, from its study."""
    return {key: renamed(value) for key, value in study.user_attrs.items() if not key.startswith(promoted_key(""))}


def trials_of(entries: Iterable[Mapping[str, Any]]) -> dict[int, Record]:
    """Every finished trial by its number, from the lines of a journal; the last line of each trial holds."""
    return {
        entry["number"]: Record.from_dict({key: value for key, value in entry.items() if key != CLOCK})
        for entry in entries
        if FACT not in entry
    }


def is_format(value: Any) -> bool:
    """Whether a value is a format version of a search's study or journal, of this or another version."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_format(version: int | None, location: str) -> None:
    """Refuse a format that a newer version has written.

    Args:
        version: of the format; None if there is none yet.
        location: of the study, for the message.

    Raises:
        SearchError: the format is newer than this version knows.
    """
    if version is not None and version > FORMAT:
        raise SearchError(
            f"{location} was written by a newer attnsurgery (format {version}, and this one knows {FORMAT}). Update "
            "attnsurgery to resume it; nothing was changed."
        )


def records_of(study: optuna.Study) -> list[Record]:
    """Every finished trial of a study, in order."""
    later = study.user_attrs
    return [
        Record.from_dict(later.get(promoted_key(trial.number), trial.user_attrs[RECORD]))
        for trial in study.get_trials(deepcopy=False)
        if RECORD in trial.user_attrs
    ]


def promoted_key(number: int | str) -> str:
    """The study's key for the record of a trial that was changed after the trial was finished."""
    return f"promoted:{number}"


def same_json(data: Any) -> Any:
    """Data as a storage returns it: converted to JSON and back."""
    return json.loads(json.dumps(data))
