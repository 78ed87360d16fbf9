"""The Optuna study of a search: asks for candidates, stores every record, resumes unfinished trials.

Each choice of a candidate has a seed that depends only on the search's seed and on the number of choices before it. So
a search that was interrupted continues as if it had not been.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from attnsurgery.samplers import AGAIN, SAMPLERS
from attnsurgery.samplers.places import Places
from attnsurgery.search.files import Journal
from attnsurgery.search.result.limits import Budgets
from attnsurgery.search.result.older import renamed
from attnsurgery.search.result.record import Record, trained
from attnsurgery.search.seeds import seed_of
from attnsurgery.search.space import BoundSpace
from attnsurgery.search.storage.leases import Claimed, Sharing
from attnsurgery.search.storage.propose import next_slot, propose
from attnsurgery.search.storage.schema import (
    ATTEMPTS,
    CLOCK,
    FACT,
    FINAL_STATES,
    FORMAT,
    FORMAT_KEY,
    ORIGIN,
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
    open_storage,
    storage_errors,
    study_name,
    url_of,
    without_password,
)
from attnsurgery.settings import RankBy


@dataclass(frozen=True, slots=True)
class Request:
    """A candidate that was asked for, as a trial of the study."""

    number: int
    """The trial's number."""
    assignment: Mapping[str, str]
    """A label for every variable."""
    slot: int
    """How many candidates were asked for before it."""

    @classmethod
    def of(cls, trial: FrozenTrial) -> Request | None:
        """The request of a trial; None if its process ended before the candidate was complete."""
        slot = trial.user_attrs.get(SLOT)
        return None if slot is None else cls(trial.number, {k: str(v) for k, v in trial.params.items()}, slot)


