"""Runs a search, or goes on with it: ask, measure, train what fits, tell; then confirm the winner.

This is the coordinator: it alone asks and tells, and whatever needs a device is a job for a pool of workers. Everything
that is known is on the disk after each job, so the same command goes on wherever it was stopped, and the trials are
those of a search that was never stopped: with one worker, or with several in step.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from optuna.exceptions import UpdateFinishedTrialError

from attnsurgery.errors import SearchError
from attnsurgery.latency import LatencyBackend
from attnsurgery.search.budgets.predict import LatencyPredictor
from attnsurgery.search.compatibility import VERSIONS
from attnsurgery.search.config import SearchConfig
from attnsurgery.search.coordinator.base_record import base_of
from attnsurgery.search.coordinator.confirm import confirm
from attnsurgery.search.coordinator.describe import remember
from attnsurgery.search.coordinator.resume import open_store
from attnsurgery.search.execution.assemble import assemble, keep_digests
from attnsurgery.search.execution.baseline import hash_of
from attnsurgery.search.execution.bench import Bench
from attnsurgery.search.execution.exhausted import any_left
from attnsurgery.search.execution.jobs import Job
from attnsurgery.search.execution.trial import at_once, outlined
from attnsurgery.search.files import locked
from attnsurgery.search.listener import Listener
from attnsurgery.search.report.write import write_outcome
from attnsurgery.search.result.confirmation import Confirmation
from attnsurgery.search.result.outcome import Outcome
from attnsurgery.search.result.promotion import next_promotion
from attnsurgery.search.result.record import Record, contenders, trained
from attnsurgery.search.rungs import rungs_of, shares
from attnsurgery.search.storage.known import known
from attnsurgery.search.storage.run_directory import (
    BEST,
    CONFIG,
    CONFIRMING,
    SUPERNET_WEIGHTS,
    WEIGHTS,
    check_free,
    mark,
    remove_own,
    set_aside,
    weights_of,
    write_own,
)
from attnsurgery.search.storage.schema import KNOWN, SECONDS
from attnsurgery.search.storage.store import Asked, Store
from attnsurgery.search.storage.urls import check_url, writing_errors
from attnsurgery.search.watching import StopAsked
from attnsurgery.search.workers.launch import LAUNCHERS
from attnsurgery.search.workers.pool import Done, InProcessPool, WorkerPool
from attnsurgery.search.workers.processes import ProcessPool

_MOST_ATTEMPTS = 3
"""A trial is begun so often, over all runs: what every process dies of is the trial's own fault."""
_WAIT_S = 1.0


def run(
    config: SearchConfig,
    listener: Listener | None = None,
    stop: Callable[[], bool] | None = None,
    *,
    backend: LatencyBackend | None = None,
    command: str = "",
) -> Outcome:
    """Search until `config.trials` candidates within the budget were trained, by this run or another; confirm the best.

    Args:
        listener: told what happens.
        stop: asked before every batch and trial; once true, what is running is given up and everything is written.
        backend: measures instead of the one that the configuration names.
        command: the command line that does the same, for the report.

    Raises:
        NothingFeasibleError: no candidate fits; the report is there.
        SearchError: the run directory or the study holds another search, or is in use; or the data is no good.
        UsageError and its kin: the configuration names what does not exist or does not fit; or the run directory holds
            files and is none.

    Example: one trial of SE on the embedded digits
        >>> config = SearchConfig(
        ...     budget_params=1_000_000, space="se", trials=1, finalists=1, confirm_seeds=1, epochs=1, base_epochs=1,
        ...     input_size=16, workers=0, output=str(folder / "run"),
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
    if config.storage:
        check_url(config.storage)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SearchError(f"cannot make the run directory {folder}: {error.strerror}.") from None
    pulse = _Pulse(stop)
    with locked(folder):
        before = known(folder, config.storage)
        mark(folder)
        with writing_errors(), _pool(config, listener, pulse, backend) as (bench, pool):
            bench.weights = _weights(pool, bench, folder, before, listener)
            store, others = open_store(bench, folder, listener)
            keep_digests(bench, folder)
            # to resume in spite of a difference is allowed for one run, and not for all that read this file
            write_own(folder, CONFIG, bench.config.model_copy(update={"extend": False}).as_yaml())
            pulse.beat = store.beat
            with closing(store):
                outcome = _Search(bench, pool, store, folder, listener, pulse, command, others).go()
    outcome.check_feasible()
    return outcome


@contextmanager
def _pool(
    config: SearchConfig, listener: Listener, stop: Callable[[], bool], backend: LatencyBackend | None
) -> Iterator[tuple[Bench, WorkerPool]]:
    """What the search decides on, and who works for it. A backend that was given is this process's own."""
    alone = config.workers == 0 or backend is not None
    launcher = LAUNCHERS[config.launcher]  # there is one of that name, before images are read
    bench = assemble(config, listener, backend, decode=alone)
    pool: WorkerPool
    if alone:
        pool = InProcessPool(bench, listener, stop)
    else:  # only now, for a launcher may hold a cluster until its pool is closed
        pool = ProcessPool(launcher(bench.config), listener, stop, versions=bench.found()[VERSIONS])
    try:
        yield bench, pool
    finally:
        pool.close()


