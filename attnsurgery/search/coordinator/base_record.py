"""The base's latency and scores, which are measured once and are the reference of every trial."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from attnsurgery.errors import SearchError
from attnsurgery.latency import Latency
from attnsurgery.search.budgets.predict import LatencyPredictor
from attnsurgery.search.coordinator.tune import tune
from attnsurgery.search.execution.baseline import timing_of
from attnsurgery.search.execution.bench import Bench
from attnsurgery.search.execution.jobs import Data, Job
from attnsurgery.search.execution.over_budget import BaseFacts, refuse_over_budget
from attnsurgery.search.execution.what_fits import Alternative
from attnsurgery.search.listener import Listener
from attnsurgery.search.result.record import Promotion, Record
from attnsurgery.search.storage.store import Store
from attnsurgery.search.tuning import Tuned
from attnsurgery.search.watching import StopRequested
from attnsurgery.search.workers.pool import WorkerPool

_WAIT_S = 1.0


def measure_base(bench: Bench, pool: WorkerPool, *, suggest: bool) -> Data:
    """Measure the base before anything is trained, for `base_of`.

    Args:
        bench: what trials are made on.
        pool: does the work.
        suggest: where the base is over a budget, measure what would fit.

    Raises:
        NothingFeasibleError: the base alone is over a budget.
        StopRequested: the user asked for an end.
    """
    facts = _with_sizes(pool.all([Job("base latency")])[0], bench, pool)
    reference = Latency(**facts["latency"])

    def alternatives() -> list[Alternative]:
        try:
            (result,) = pool.all([Job("what fits", {"reference": reference})])
        except SearchError:  # every worker was lost: what is known of the base is reported without it
            return []
        return [Alternative(**other) for other in result["tried"]]

    others = _at_other_sizes(facts, bench)
    refuse_over_budget(bench, BaseFacts.of(facts), alternatives if suggest else None, others)
    return facts


def _at_other_sizes(facts: Data, bench: Bench) -> list[BaseFacts]:
    """What was measured of the base at the other input sizes of the space."""
    return [BaseFacts.of(facts["sizes"][label]) for label in bench.space.sizes[1:]]


def _with_sizes(facts: Data, bench: Bench, pool: WorkerPool) -> Data:
    """What was measured of the base, with all input sizes of the space; measures those that are missing."""
    measured = facts.get("sizes", {})
    missing = [label for label in bench.space.sizes[1:] if label not in measured]
    if not missing:
        return facts
    reference = Latency(**facts["latency"])
    results = pool.all([Job("base latency", {"size": label, "reference": reference}) for label in missing])
    return {**facts, "sizes": {**measured, **dict(zip(missing, results, strict=True))}}


def base_of(
    bench: Bench,
    pool: WorkerPool,
    store: Store,
    stop: Callable[[], bool],
    listener: Listener,
    measured: Data | None = None,
) -> tuple[list[Latency], Record]:
    """The base's latency at each input size and its record, from the store.

    What is missing is measured by one of the searches at the study.

    Args:
        bench: what trials are made on.
        pool: does the work.
        store: the study and its journal.
        stop: whether the user asked for an end.
        listener: told of progress.
        measured: what `measure_base` returned; it is stored if the study does not have the base's latency.

    Raises:
        StopRequested: the user asked for an end.
    """
    facts = _wait_for_others(store, stop)
    if facts is None:
        facts = measured or pool.all([Job("base latency")])[0]
        store.fix("base", dict(facts))
    if (complete := _with_sizes(facts, bench, pool)) is not facts:
        facts = complete
        store.fix("base", dict(facts))
    references = [Latency(**facts["latency"]), *(other.latency for other in _at_other_sizes(facts, bench))]
    if bench.config.tunes and bench.evaluator.trains:
        bench.tuned = _tuned(bench, pool, store, listener)
        facts = store.fixed("base")
    if "record" not in facts:
        (result,) = pool.all([Job("base scores", training=bench.tuned.base if bench.tuned else None)])
        scores = [Promotion(**score) for score in result["scores"]]
        facts = {**facts, "record": _record(bench, references[0], facts["peak_mb"], scores).as_dict()}
        store.fix("base", facts)
    return references, Record.from_dict(facts["record"])


def measured_earlier(bench: Bench, store: Store) -> list[Any]:
    """What this machine had measured before the search began at each input size of the space, from the store."""
    facts = store.fixed("latencies")
    if facts is None:
        facts = LatencyPredictor.measured_before(bench.latency_cache)
        store.fix("latencies", facts)
    before = dict(facts.get("sizes", {}))
    caches = dict(zip(bench.space.sizes[1:], (other.latency_cache for other in bench.at_sizes), strict=True))
    if missing := {label: cache for label, cache in caches.items() if label not in before}:
        before |= {label: LatencyPredictor.measured_before(cache) for label, cache in missing.items()}
        store.fix("latencies", {**facts, "sizes": before})
    return [facts, *(before[label] for label in caches)]


def _tuned(bench: Bench, pool: WorkerPool, store: Store, listener: Listener) -> Tuned:
    """How base and candidates are trained, from the store; what is missing is chosen by trainings."""
    facts = store.fixed("base")
    if "tuned" not in facts:

        def keep(results: dict[str, Any]) -> None:
            store.fix("base", {**facts, "tuning": results})

        tuned = tune(bench, pool, listener, facts.get("tuning", {}), keep)
        store.fix("base", {**store.fixed("base"), "tuned": tuned.as_dict()})
    return Tuned.from_dict(store.fixed("base")["tuned"])


def _wait_for_others(store: Store, stop: Callable[[], bool]) -> Any:
    """What the store has of the base, once it is complete or this search is the one to complete it.

    Raises:
        StopRequested: the user asked for an end.
    """
    sharing = store.sharing
    while sharing is not None and "record" not in (store.fixed("base") or {}) and not sharing.leads():
        if stop():
            raise StopRequested
        time.sleep(_WAIT_S)
    return store.fixed("base")


def _record(bench: Bench, reference: Latency, peak_mb: float | None, scores: list[Promotion]) -> Record:
    lowest, *above = scores
    return Record(
        number=-1,
        state="trained",
        digest="",
        timing=timing_of(reference),
        metric=lowest.metric,
        loss=lowest.loss,
        balanced=lowest.balanced,
        promotions=tuple(above),
        parameters=bench.costs.base["parameters"],
        macs=bench.costs.base["macs"],
        peak_mb=peak_mb,
        seconds=lowest.seconds,
        epochs=lowest.epochs,
        assignment=bench.space.nothing,
    )
