"""What a study and its journal hold, and under which keys; and what a study is told of a trial."""

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
from attnsurgery.search.result.record import Record, State
from attnsurgery.settings import RankBy

STUDY, TRIALS = "study.db", "trials.jsonl"
"""Of a run directory."""
RECORD = "record"
"""User attribute of a trial: what became of it."""
KNOWN: frozenset[State] = frozenset({"trained", "over_budget", "failed"})
"""States of a candidate that need not be tried again."""
FACT, CLOCK = "fact", "clock"
"""Keys of the journal: a line with the first keeps data of the whole search; the second is the search's own time."""
SECONDS = "seconds"
"""Under which the study keeps that time; of a journal, its last line has it."""
FORMAT_KEY, FORMAT = "format", 1
"""Of study and journal; one that is newer is not read."""
SLOT, HOW, BEGUN = "slot", "how", "begun"
"""User attributes of a trial: which ask of the search it is, set when all of it is known; who chose it; how often work
on it was begun."""


@dataclass(frozen=True)
class Terms:
    """What a study is told by: the same for all of its trials."""

    choices: Mapping[str, Sequence[str]]
    """The labels of every variable."""
    max_blocks: int | None
    budgets: Budgets
    rank_by: RankBy

    @classmethod
    def of(cls, fixed: Mapping[str, Any]) -> Terms:
        """From what `fixed_part` has made."""
        asked = {name: fixed[name] for name in SearchConfig.model_fields if name in fixed}
        choices = fixed["choices"]
        budgets = Budgets.of(SearchConfig(**asked))
        return cls(choices["variables"], choices["max_blocks"], budgets, fixed["rank_by"])

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        return {name: CategoricalDistribution(tuple(labels)) for name, labels in self.choices.items()}

    def settle(self, study: optuna.Study, trial: optuna.trial.Trial, record: Record) -> None:
        """Tell the study what became of a trial that runs."""
        check = self.budgets.check(record)
        for name, share in check.by.items():
            trial.set_constraint(name, share)
        if self.max_blocks is not None:
            trial.set_constraint(BLOCKS, float(record.blocks - self.max_blocks))
        score = record.score_on(0, self.rank_by)
        if record.state != "too_many_blocks" and score is not None:
            study.tell(trial, score)  # also of one that is over a budget which was wider when it was trained
        elif record.state == "too_many_blocks" or not check.within:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, state=TrialState.FAIL)


def facts_of(entries: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """From the lines of a journal: data of the whole search, as of the last line of each kind."""
    return {entry[FACT]: entry["value"] for entry in entries if FACT in entry}


def facts_in(study: optuna.Study) -> dict[str, Any]:
    """Data of the whole search, from its study."""
    return {key: value for key, value in study.user_attrs.items() if not key.startswith(promoted_key(""))}


def trials_of(entries: Iterable[Mapping[str, Any]]) -> dict[int, Record]:
    """From the lines of a journal: every finished trial by its number, as of its last line."""
    return {
        entry["number"]: Record.from_dict({key: value for key, value in entry.items() if key != CLOCK})
        for entry in entries
        if FACT not in entry
    }


def is_format(value: Any) -> bool:
    """Whether a value is the mark of a study or journal of a search, of this version or another."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_format(written: int | None, where: str) -> None:
    """
    Raises:
        SearchError: another version has written it, in a way that this one does not know.
    """
    if written is not None and written > FORMAT:
        raise SearchError(
            f"{where} was written by a newer attnsurgery (format {written}, and this one knows {FORMAT}). Update "
            "attnsurgery to go on with it; nothing was changed."
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
    """Where the study keeps what became of a trial after it was told."""
    return f"promoted:{number}"


def same_json(data: Any) -> Any:
    """What `data` is after a trip through JSON, as a storage gives it back."""
    return json.loads(json.dumps(data))
