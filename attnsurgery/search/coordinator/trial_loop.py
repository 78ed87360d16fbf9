"""The trials of a search: asks for candidates, gives them to workers, and records what they return.

Several searches may work at one study. What they finish is taken in from the store, and what they leave behind when
they die is taken over.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from optuna.exceptions import UpdateFinishedTrialError

from attnsurgery.latency import Latency
from attnsurgery.search.budgets.predict import LatencyPredictor
from attnsurgery.search.execution.bench import Bench
from attnsurgery.search.execution.exhausted import any_left
from attnsurgery.search.execution.jobs import Job
from attnsurgery.search.execution.trial import outline, settle_early
from attnsurgery.search.listener import Listener
from attnsurgery.search.result.record import Record, trained
from attnsurgery.search.storage.schema import FINAL_STATES
from attnsurgery.search.storage.store import Request, Store
from attnsurgery.search.watching import StopRequested
from attnsurgery.search.workers.pool import JobOutcome, WorkerPool

WAIT_S = 1.0
"""Seconds between two looks at what other searches do."""
_MAX_ATTEMPTS = 3
"""How often a trial is begun over all runs. A trial that ends every process is itself the cause."""


class TrialLoop:
    """Runs trials until enough candidates are trained.

    Args:
        bench: what trials are made on.
        pool: does the work.
        store: the study and its journal.
        listener: told of each trial.
        stop: whether the user asked for an end.
        references: the base's latency at each input size of the space, its own first.
        base: the base's record.
        predictor: predicts the latency of candidates; it learns from each trial.
        requests: candidates that were asked for before and have no result.
        records: of the trials that are finished.
        on_result: called after each record.
    """

    def __init__(
        self,
        bench: Bench,
        pool: WorkerPool,
        store: Store,
        listener: Listener,
        stop: Callable[[], bool],
        references: Sequence[Latency],
        base: Record,
        predictor: LatencyPredictor,
        requests: list[Request],
        records: list[Record],
        on_result: Callable[[], None],
    ) -> None:
        self.bench, self.pool, self.store = bench, pool, store
        self.listener, self.stop = listener, stop
        self.config = bench.config
        self.references, self.base, self.predictor = references, base, predictor
        self.records = records
        """The records of all finished trials, in order."""
        self._on_result = on_result
        self._wanted = self.config.trials
        """Number of trained candidates to stop at."""
        self._queue: deque[Request] = deque(requests)
        """Candidates that were asked for and that no worker has."""
        self._running: dict[int, Request] = {}
        """Candidates that workers have, by trial number."""
        self._twins: list[Request] = []
        """Candidates that are equal to running ones; they get the results of those."""

    def run(self, until: int | None = None) -> None:
        """Ask, measure and train until enough candidates are trained, or there are no more.

        Args:
            until: return as soon as so many are trained and no worker is busy, although the search goes on after that;
                None for all candidates of the search. The candidates are the same either way.

        Raises:
            StopRequested: the user asked for an end.
        """
        self._wanted = self.config.trials if until is None else until
        while True:
            self.refresh()
            if not self.stop():
                self._assign()
            if self.pool.busy:
                for outcome in self.pool.wait(WAIT_S):
                    self._receive(outcome)
            elif self.stop() or self._early(until) or not self.store.elsewhere():
                break
            else:
                time.sleep(WAIT_S)
        self.check_stop()

    def refresh(self) -> None:
        """Read what other searches at this study have finished, and take over the trials of dead ones."""
        if self.store.sharing is None:
            return
        self.store.take_over()
        numbers = {record.number for record in self.records}
        self.records = self.store.records()
        for record in self.records:
            if record.number not in numbers:
                self.store.journal.append(record.as_dict())
                self.listener.trial_finished(record, len(trained(self.records)), self.config.trials)
        self._queue_twins()

    def check_stop(self) -> None:
        """Raise an exception if the user asked for an end.

        Raises:
            StopRequested: the user asked for an end.
        """
        if self.stop():
            raise StopRequested

    def put_back(self) -> None:
        """Return all unfinished trials to the study, where the next run or another search gets them."""
        for request in [*self._running.values(), *self._queue, *self._twins]:
            self.store.put_back(request.number)

    def _assign(self) -> None:
        """Give every free worker a trial, as long as more trained candidates are needed."""
        while self.pool.busy < self.pool.size and self._needed() > 0:
            for _ in range(self._due()):
                self.predictor.learn(self.records)
                if self._any_left():
                    places = self.predictor.places()
                    self._queue.append(self.store.ask(self.records, places, repeats=bool(self._twins)))
            if not self._queue:
                return
            try:
                self._begin(self._queue.popleft())
            except UpdateFinishedTrialError:  # another search took the trial over because this one seemed dead
                self.refresh()

    def _needed(self) -> int:
        """Number of candidates that are still to be trained and that no worker has."""
        return self._wanted - len(trained(self.records)) - len(self._running) - self.store.elsewhere()

    def _early(self, until: int | None) -> bool:
        """Whether enough candidates are trained for a return before the end."""
        return until is not None and len(trained(self.records)) >= until

    def _due(self) -> int:
        """Number of candidates to ask for now.

        In step, as many as there are workers, before any of them begins. So each step knows the results of all steps
        before it, and does not depend on which worker was faster.
        """
        if not self.config.in_step:
            return 0 if self._queue else 1
        if self._running or self._twins:
            return 0
        position = self.store.slots() % self.pool.size
        return self.pool.size - position if position or not self._queue else 0

    def _any_left(self) -> bool:
        """Whether there may be candidates within the budget that were not asked for."""
        return any_left(self.bench, self.base, self.records, self._unfinished(), self._any_predicted)

    def _unfinished(self) -> list[Mapping[str, str]]:
        return [request.assignment for request in [*self._queue, *self._running.values(), *self._twins]]

    def _any_predicted(self) -> bool:
        """Whether a candidate that was not asked for is predicted to be within the budgets."""
        nothing = self.bench.picks(self.bench.space.nothing)
        assignments = [*(record.assignment for record in self.records), *self._unfinished()]
        return self.predictor.any_within({nothing, *map(self.bench.picks, assignments)})

    def _begin(self, request: Request) -> None:
        """Settle a candidate that needs no work; give any other to a worker."""
        if not self.store.resume(request.number):
            return  # another search was faster
        over = self.predictor.surely_over_ms(request.assignment)
        if over is not None and not trained(self.records) and not self._any_predicted():
            over = None  # a search that ends without a result has measured, and not only predicted, that none fits
        record = outline(self.bench, request.number, request.assignment, over)
        self.listener.trial_started(request.number, record.recipe["name"] if record.recipe else "the base as it is")
        earlier = {other.digest: other for other in self.records if other.digest and other.state in FINAL_STATES}
        if (settled := settle_early(self.bench, record, {**earlier, "": self.base})) is not None:
            self._finish(settled)
        elif any(self._digest(other) == record.digest for other in self._running.values()):
            self._twins.append(request)
        elif (claim := self.store.claim(request.number, record.digest or "", self.config.trials)) != "mine":
            if claim == "twin":
                self._twins.append(request)
            else:
                self.store.put_back(request.number)
            self.refresh()
        elif (attempts := self.store.count_attempt(request.number)) > _MAX_ATTEMPTS:
            reason = f"it was begun {_MAX_ATTEMPTS} times, and the search died each time"
            self._finish(replace(record, state="failed", reason=reason, attempts=_MAX_ATTEMPTS))
        else:
            self._running[request.number] = request
            reference = self.references[self.bench.space.size_index(request.assignment)]
            payload = {"record": record, "reference": reference}
            training = self.bench.training()
            self.pool.give(Job("trial", payload, request.number, before=attempts - 1, training=training))

    def _receive(self, outcome: JobOutcome) -> None:
        """Record the result of a trial that a worker had."""
        if outcome.error:
            raise outcome.error
        assert outcome.job.trial is not None
        request = self._running.pop(outcome.job.trial)
        if outcome.stopped:
            self._queue.append(request)
            return
        attempts = outcome.job.before + outcome.job.attempt
        if isinstance(outcome.result, Record):
            record = outcome.result
        else:
            record = replace(outcome.job.payload["record"], state="failed", reason=outcome.lost)
        self._finish(replace(record, attempts=attempts))

    def _finish(self, record: Record) -> None:
        """Store the record of a trial, unless another search has taken the trial over."""
        stored = self.store.finish(record)
        self.predictor.keep(record, self.bench.at_size_of(record).latency_cache)
        if stored is None:
            self.refresh()
            return
        self.records = sorted([*self.records, stored], key=lambda other: other.number)
        self._queue_twins()
        self.listener.trial_finished(stored, len(trained(self.records)), self.config.trials)
        self._on_result()

    def _queue_twins(self) -> None:
        """Put twins back in front of the queue: the candidates that they are equal to may be finished by now."""
        self._queue.extendleft(reversed(self._twins))
        self._twins.clear()

    def _digest(self, request: Request) -> str:
        recipe = self.bench.space.recipe_for(request.assignment)
        return recipe.digest() if recipe else ""
