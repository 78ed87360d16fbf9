"""The Optuna study behind a search: asks with a seed for each trial, keeps every record, takes up what was left.

The seed of an ask depends on the search's seed and on how many asks were used up before it, and on nothing else, so a
search that was interrupted goes on as if it had not been.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from attnsurgery.errors import SearchError
from attnsurgery.samplers import AGAIN, SAMPLERS, Sampler
from attnsurgery.samplers.knapsack import best
from attnsurgery.samplers.places import Picks, Places
from attnsurgery.search.files import Journal
from attnsurgery.search.result.limits import EXACT, Budgets
from attnsurgery.search.result.record import Record, trained
from attnsurgery.search.seeds import seed_of
from attnsurgery.search.space import BoundSpace
from attnsurgery.search.storage.leases import Claimed, Sharing
from attnsurgery.search.storage.schema import (
    BEGUN,
    CLOCK,
    FACT,
    FORMAT,
    FORMAT_KEY,
    HOW,
    KNOWN,
    RECORD,
    SECONDS,
    SLOT,
    STUDY,
    TRIALS,
    Terms,
    check_format,
    facts_in,
    promoted_key,
    records_of,
    trials_of,
)
from attnsurgery.search.storage.urls import (
    check_ours,
    close,
    opened,
    storage_errors,
    study_name,
    url_of,
    without_password,
)
from attnsurgery.settings import RankBy

_STARTUP = 6
"""So many candidates are drawn uniformly before the sampler is asked: to learn from, to judge a supernet by, and as a
control."""
_STUCK = 3
"""After so many candidates in a row that taught nothing, the next one is drawn from those not seen yet."""
_EMPTY = {"duplicate", "too_many_blocks"}


@dataclass(frozen=True, slots=True)
class Asked:
    """A candidate that was asked for."""

    number: int
    """Of the trial."""
    assignment: Mapping[str, str]
    """A label for every variable."""
    slot: int
    """How many were asked for before it."""

    @classmethod
    def of(cls, trial: FrozenTrial) -> Asked | None:
        """None where the ask was not completed."""
        slot = trial.user_attrs.get(SLOT)
        return None if slot is None else cls(trial.number, {k: str(v) for k, v in trial.params.items()}, slot)


class Store:
    """The only writer of a study.

    Raises:
        UsageError: the storage URL does not read.
        SearchError: the storage cannot be opened.
    """

    def __init__(
        self,
        folder: Path,
        storage: str | BaseStorage | None,
        space: BoundSpace,
        budgets: Budgets,
        seed: int,
        sampler: str = "additive",
        rank_by: RankBy = "top1",
        lease_s: float = 60.0,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        url = storage or url_of(folder / STUDY)
        shown = url if isinstance(url, str) else type(url).__name__
        self.journal = Journal(folder / TRIALS)
        self._space = space
        self._seed = seed
        self._sampler = SAMPLERS[sampler]
        self._rank_by = rank_by
        with storage_errors(shown):
            self._opened = kept = opened(url)
            # a folder's own database holds its study, whatever the folder was called when that began
            name = folder.resolve().name if storage else study_name(kept, folder) or folder.resolve().name
            if name in optuna.get_all_study_names(kept):
                check_ours(kept, name, without_password(url) if isinstance(url, str) else shown)
            self._study = optuna.create_study(storage=kept, study_name=name, direction="maximize", load_if_exists=True)
            self._storage = self._study._storage  # with Optuna's cache of finished trials
        self._began, self._before = time.monotonic(), float(self.fixed(SECONDS) or 0.0)
        choices = {variable.name: tuple(variable.choices) for variable in space.variables}
        self._terms = Terms(choices, space.max_blocks, budgets, rank_by)
        self._distributions = self._terms.distributions
        check_format(self.fixed(FORMAT_KEY), str(folder))
        if self.fixed(FORMAT_KEY) is None:
            self.fix(FORMAT_KEY, FORMAT)
        self.sharing = Sharing(self._study, folder, lease_s) if isinstance(storage, str) else None
        """With other searches at the same study; None where it lies in the run directory, which one search has."""

    def fixed(self, key: str) -> Any:
        """Data of the whole search kept under `key`, or None."""
        return self._study.user_attrs.get(key)

    def facts(self) -> dict[str, Any]:
        """All data of the whole search."""
        return facts_in(self._study)

    @property
    def name(self) -> str:
        """Of the study."""
        return self._study.study_name

    def fix(self, key: str, value: Any) -> None:
        """Keep data of the whole search: in the study, and in the journal, from which a study can be made again."""
        self._study.set_user_attr(key, value)
        self.journal.append({FACT: key, "value": value})

    def close(self) -> None:
        """Let go of the database."""
        close(self._opened)

    def end(self, interrupted: bool) -> None:
        """Note that this run has come to its end, and not merely died."""
        self._note_time()
        self.fix("ended", "interrupted" if interrupted else "finished")
        if self.sharing:
            self.sharing.leave()

    def records(self) -> list[Record]:
        """Every finished trial, in order."""
        return records_of(self._study)

    def open(self) -> list[Asked]:
        """Trials that were asked for and have no result: somebody works on them, or died at it, or was stopped.

        Study and journal are made to agree first: a process may have died between writing to the one and to the other.
        """
        told = {record.number: record for record in self.records()}
        known = trials_of(self.journal.read())
        for number, record in known.items():
            if (record.promotions or record.halted) and told.get(number) != record:
                self._study.set_user_attr(promoted_key(number), record.as_dict())
        found: list[Asked] = []
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING)):
            asked, result = Asked.of(trial), told.get(trial.number) or known.get(trial.number)
            if self.sharing and trial.state is TrialState.RUNNING and not self.sharing.is_mine(trial):
                continue  # somebody else's, who may live
            if result is not None:
                self._settle(result)
            elif asked is None:  # its process died while it was asked for: the next ask has its seed
                self._storage.set_trial_user_attr(trial._trial_id, AGAIN, True)
                self._study.tell(trial.number, state=TrialState.FAIL)
            else:
                found.append(asked)
                if self.sharing and trial.state is TrialState.RUNNING:
                    self.sharing.lease(trial)
        for number in sorted(told.keys() - known.keys()):
            self.journal.append(told[number].as_dict())
        return found

    def slots(self) -> int:
        """How many candidates were asked for."""
        return _slots(self._study.get_trials(deepcopy=False))

    def ask(self, records: list[Record], places: Places, repeats: bool = False) -> Asked:
        """The next candidate: trial number, and a label for every variable.

        Args:
            places: the space, with what is known of its budgets by now.
            repeats: the sampler has asked for one that is being worked on: it is not asked, then.
        """
        trials = self._study.get_trials(deepcopy=False)
        going = [trial for trial in trials if not trial.state.is_finished()]
        digests = {record.digest for record in records} | {self._digest(trial.params) for trial in going}
        slot = _slots(trials)
        seed = seed_of(self._seed, slot)
        stuck = repeats or (len(records) >= _STUCK and not any(map(_teaches, records[-_STUCK:])))
        begins = slot < _STARTUP
        fresh = self._unseen(places, digests, seed) if begins or stuck else None
        base = (self.fixed("base") or {}).get("record")
        base_score = Record.from_dict(base).score_on(0, self._rank_by) if base else None
        sampler: BaseSampler = _Fixed(places, fresh) if fresh else self._sampler(places, seed, base_score)
        waiting = any(trial.state is TrialState.WAITING for trial in going)
        chosen: Mapping[str, str] | None = None
        if isinstance(sampler, Sampler) and not waiting:
            chosen = sampler.choose(self._study.direction, trials)
            if chosen and places.picks(chosen) is None:
                raise SearchError(
                    f"The sampler {type(sampler).__qualname__} chose {dict(chosen)}, which is no candidate of this "
                    "space: a choice has one label for every place (attnsurgery.samplers.Sampler)."
                )
        if isinstance(sampler, Sampler) and not (waiting or chosen or sampler.fell_back):
            # all that seems to be within the budgets was asked for: what a measurement might still find within them
            sure = replace(places, budgets={name: most for name, most in places.budgets.items() if name in EXACT})
            chosen = None if trained(records) else _fastest(places, sure, trials)
            chosen = chosen or self._unseen(sure, digests, seed)
        if chosen:
            number = self._begin(chosen, slot, self._how(sampler, begins and fresh is not None))
            return Asked(number, {name: str(chosen[name]) for name in self._distributions}, slot)
        self._study.sampler = sampler
        trial = self._study.ask(self._distributions)
        if self.sharing:
            self.sharing.lease(self._trial(trial.number))
        if (there := Asked.of(self._trial(trial.number))) is not None:
            return there  # one that was put back goes first
        trial.set_user_attr(HOW, self._how(sampler, begins and fresh is not None))
        trial.set_user_attr(SLOT, slot)
        return Asked(trial.number, {name: str(trial.params[name]) for name in self._distributions}, slot)

    def _how(self, sampler: BaseSampler, drawn: bool) -> dict[str, bool]:
        """Who chose a candidate. One that is drawn because the sampler is stuck does not count as drawn at random."""
        return {
            "drawn": getattr(self._sampler, "draws_uniformly", False) or drawn,
            "fell_back": getattr(sampler, "fell_back", False),
        }

    def _begin(self, chosen: Mapping[str, str], slot: int, how: Mapping[str, bool]) -> int:
        """A running trial with all that belongs to it, in one transaction; its number."""
        given = {SLOT: slot, HOW: dict(how)} | (self.sharing.leased() if self.sharing else {})
        trial = create_trial(
            state=TrialState.RUNNING, params=dict(chosen), distributions=self._distributions, user_attrs=given
        )
        number = self._storage.get_trial_number_from_id(
            self._storage.create_new_trial(self._study._study_id, template_trial=trial)
        )
        if self.sharing:
            self.sharing.works_on(number)
        return number

    def finish(self, record: Record) -> Record | None:
        """Write the record down twice, then tell the study; in this order nothing that was finished is lost.

        Returns:
            The record with what only the store knows: which ask it answers, and who chose it. None where another
            search has taken the trial over, for this one seemed dead to it.
        """
        trial = self._trial(record.number)
        if trial.state.is_finished():
            return None
        attributes = trial.user_attrs
        record = replace(record, slot=attributes.get(SLOT), **attributes.get(HOW, {}))
        # first where whoever takes up what this process leaves behind looks for it
        data = record.as_dict()
        self._storage.set_trial_user_attr(trial._trial_id, RECORD, data)
        self.journal.append({**data, CLOCK: self._seconds()})
        self._settle(record)
        self._note_time()
        return record

    def put_back(self, number: int) -> None:
        """Nobody works on it any more; whoever asks next takes it up."""
        if self.sharing:
            self.sharing.release(number)
        with suppress(UpdateFinishedTrialError):  # another search has taken it over
            self._storage.set_trial_state_values(self._trial(number)._trial_id, TrialState.WAITING)

    def take_up(self, number: int) -> bool:
        """Work on one that was put back, or that died with its process; False if another search was faster."""
        trial = self._trial(number)
        if trial.state is TrialState.WAITING and not self._storage.set_trial_state_values(
            trial._trial_id, TrialState.RUNNING
        ):
            return False
        if self.sharing and not trial.state.is_finished():
            self.sharing.lease(trial)
        return not trial.state.is_finished()

    def claim(self, number: int, digest: str, wanted: int) -> Claimed:
        """Whether this search may work on a trial that it has taken up, or another one is at the same, or enough are.

        Args:
            wanted: so many trained candidates are asked for.
        """
        if self.sharing is None:
            return "mine"

        def done() -> set[str | None]:
            return {record.digest for record in self.records() if record.state in KNOWN}

        return self.sharing.claim(number, digest, lambda: wanted - len(trained(self.records())), done)

    def elsewhere(self) -> int:
        """How many trials other searches work on."""
        return len(self.sharing.elsewhere()) if self.sharing else 0

    def take_over(self) -> None:
        """Settle, or put back for whoever is free, what searches that are gone have left running."""
        for trial in self.sharing.lost() if self.sharing else ():
            if RECORD in trial.user_attrs:
                with suppress(ValueError, RuntimeError):  # another one was faster
                    self._settle(Record.from_dict(trial.user_attrs[RECORD]))
            elif self.sharing:
                kept = {name: trial.user_attrs[name] for name in (SLOT, HOW, BEGUN) if name in trial.user_attrs}
                self.sharing.inherit(trial, kept if SLOT in kept else None)

    def beat(self) -> None:
        """Show that this search lives."""
        if self.sharing:
            self.sharing.beat()

    def begun(self, number: int) -> int:
        """Note that the work on a trial begins, in this run or another; how often it has been, this time counted."""
        trial = self._trial(number)
        attempt = int(trial.user_attrs.get(BEGUN, 0)) + 1
        self._storage.set_trial_user_attr(trial._trial_id, BEGUN, attempt)
        return attempt

    def promote(self, record: Record) -> None:
        """Write down what became of a trial on a higher rung; the study's trial itself is finished and stays."""
        self.journal.append({**record.as_dict(), CLOCK: self._seconds()})
        self._study.set_user_attr(promoted_key(record.number), record.as_dict())
        self._note_time()

    def _trial(self, number: int) -> FrozenTrial:
        return self._study.get_trials(deepcopy=False)[number]

    def _settle(self, record: Record) -> None:
        if self._trial(record.number).state is TrialState.WAITING:
            self.take_up(record.number)  # only what runs can be told
        frozen = self._trial(record.number)
        trial = optuna.trial.Trial(self._study, frozen._trial_id)
        if RECORD not in frozen.user_attrs:
            trial.set_user_attr(RECORD, record.as_dict())
        self._terms.settle(self._study, trial, record)
        if self.sharing:
            self.sharing.release(record.number)

    def _digest(self, params: Mapping[str, Any]) -> str:
        """Of the candidate that a running trial stands for; '' where it is not known yet."""
        if params.keys() != self._distributions.keys():
            return ""
        recipe = self._space.recipe_of(params)
        return recipe.digest() if recipe else ""

    def _seconds(self) -> float:
        """That this search has taken, over all its runs, without the loading before each of them."""
        return self._before + time.monotonic() - self._began

    def _note_time(self) -> None:
        self._study.set_user_attr(SECONDS, self._seconds())

    def _unseen(self, places: Places, digests: set[str | None], seed: int) -> dict[str, str] | None:
        """A legal candidate that was not asked for yet, drawn uniformly; None when there seems to be none."""

        def unseen(picks: Picks) -> bool:
            recipe = self._space.recipe_of(places.params(picks))
            return recipe is not None and recipe.digest() not in digests

        picks = places.drawn(np.random.default_rng(seed), unseen)
        return None if picks is None else places.params(picks)