class Store:
    """The only writer of a study.

    Args:
        folder: the run directory, which holds the journal.
        storage: URL of the study or an Optuna storage; None for a SQLite file in the run directory.
        space: the space for the model.
        budgets: limits that the study's constraints are relative to.
        seed: of the search.
        sampler: a name of `SAMPLERS`.
        rank_by: the score that the study is told.
        lease_s: seconds after which another search takes over a lease that was not renewed.

    Raises:
        UsageError: the storage URL cannot be parsed.
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
        rank_by: RankBy = "metric",
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
            self._opened = database = open_storage(url)
            # the database of a run directory holds one study, whatever the folder was called when it was created
            name = folder.resolve().name if storage else study_name(database, folder) or folder.resolve().name
            if name in optuna.get_all_study_names(database):
                check_ours(database, name, without_password(url) if isinstance(url, str) else shown)
            self._study = optuna.create_study(
                storage=database, study_name=name, direction="maximize", load_if_exists=True
            )
            self._storage = self._study._storage  # with Optuna's cache of finished trials
        self._start, self._earlier_s = time.monotonic(), float(self.fixed(SECONDS) or 0.0)
        self._terms = Terms(space.places.choices, space.max_blocks, budgets, rank_by)
        self._distributions = self._terms.distributions
        check_format(self.fixed(FORMAT_KEY), str(folder))
        if self.fixed(FORMAT_KEY) is None:
            self.fix(FORMAT_KEY, FORMAT)
        self.sharing = Sharing(self._study, folder, lease_s) if isinstance(storage, str) else None
        """Coordinates several searches at one study; None if the study is in the run directory of one search."""

    def fixed(self, key: str) -> Any:
        """Data of the whole search under a key, or None."""
        return renamed(self._study.user_attrs.get(key))

    def facts(self) -> dict[str, Any]:
        """All data of the whole search."""
        return facts_in(self._study)

    @property
    def name(self) -> str:
        """The study's name."""
        return self._study.study_name

    def fix(self, key: str, value: Any) -> None:
        """Write data of the whole search to the study and to the journal, from which a study can be rebuilt."""
        self._study.set_user_attr(key, value)
        self.journal.append({FACT: key, "value": value})

    def close(self) -> None:
        """Close the database."""
        close(self._opened)

    def end(self, interrupted: bool) -> None:
        """Record that this run ended by itself: a process that dies leaves no such note."""
        self._note_time()
        self.fix("ended", "interrupted" if interrupted else "finished")
        if self.sharing:
            self.sharing.leave()

    def records(self) -> list[Record]:
        """Every finished trial, in order."""
        return records_of(self._study)

    def open(self) -> list[Request]:
        """Trials without a result that this search may work on: their process ended, or the search was stopped.

        Study and journal are made to agree first, because a process may have died between writing to the two.
        """
        in_study = {record.number: record for record in self.records()}
        in_journal = trials_of(self.journal.read())
        for number, record in in_journal.items():
            if (record.promotions or record.halted) and in_study.get(number) != record:
                self._study.set_user_attr(promoted_key(number), record.as_dict())
        requests: list[Request] = []
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING)):
            request, result = Request.of(trial), in_study.get(trial.number) or in_journal.get(trial.number)
            if self.sharing and trial.state is TrialState.RUNNING and not self.sharing.is_mine(trial):
                continue  # another search may be working on it
            if result is not None:
                self._settle(result)
            elif request is None:  # its process died before the candidate was complete: the next one has its seed
                self._storage.set_trial_user_attr(trial._trial_id, AGAIN, True)
                self._study.tell(trial.number, state=TrialState.FAIL)
            else:
                requests.append(request)
                if self.sharing and trial.state is TrialState.RUNNING:
                    self.sharing.lease(trial)
        for number in sorted(in_study.keys() - in_journal.keys()):
            self.journal.append(in_study[number].as_dict())
        return requests

    def slots(self) -> int:
        """How many candidates were asked for."""
        return next_slot(self._study.get_trials(deepcopy=False))

    def ask(self, records: list[Record], places: Places, repeats: bool = False) -> Request:
        """The next candidate: trial number, and a label for every variable.

        Args:
            records: all finished trials.
            places: the space, with the budgets that are known or predicted by now.
            repeats: the last candidate is being worked on already, so the sampler would repeat itself; the next one is
                drawn at random.

        Raises:
            SearchError: the sampler chose what is no candidate of the space.
        """
        trials = self._study.get_trials(deepcopy=False)
        slot = next_slot(trials)
        base = (self.fixed("base") or {}).get("record")
        proposal = propose(
            self._sampler,
            self._study.direction,
            self._space,
            places,
            records,
            trials,
            slot,
            seed_of(self._seed, slot),
            base_score=Record.from_dict(base).score_on(0, self._rank_by) if base else None,
            repeats=repeats,
        )
        if proposal.assignment:
            number = self._begin(proposal.assignment, slot, proposal.origin)
            return Request(number, {name: str(proposal.assignment[name]) for name in self._distributions}, slot)
        self._study.sampler = proposal.sampler
        trial = self._study.ask(self._distributions)
        if self.sharing:
            self.sharing.lease(self._trial(trial.number))
        if (requeued := Request.of(self._trial(trial.number))) is not None:
            return requeued  # a trial that was put back goes first
        trial.set_user_attr(ORIGIN, proposal.origin)
        trial.set_user_attr(SLOT, slot)
        return Request(trial.number, {name: str(trial.params[name]) for name in self._distributions}, slot)

    def _begin(self, assignment: Mapping[str, str], slot: int, origin: Mapping[str, bool]) -> int:
        """Create a running trial with all its attributes, in one transaction; return its number."""
        attributes = {SLOT: slot, ORIGIN: dict(origin)} | (self.sharing.leased() if self.sharing else {})
        trial = create_trial(
            state=TrialState.RUNNING,
            params=dict(assignment),
            distributions=self._distributions,
            user_attrs=attributes,
        )
        number = self._storage.get_trial_number_from_id(
            self._storage.create_new_trial(self._study._study_id, template_trial=trial)
        )
        if self.sharing:
            self.sharing.works_on(number)
        return number

    def finish(self, record: Record) -> Record | None:
        """Write the record to the study's trial and to the journal, then finish the trial; this order loses nothing.

        Returns:
            The record with its slot and with who chose it. None if another search has taken over the trial because
            this one seemed dead.
        """
        trial = self._trial(record.number)
        if trial.state.is_finished():
            return None
        attributes = trial.user_attrs
        record = replace(record, slot=attributes.get(SLOT), **attributes.get(ORIGIN, {}))
        # to the trial first: a search that takes over from this one looks for the record there
        data = record.as_dict()
        self._storage.set_trial_user_attr(trial._trial_id, RECORD, data)
        self.journal.append({**data, CLOCK: self._seconds()})
        self._settle(record)
        self._note_time()
        return record

    def put_back(self, number: int) -> None:
        """Stop working on a trial; the next search that asks for a candidate gets it."""
        if self.sharing:
            self.sharing.release(number)
        with suppress(UpdateFinishedTrialError):  # another search has taken it over
            self._storage.set_trial_state_values(self._trial(number)._trial_id, TrialState.WAITING)

    def resume(self, number: int) -> bool:
        """Work on a trial that was put back or whose process died; False if another search was faster."""
        trial = self._trial(number)
        if trial.state is TrialState.WAITING and not self._storage.set_trial_state_values(
            trial._trial_id, TrialState.RUNNING
        ):
            return False
        if self.sharing and not trial.state.is_finished():
            self.sharing.lease(trial)
        return not trial.state.is_finished()

    def claim(self, number: int, digest: str, total: int) -> Claimed:
        """Whether this search may work on a trial that it has resumed.

        Args:
            number: of the trial.
            digest: of its candidate.
            total: how many trained candidates the search is to have.

        Returns:
            "mine"; or "twin" if another search has the same candidate, or "full" if no more candidates are needed.
        """
        if self.sharing is None:
            return "mine"

        def finished() -> set[str | None]:
            return {record.digest for record in self.records() if record.state in FINAL_STATES}

        return self.sharing.claim(number, digest, lambda: total - len(trained(self.records())), finished)

    def elsewhere(self) -> int:
        """How many trials other searches are working on."""
        return len(self.sharing.elsewhere()) if self.sharing else 0

    def take_over(self) -> None:
        """Finish, or put back for any free worker, the running trials of searches that have died."""
        for trial in self.sharing.lost() if self.sharing else ():
            if RECORD in trial.user_attrs:
                with suppress(ValueError, RuntimeError):  # another search was faster
                    self._settle(Record.from_dict(trial.user_attrs[RECORD]))
            elif self.sharing:
                attributes = {
                    name: trial.user_attrs[name] for name in (SLOT, ORIGIN, ATTEMPTS) if name in trial.user_attrs
                }
                self.sharing.inherit(trial, attributes if SLOT in attributes else None)

    def beat(self) -> None:
        """Renew the leases of this search."""
        if self.sharing:
            self.sharing.beat()

    def count_attempt(self, number: int) -> int:
        """Record that work on a trial begins; return how often it has begun over all runs, this time included."""
        trial = self._trial(number)
        attempt = int(trial.user_attrs.get(ATTEMPTS, 0)) + 1
        self._storage.set_trial_user_attr(trial._trial_id, ATTEMPTS, attempt)
        return attempt

    def promote(self, record: Record) -> None:
        """Write the record of a trial after a higher rung; the study's trial itself is finished and stays as it is."""
        self.journal.append({**record.as_dict(), CLOCK: self._seconds()})
        self._study.set_user_attr(promoted_key(record.number), record.as_dict())
        self._note_time()

    def _trial(self, number: int) -> FrozenTrial:
        return self._study.get_trials(deepcopy=False)[number]

    def _settle(self, record: Record) -> None:
        if self._trial(record.number).state is TrialState.WAITING:
            self.resume(record.number)  # Optuna finishes only running trials
        frozen = self._trial(record.number)
        trial = optuna.trial.Trial(self._study, frozen._trial_id)
        if RECORD not in frozen.user_attrs:
            trial.set_user_attr(RECORD, record.as_dict())
        self._terms.settle(self._study, trial, record)
        if self.sharing:
            self.sharing.release(record.number)

    def _seconds(self) -> float:
        """Seconds that this search has taken over all its runs, without loading data and models."""
        return self._earlier_s + time.monotonic() - self._start

    def _note_time(self) -> None:
        self._study.set_user_attr(SECONDS, self._seconds())
