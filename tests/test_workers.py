"""Workers that are killed, hang, or run out of memory cost one attempt of a trial, and the search goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest

from attnsurgery.evaluate import EVALUATORS
from attnsurgery.latency import Latency
from attnsurgery.search import Listener, Outcome, Record, SearchConfig, run
from attnsurgery.search.execution.jobs import Job, result_from_data, result_to_data
from attnsurgery.search.execution.trial import reason_of
from attnsurgery.search.result.record import Promotion, Timing, trained
from attnsurgery.search.workers.launch.processes import end_of
from tests._searches import change, small_search, write_images, write_space
from tests.plugins.attnsurgery_dummy import Dummy

pytestmark = pytest.mark.usefixtures("no_pictures", "one_thread", "warm_workers")

PLUGINS = str(Path(__file__).parent / "plugins")
ROOT = str(Path(__file__).parents[1])


@pytest.fixture(scope="module", autouse=True)
def dummy() -> Iterator[None]:
    """Registers the evaluator 'dummy' in this process, as the plugin does in workers."""
    assert "finetune" in EVALUATORS, "all others are loaded"
    if "dummy" not in EVALUATORS:
        EVALUATORS.register("dummy")(Dummy)
    yield
    EVALUATORS._entries.pop("dummy")


@pytest.fixture
def injected_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "injected_faults"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", PLUGINS)
    monkeypatch.setenv("DUMMY_FAULTS", str(folder))
    monkeypatch.setenv("DUMMY_LOG", str(tmp_path / "scores.jsonl"))
    return folder


@pytest.fixture
def config(tmp_path: Path) -> SearchConfig:
    images, space = write_images(tmp_path / "images"), write_space(tmp_path)
    return change(small_search(images, space, tmp_path / "run"), workers=1, evaluator="dummy")


class FaultInjector(Listener):
    """Injects the planned faults once the trials begin, and records the phases."""

    def __init__(self, injected_faults: Path | None = None, planned: tuple[str, ...] = ()) -> None:
        self.phases: list[str] = []
        self._faults, self._planned = injected_faults, planned

    def ready(self, conditions: str, data: str, candidates: int, base: Record, power: str) -> None:
        for one in self._planned:
            assert self._faults is not None
            (self._faults / one).touch()

    def phase(self, text: str) -> None:
        self.phases.append(text)


def essence(outcome: Outcome) -> list[tuple[object, ...]]:
    return [(r.number, r.state, dict(r.assignment), r.digest, r.metric, r.loss, r.timing) for r in outcome.records]


def scores(tmp_path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]


def states(outcome: Outcome) -> list[str]:
    """Returns the states of the study's trials."""
    study = optuna.load_study(study_name="run", storage=f"sqlite:///{outcome.folder / 'study.db'}")
    return [trial.state.name for trial in study.trials]


@pytest.mark.slow
def test_worker_trials_equal_in_process(config: SearchConfig, tmp_path: Path) -> None:
    """Trained for real, each in an interpreter of its own."""
    real = change(config, evaluator="finetune", trials=2)
    here = run(change(real, workers=0, output=str(tmp_path / "here")))
    there = run(real)
    assert essence(there) == essence(here)
    assert there.confirmation == here.confirmation
    assert (there.folder / "base.safetensors").read_bytes() == (here.folder / "base.safetensors").read_bytes()
    assert not (there.folder / "confirming").exists()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("kill", "its worker was ended by SIGKILL, as a system short of memory does"),
        ("exit", "its worker ended with exit code 7: the driver is gone"),
        ("memory", "a forced lack of memory"),
        ("hang", "its worker gave no sign of life for 4 s"),
    ],
)
@pytest.mark.slow
def test_injected_fault_costs_one_attempt(
    config: SearchConfig, injected_faults: Path, tmp_path: Path, kind: str, reason: str
) -> None:
    """A fault costs its trial one more attempt, and a second one costs the trial."""
    injector = FaultInjector(injected_faults, (f"{kind}-1", f"{kind}-2", f"{kind}-3"))
    outcome = run(change(config, patience_minutes=4 / 60, trials=2), injector)
    failed, *rest = outcome.records
    assert (failed.state, failed.reason, failed.attempts) == ("failed", reason, 2)
    assert [(record.state, record.attempts) for record in rest] == [("trained", 2), ("trained", 1)]
    half = ", at half the batch" if kind in ("kill", "memory") else ""
    assert injector.phases.count(f"repeated{half}: {reason}") == 2
    _, again, whole, *_ = scores(tmp_path)  # the base is the first
    assert (again["pieces"], whole["pieces"]) == (2 if half else 1, 1)
    assert not list(injected_faults.iterdir())


@pytest.mark.slow
def test_in_step_trials_equal_when_resumed(config: SearchConfig, injected_faults: Path, tmp_path: Path) -> None:
    """In step, two workers come to the same trials in one run or in two."""
    stepping = change(config, workers=2, in_step=True, trials=5)
    straight = run(change(stepping, output=str(tmp_path / "straight")))
    assert straight.trained == 5
    first = run(change(stepping, trials=3))
    assert first.trained == 3
    assert "WAITING" in states(first), "the second of its step was asked for, and not needed"
    again = run(stepping)
    assert essence(again) == essence(straight)
    pids = {entry["pid"] for entry in scores(tmp_path)}
    assert len(pids) > 2, "two workers have scored in each of the runs"