def _fastest(places: Places, sure: Places, trials: Sequence[FrozenTrial]) -> dict[str, str] | None:
    """Of the candidates that were not asked for, the one with the lowest latency that is predicted; None if none is.

    Args:
        sure: `places` with the budgets that are known exactly.
    """
    latency = places.budgets.get("latency")
    if latency is None:
        return None
    asked = {picks for trial in trials if (picks := places.picks({k: str(v) for k, v in trial.params.items()}))}
    nothing = (0,) * len(places.choices)
    found = best(sure, [-costs for costs in latency.costs], None, list(sure.budgets.values()), {nothing, *asked})
    return None if found is None else places.params(found)


def _slots(trials: Sequence[FrozenTrial]) -> int:
    return 1 + max((trial.user_attrs.get(SLOT, -1) for trial in trials), default=-1)


def _teaches(record: Record) -> bool:
    """False of a candidate that nothing was made for: it was there before, or is known to cost too much."""
    return record.state not in _EMPTY and (record.state != "over_budget" or record.timing is not None)


class _Fixed(Sampler):
    """Chooses the candidate that it was made with."""

    def __init__(self, places: Places, assignment: Mapping[str, str]) -> None:
        super().__init__(places, seed=0)
        self._assignment = assignment

    def choose(self, direction: StudyDirection, trials: Sequence[FrozenTrial]) -> Mapping[str, str]:
        """That candidate."""
        return self._assignment
