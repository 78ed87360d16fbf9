"""The laws of every pool of workers, whichever way it runs its jobs."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from attnsurgery.errors import CheckpointError, SearchError, UsageError
from attnsurgery.evaluate import EVALUATORS
from attnsurgery.latency import Latency
from attnsurgery.latency.fixed import FixedLatency
from attnsurgery.search import Listener, SearchConfig
from attnsurgery.search.execution.assemble import assemble
from attnsurgery.search.execution.jobs import Job, perform
from attnsurgery.search.watching import StopRequested, Watching
from attnsurgery.search.workers import worker
from attnsurgery.search.workers.launch import LAUNCHERS
from attnsurgery.search.workers.pool import InProcessPool, JobOutcome, WorkerPool
from attnsurgery.search.workers.processes import ProcessPool
from tests.plugins.attnsurgery_dummy import Dummy

PLUGINS = str(Path(__file__).parents[1] / "plugins")

pytestmark = pytest.mark.usefixtures("one_thread", "warm_workers")


@pytest.fixture(autouse=True)
def dummy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The dummy evaluator, which this process and its workers can import."""
    assert "finetune" in EVALUATORS, "all others are loaded"
    EVALUATORS.register("dummy")(Dummy)
    monkeypatch.setenv("PYTHONPATH", PLUGINS)
    monkeypatch.setenv("DUMMY_FAULTS", str(tmp_path / "injected_faults"))
    (tmp_path / "injected_faults").mkdir()
    yield
    EVALUATORS._entries.pop("dummy")


def config_in(folder: Path, pool: str) -> SearchConfig:
    folder.mkdir(exist_ok=True)
    return SearchConfig(
        data="digits",
        space="tiny",
        budget_ms=100.0,
        latency="fixed",
        evaluator="dummy",
        input_size=32,
        epochs=1,
        lr=1e-3,
        block_lr_scale=10.0,
        base_epochs=1,
        workers=0 if pool == "here" else 2,
        launcher="local" if pool == "here" else pool,
        launcher_args="" if pool == "here" else LAUNCHERS[pool].local_arguments,
        output=str(folder),
    )


class StopFlag:
    """Says whether to stop; `now` sets it."""

    now = False

    def __call__(self) -> bool:
        return self.now


@pytest.fixture(params=["here", *LAUNCHERS])
def which(request: pytest.FixtureRequest) -> str:
    """Without worker processes, or a launcher; a new launcher is tested by itself."""
    if request.param != "here" and (package := LAUNCHERS[request.param].package):
        pytest.importorskip(package)
    return str(request.param)


def pool_of(config: SearchConfig, stop: StopFlag | None = None) -> WorkerPool:
    stop = stop or StopFlag()
    if config.workers:
        return ProcessPool(LAUNCHERS[config.launcher](config), Listener(), stop)
    return InProcessPool(assemble(config, Listener()), Listener(), stop)


def finished_jobs(pool: WorkerPool) -> list[JobOutcome]:
    done: list[JobOutcome] = []
    while pool.busy:
        done += pool.wait(1.0)
    return done


@pytest.mark.slow
def test_pool_returns_each_job_once(tmp_path: Path, which: str) -> None:
    """Each job comes back once, with the result that a call in this process gives."""
    config = config_in(tmp_path / "run", which)
    pool = pool_of(config)
    try:
        (weights,) = pool.all([Job("weights")])
        jobs = [Job("base scores", tag=7), Job("base latency", tag=8), Job("base scores", tag=9)]
        for job in jobs:
            pool.give(job)
        assert pool.busy == 3
        done = finished_jobs(pool)
        assert sorted(one.job.tag for one in done) == [7, 8, 9]
        assert pool.wait(0.1) == []
        results = {one.job.tag: one.result for one in done}
        bench = assemble(config, Listener())
        watch = Watching(Listener(), lambda: False)
        assert perform(bench, Job("weights"), watch) == weights
        for job in jobs:
            expected, got = perform(bench, job, watch), results[job.tag]
            assert got is not None
            for one in (expected, got):
                for score in one.get("scores", ()):
                    score.pop("seconds")
            assert got == expected
        indices: list[int] = []
        pool.all([Job("base latency"), Job("base latency")], lambda at, result: indices.append(at))
        assert sorted(indices) == [0, 1]
    finally:
        pool.close()


@pytest.mark.parametrize("which", ["here", "local"])  # for a launcher an error is a message like others
@pytest.mark.slow
def test_pool_returns_errors_unchanged(tmp_path: Path, which: str) -> None:
    """An error of the package comes back with its class and text, and `all` raises it."""
    config = config_in(tmp_path / "run", which)
    (tmp_path / "run" / "base.safetensors").write_bytes(b"no weights")
    pool = pool_of(config)
    try:
        pool.give(Job("weights"))
        (done,) = finished_jobs(pool)
        assert isinstance(done.error, CheckpointError)
        assert "base.safetensors" in str(done.error)
        with pytest.raises(CheckpointError, match=r"base\.safetensors"):
            pool.all([Job("weights")])
    finally:
        pool.close()


