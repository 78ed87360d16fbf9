"""The jobs of the confirmation, each done once: results of an interrupted run are reused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attnsurgery.latency import Latency
from attnsurgery.search.execution.baseline import hash_of
from attnsurgery.search.execution.bench import Bench
from attnsurgery.search.execution.jobs import Job
from attnsurgery.search.storage.run_directory import CONFIRMING, weights_of
from attnsurgery.search.storage.store import Store
from attnsurgery.search.tuning import Training
from attnsurgery.search.workers.pool import WorkerPool


class ConfirmationJobs:
    """Does jobs in a pool, and stores each result in the study as soon as it is there.

    Args:
        bench: what trials are made on.
        pool: does the jobs.
        store: the study, which holds the results until there is a verdict.
        folder: the run directory, which holds the weights that trainings leave.
        references: the base's latency at each input size of the space, its own first.
        check_stop: raises StopRequested once the user asked for an end.
    """

    def __init__(
        self,
        bench: Bench,
        pool: WorkerPool,
        store: Store,
        folder: Path,
        references: Sequence[Latency],
        check_stop: Callable[[], None],
    ) -> None:
        self._bench, self._references = bench, references
        self._pool, self._store, self._folder = pool, store, folder
        self._check_stop = check_stop

    def __call__(self, kind: str, *payloads: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The results of jobs of one kind, in the order of their payloads.

        Raises:
            StopRequested: the user asked for an end.
            AttnSurgeryError: one of the jobs cannot be done.
        """
        results: dict[str, Any] = self._store.fixed(CONFIRMING) or {}
        keys = [_key(kind, payload) for payload in payloads]
        missing = [at for at, key in enumerate(keys) if not self._is_complete(results.get(key), payloads[at])]

        def keep(at: int, result: Mapping[str, Any]) -> None:
            results[keys[missing[at]]] = result
            self._store.fix(CONFIRMING, results)

        self._check_stop()
        self._pool.all([self._job(kind, payloads[at]) for at in missing], keep)
        return [results[key] for key in keys]

    def _job(self, kind: str, payload: Mapping[str, Any]) -> Job:
        record = payload["record"]
        if record and "reference" in payload:  # the base's latency at the input size of the candidate
            reference = self._references[self._bench.space.size_index(record["assignment"])]
            payload = {**payload, "reference": reference}
        own = payload.get("training")
        training = Training(**own) if own else self._bench.training(base=record is None)
        if kind == "rival weights":  # made as those of the base are, before anything was chosen
            training = None
        return Job(kind, payload, (record or {}).get("number"), training=training)

    def _is_complete(self, result: Mapping[str, Any] | None, payload: Mapping[str, Any]) -> bool:
        """Whether an earlier run has done a job, and the weights that it left are unchanged."""
        if result is None or "failed" in result or "timing" in result:
            return False
        if "weights" not in result:
            return True
        path = self._folder / weights_of(payload["record"])
        return path.is_file() and hash_of(path) == result["weights"]


def _key(kind: str, payload: Mapping[str, Any]) -> str:
    """The key of a job's result: its kind, its candidate, the index of its seed, and its own settings.

    A rival's key is in place of the candidate's digest.
    """
    parts = [kind, payload["record"]["digest"] if payload["record"] else payload.get("rival", "base")]
    parts += [str(payload["index"])] if "index" in payload else []
    parts += [Training(**payload["training"]).key] if payload.get("training") else []
    return ":".join(parts)
