"""The search on tiny images with a computed latency keeps budgets, resumes, and reports honestly."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import warnings
import wsgiref.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import safetensors.torch
import timm
import torch
from typer.testing import CliRunner

import attnsurgery.search.execution.trial as trial_module
from attnsurgery.cli import build_app
from attnsurgery.cli.search import command_of
from attnsurgery.errors import NothingFeasibleError, SearchError, SurgeryError, UnknownNameError, UsageError
from attnsurgery.evaluate import Epoch, blocks_only, finetune
from attnsurgery.recipe.text import load
from attnsurgery.search import Listener, Outcome, Record, SearchConfig, Timing, run
from attnsurgery.search.files import Journal, locked, write_atomically
from attnsurgery.search.result.record import Promotion, best, contenders, front
from attnsurgery.search.storage.schema import trials_of
from attnsurgery.search.storage.store import Store
from attnsurgery.search.storage.urls import without_password
from tests._searches import SPACE, change, small_search, write_images, write_space

pytestmark = pytest.mark.usefixtures("no_pictures", "one_thread")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_space(tmp_path_factory.mktemp("space"))


@pytest.fixture
def config(tmp_path: Path, images: Path, space: Path) -> SearchConfig:
    return small_search(images, space, tmp_path / "run")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, images: Path, space: Path) -> Outcome:
    config = small_search(images, space, tmp_path_factory.mktemp("finished") / "run")
    return run(config, command=command_of(config))


def essence(records: list[Record]) -> list[tuple[object, ...]]:
    return [(r.state, dict(r.assignment), r.digest, r.metric, r.loss, r.timing) for r in records]


def differences(actual: list[Record], expected: list[Record]) -> str:
    """Returns the first difference, since pytest would compare the long reprs for minutes."""
    for one, other in zip(essence(actual), essence(expected), strict=False):
        if one != other:
            return f"{one} != {other}"
    return "" if len(actual) == len(expected) else f"{len(actual)} records, not {len(expected)}"


def base_ms(outcome: Outcome) -> float:
    assert outcome.base.timing is not None
    return outcome.base.timing.ms


class StopAfter:
    """Requests a stop after it was called `asks` times."""

    def __init__(self, asks: int) -> None:
        self.left = asks

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.mark.slow
def test_search_trains_as_many_as_wanted(finished: Outcome) -> None:
    """A search trains as many different candidates as were ordered, and the best is on the front."""
    assert finished.trained == 4
    assert finished.about.candidates == 80
    assert not finished.interrupted
    assert len({record.digest for record in finished.records if record.state == "trained"}) == 4
    assert finished.best in finished.front


@pytest.mark.slow
def test_budget_pruned_before_training(config: SearchConfig, finished: Outcome) -> None:
    """A trial over the budget is pruned before it is trained."""
    times = sorted(r.timing.ms for r in finished.records if r.timing)
    tight = change(config, budget_ms=(times[0] + times[1]) / 2, trials=2)
    trained_names: list[str] = []

    class Watch(Listener):
        def trial_started(self, number: int, name: str) -> None:
            self.name = name

        def epoch(self, epoch: Epoch) -> None:
            trained_names.append(getattr(self, "name", "base"))

    outcome = run(tight, Watch())
    over = [r for r in outcome.records if r.state == "over_budget"]
    assert over
    for record in over:
        assert record.timing is not None
        assert record.timing.ms > tight.budget_ms
        assert record.metric is None
        assert record.recipe is not None
        assert record.recipe["name"] not in trained_names
    study = optuna.load_study(study_name="run", storage=f"sqlite:///{outcome.folder / 'study.db'}")
    trial = study.trials[over[0].number]
    assert trial.state is optuna.trial.TrialState.PRUNED
    assert trial.system_attrs["constraints:latency"] > 0
    within = next(r for r in outcome.records if r.state == "trained")
    assert study.trials[within.number].system_attrs["constraints:latency"] <= 0


@pytest.mark.slow
def test_resumed_trials_equal_straight_ones(config: SearchConfig, finished: Outcome) -> None:
    """Two trials and two more are the same trials as four in one run."""
    first = run(change(config, trials=2))
    assert first.trained == 2
    again = run(config)
    assert again.trained == 4
    assert differences(again.records, finished.records) == ""
    assert again.confirmation == finished.confirmation


@pytest.mark.slow
def test_additive_sampler_resumes_equally(config: SearchConfig, tmp_path: Path) -> None:
    """One trial and two more are the same as three in one run with the additive sampler."""
    additive = change(config, sampler="additive", trials=3)
    straight = run(change(additive, output=str(tmp_path / "straight")))
    run(change(additive, trials=1))
    assert differences(run(additive).records, straight.records) == ""
    assert [record.state for record in straight.records] == ["trained"] * 3


@pytest.mark.slow
def test_seed_changes_the_trials(config: SearchConfig, finished: Outcome) -> None:
    """Another seed gives other trials."""
    other = run(change(config, seed=1, trials=2))
    assert differences(other.records, finished.records[:2]) != ""


@pytest.mark.parametrize("asks", [9])
@pytest.mark.slow
def test_interrupted_search_resumes_equally(config: SearchConfig, finished: Outcome, asks: int) -> None:
    """An interrupted search goes on as if it had not been interrupted."""
    run(change(config, trials=1))  # base and first trial are there; the next stop falls into the trials
    stopped = run(config, stop=StopAfter(asks))
    assert stopped.interrupted
    assert 1 <= stopped.trained < 4
    assert (stopped.folder / "report.html").read_text().count("Interrupted: the same command resumes the search") == 1
    again = run(config)
    assert not again.interrupted
    assert again.trained == 4
    assert differences(again.records, finished.records) == ""
    assert [record.number for record in again.records] == [record.number for record in finished.records]


@pytest.mark.slow
def test_trial_survives_death_before_tell(
    config: SearchConfig, finished: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that dies before it tells the study of a trial loses no finished trial."""
    settle = Store._settle
    calls: list[int] = []

    def dies(self: Store, record: Record) -> None:
        calls.append(record.number)
        if len(calls) == 2:
            raise KeyboardInterrupt
        settle(self, record)

    monkeypatch.setattr(Store, "_settle", dies)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    monkeypatch.setattr(Store, "_settle", settle)
    again = run(config)
    assert differences(again.records, finished.records) == ""