def _weights(pool: WorkerPool, bench: Bench, folder: Path, before: Mapping[str, Any], listener: Listener) -> str:
    """The hash of the starting weights; whoever needs the weights themselves loads them where it is.

    Args:
        before: data of the search as its study had it. Weights that it does not know of are not believed.

    Raises:
        SearchError: the weights in the run directory are not those that the search was begun with.
    """
    path, begun = folder / WEIGHTS, (before.get("config") or {}).get("weights")
    if begun is None:
        _put_away(folder, WEIGHTS, listener)
    if not before.get("base"):
        _put_away(folder, SUPERNET_WEIGHTS, listener)
    if path.exists():
        if (there := hash_of(path)) != begun:
            raise SearchError(
                f"{path} does not hold the weights that the search was begun with: their hash was {begun}, and is now "
                f"{there}. Put them back, or remove the file, and they are made again; or begin another search beside "
                "this one with --new."
            )
        if not isinstance(pool, InProcessPool):
            return there
    (made,) = pool.all([Job("weights")])
    bench.fresh, bench.head = made["fresh"], made["head"]
    return str(made["weights"])


def _put_away(folder: Path, name: str, listener: Listener) -> None:
    """Leave nothing under that name: what a search has written is removed, all else is renamed."""
    remove_own(folder, name)
    if kept := set_aside(folder, name):
        listener.phase(f"{name} was not made by this search: it is not used, and kept as {kept}")


class _Pulse:
    """Whether to stop, as it was given; whoever asks, and that is often, keeps the search's leases alive."""

    def __init__(self, stop: Callable[[], bool]) -> None:
        self._stop = stop
        self.beat: Callable[[], None] = lambda: None

    def __call__(self) -> bool:
        self.beat()
        return self._stop()


