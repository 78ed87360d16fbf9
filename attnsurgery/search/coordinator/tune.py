"""Chooses how the base and the candidates are trained, by trainings that workers do (`attnsurgery.search.tuning`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attnsurgery.errors import SearchError
from attnsurgery.search.execution.bench import Bench
from attnsurgery.search.execution.jobs import Job
from attnsurgery.search.listener import Listener
from attnsurgery.search.tuning import Tuned, Tuning, pilot_epochs
from attnsurgery.search.workers.pool import WorkerPool


def tune(
    bench: Bench,
    pool: WorkerPool,
    listener: Listener,
    results: Mapping[str, Any],
    keep: Callable[[dict[str, Any]], None],
) -> Tuned:
    """Do the trainings that the choice needs, and choose.

    Args:
        bench: what trials are made on.
        pool: does the trainings.
        listener: told of the choice.
        results: of the trainings that an earlier run has done.
        keep: called with all results whenever there are new ones, so that a stopped search does not repeat them.

    Raises:
        SearchError: every training of the base diverged.
        StopRequested: the user asked for an end.
    """
    tuning = Tuning(bench.config, pilot_epochs(len(bench.data.train), bench.config.train_batch_size))
    results = dict(results)
    while attempts := tuning.needed(results):

        def add(at: int, result: Mapping[str, Any], attempts: list[Any] = attempts) -> None:
            results[attempts[at].key] = dict(result)
            keep(results)

        jobs = [Job("tuning", {"part": attempt.part}, training=attempt.training) for attempt in attempts]
        pool.all(jobs, add)
    base = [result for key, result in results.items() if key.startswith("base:")]
    if base and all("failed" in result for result in base):
        raise SearchError(
            f"the base could not be trained with any of the settings that were tried: {base[-1]['failed']}"
        )
    tuned = tuning.chosen(results)
    listener.phase(tuned.words())
    return tuned
