"""The base's latency and scores, which are measured once and are the reference of every trial."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from attnsurgery.errors import SearchError
from attnsurgery.latency import Latency
from attnsurgery.search.coordinator.tune import tune
from attnsurgery.search.execution.baseline import timing_of
from attnsurgery.search.execution.bench import Bench
from attnsurgery.search.execution.jobs import Data, Job
from attnsurgery.search.execution.over_budget import refuse_over_budget
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
    (facts,) = pool.all([Job("base latency")])
    reference = Latency(**facts["latency"])

    def alternatives() -> list[Alternative]:
        try:
            (result,) = pool.all([Job("what fits", {"reference": reference})])
        except SearchError:  # every worker was lost: what is known of the base is reported without it
            return []
        return [Alternative(**other) for other in result["tried"]]

    refuse_over_budget(bench, reference, facts["peak_mb"], alternatives if suggest else None)
    return facts


def base_of(
    bench: Bench,
    pool: WorkerPool,
    store: Store,
    stop: Callable[[], bool],
    listener: Listener,
    measured: Data | None = None,
) -> tuple[Latency, Record]:
    """The base's latency and record from the store. What is missing is measured by one of the searches at the study.

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
    reference = Latency(**facts["latency"])
    if bench.config.tunes and bench.evaluator.trains:
        bench.tuned = _tuned(bench, pool, store, listener)
        facts = store.fixed("base")
    if "record" not in facts:
        (result,) = pool.all([Job("base scores", training=bench.tuned.base if bench.tuned else None)])
        scores = [Promotion(**score) for score in result["scores"]]
        facts = {**facts, "record": _record(bench, reference, facts["peak_mb"], scores).as_dict()}
        store.fix("base", facts)
    return reference, Record.from_dict(facts["record"])


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
        top1=lowest.top1,
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
