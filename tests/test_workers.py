"""Workers that are killed, hang, or lose their memory or device; what becomes of their trials, and of the search."""

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

pytestmark = pytest.mark.usefixtures("one_thread")

PLUGINS = str(Path(__file__).parent / "plugins")
ROOT = str(Path(__file__).parents[1])


@pytest.fixture(scope="module", autouse=True)
def dummy() -> Iterator[None]:
    """Known to this process as to workers."""
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


class Hearing(Listener):
    """Has injected faults happen once the trials begin, and keeps what it was told."""

    def __init__(self, injected_faults: Path | None = None, planned: tuple[str, ...] = ()) -> None:
        self.heard: list[str] = []
        self._faults, self._planned = injected_faults, planned

    def ready(self, conditions: str, data: str, candidates: int, base: Record) -> None:
        for one in self._planned:
            assert self._faults is not None
            (self._faults / one).touch()

    def phase(self, text: str) -> None:
        self.heard.append(text)


def essence(outcome: Outcome) -> list[tuple[object, ...]]:
    return [(r.number, r.state, dict(r.assignment), r.digest, r.top1, r.loss, r.timing) for r in outcome.records]


def scores(tmp_path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]


def states(outcome: Outcome) -> list[str]:
    """Of the study's trials."""
    study = optuna.load_study(study_name="run", storage=f"sqlite:///{outcome.folder / 'study.db'}")
    return [trial.state.name for trial in study.trials]


def test_a_worker_comes_to_the_same_trials_as_this_process(config: SearchConfig, tmp_path: Path) -> None:
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
def test_a_mishap_costs_its_trial_one_more_attempt_and_two_cost_the_trial(
    config: SearchConfig, injected_faults: Path, tmp_path: Path, kind: str, reason: str
) -> None:
    """Three in a row: two for the first trial, one for the second, none for the third."""
    hearing = Hearing(injected_faults, (f"{kind}-1", f"{kind}-2", f"{kind}-3"))
    outcome = run(change(config, patience_minutes=4 / 60, trials=2), hearing)
    failed, *rest = outcome.records
    assert (failed.state, failed.reason, failed.attempts) == ("failed", reason, 2)
    assert [(record.state, record.attempts) for record in rest] == [("trained", 2), ("trained", 1)]
    half = ", at half the batch" if kind in ("kill", "memory") else ""
    assert hearing.heard.count(f"begun again{half}: {reason}") == 2
    _, again, whole, *_ = scores(tmp_path)  # the base is the first
    assert (again["pieces"], whole["pieces"]) == (2 if half else 1, 1)
    assert not list(injected_faults.iterdir())


def test_in_step_two_workers_come_to_the_same_trials_in_one_run_or_in_two(
    config: SearchConfig, injected_faults: Path, tmp_path: Path
) -> None:
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


def test_several_workers_train_exactly_as_many_as_were_asked_for_and_none_twice(
    config: SearchConfig, injected_faults: Path
) -> None:
    outcome = run(change(config, workers=3, trials=8, sampler="tpe"))
    assert outcome.trained == 8
    assert Counter(record.digest for record in trained(outcome.records)).most_common(1)[0][1] == 1
    assert not {"RUNNING", "WAITING"} & set(states(outcome))
    assert [record.number for record in outcome.records] == sorted(record.number for record in outcome.records)


def test_a_stop_leaves_nothing_running_and_the_next_run_takes_it_up(
    config: SearchConfig, injected_faults: Path
) -> None:
    straight = run(change(config, trials=3, output=f"{config.output}-straight"))
    hearing = Hearing()
    begun: list[int] = []

    class Asked(Hearing):
        def trial_started(self, number: int, name: str) -> None:
            begun.append(number)

    os.environ["DUMMY_SECONDS"] = "3"
    try:
        stopped = run(change(config, trials=3), Asked(), stop=lambda: len(begun) == 2)
    finally:
        del os.environ["DUMMY_SECONDS"]
    assert stopped.interrupted
    assert stopped.trained == 1
    assert states(stopped) == ["COMPLETE", "WAITING"]
    assert (stopped.folder / "report.html").is_file()
    assert essence(run(change(config, trials=3), hearing)) == essence(straight)


def test_what_a_worker_cannot_do_ends_the_search_with_its_reason(config: SearchConfig, tmp_path: Path) -> None:
    """The image is damaged; the coordinator never looks at one."""
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
def test_how_a_worker_ended_tells_whether_half_a_batch_may_help(
    tmp_path: Path, code: int, last: str, out_of_memory: bool
) -> None:
    (tmp_path / "worker-0.log").write_text(f"a warning\n{last}\n" if last else "")
    gone = end_of(code, tmp_path / "worker-0.log")
    assert gone.out_of_memory is out_of_memory
    assert gone.reason.endswith(last)


def test_the_reason_of_a_fault_is_what_the_device_says_and_not_how_to_look_for_kernels() -> None:
    said = "CUDA error: unspecified launch failure\nCUDA kernel errors might be asynchronously reported."
    assert reason_of(RuntimeError(said)) == "CUDA error: unspecified launch failure"
    assert reason_of(ValueError("one line\nand another")) == "one line and another"


def test_a_worker_ends_when_its_search_is_gone() -> None:
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
def test_job_of_a_record_is_the_same_on_the_other_side(kind: str) -> None:
    """Records become JSON data only where they leave the process."""
    promotions = (Promotion(0.5, 1.0, 3.0, 2),)
    record = Record(3, "pending", {"layer1.0": "se"}, timing=Timing(1.0, 0.9, 1.1, 1.2), promotions=promotions)
    reference = Latency(1.0, 1.1, 20, 0.01, "cpu", "float32", 1, "eager")
    job = Job(kind, {"record": record, "reference": reference}, trial=3, before=2)
    assert Job.from_dict(json.loads(json.dumps(job.as_dict()))) == job
    assert result_from_data(job, json.loads(json.dumps(result_to_data(record)))) == record


def test_trial_is_converted_for_the_store_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without workers: two forms for study and journal, and none to hand a trial on."""
    calls: Counter[str] = Counter()
    to_dict, from_dict = Record.as_dict, Record.from_dict.__func__  # type: ignore[attr-defined]

    def counted_to(self: Record) -> dict[str, Any]:
        calls["as_dict"] += self.number >= 0
        return to_dict(self)

    def counted_from(cls: type[Record], data: dict[str, Any]) -> Record:
        calls["from_dict"] += data["number"] >= 0
        return from_dict(cls, data)  # type: ignore[no-any-return]

    monkeypatch.setattr(Record, "as_dict", counted_to)
    monkeypatch.setattr(Record, "from_dict", classmethod(counted_from))
    monkeypatch.setattr("attnsurgery.search.coordinator.search._Search._confirm", lambda self: None)
    config = SearchConfig(
        budget_params=1_000_000,
        trials=4,
        epochs=1,
        base_epochs=1,
        input_size=32,
        workers=0,
        output=str(tmp_path / "run"),
    )
    asked = len(run(config).records)
    assert calls["as_dict"] <= 2 * asked
    assert calls["from_dict"] <= asked
