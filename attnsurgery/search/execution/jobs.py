"""What of a search needs a device, in pieces that a worker can be given.

Within a process, a trial and its result are records. They become JSON data only where they leave it (`as_dict`,
`from_dict`, `result_to_data`, `result_from_data`).

A job stands by itself. It depends on the search's configuration, on the files of the run directory and on what it is
given, never on the jobs before it, so any worker can do any job, and one that was lost can be done again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from attnsurgery.latency import Latency
from attnsurgery.search.execution.baseline import base_latency, base_scores, starting_weights
from attnsurgery.search.execution.bench import Bench
from attnsurgery.search.execution.trial import promote, run_trial, train_seed
from attnsurgery.search.execution.verdict import judged, measured_again, trained_again
from attnsurgery.search.result.record import Promotion, Record
from attnsurgery.search.watching import Watching

Data = dict[str, Any]
Result = Record | Data
_OF_RECORDS = ("trial", "promotion")
"""Kinds of jobs that are given a record and return one."""


@dataclass(frozen=True, slots=True)
class Job:
    """A piece of work."""

    kind: str
    """One of KINDS."""
    given: Mapping[str, Any] = field(default_factory=dict)
    trial: int | None = None
    """The trial that it is for."""
    attempt: int = 1
    """How often this run has begun it, this time counted."""
    most: int = 2
    """How often it may begin it."""
    before: int = 0
    """How often earlier runs have."""
    pieces: int = 1
    """Training batches are passed in so many pieces, for memory ran out before."""
    tag: int = 0
    """Tells it from others; of no meaning to a worker."""

    def as_dict(self) -> Data:
        """JSON data from which `from_dict` makes an equal job."""
        data = {one.name: getattr(self, one.name) for one in fields(self)}
        return {**data, "given": {name: _to_data(value) for name, value in self.given.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Job:
        given = dict(data["given"])
        if data["kind"] in _OF_RECORDS:
            given["record"] = Record.from_dict(given["record"])
        if "reference" in given:
            given["reference"] = Latency(**given["reference"])
        return cls(**{**data, "given": given})

    def again(self, out_of_memory: bool) -> Job:
        """The next attempt."""
        return replace(self, attempt=self.attempt + 1, pieces=self.pieces * (2 if out_of_memory else 1))


def result_to_data(result: Result) -> Data:
    """JSON data from which `result_from_data` makes an equal result."""
    return _to_data(result)  # type: ignore[no-any-return]


def result_from_data(job: Job, data: Data) -> Result:
    """The result of a job that was done in another process."""
    return Record.from_dict(data) if job.kind in _OF_RECORDS else data


def _to_data(value: Any) -> Any:
    if isinstance(value, Record):
        return value.as_dict()
    return asdict(value) if isinstance(value, Latency) else value


def perform(bench: Bench, job: Job, watch: Watching) -> Result:
    """Do a job.

    Returns:
        The record of a trial or a promotion; of the other jobs, JSON data.

    Raises:
        StopAsked: the user asked for an end.
        AttnSurgeryError: it cannot be done, and the search with it.
        RuntimeError and others: a device, or the memory, gave way; another worker may do it.
    """
    return KINDS[job.kind](bench.in_pieces(job.pieces), job.given, watch)


def _weights(bench: Bench, given: Mapping[str, Any], watch: Watching) -> Data:
    return {"weights": starting_weights(bench, watch), "fresh": bench.fresh, "head": bench.head}


def _base_latency(bench: Bench, given: Mapping[str, Any], watch: Watching) -> Data:
    return {"latency": asdict(base_latency(bench, watch)), "peak_mb": bench.peak_mb(bench.base)}


def _base_scores(bench: Bench, given: Mapping[str, Any], watch: Watching) -> Data:
    scores = base_scores(bench, train_seed(bench), watch)
    return {"scores": [asdict(Promotion.of(score)) for score in scores]}


def _trial(bench: Bench, given: Mapping[str, Any], watch: Watching) -> Record:
    return run_trial(bench, given["record"], given["reference"], watch)


def _promotion(bench: Bench, given: Mapping[str, Any], watch: Watching) -> Record:
    return promote(bench, given["record"], watch)


def _timing(bench: Bench, given: Mapping[str, Any], watch: Watching) -> Data:
    return asdict(measured_again(bench, Record.from_dict(given["record"]), given["reference"], watch))


def _training(bench: Bench, given: Mapping[str, Any], watch: Watching) -> Data:
    return trained_again(bench, given["record"], given["index"], watch, final=False)


def _final_training(bench: Bench, given: Mapping[str, Any], watch: Watching) -> Data:
    return trained_again(bench, given["record"], given["index"], watch, final=True)


def _verdict(bench: Bench, given: Mapping[str, Any], watch: Watching) -> Data:
    return judged(bench, Record.from_dict(given["record"]), given["reference"], watch).as_dict()


KINDS: Mapping[str, Callable[[Bench, Mapping[str, Any], Watching], Result]] = {
    "weights": _weights,
    "base latency": _base_latency,
    "base scores": _base_scores,
    "trial": _trial,
    "promotion": _promotion,
    "timing": _timing,
    "training": _training,
    "final training": _final_training,
    "verdict": _verdict,
}
"""By name: make the starting weights; measure the base; score it on every rung; build, measure and train a candidate;
train it on the next rung; measure a finalist again; train one from one more seed; train the winner, or the base, from a
fresh one; the last word."""
