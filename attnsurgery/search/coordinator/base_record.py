"""The base's latency and scores, which are measured once and are the reference of every trial."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from attnsurgery.latency import Latency
from attnsurgery.search.execution.bench import Bench
from attnsurgery.search.execution.jobs import Job
from attnsurgery.search.result.record import Promotion, Record, Timing
from attnsurgery.search.storage.store import Store
from attnsurgery.search.watching import StopRequested
from attnsurgery.search.workers.pool import WorkerPool

_WAIT_S = 1.0


def base_of(bench: Bench, pool: WorkerPool, store: Store, stop: Callable[[], bool]) -> tuple[Latency, Record]:
    """The base's latency and record from the store. What is missing is measured by one of the searches at the study.

    Raises:
        StopRequested: the user asked for an end.
    """
    facts = _wait_for_others(store, stop)
    if facts is None:
        (facts,) = pool.all([Job("base latency")])
        store.fix("base", dict(facts))
    reference = Latency(**facts["latency"])
    if "record" not in facts:
        (result,) = pool.all([Job("base scores")])
        scores = [Promotion(**score) for score in result["scores"]]
        facts = {**facts, "record": _record(bench, reference, facts["peak_mb"], scores).as_dict()}
        store.fix("base", facts)
    return reference, Record.from_dict(facts["record"])


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
    half = reference.noise * reference.p50_ms
    lowest, *above = scores
    return Record(
        number=-1,
        state="trained",
        digest="",
        timing=Timing(reference.p50_ms, reference.p50_ms - half, reference.p50_ms + half, 1.0),
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
