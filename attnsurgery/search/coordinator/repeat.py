"""Trains the first candidates once more from a second seed, to know how reliable their ranking is.

The second scores are kept beside the trials: they change neither a record nor which candidates come next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attnsurgery.search.execution.bench import Bench
from attnsurgery.search.execution.jobs import Job
from attnsurgery.search.listener import Listener
from attnsurgery.search.result.record import Record, trained
from attnsurgery.search.result.reliability import Reliability
from attnsurgery.search.rungs import repeats_wanted
from attnsurgery.search.storage.schema import REPEATS
from attnsurgery.search.storage.store import Store
from attnsurgery.search.workers.pool import WorkerPool

_WAIT_S = 1.0


def repeat(bench: Bench, pool: WorkerPool, store: Store, records: Sequence[Record], listener: Listener) -> bool:
    """Train as many candidates again as the settings want, less those that the study has already.

    A training that fails on every worker is left out; the search does not need it.

    Args:
        bench: what trials are made on.
        pool: does the trainings.
        store: the study, which gets each score as soon as it is there.
        records: of the trials so far, in order.
        listener: told of the result.

    Returns:
        Whether all of them are done; false if the user asked for an end.
    """
    repeats: dict[str, dict[str, Any]] = dict(store.fixed(REPEATS) or {})
    new = [record for record in trained(records) if record.digest not in repeats]
    missing = new[: max(0, repeats_wanted(bench.config) - len(repeats))]
    if not missing:
        return True
    for record in missing:
        payload = {"record": record.as_dict()}
        pool.give(Job("repeat", payload, record.number, training=bench.training()))
    complete = True
    while pool.busy:
        for outcome in pool.wait(_WAIT_S):
            if outcome.error:
                raise outcome.error
            if outcome.stopped:
                complete = False
                continue
            record = next(record for record in missing if record.number == outcome.job.trial)
            second = outcome.result if isinstance(outcome.result, dict) else {"failed": outcome.lost}
            first = {"metric": record.metric, "loss": record.loss}
            repeats[record.digest or ""] = {"number": record.number, "first": first, "second": second}
            store.fix(REPEATS, repeats)
    reliability = Reliability.of(repeats, bench.config.rank_by, len(bench.data.val))
    if complete and reliability:
        listener.phase(reliability.words())
    return complete