@pytest.mark.slow
def test_running_trial_of_dead_is_taken_up(
    config: SearchConfig, finished: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial that a dead process left running is taken up again."""
    calls: list[int] = []
    real = trial_module.build

    def dies(*args: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(trial_module, "build", dies)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    again = run(config)
    assert differences(again.records, finished.records) == ""
    assert sorted(record.attempts for record in again.records) == [1, 1, 1, 2]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("budget_ms", 90.0, r"budget_ms: was 100.0, is now 90.0"),
        ("seed", 3, r"seed: was 0, is now 3"),
        ("epochs", 2, r"epochs: was 1, is now 2"),
        ("space", "se", r"choices\.variables\.layer1.*se\(reduction=32\)"),
        ("batch_size", 2, r"batch_size: was 1, is now 2"),
    ],
)
@pytest.mark.slow
def test_changed_search_is_refused(
    config: SearchConfig, finished: Outcome, field: str, value: object, message: str
) -> None:
    """A search with changed settings is refused with the difference, and writes nothing."""
    before = (finished.folder / "trials.jsonl").read_bytes()
    with pytest.raises(SearchError, match=message):
        run(change(finished.config, **{field: value}))
    assert (finished.folder / "trials.jsonl").read_bytes() == before


@pytest.mark.slow
def test_same_command_after_end_only_reports(finished: Outcome) -> None:
    """The same command after the end trains nothing and reports the same result."""
    trained: list[Epoch] = []

    class Watch(Listener):
        def epoch(self, epoch: Epoch) -> None:
            trained.append(epoch)

    again = run(finished.config, Watch(), command=command_of(finished.config))
    assert trained == []
    assert differences(again.records, finished.records) == ""
    assert again.confirmation == finished.confirmation


@pytest.mark.slow
def test_small_space_ends_without_repeats(config: SearchConfig, tmp_path: Path) -> None:
    """A candidate is never trained twice, and a search in a small space ends."""
    space = tmp_path / "one.yaml"
    space.write_text(SPACE.replace("stage:* branches", "stage:2 branches"))
    outcome = run(change(config, space=str(space), trials=9))
    assert outcome.about.candidates == 2
    digests = [record.digest for record in outcome.records if record.state == "trained"]
    assert len(digests) == len(set(digests)) == 2


@pytest.mark.slow
def test_duplicate_is_told_its_first_result(config: SearchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A duplicate is recorded with the result of the first trial of the same candidate."""
    same = {"layer1.0.bn2": "se(reduction=4)"}
    none = {f"layer{n}.0.{bn}": "none" for n, bn in ((1, "bn2"), (2, "bn2"), (3, "bn3"), (4, "bn2"))}
    plan = iter([{**none, **same}, none, {**none, **same}, {**none, "layer2.0.bn2": "se(reduction=4)"}])
    monkeypatch.setattr("attnsurgery.search.storage.propose._draw_new", lambda space, places, digests, seed: next(plan))
    outcome = run(change(config, trials=2))
    first, base, second, other = outcome.records
    assert [r.state for r in outcome.records] == ["trained", "duplicate", "duplicate", "trained"]
    assert (second.duplicate_of, second.metric, second.timing, second.seconds) == (0, first.metric, first.timing, 0.0)
    assert (base.duplicate_of, base.metric) == (-1, outcome.base.metric)
    assert other.digest != first.digest


@pytest.mark.slow
def test_block_limit_prevents_building(config: SearchConfig, tmp_path: Path) -> None:
    """Candidates with more blocks than max_blocks are never built."""
    space = tmp_path / "few.yaml"
    space.write_text(SPACE.replace("name: small", "name: small\nmax_blocks: 1"))
    outcome = run(change(config, space=str(space), trials=3))
    assert {record.blocks for record in outcome.records if record.state == "trained"} == {1}
    assert all(r.timing is None for r in outcome.records if r.state == "too_many_blocks")


@pytest.mark.slow
def test_nothing_fits_error_lists_fastest(config: SearchConfig, finished: Outcome) -> None:
    """The error for a budget that nothing keeps to lists the fastest candidate that was measured."""
    budget = base_ms(finished) * 1.0001
    with pytest.raises(NothingFeasibleError, match=r"The base alone takes .* The fastest of \d+ measured: .* ms se"):
        run(change(config, budget_ms=budget))
    report = (Path(config.output) / "report.html").read_text()
    assert "No candidate within" in report
    assert "has been trained so far" in report


@pytest.mark.slow
def test_nothing_feasible_exits_with_3(config: SearchConfig) -> None:
    """The command exits with 3 when no candidate fits the budget."""
    args = ["--budget-ms", "0.001", "--data", str(config.data), "--space", config.space, "--latency", "fixed"]
    result = CliRunner().invoke(
        build_app(),
        ["search", "--input-size", "32", "--epochs", "1", "--workers", "0", "--output", config.output, *args],
    )
    assert result.exit_code == 3
    assert "no candidate fits 0.001 ms" in result.stderr


@pytest.mark.slow
def test_failing_candidate_keeps_its_reason(config: SearchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failing candidate fails with its reason, and the search goes on."""
    real = trial_module.operate
    calls: list[int] = []

    def fails_once(*args: object) -> object:
        calls.append(1)
        if len(calls) == 1:
            raise SurgeryError("the knife slipped.")
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(trial_module, "operate", fails_once)
    outcome = run(change(config, trials=2))
    assert outcome.records[0].state == "failed"
    assert outcome.records[0].reason == "the knife slipped."
    assert outcome.trained == 2
    assert "failed: the knife slipped." in (outcome.folder / "report.html").read_text()


@pytest.mark.slow
def test_candidate_unequal_to_base_untrained(config: SearchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A candidate that does not start as the base is not trained."""
    real = trial_module.operate

    def wrong(model: torch.nn.Module, plan: object) -> torch.nn.Module:
        operated = real(model, plan)  # type: ignore[arg-type]
        with torch.no_grad():
            operated.fc.bias += 1.0  # type: ignore[operator, union-attr]
        return operated

    monkeypatch.setattr(trial_module, "operate", wrong)
    with pytest.raises(NothingFeasibleError, match=r"does not start as the base: outputs differ by up to 1"):
        run(change(config, trials=1))


def test_files_hold_what_the_search_recorded(finished: Outcome) -> None:
    """best.yaml, front.csv and the journal hold what the search recorded."""
    recipe = load(finished.folder / "best.yaml")
    assert finished.best is not None
    assert recipe.digest() == finished.best.digest
    with (finished.folder / "front.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["recipe"] for row in rows] == [r.recipe["name"] for r in finished.front if r.recipe]
    journal_records = trials_of(Journal(finished.folder / "trials.jsonl").read())
    assert differences(list(journal_records.values()), finished.records) == ""


def test_report_has_verdict_and_trials(finished: Outcome) -> None:
    """The report has the verdict, every trial and the command."""
    page = (finished.folder / "report.html").read_text()
    assert finished.confirmation is not None
    assert all(f'<td class="n">{record.number}</td>' in page for record in finished.records)
    assert finished.about.conditions in page
    assert "attnsurgery search test_resnet --budget-ms 100.0" in page
    assert f"{100 * finished.confirmation.winner_metric:.2f} %" in page


def test_winner_is_built_by_timm(finished: Outcome) -> None:
    """The winner is a directory that timm builds again."""
    model = timm.create_model(f"local-dir:{finished.folder / 'best'}", pretrained=True).eval()
    assert finished.best is not None
    assert sum(parameter.numel() for parameter in model.parameters()) == finished.best.parameters
    assert model.num_classes == 2
    assert model.pretrained_cfg["input_size"] == (3, 32, 32) or model.pretrained_cfg["input_size"] == [3, 32, 32]


def test_verdict_is_from_unseen_test_images(finished: Outcome) -> None:
    """The verdict comes from test images that no trial has used."""
    assert finished.confirmation is not None
    assert finished.confirmation.images == 8
    assert finished.confirmation.verdict in finished.confirmation.sentence().lower()


def test_run_directory_has_one_search(tmp_path: Path) -> None:
    """Two searches cannot share a run directory at the same time."""
    with locked(tmp_path), pytest.raises(SearchError, match="another search is running"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("cut", range(1, 9))
def test_journal_drops_a_torn_last_line(tmp_path: Path, cut: int) -> None:
    """A torn last line is left out and does not spoil the next one."""
    journal = Journal(tmp_path / "trials.jsonl")
    journal.append({"a": 1})
    journal.append({"b": 2})
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole[:-cut])
    assert journal.read() == [{"a": 1}]
    journal.append({"c": 3})
    assert journal.read() == [{"a": 1}, {"c": 3}]


def test_journal_names_a_damaged_line(tmp_path: Path) -> None:
    """A damaged line in the middle of the journal is named."""
    (tmp_path / "trials.jsonl").write_text('{"a": 1}\n{"b\n{"c": 3}\n')
    with pytest.raises(SearchError, match=r"trials.jsonl:2 is damaged"):
        Journal(tmp_path / "trials.jsonl").read()


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that cannot be written leaves the old one, and no other."""
    path = tmp_path / "best.yaml"
    write_atomically(path, "old")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(SearchError, match="No space left on device"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["best.yaml"]


def record_with(number: int, metric: float, ms: float) -> Record:
    return Record(number, "trained", metric=metric, loss=0.1, timing=Timing(ms, ms, ms, 1.0))


def test_rank_ties_go_by_other_score() -> None:
    """Equal losses are ranked by top-1, and equal top-1 by loss."""
    records = [record_with(0, 0.9, 1.0), record_with(1, 0.8, 1.0), record_with(2, 0.95, 1.0)]
    losses = {0: 0.2, 1: 0.1, 2: 0.2}
    records_with_loss = [replace(record, loss=losses[record.number]) for record in records]
    assert [record.number for record in contenders(records_with_loss, "loss")] == [1, 2, 0]
    assert [record.number for record in contenders(records_with_loss, "metric")] == [2, 0, 1]
    assert [record.number for record in contenders(records, "loss")] == [2, 0, 1]
    assert records_with_loss[1].score_on(0, "loss") == -0.1
    assert records_with_loss[1].score_on(1, "loss") is None
    assert records_with_loss[1].score_on(1, "metric") is None
    promotion = Promotion(metric=0.7, loss=0.3, seconds=1.0, epochs=1)
    risen = replace(records_with_loss[0], promotions=(promotion,))
    assert (risen.score_on(1, "loss"), risen.score_on(1, "metric")) == (-0.3, 0.7)
    assert best([*records_with_loss, risen], "loss") is risen


@pytest.mark.parametrize("field", ["sampler", "evaluator", "rungs", "latency", "dtype", "space", "base"])
def test_unknown_name_refused_before_images(config: SearchConfig, monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    """An unknown name is refused before any image is read."""
    monkeypatch.setattr(
        "attnsurgery.search.execution.assemble.load_data", lambda *args, **named: pytest.fail("images were read")
    )
    with pytest.raises((UsageError, UnknownNameError), match="'nonsense"):
        run(change(config, **{field: "nonsense:1" if field == "rungs" else "nonsense"}))


def test_front_leaves_out_dominated_records() -> None:
    """The front leaves out what is beaten in both, and the best is the fastest of equals."""
    records = [record_with(0, 0.9, 2.0), record_with(1, 0.8, 1.0), record_with(2, 0.85, 3.0), record_with(3, 0.9, 1.5)]
    assert [record.number for record in front(records, "metric")] == [1, 3]
    winner = best(records, "metric")
    assert winner is not None
    assert winner.number == 3
    assert best([replace(records[0], state="over_budget")], "metric") is None


def test_passwords_are_never_shown(config: SearchConfig) -> None:
    """Passwords in URLs of databases are never shown."""
    url = "postgresql://me:secret@host/db"
    assert "secret" not in without_password(url)
    assert "secret" not in command_of(change(config, storage=url))
    with pytest.raises(UsageError, match="not a database URL"):
        without_password("nonsense")


@pytest.mark.parametrize(
    ("words", "variable", "warns"),
    [
        (["--storage", "postgresql://me:secret@127.0.0.1:1/db"], None, True),
        (["--storage", "postgresql://me@127.0.0.1:1/db"], None, False),
        ([], "postgresql://me:secret@127.0.0.1:1/db", False),
    ],
)
def test_password_on_command_line_warns(
    words: list[str], variable: str | None, warns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A password on the command line is advised against, and never printed."""
    configs: list[SearchConfig] = []
    monkeypatch.setattr("attnsurgery.cli.search._run", lambda config, as_json: configs.append(config))
    if variable:
        monkeypatch.setenv("ATTNSURGERY_STORAGE", variable)
    result = CliRunner().invoke(build_app(), ["search", "test_resnet", "--budget-ms", "8", *words])
    assert result.exit_code == 0
    assert ("put the URL into ATTNSURGERY_STORAGE" in " ".join(result.stderr.split())) is warns
    assert "secret" not in result.output
    assert configs[0].storage == (variable or words[1])


def test_pretrained_excludes_checkpoint(config: SearchConfig) -> None:
    """--pretrained and --checkpoint exclude each other."""
    with pytest.raises(UsageError, match="give one"):
        run(change(config, pretrained=True, checkpoint="weights.pth"))


@pytest.mark.slow
def test_checkpoint_is_the_starting_point(config: SearchConfig, finished: Outcome) -> None:
    """A search starts from the weights of its checkpoint, bit for bit."""
    weights = finished.folder / "base.safetensors"
    outcome = run(change(config, checkpoint=str(weights), trials=1))
    assert (outcome.folder / "base.safetensors").read_bytes() == weights.read_bytes()


@pytest.mark.slow
def test_new_head_is_fitted_first(config: SearchConfig, tmp_path: Path) -> None:
    """A head for other classes is fitted by itself before anything is tried."""
    torch.manual_seed(0)
    weights = tmp_path / "five.safetensors"
    safetensors.torch.save_file(timm.create_model("test_resnet", num_classes=5).state_dict(), weights)
    phases: list[str] = []

    class Hearing(Listener):
        def phase(self, text: str) -> None:
            phases.append(text)

    outcome = run(change(config, checkpoint=str(weights), trials=1, base_epochs=3), Hearing())
    assert any(text.startswith("fitting a new head for 2 classes") for text in phases)
    started = safetensors.torch.load_file(outcome.folder / "base.safetensors")
    original = safetensors.torch.load_file(weights)
    moved = {name for name, tensor in original.items() if not torch.equal(tensor, started[name])}
    assert {name for name in moved if "running_" not in name and "num_batches" not in name} == {"fc.weight", "fc.bias"}
    assert "a new head, trained alone for 3 epochs" in (outcome.folder / "report.html").read_text()


@pytest.fixture
def search_cli(config: SearchConfig) -> Callable[..., object]:
    def invoke(*more: str) -> object:
        words = ["search", "--budget-ms", "100", "--data", str(config.data), "--space", config.space, "--epochs", "1"]
        words += ["--lr", "1e-3", "--block-lr-scale", "10"]
        words += ["--input-size", "32", "--latency", "fixed", "--confirm-seeds", "1", "--trials", "1", "--workers", "0"]
        return CliRunner().invoke(build_app(), [*words, "--output", config.output, *more])

    return invoke


@pytest.mark.slow
def test_search_command_prints_plain_lines(search_cli: Callable[..., object]) -> None:
    """The command prints plain lines, and the call that builds the winner."""
    result = search_cli()
    assert result.exit_code == 0, result.output  # type: ignore[attr-defined]
    assert "[1/1] trial 0" in result.stderr  # type: ignore[attr-defined]
    assert "timm.create_model('local-dir:" in result.stdout  # type: ignore[attr-defined]
    assert "\x1b" not in result.output  # type: ignore[attr-defined]


@pytest.mark.slow
def test_search_json_is_all_of_stdout(search_cli: Callable[..., object]) -> None:
    """With --json the result is all that is written to stdout."""
    result = search_cli("--json")
    data = json.loads(result.stdout)  # type: ignore[attr-defined]
    assert data["trained"] == 1
    assert data["confirmation"]["verdict"]
    assert Path(data["files"]["report.html"]).is_file()


def test_wrong_option_value_is_usage_error(search_cli: Callable[..., object]) -> None:
    """A wrong option value is a usage error."""
    result = search_cli("--lr", "0")
    assert result.exit_code == 2  # type: ignore[attr-defined]
    assert "--lr cannot be 0.0" in result.stderr  # type: ignore[attr-defined]


@pytest.mark.slow
def test_blocks_search_is_confirmed_in_full(config: SearchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that trains blocks alone is confirmed by fine-tuning all parameters."""
    trained: list[int] = []
    real = finetune.train

    def counts(model: torch.nn.Module, *args: object, **kwargs: object) -> None:
        trained.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
        real(model, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(finetune, "train", counts)
    monkeypatch.setattr(blocks_only, "train", counts)
    outcome = run(change(config, evaluator="blocks", trials=2))
    everything = max(trained)
    assert outcome.trained == 2
    assert trained[-2:] == [everything, trained[-1]]  # winner and base in the end
    assert all(count < everything / 2 for count in trained[:-2])


@pytest.mark.slow
def test_earlier_latencies_predict_too_slow(config: SearchConfig, finished: Outcome) -> None:
    """The second search knows the first one's latencies, and builds nothing that is surely too slow."""
    run(change(config, trials=8))
    times = sorted(record.timing.ms for record in finished.records if record.timing)
    second = change(config, budget_ms=times[0] * 1.001, output=f"{config.output}-2", sampler="random", trials=12)
    try:
        records = run(second).records
    except NothingFeasibleError:
        records = list(trials_of(Journal(Path(second.output) / "trials.jsonl").read()).values())
    predicted = [record for record in records if record.predicted_ms is not None and record.state != "duplicate"]
    assert predicted
    for record in predicted:
        assert (record.state, record.timing) == ("over_budget", None)
        assert record.predicted_ms is not None
        assert second.budget_ms is not None
        assert record.predicted_ms > second.budget_ms


def test_trained_candidates_have_proxies(finished: Outcome) -> None:
    """Every trained candidate has all scores that need no training."""
    trained = [record for record in finished.records if record.state == "trained"]
    assert all(set(record.proxies) == {"grad_norm", "synflow"} for record in trained)
    assert len({record.proxies["grad_norm"] for record in trained}) == len(trained)


@pytest.mark.slow
def test_optuna_command_reads_the_study(finished: Outcome) -> None:
    """Optuna's own command line reads the study."""
    words = ["trials", "--storage", f"sqlite:///{finished.folder / 'study.db'}", "--study-name", "run", "-f", "json"]
    program = "from optuna.cli import main; raise SystemExit(main())"
    process = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=True)
    trials = json.loads(process.stdout)
    assert [trial["number"] for trial in trials] == [record.number for record in finished.records]
    assert [trial["state"] for trial in trials].count("COMPLETE") == finished.trained


def test_optunas_dashboard_shows_the_study(finished: Outcome) -> None:
    """Optuna's dashboard shows the study and its trials."""
    dashboard = pytest.importorskip("optuna_dashboard")
    storage = optuna.storages.RDBStorage(f"sqlite:///{finished.folder / 'study.db'}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the dashboard itself is warned of
            site = dashboard.wsgi(storage)
            (study,) = json.loads(response_of(site, "/api/studies"))["study_summaries"]
            trials = json.loads(response_of(site, f"/api/studies/{study['study_id']}"))["trials"]
    finally:
        storage.remove_session()
        storage.engine.dispose()
    assert study["study_name"] == "run"
    assert [trial["number"] for trial in trials] == [record.number for record in finished.records]


def response_of(site: Any, path: str) -> str:
    """Returns the response of a WSGI site."""
    status: list[str] = []
    environ: dict[str, Any] = {"PATH_INFO": path}
    wsgiref.util.setup_testing_defaults(environ)
    body = b"".join(site(environ, lambda status_line, headers, error=None: status.append(status_line)))
    assert status == ["200 OK"], body
    return body.decode()
