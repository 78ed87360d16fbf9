"""Runs or resumes a search: trials, promotions to higher rungs, confirmation of the winner, report.

This is the coordinator. Only it chooses candidates and records results; whatever needs a device is a job for a pool of
workers. Every result is on the disk after each job, so the same command resumes a search wherever it was stopped. With
one worker, or with several in step, the trials are those of a search that was never stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from attnsurgery.errors import SearchError, UsageError
from attnsurgery.latency import LatencyBackend
from attnsurgery.search.budgets.predict import LatencyPredictor
from attnsurgery.search.config import SearchConfig
from attnsurgery.search.coordinator.base_record import base_of, measure_base, measured_earlier
from attnsurgery.search.coordinator.confirm import confirm
from attnsurgery.search.coordinator.confirmation_jobs import ConfirmationJobs
from attnsurgery.search.coordinator.describe import remember
from attnsurgery.search.coordinator.repeat import repeat
from attnsurgery.search.coordinator.resume import open_store
from attnsurgery.search.coordinator.start import measured_early, started_pool, starting_weights_of
from attnsurgery.search.coordinator.trial_loop import WAIT_S, TrialLoop
from attnsurgery.search.execution.assemble import save_digests
from attnsurgery.search.execution.bench import Bench
from attnsurgery.search.execution.jobs import Data, Job
from attnsurgery.search.listener import Listener
from attnsurgery.search.report.write import write_outcome
from attnsurgery.search.result.confirmation import Confirmation
from attnsurgery.search.result.outcome import Outcome
from attnsurgery.search.result.promotion import next_promotion
from attnsurgery.search.result.record import Record, contenders, trained
from attnsurgery.search.result.statistics import smallest_visible_gain
from attnsurgery.search.rungs import repeats_wanted, rungs_of, shares
from attnsurgery.search.storage.facts import stored_facts
from attnsurgery.search.storage.run_directory import (
    BEST,
    CONFIG,
    CONFIRMING,
    check_free,
    mark,
    opened,
    remove_own,
    write_own,
)
from attnsurgery.search.storage.schema import REPEATS, SECONDS
from attnsurgery.search.storage.store import Store
from attnsurgery.search.storage.urls import check_url, writing_errors
from attnsurgery.search.tuning import pilot_epochs
from attnsurgery.search.watching import StopRequested
from attnsurgery.search.workers.pool import JobOutcome, WorkerPool


def run(
    config: SearchConfig,
    listener: Listener | None = None,
    stop: Callable[[], bool] | None = None,
    *,
    backend: LatencyBackend | None = None,
    command: str = "",
) -> Outcome:
    """Search until `config.trials` candidates within the budget are trained, by this run or another; confirm the best.

    Args:
        config: all settings of the search.
        listener: told what happens.
        stop: called before every batch and trial. Once it returns true, running work is abandoned and the results so
            far are written.
        backend: measures latencies instead of the backend that the configuration names, in this process.
        command: the equivalent command line, for the report.

    Returns:
        The result. It is marked as interrupted if `stop` ended the search.

    Raises:
        NothingFeasibleError: the base alone is over the budget, before anything is trained; or no candidate is within
            it, and the report is written.
        SearchError: the run directory or the study holds another search, or is in use; or the data cannot be used.
        UsageError and its subclasses: the configuration names what does not exist or does not fit; or the run directory
            holds other files.

    Example: one trial of SE on the embedded digits
        >>> config = SearchConfig(
        ...     budget_params=1_000_000, data="digits", space="se", trials=1, finalists=1, confirm_seeds=1, epochs=1,
        ...     base_epochs=1, lr=1e-3, block_lr_scale=1.0, input_size=16, workers=0, output=str(folder / "run"),
        ... )
        >>> outcome = run(config)
        >>> outcome.best.state, outcome.confirmation.seeds
        ('trained', 1)
        >>> (outcome.folder / "report.html").is_file()
        True
    """
    listener, stop = listener or Listener(), stop or (lambda: False)
    folder = Path(config.output)
    check_free(folder)
    if config.data is not None and Path(config.data).resolve() == folder.resolve():
        raise UsageError(
            f"--output {config.output} and --data {config.data} name the same folder, which would then hold the run "
            "and no images. Give another --output."
        )
    if config.storage:
        check_url(config.storage)
    pulse = _Pulse(stop)
    with opened(folder):
        facts = stored_facts(folder, config.storage)
        mark(folder)
        measured = None if facts.get("base") else measured_early(config, listener, pulse, backend)
        with writing_errors(), started_pool(config, listener, pulse, backend) as (bench, pool):
            if not measured and not facts.get("base"):
                measured = measure_base(bench, pool, suggest=backend is None)
            bench.weights = starting_weights_of(pool, bench, folder, facts, listener)
            store, changes = open_store(bench, folder, listener)
            save_digests(bench, folder)
            # `extend` holds for one run, and not for later ones that read this file
            write_own(folder, CONFIG, bench.config.model_copy(update={"extend": False}).as_yaml())
            pulse.beat = store.beat
            with closing(store):
                outcome = _Search(bench, pool, store, folder, listener, pulse, command, changes, measured).run()
    outcome.check_feasible()
    return outcome


class _Pulse:
    """The user's `stop`, which also renews the search's leases whenever it is called, and that is often."""

    def __init__(self, stop: Callable[[], bool]) -> None:
        self._stop = stop
        self.beat: Callable[[], None] = lambda: None

    def __call__(self) -> bool:
        self.beat()
        return self._stop()


class _Search:
    """The state of one run; what outlives the run is in the store.

    Args:
        bench: what trials are made on.
        pool: does the work.
        store: the study and its journal.
        folder: the run directory.
        listener: told what happens.
        stop: whether the user asked for an end.
        command: the equivalent command line, for the report.
        changes: how this run differs from the one before.
        measured: the base's latency, if it was measured before the search began.
    """

    def __init__(
        self,
        bench: Bench,
        pool: WorkerPool,
        store: Store,
        folder: Path,
        listener: Listener,
        stop: Callable[[], bool],
        command: str,
        changes: Sequence[str],
        measured: Data | None,
    ) -> None:
        self.bench, self.pool, self.store, self.folder = bench, pool, store, folder
        self.listener, self.stop = listener, stop
        self.config = bench.config
        requests, records = store.open(), store.records()
        self.references, self.base = base_of(bench, pool, store, stop, listener, measured)
        self.about = remember(store, bench, self.references, command, changes)
        latencies = measured_earlier(bench, store)
        predictor = LatencyPredictor(bench.costs, bench.places, bench.budgets, self.references, latencies)
        self.trials = TrialLoop(
            bench,
            pool,
            store,
            listener,
            stop,
            self.references,
            self.base,
            predictor,
            requests,
            records,
            on_result=lambda: self._write(seldom=True),
        )
        self.confirmation: Confirmation | None = None
        self._unwritten = ""
        """Why the report could not be written the last time."""

    def run(self) -> Outcome:
        """The whole search; an interrupted one has an outcome too."""
        conditions = "; the base: ".join(filter(None, [self.about.conditions, self.about.beside]))
        self.listener.ready(conditions, self.bench.data.describe(), self.bench.space.size(), self.base, self._power())
        interrupted = False
        try:
            self._repeats()
            self.trials.run()
            if self._leads():
                self._promotions()
                self._confirm()
        except StopRequested:
            interrupted = True
        except Exception:
            self.trials.put_back()
            raise
        self.trials.put_back()
        self.store.end(interrupted)
        self._write(interrupted)
        return self._outcome(interrupted)

    def _power(self) -> str:
        """Which gain the verdict can show, in words; '' where the metric is no share of images."""
        if self.bench.task.metric.name != "top1":
            return ""
        images, seeds = self.about.images["test"], self.config.most_seeds
        gain = smallest_visible_gain(self.base.metric_on(self.base.reached) or 0.0, images, seeds)
        trainings = f"{'up to ' * (self.config.first_seeds < seeds)}{seeds} seed{'s' if seeds > 1 else ''}"
        return (
            f"with {images:,} test images and {trainings}, the verdict can show gains of about {100 * gain:.1f} points "
            "or more; smaller ones need more images or seeds"
        )

    def _leads(self) -> bool:
        """Whether this search does the rest. Of several at one study, one does; the others wait for its result.

        Raises:
            StopRequested: the user asked for an end.
        """
        sharing = self.store.sharing
        while sharing is not None and not sharing.leads():
            self.trials.check_stop()
            if self.store.fixed("ended") == "finished" and not self.store.elsewhere():
                data = self.store.fixed("confirmation")
                self.trials.records = self.store.records()
                self.confirmation = Confirmation.from_dict(data) if data else None
                return False
            time.sleep(WAIT_S)
        self.trials.refresh()
        return True

    def _repeats(self) -> None:
        """Once enough candidates are trained, train them from a second seed, to say how reliable their ranking is.

        Searches that share a study do not. A search that has trained all its candidates has no use for it.

        Raises:
            StopRequested: the user asked for an end.
        """
        wanted = repeats_wanted(self.config)
        if not wanted or self.store.sharing is not None:
            return
        self.trials.run(until=wanted)
        if not wanted <= len(trained(self.trials.records)) < self.config.trials:
            return
        complete = repeat(self.bench, self.pool, self.store, self.trials.records, self.listener)
        self._write(seldom=True)
        if not complete:
            raise StopRequested

    def _promotions(self) -> None:
        """Train the best candidates on the higher rungs, as many as each rung takes.

        Raises:
            StopRequested: the user asked for an end.
        """
        rungs, config = len(self.bench.rungs), self.config
        running: set[int] = set()
        while True:
            while not self.stop() and self.pool.busy < self.pool.size:
                record = next_promotion(
                    self.trials.records, rungs, config.halving, shares(config), config.rank_by, frozenset(running)
                )
                if record is None:
                    break
                lane = f"{rungs_of(config)[record.reached + 1]}"
                self.listener.phase(f"trial {record.number} on rung {record.reached + 2} of {rungs}: {lane}")
                running.add(record.number)
                self.pool.give(Job("promotion", {"record": record}, record.number, training=self.bench.training()))
            if not self.pool.busy:
                break
            for outcome in self.pool.wait(WAIT_S):
                self._promoted(outcome)
                running.discard(outcome.job.trial or 0)
        self.trials.check_stop()

    def _promoted(self, outcome: JobOutcome) -> None:
        """Store the record of a trial that was trained on a higher rung."""
        if outcome.error:
            raise outcome.error
        if outcome.stopped:
            return
        if isinstance(outcome.result, Record):
            record = outcome.result
        else:
            record = replace(outcome.job.payload["record"], halted=outcome.lost)
        self.store.promote(record)
        records = self.trials.records
        self.trials.records = [record if other.number == record.number else other for other in records]
        self.listener.promoted(record, len(self.bench.rungs))
        self._write(seldom=True)

    def _confirm(self) -> None:
        """Choose the winner and compare it with the base, unless an earlier run has done that for the same finalists.

        Raises:
            StopRequested: the user asked for an end.
        """
        order = contenders(self.trials.records, self.config.rank_by)
        if not order:
            return
        data = self.store.fixed("confirmation")
        earlier = Confirmation.from_dict(data) if data else None
        seeds = self.config.first_seeds, self.config.most_seeds
        saved = self.store.sharing is not None or (self.folder / BEST).is_dir()
        if earlier and earlier.answers(order, self.config.finalists, seeds, self.config.difference / 100) and saved:
            self.confirmation = earlier
            return
        work = ConfirmationJobs(self.bench, self.pool, self.store, self.folder, self.references, self.trials.check_stop)
        pilot = pilot_epochs(len(self.bench.data.train), self.config.train_batch_size)
        tuned = self.bench.tuned
        confirmation = confirm(self.config, self.bench.budgets, order, self.references[0], work, tuned, pilot)
        confirmation = replace(confirmation.after(data), metric=self.about.metric)
        self.store.fix("confirmation", confirmation.as_dict())
        self.store.fix(CONFIRMING, None)
        remove_own(self.folder, CONFIRMING)
        self.confirmation = confirmation

    def _write(self, interrupted: bool = False, seldom: bool = False) -> None:
        """Write report and recipe. If they cannot be written, the next time may do: the trials are safe without."""
        try:
            for new_name in write_outcome(self._outcome(interrupted), seldom=seldom):
                self.listener.phase(f"kept as {new_name}: a file that this search has not written or that was changed")
        except SearchError as error:
            if not self._unwritten:
                self.listener.phase(f"the report is not written yet: {error}")
            self._unwritten = str(error)
        else:
            self._unwritten = ""

    def _outcome(self, interrupted: bool) -> Outcome:
        return Outcome(
            config=self.config,
            folder=self.folder,
            about=self.about,
            base=self.base,
            records=self.trials.records,
            confirmation=self.confirmation,
            interrupted=interrupted,
            seconds=self.store.fixed(SECONDS),
            repeats=self.store.fixed(REPEATS) or {},
            unwritten=self._unwritten,
        )
