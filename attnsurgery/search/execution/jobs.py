"""Jobs: the work of a search that needs a device, in units for workers.

Within a process, a trial and its result are records. They become JSON data only where they leave the process
(`as_dict`, `from_dict`, `result_to_data`, `result_from_data`).

A job depends only on the search's configuration, the files of the run directory and its own payload, never on earlier
jobs. So any worker can do any job, and a lost job can be repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from attnsurgery.latency import Latency
from attnsurgery.search.execution.baseline import (
    base_latency,
    base_latency_at,
    base_scores,
    least_ratio,
    starting_weights,
)
from attnsurgery.search.execution.bench import Bench
from attnsurgery.search.execution.rivals import bench_of, measure_rival, propose_rivals, start_rival
from attnsurgery.search.execution.trial import promote, run_trial, train_second, train_seed
from attnsurgery.search.execution.tune import try_training
from attnsurgery.search.execution.verdict import measure_again, save_winner, train_again, train_finally
from attnsurgery.search.execution.what_fits import what_fits
from attnsurgery.search.result.record import Promotion, Record
from attnsurgery.search.tuning import Training
from attnsurgery.search.watching import Watching
from attnsurgery.settings import sides

Data = dict[str, Any]
Result = Record | Data
_OF_RECORDS = ("trial", "promotion")
"""Kinds of jobs whose payload holds a record and whose result is one."""
_AS_THE_BASE = ("tuning", "final training")
"""Kinds of jobs that are done for a rival as for the base, on the rival's own bench."""
BEFORE_WEIGHTS = ("base latency", "what fits")
"""Kinds of jobs that need no starting weights. One worker does them, before the others start."""


@dataclass(frozen=True, slots=True)
class Job:
    """One unit of work."""

    kind: str
    """A key of KINDS."""
    payload: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the job, by name; they depend on its kind."""
    trial: int | None = None
    """Number of the trial that the job belongs to, if any."""
    attempt: int = 1
    """Number of this attempt in this run, from 1."""
    max_attempts: int = 2
    """Maximum number of attempts in one run."""
    before: int = 0
    """Number of attempts in earlier runs."""
    pieces: int = 1
    """Number of pieces that each training batch is split into, because memory ran out in an earlier attempt."""
    training: Training | None = None
    """How the job trains; None for the settings of the configuration."""
    tag: int = 0
    """Identifies the job to whoever gave it; workers ignore it."""

    def as_dict(self) -> Data:
        """JSON data from which `from_dict` makes an equal job."""
        data = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        data["training"] = None if self.training is None else asdict(self.training)
        return {**data, "payload": {name: _to_data(value) for name, value in self.payload.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Job:
        """The job that `as_dict` was called on."""
        payload = dict(data["payload"])
        if data["kind"] in _OF_RECORDS:
            payload["record"] = Record.from_dict(payload["record"])
        if "reference" in payload:
            payload["reference"] = Latency(**payload["reference"])
        training = None if data["training"] is None else Training(**data["training"])
        return cls(**{**data, "payload": payload, "training": training})

    def again(self, out_of_memory: bool) -> Job:
        """The job of the next attempt, with smaller pieces if memory ran out."""
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
        The record of a trial or a promotion; JSON data of any other job.

    Raises:
        StopRequested: the user asked for an end.
        AttnSurgeryError: the job cannot be done, and the search cannot continue without it.
        RuntimeError and others: the device failed or memory ran out; another worker may be able to do the job.
    """
    bench = bench.changed(job.pieces, job.training).at_size_of(job.payload.get("record"))
    if job.kind in _AS_THE_BASE and "rival" in job.payload:
        bench = bench_of(bench, job.payload["rival"], watch)
    return KINDS[job.kind](bench, job.payload, watch)


def _weights(bench: Bench, payload: Mapping[str, Any], watch: Watching) -> Data:
    return {"weights": starting_weights(bench, watch), "fresh": bench.fresh, "head": bench.head}