@pytest.mark.slow
def test_pool_retries_failed_job_in_pieces(tmp_path: Path, which: str) -> None:
    """A job whose worker runs out of memory is repeated in pieces, and is lost after the last attempt."""
    config = config_in(tmp_path / "run", which)
    pool = pool_of(config)
    try:
        pool.all([Job("weights")])
        (tmp_path / "injected_faults" / "memory-1").touch()
        pool.give(Job("base scores"))
        (done,) = finished_jobs(pool)
        assert done.result is not None
        assert (done.job.attempt, done.job.pieces) == (2, 2)
        if which != "here":  # which a kill would end
            (tmp_path / "injected_faults" / "kill-1").touch()
            pool.give(Job("base scores"))
            (done,) = finished_jobs(pool)
            assert done.result is not None
            assert done.job.attempt == 2
            (tmp_path / "injected_faults" / "device-1").touch()
            pool.give(Job("base scores", max_attempts=1))
            (done,) = finished_jobs(pool)
            assert done.result is None
            assert done.lost == "CUDA error: an illegal memory access was encountered"
            return  # the rest is the same for all, and here at once
        for index in range(4):
            (tmp_path / "injected_faults" / f"memory-{index}").touch()
        with pytest.raises(SearchError, match="the base scores could not be done: a forced lack of memory"):
            pool.all([Job("base scores")])
        assert not list((tmp_path / "injected_faults").iterdir()), "begun four times"
    finally:
        pool.close()


@pytest.mark.slow
def test_pool_in_process_ends_on_fault(tmp_path: Path) -> None:
    """A CUDA context that is broken stays broken, so a second attempt in the same process would be in vain."""
    pool = pool_of(config_in(tmp_path / "run", "here"))
    pool.all([Job("weights")])
    for index in range(2):
        (tmp_path / "injected_faults" / f"device-{index}").touch()
    pool.give(Job("base scores", trial=3))
    message = r"scores of trial 3 broke the device: CUDA error: an illegal .* results are kept.* With --workers 1"
    with pytest.raises(SearchError, match=message):
        pool.wait(1.0)
    assert [entry.name for entry in (tmp_path / "injected_faults").iterdir()] == ["device-1"], "begun once"


class BrokenBackend(FixedLatency):
    """A latency backend that wraps an error of the device, as the real ones do."""

    def measure(self, model: nn.Module) -> Latency:
        try:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        except RuntimeError as error:
            raise UsageError("ResNet cannot run under the conditions of this measurement") from error


@pytest.mark.slow
def test_pool_measurement_fault_is_of_device(tmp_path: Path) -> None:
    """A device that breaks during a measurement is reported as such, not as a mistake of the user."""
    config = config_in(tmp_path / "run", "here")
    bench = assemble(config, Listener())
    pool = InProcessPool(replace(bench, backend=BrokenBackend(bench.backend.conditions)), Listener(), StopFlag())
    with pytest.raises(SearchError, match="the base latency broke the device"):
        pool.all([Job("base latency")])


@pytest.mark.parametrize(
    ("wrapped", "answer"),
    [
        ("CUDA error: an illegal memory access was encountered", {"broken": ["ResNet cannot run", False]}),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", {"broken": ["ResNet cannot run", True]}),
        ("sizes of tensors must match", {"error": ["UsageError", "ResNet cannot run"]}),
    ],
)
def test_worker_tells_faults_from_mistakes(
    monkeypatch: pytest.MonkeyPatch, wrapped: str, answer: dict[str, object]
) -> None:
    """A worker tells faults of the device from mistakes of the user, also where an error wraps another."""

    def fail(*arguments: object) -> None:
        raise UsageError("ResNet cannot run") from RuntimeError(wrapped)

    monkeypatch.setattr(worker, "perform", fail)
    monkeypatch.setattr(worker._Worker, "_ready", lambda self, job: None)
    message = {"threads": 1, "config": {"device": "cpu", "budget_ms": 1.0, "data": "/nowhere"}}
    subject = worker._Worker(message, worker.Wire(io.StringIO()), threading.Event())
    subject.assemble()  # in vain, for there are no images
    assert subject.answer(Job("base latency")) == answer


@pytest.mark.slow
def test_pool_stop_ends_running_and_waiting(tmp_path: Path, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop ends the jobs that run and those that wait, and no new ones start."""
    monkeypatch.setenv("DUMMY_SECONDS", "20")  # longer than a stop is on its way
    stop = StopFlag()
    pool = pool_of(config_in(tmp_path / "run", which), stop)
    try:
        pool.all([Job("weights")])
        stop.now = True
        for tag in range(4):
            pool.give(Job("base scores", tag=tag))
        done = finished_jobs(pool)
        assert sorted(one.job.tag for one in done) == [0, 1, 2, 3]
        assert all(one.stopped for one in done)
        with pytest.raises(StopRequested):
            pool.all([Job("base scores")])
    finally:
        pool.close()


@pytest.mark.slow
def test_pool_half_batches_train_as_whole(tmp_path: Path) -> None:
    """Two halves of a batch train a model without batch norms as the whole batch does."""
    config = config_in(tmp_path / "run", "here").model_copy(update={"base": "test_convnext", "evaluator": "finetune"})
    bench = assemble(config, Listener())
    watch = Watching(Listener(), lambda: False)
    perform(bench, Job("weights"), watch)
    (whole,) = perform(bench, Job("base scores"), watch)["scores"]
    (halves,) = perform(bench, Job("base scores", pieces=2), watch)["scores"]
    assert halves["loss"] == pytest.approx(whole["loss"], rel=1e-3)
