"""Runs a search, or goes on with it: ask, measure, train what fits, tell; then confirm the winner.

Everything that is known is on the disk after each trial, so the same command goes on wherever it was stopped, and the
trials are those of a search that was never stopped.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from attnsurgery.errors import SearchError
from attnsurgery.latency import Latency, LatencyBackend
from attnsurgery.search.about import remember
from attnsurgery.search.config import SearchConfig, check_same, fixed_part
from attnsurgery.search.confirm import Confirmation, confirm
from attnsurgery.search.files import locked
from attnsurgery.search.foretell import Foreteller
from attnsurgery.search.listener import Listener
from attnsurgery.search.outcome import Outcome
from attnsurgery.search.prepare import Bench, prepare
from attnsurgery.search.record import ASKED, Promotion, Record, Timing, contenders, trained
from attnsurgery.search.rungs import SUPERNET, next_promotion, rungs_of, shares
from attnsurgery.search.scorers import Candidate
from attnsurgery.search.store import Store, same_json
from attnsurgery.search.trial import promote, run_trial, train_seed
from attnsurgery.search.watching import StopAsked, Watching

_ASKS_A_TRIAL = 10
_HOPELESS = 24
"""After so many measured candidates over the budget and none within it, there is none."""
_HOPELESS_BASE = 4
"""The same where the base alone is over the budget: blocks only add to it."""


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
        SearchError: the run directory holds another search, or is in use; or the data is no good.
        UsageError and its kin: the configuration names what does not exist or does not fit.
    """
    listener, stop = listener or Listener(), stop or (lambda: False)
    folder = Path(config.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SearchError(f"cannot make the run directory {folder}: {error.strerror}.") from None
    with locked(folder):
        bench = prepare(config, folder, listener, stop, backend)
        store = Store(folder, config.storage, bench.space, bench.budgets, config.seed, config.sampler, config.rank_by)
        search = _Search(bench, store, folder, listener, stop, command)
        outcome = search.go()
    outcome.check_feasible()
    return outcome


class _Search:
    """The state of one run; what outlives it is in the store."""

    def __init__(
        self,
        bench: Bench,
        store: Store,
        folder: Path,
        listener: Listener,
        stop: Callable[[], bool],
        command: str,
    ) -> None:
        self.bench, self.store, self.folder = bench, store, folder
        self.listener, self.stop = listener, stop
        self.config = bench.config
        self._same_search()
        store.recover()
        self.reference, self.base = self._reference()
        self.about = remember(store, bench, self.reference, command)
        known = store.fixed("latencies")
        if known is None:
            known = Foreteller.kept(bench.shelf)
            store.fix("latencies", known)
        self.foreteller = Foreteller(bench, self.reference, known)
        self.confirmation: Confirmation | None = None

    def go(self) -> Outcome:
        """The whole search; an interruption is an outcome too."""
        conditions = self.bench.backend.conditions.describe()
        self.listener.ready(conditions, self.bench.data.describe(), self.bench.space.size(), self.base)
        records = self.store.records()
        interrupted = False
        try:
            while self._goes_on(records):
                if self.stop():
                    raise StopAsked
                records = self._trial(records)
                if records[-1].state == "interrupted":
                    raise StopAsked
                self._outcome(records, interrupted=False).write(seldom=True)
            while (candidate := self._next_promotion(records)) is not None:
                records = self._promote(records, candidate)
                self._outcome(records, interrupted=False).write(seldom=True)
            self._confirm(records)
        except StopAsked:
            interrupted = True
        self.store.end(interrupted)
        outcome = self._outcome(records, interrupted)
        outcome.write()
        return outcome

    def _goes_on(self, records: list[Record]) -> bool:
        done = len(trained(records))
        asked = [record for record in records if record.state in ASKED and record.state != "too_many_blocks"]
        if done >= self.config.trials or len(asked) >= _ASKS_A_TRIAL * self.config.trials + 2 * _HOPELESS:
            return False
        known = {record.digest for record in asked if record.digest}
        if len(known) >= self.bench.space.size():
            return False
        # those over an exact budget are no measure: others are known to keep to it
        over = sum(record.state == "over_budget" and record.timing is not None for record in asked)
        base_over = max(self.bench.budgets.excess(self._fastest_base()).values(), default=0.0) > 0
        return done > 0 or over < (_HOPELESS_BASE if base_over else _HOPELESS)

    def _trial(self, records: list[Record]) -> list[Record]:
        seen = {record.digest: record for record in records if record.state in {"trained", "over_budget", "failed"}}
        seen[""] = self.base
        self.foreteller.learn(records)
        number, assignment = self.store.ask(records, self.foreteller.places())
        known = {digest: record for digest, record in seen.items() if digest is not None}
        foretold = self.foreteller.over(assignment)
        record = run_trial(self.bench, number, assignment, known, self.reference, foretold, self.listener, self.stop)
        record = self.store.finish(record)
        self.foreteller.keep(record, self.bench.shelf)
        records = [*records, record]
        self.listener.told(record, len(trained(records)), self.config.trials)
        return records

    def _next_promotion(self, records: list[Record]) -> Record | None:
        return next_promotion(
            records, len(self.bench.rungs), self.config.halving, shares(self.config), self.config.rank_by
        )

    def _promote(self, records: list[Record], candidate: Record) -> list[Record]:
        rung, of = candidate.reached + 1, len(self.bench.rungs)
        self.listener.phase(f"trial {candidate.number} on rung {rung + 1} of {of}: {rungs_of(self.config)[rung]}")
        record = promote(self.bench, candidate, self.listener, self.stop)
        self.store.promote(record)
        self.listener.promoted(record, of)
        return [record if other.number == record.number else other for other in records]

    def _fastest_base(self) -> Record:
        """The base, as fast as it may be by its interval."""
        timing = self.base.timing
        return self.base if timing is None else replace(self.base, timing=replace(timing, ms=timing.low_ms))

    def _confirm(self, records: list[Record]) -> None:
        order = contenders(records, self.config.rank_by)
        if not order:
            return
        kept = self.store.fixed("confirmation")
        before = Confirmation.from_dict(kept) if kept else None
        asked = self.config.finalists, self.config.confirm_seeds
        if before and before.answers(order, *asked) and (self.folder / "best").is_dir():
            self.confirmation = before
            return
        done = confirm(self.bench, order, self.reference, self.folder, self.listener, self.stop).after(kept)
        self.store.fix("confirmation", done.as_dict())
        self.confirmation = done

    def _same_search(self) -> None:
        now = same_json(fixed_part(self.config, self.bench.found()))
        before = self.store.fixed("config")
        if before is None:
            self.store.fix("config", now)
        else:
            check_same(before, now, str(self.folder))

    def _reference(self) -> tuple[Latency, Record]:
        """The base's own latency and score, taken once: every trial of the search is on this scale."""
        kept = self.store.fixed("base")
        if kept is None:
            self.listener.phase("measuring the base")
            kept = {"latency": asdict(self._measure_base())}
            self.store.fix("base", kept)
        reference = Latency(**kept["latency"])
        if "record" not in kept:
            kept = {**kept, "record": self._score_base(reference).as_dict()}
            self.store.fix("base", kept)
        return reference, Record.from_dict(kept["record"])

    def _measure_base(self) -> Latency:
        with self.bench.backend.carefully():
            return self.bench.backend.measure(self.bench.base)

    def _score_base(self, reference: Latency) -> Record:
        scores, watch = [], Watching(self.listener, self.stop)
        for scorer, rung in zip(self.bench.rungs, rungs_of(self.config), strict=True):
            shared = rung.evaluator == SUPERNET
            self.listener.phase(
                f"training all candidates at once: {rung}" if shared else f"training the base as each candidate: {rung}"
            )
            candidate = Candidate(copy.deepcopy(self.bench.base), self.bench.space.nothing)
            scores.append(scorer.score(candidate, train_seed(self.bench), watch))
        score = scores[0]
        half = reference.noise * reference.p50_ms
        return Record(
            number=-1,
            state="trained",
            digest="",
            timing=Timing(reference.p50_ms, reference.p50_ms - half, reference.p50_ms + half, 1.0),
            top1=score.top1,
            loss=score.loss,
            promotions=tuple(map(Promotion.of, scores[1:])),
            parameters=self.bench.costs.base["parameters"],
            macs=self.bench.costs.base["macs"],
            peak_mb=self.bench.peak_mb(self.bench.base),
            seconds=score.seconds,
            epochs=score.epochs,
            assignment=self.bench.space.nothing,
        )

    def _outcome(self, records: list[Record], interrupted: bool) -> Outcome:
        return Outcome(
            config=self.config,
            folder=self.folder,
            about=self.about,
            base=self.base,
            records=records,
            confirmation=self.confirmation,
            interrupted=interrupted,
            seconds=self.store.fixed("seconds"),
        )