def _base_latency(bench: Bench, payload: Mapping[str, Any], watch: Watching) -> Data:
    if "size" in payload:
        size, there = sides(payload["size"]), bench.at(sides(payload["size"]))
        latency = base_latency_at(bench, size, payload["reference"], watch)
    else:
        there, latency = bench, base_latency(bench, watch)
    facts = {"latency": asdict(latency), "peak_mb": there.peak_mb(there.base)}
    least = least_ratio(there, latency, watch)
    return facts if least == 1 else {**facts, "least": least}


def _what_fits(bench: Bench, payload: Mapping[str, Any], watch: Watching) -> Data:
    return {"tried": [asdict(other) for other in what_fits(bench, payload["reference"].p50_ms, watch)]}


def _tuning(bench: Bench, payload: Mapping[str, Any], watch: Watching) -> Data:
    return try_training(bench, payload["part"], train_seed(bench), watch)


def _base_scores(bench: Bench, payload: Mapping[str, Any], watch: Watching) -> Data:
    scores = base_scores(bench, train_seed(bench), watch)
    return {"scores": [asdict(Promotion.of(score)) for score in scores]}


def _trial(bench: Bench, payload: Mapping[str, Any], watch: Watching) -> Record:
    return run_trial(bench, payload["record"], payload["reference"], watch)


def _promotion(bench: Bench, payload: Mapping[str, Any], watch: Watching) -> Record:
    return promote(bench, payload["record"], watch)


def _repeat(bench: Bench, payload: Mapping[str, Any], watch: Watching) -> Data:
    return train_second(bench, Record.from_dict(payload["record"]), watch)


def _timing(bench: Bench, payload: Mapping[str, Any], watch: Watching) -> Data:
    return asdict(measure_again(bench, Record.from_dict(payload["record"]), payload["reference"], watch))


def _training(bench: Bench, payload: Mapping[str, Any], watch: Watching) -> Data:
    return train_again(bench, payload["record"], payload["index"], watch)


def _final_training(bench: Bench, payload: Mapping[str, Any], watch: Watching) -> Data:
    return train_finally(bench, payload["record"], payload["index"], watch, rival="rival" in payload)


def _winner(bench: Bench, payload: Mapping[str, Any], watch: Watching) -> Data:
    return save_winner(bench, Record.from_dict(payload["record"]), payload["reference"], watch)


def _rival_costs(bench: Bench, payload: Mapping[str, Any], watch: Watching) -> Data:
    return measure_rival(bench, payload["rival"], payload["reference"], watch)


def _rival_weights(bench: Bench, payload: Mapping[str, Any], watch: Watching) -> Data:
    return start_rival(bench, payload["rival"], watch)


KINDS: Mapping[str, Callable[[Bench, Mapping[str, Any], Watching], Result]] = {
    "base latency": _base_latency,
    "what fits": _what_fits,
    "weights": _weights,
    "tuning": _tuning,
    "base scores": _base_scores,
    "trial": _trial,
    "promotion": _promotion,
    "repeat": _repeat,
    "timing": _timing,
    "training": _training,
    "final training": _final_training,
    "winner": _winner,
    "rival proposals": propose_rivals,
    "rival costs": _rival_costs,
    "rival weights": _rival_weights,
}
"""The function of each kind of job, by name.

base latency    measure the base, at another input size of the space if the payload has one
what fits       try smaller images and models in place of a base that is over a budget
weights         make the starting weights of the base
tuning          train the base, a rival or the probe with settings that are on trial
base scores     train the base on every rung
trial           build, measure and train a candidate
promotion       train a candidate on its next rung
repeat          train a candidate on the lowest rung from a second seed
timing          measure a finalist again
training        train a finalist from another seed
final training  train winner, base or rival from a seed that nothing was chosen by, and test it
winner          measure the winner again, and save it
rival proposals look for models of the base's family that fit the budget
rival costs     build and measure a rival
rival weights   make the starting weights of a rival
"""