class _Search:
    """The state of one run; what outlives it is in the store."""

    def __init__(
        self,
        bench: Bench,
        pool: WorkerPool,
        store: Store,
        folder: Path,
        listener: Listener,
        stop: Callable[[], bool],
        command: str,
        others: Sequence[str],
    ) -> None:
        self.bench, self.pool, self.store, self.folder = bench, pool, store, folder
        self.listener, self.stop = listener, stop
        self.config = bench.config
        self._ready: deque[Asked] = deque(store.open())
        """Asked for, and given to nobody yet."""
        self._going: dict[int, Asked] = {}
        """By trial: given to a worker."""
        self._twins: list[Asked] = []
        """The same candidates as others that are going: what becomes of those is theirs."""
        self.records = store.records()
        self.reference, self.base = base_of(bench, pool, store, stop)
        self.about = remember(store, bench, self.reference, command, others)
        known = store.fixed("latencies")
        if known is None:
            known = LatencyPredictor.kept(bench.shelf)
            store.fix("latencies", known)
        self.predictor = LatencyPredictor(bench.costs, bench.places, bench.budgets, self.reference, known)
        self.confirmation: Confirmation | None = None
        self._unwritten = ""
        """Why the report could not be written the last time."""

    def go(self) -> Outcome:
        """The whole search; an interruption is an outcome too."""
        conditions = "; the base: ".join(filter(None, [self.about.conditions, self.about.beside]))
        self.listener.ready(conditions, self.bench.data.describe(), self.bench.space.size(), self.base)
        interrupted = False
        try:
            self._trials()
            if self._leads():
                self._promotions()
                self._confirm()
        except StopAsked:
            interrupted = True
        except Exception:
            self._put_back()
            raise
        self._put_back()
        self.store.end(interrupted)
        self._write(interrupted)
        return self._outcome(interrupted)

    def _trials(self) -> None:
        """Ask, measure and train until enough candidates are trained, or there are no more."""
        while True:
            self._refresh()
            if not self.stop():
                self._hand_out()
            if self.pool.busy:
                for done in self.pool.wait(_WAIT_S):
                    self._take_in(done)
            elif self.stop() or not self.store.elsewhere():
                break
            else:
                time.sleep(_WAIT_S)
        self._go_on()

    def _refresh(self) -> None:
        """Take in what other searches have done at this study, and take over what they left."""
        if self.store.sharing is None:
            return
        self.store.take_over()
        known = {record.number for record in self.records}
        self.records = self.store.records()
        for record in self.records:
            if record.number not in known:
                self.store.journal.append(record.as_dict())
                self.listener.told(record, len(trained(self.records)), self.config.trials)
        self._ready.extendleft(reversed(self._twins))
        self._twins.clear()

    def _leads(self) -> bool:
        """True of the one search that does what is left; another one waits until that is done, or its turn comes.

        Raises:
            StopAsked: the user asked for an end.
        """
        sharing = self.store.sharing
        while sharing is not None and not sharing.leads():
            self._go_on()
            if self.store.fixed("ended") == "finished" and not self.store.elsewhere():
                kept = self.store.fixed("confirmation")
                self.records = self.store.records()
                self.confirmation = Confirmation.from_dict(kept) if kept else None
                return False
            time.sleep(_WAIT_S)
        self._refresh()
        return True

    def _hand_out(self) -> None:
        """Give every free worker a trial, as long as trials are wanted."""
        while self.pool.busy < self.pool.size and self._wanted() > 0:
            for _ in range(self._due()):
                self.predictor.learn(self.records)
                if self._more():
                    places = self.predictor.places()
                    self._ready.append(self.store.ask(self.records, places, repeats=bool(self._twins)))
            if not self._ready:
                return
            try:
                self._begin(self._ready.popleft())
            except UpdateFinishedTrialError:  # another search has taken it over, for this one seemed dead to it
                self._refresh()

    def _wanted(self) -> int:
        """How many candidates are still to be trained that nobody works on."""
        return self.config.trials - len(trained(self.records)) - len(self._going) - self.store.elsewhere()

    def _due(self) -> int:
        """How many candidates are to be asked for now.

        In step, as many as there are workers, before any of them is begun: so each step knows the results of all
        steps before it, and nothing of who was faster.
        """
        if not self.config.in_step:
            return 0 if self._ready else 1
        if self._going or self._twins:
            return 0
        begun = self.store.slots() % self.pool.size
        return self.pool.size - begun if begun or not self._ready else 0

    def _more(self) -> bool:
        """True while there may be candidates within the budget that were not asked for."""
        return any_left(self.bench, self.base, self.records, self._open_ones(), self._predicted)

    def _open_ones(self) -> list[Mapping[str, str]]:
        return [asked.assignment for asked in [*self._ready, *self._going.values(), *self._twins]]

    def _predicted(self) -> bool:
        """Whether a candidate that was not asked for may be within the budgets by what is known of latencies."""
        nothing = self.bench.picks(self.bench.space.nothing)
        asked = [*(record.assignment for record in self.records), *self._open_ones()]
        return self.predictor.any_within({nothing, *map(self.bench.picks, asked)})

    def _begin(self, asked: Asked) -> None:
        """Settle what needs no work; give the rest to a worker."""
        if not self.store.take_up(asked.number):
            return  # another search was faster
        over = self.predictor.surely_over_ms(asked.assignment)
        if over is not None and not trained(self.records) and not self._predicted():
            over = None  # a search that ends without a result has measured, and not merely predicted, that none fits
        record = outlined(self.bench, asked.number, asked.assignment, over)
        self.listener.asked(asked.number, record.recipe["name"] if record.recipe else "the base as it is")
        seen = {known.digest: known for known in self.records if known.digest and known.state in KNOWN}
        if (settled := at_once(self.bench, record, {**seen, "": self.base})) is not None:
            self._told(settled)
        elif any(self._digest(other) == record.digest for other in self._going.values()):
            self._twins.append(asked)
        elif (claimed := self.store.claim(asked.number, record.digest or "", self.config.trials)) != "mine":
            if claimed == "twin":
                self._twins.append(asked)
            else:
                self.store.put_back(asked.number)
            self._refresh()
        elif (attempts := self.store.begun(asked.number)) > _MOST_ATTEMPTS:
            reason = f"it was begun {_MOST_ATTEMPTS} times, and the search died each time"
            self._told(replace(record, state="failed", reason=reason, attempts=_MOST_ATTEMPTS))
        else:
            self._going[asked.number] = asked
            given = {"record": record, "reference": self.reference}
            self.pool.give(Job("trial", given, trial=asked.number, before=attempts - 1))

    def _take_in(self, done: Done) -> None:
        """What became of a trial that was given to a worker."""
        if done.error:
            raise done.error
        assert done.job.trial is not None
        asked = self._going.pop(done.job.trial)
        if done.stopped:
            self._ready.append(asked)
            return
        attempts = done.job.before + done.job.attempt
        if isinstance(done.result, Record):
            record = done.result
        else:
            record = replace(done.job.given["record"], state="failed", reason=done.lost)
        self._told(replace(record, attempts=attempts))

    def _told(self, record: Record) -> None:
        finished = self.store.finish(record)
        self.predictor.keep(record, self.bench.shelf)
        if finished is None:
            self._refresh()
            return
        record = finished
        self.records = sorted([*self.records, record], key=lambda one: one.number)
        self._ready.extendleft(reversed(self._twins))
        self._twins.clear()
        self.listener.told(record, len(trained(self.records)), self.config.trials)
        self._write(seldom=True)

    def _put_back(self) -> None:
        """Whoever goes on takes up what nobody works on now."""
        for asked in [*self._going.values(), *self._ready, *self._twins]:
            self.store.put_back(asked.number)

    def _digest(self, asked: Asked) -> str:
        recipe = self.bench.space.recipe_of(asked.assignment)
        return recipe.digest() if recipe else ""

    def _promotions(self) -> None:
        """Train the best on the rungs above, as far as each rung has room."""
        rungs, config = len(self.bench.rungs), self.config
        going: set[int] = set()
        while True:
            while not self.stop() and self.pool.busy < self.pool.size:
                found = next_promotion(
                    self.records, rungs, config.halving, shares(config), config.rank_by, frozenset(going)
                )
                if found is None:
                    break
                lane = f"{rungs_of(config)[found.reached + 1]}"
                self.listener.phase(f"trial {found.number} on rung {found.reached + 2} of {rungs}: {lane}")
                going.add(found.number)
                self.pool.give(Job("promotion", {"record": found}, trial=found.number))
            if not self.pool.busy:
                break
            for done in self.pool.wait(_WAIT_S):
                self._promoted(done)
                going.discard(done.job.trial or 0)
        self._go_on()

    def _promoted(self, done: Done) -> None:
        if done.error:
            raise done.error
        if done.stopped:
            return
        record = done.result if isinstance(done.result, Record) else replace(done.job.given["record"], halted=done.lost)
        self.store.promote(record)
        self.records = [record if other.number == record.number else other for other in self.records]
        self.listener.promoted(record, len(self.bench.rungs))
        self._write(seldom=True)

    def _go_on(self) -> None:
        """
        Raises:
            StopAsked: the user asked for an end.
        """
        if self.stop():
            raise StopAsked

    def _confirm(self) -> None:
        order = contenders(self.records, self.config.rank_by)
        if not order:
            return
        kept = self.store.fixed("confirmation")
        before = Confirmation.from_dict(kept) if kept else None
        asked = self.config.finalists, self.config.confirm_seeds
        there = self.store.sharing is not None or (self.folder / BEST).is_dir()
        if before and before.answers(order, *asked) and there:
            self.confirmation = before
            return
        done = confirm(self.config, self.bench.budgets, order, self.reference, self._work).after(kept)
        self.store.fix("confirmation", done.as_dict())
        self.store.fix(CONFIRMING, None)
        remove_own(self.folder, CONFIRMING)
        self.confirmation = done

    def _work(self, kind: str, *given: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Have jobs of the confirmation done, each once: what an earlier run has come to is kept."""
        known: dict[str, Any] = self.store.fixed(CONFIRMING) or {}
        keys = [_key(kind, one) for one in given]
        lacking = [at for at, key in enumerate(keys) if not self._kept(known.get(key), given[at])]

        def keep(at: int, result: Mapping[str, Any]) -> None:
            known[keys[lacking[at]]] = result
            self.store.fix(CONFIRMING, known)

        self._go_on()
        self.pool.all([Job(kind, given[at], trial=(given[at]["record"] or {}).get("number")) for at in lacking], keep)
        return [known[key] for key in keys]

    def _kept(self, result: Mapping[str, Any] | None, given: Mapping[str, Any]) -> bool:
        """Whether an earlier run has done a job, and the weights are there that it has left."""
        if result is None or "failed" in result or "verdict" in result:
            return False
        if "weights" not in result:
            return True
        path = self.folder / weights_of(given["record"], given["index"])
        return path.is_file() and hash_of(path) == result["weights"]

    def _write(self, interrupted: bool = False, seldom: bool = False) -> None:
        """Write report and recipe; where that cannot be, they wait, for the trials are safe without them."""
        try:
            for kept in write_outcome(self._outcome(interrupted), seldom=seldom):
                self.listener.phase(f"kept as {kept}: what stood there, and is not as this search has written it")
        except SearchError as error:
            if not self._unwritten:
                self.listener.phase(f"the report waits: {error}")
            self._unwritten = str(error)
        else:
            self._unwritten = ""

    def _outcome(self, interrupted: bool) -> Outcome:
        return Outcome(
            config=self.config,
            folder=self.folder,
            about=self.about,
            base=self.base,
            records=self.records,
            confirmation=self.confirmation,
            interrupted=interrupted,
            seconds=self.store.fixed(SECONDS),
            unwritten=self._unwritten,
        )


def _key(kind: str, given: Mapping[str, Any]) -> str:
    """What tells a job of the confirmation from others."""
    digest = given["record"]["digest"] if given["record"] else "base"
    return ":".join([kind, digest, *([str(given["index"])] if "index" in given else [])])