@pytest.mark.slow
def test_workers_train_as_many_as_wanted(config: SearchConfig, injected_faults: Path) -> None:
    """Several workers train exactly as many candidates as were ordered, and none twice."""
    outcome = run(change(config, workers=3, trials=8, sampler="tpe"))
    assert outcome.trained == 8
    assert Counter(record.digest for record in trained(outcome.records)).most_common(1)[0][1] == 1
    assert not {"RUNNING", "WAITING"} & set(states(outcome))
    assert [record.number for record in outcome.records] == sorted(record.number for record in outcome.records)


@pytest.mark.slow
def test_stop_leaves_nothing_running(config: SearchConfig, injected_faults: Path) -> None:
    """A stop leaves nothing running, and the next run takes the trial up."""
    straight = run(change(config, trials=3, output=f"{config.output}-straight"))
    injector = FaultInjector()
    numbers: list[int] = []

    class TrialRecorder(FaultInjector):
        def trial_started(self, number: int, name: str) -> None:
            numbers.append(number)

    os.environ["DUMMY_SECONDS"] = "3"
    try:
        stopped = run(change(config, trials=3), TrialRecorder(), stop=lambda: len(numbers) == 2)
    finally:
        del os.environ["DUMMY_SECONDS"]
    assert stopped.interrupted
    assert stopped.trained == 1
    assert states(stopped) == ["COMPLETE", "WAITING"]
    assert (stopped.folder / "report.html").is_file()
    assert essence(run(change(config, trials=3), injector)) == essence(straight)


def test_worker_error_ends_the_search(config: SearchConfig, tmp_path: Path) -> None:
    """A job that a worker cannot do ends the search with its reason."""
    from attnsurgery.errors import SearchError

    (tmp_path / "images" / "dark" / "0.png").write_bytes(b"no image")
    with pytest.raises(SearchError, match=r"1 of \d+ images cannot be read: dark/0.png"):
        run(change(config, evaluator="finetune"))


@pytest.mark.parametrize(
    ("code", "last", "out_of_memory"),
    [
        (-9, "", True),
        (1, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", True),
        (1, "RuntimeError: CUDA error: an illegal memory access was encountered", False),
        (-6, "", False),
    ],
)
def test_worker_ending_tells_of_memory(tmp_path: Path, code: int, last: str, out_of_memory: bool) -> None:
    """How a worker ended tells whether half a batch may help."""
    (tmp_path / "worker-0.log").write_text(f"a warning\n{last}\n" if last else "")
    ending = end_of(code, tmp_path / "worker-0.log")
    assert ending.out_of_memory is out_of_memory
    assert ending.reason.endswith(last)


def test_reason_of_fault_is_the_devices() -> None:
    """The reason of a fault is what the device says, without the advice on debugging."""
    error_text = "CUDA error: unspecified launch failure\nCUDA kernel errors might be asynchronously reported."
    assert reason_of(RuntimeError(error_text)) == "CUDA error: unspecified launch failure"
    assert reason_of(ValueError("one line\nand another")) == "one line and another"


@pytest.mark.slow
def test_worker_ends_when_its_search_is_gone() -> None:
    """A worker ends when its search is gone."""
    process = subprocess.Popen(
        [sys.executable, "-m", "attnsurgery.search.workers.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": ROOT},
    )
    assert process.stdout is not None
    assert json.loads(process.stdout.readline()) == {"sign": True}
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(timeout=20) == 0
    process.stdout.close()


@pytest.mark.parametrize("kind", ["trial", "promotion"])
def test_job_of_record_survives_json(kind: str) -> None:
    """A job and its record come back equal from JSON."""
    promotions = (Promotion(0.5, 1.0, 3.0, 2),)
    record = Record(3, "pending", {"layer1.0": "se"}, timing=Timing(1.0, 0.9, 1.1, 1.2), promotions=promotions)
    reference = Latency(1.0, 1.1, 20, 0.01, "cpu", "float32", 1, "eager")
    job = Job(kind, {"record": record, "reference": reference}, trial=3, before=2)
    assert Job.from_dict(json.loads(json.dumps(job.as_dict()))) == job
    assert result_from_data(job, json.loads(json.dumps(result_to_data(record)))) == record


@pytest.mark.slow
def test_trial_is_converted_for_store_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without workers: two forms for study and journal, and none to hand a trial on."""
    calls: Counter[str] = Counter()
    to_dict, from_dict = Record.as_dict, Record.from_dict.__func__  # type: ignore[attr-defined]

    def count_as_dict(self: Record) -> dict[str, Any]:
        calls["as_dict"] += self.number >= 0
        return to_dict(self)

    def count_from_dict(cls: type[Record], data: dict[str, Any]) -> Record:
        calls["from_dict"] += data["number"] >= 0
        return from_dict(cls, data)  # type: ignore[no-any-return]

    monkeypatch.setattr(Record, "as_dict", count_as_dict)
    monkeypatch.setattr(Record, "from_dict", classmethod(count_from_dict))
    monkeypatch.setattr("attnsurgery.search.coordinator.search._Search._confirm", lambda self: None)
    config = SearchConfig(
        data="digits",
        space="tiny",
        budget_params=1_000_000,
        trials=4,
        epochs=1,
        lr=1e-3,
        block_lr_scale=10.0,
        base_epochs=1,
        input_size=32,
        workers=0,
        output=str(tmp_path / "run"),
    )
    trial_count = len(run(config).records)
    assert calls["as_dict"] <= 2 * trial_count
    assert calls["from_dict"] <= trial_count
