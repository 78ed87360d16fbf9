"""Extending a search under other terms: another budget, a larger search space, another sampler."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import optuna
import pytest
from typer.testing import CliRunner

from attnsurgery.cli import build_app
from attnsurgery.errors import SearchError
from attnsurgery.search import Outcome, Record, SearchConfig, run
from attnsurgery.search.compatibility import check_same, fixed_part
from attnsurgery.search.result.record import trained
from attnsurgery.search.storage.load import load_search
from attnsurgery.search.storage.repair import repair
from attnsurgery.search.storage.schema import STUDY, TRIALS
from tests._searches import SPACE, change, small_search, write_images, write_space

pytestmark = pytest.mark.usefixtures("no_pictures", "one_thread")

TWO_BLOCKS = SPACE.replace("name: small\n", "name: small\nmax_blocks: 2\n")
MORE = TWO_BLOCKS.replace("max_blocks: 2", "max_blocks: 3").replace("[4, 16]", "[4, 16, 8]") + (
    '  - at: "stage:4 last"\n    choices:\n      - block: timm:eca\n'
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A search whose candidates have one or two blocks and are all within the budget."""
    folder = tmp_path_factory.mktemp("search")
    config = small_search(write_images(folder / "images"), write_space(folder), folder / "run")
    Path(config.space).write_text(TWO_BLOCKS)
    return run(change(config, trials=6, rungs="blocks:1"))


@pytest.fixture
def config(finished: Outcome, tmp_path: Path) -> SearchConfig:
    """The configuration of a copy of that search."""
    shutil.copytree(finished.folder, tmp_path / "run")
    space = tmp_path / "space.yaml"
    space.write_text(TWO_BLOCKS)
    return change(finished.config, output=str(tmp_path / "run"), space=str(space))


def tighter_than(finished: Outcome, rank: int = -2) -> float:
    """One of the sorted latencies of trained candidates as a budget; by default only the slowest exceeds it."""
    times = sorted({record.timing.ms for record in trained(finished.records) if record.timing})
    assert len(times) > 2, "candidates that all take as long test nothing"
    return times[rank]


def scores(records: list[Record]) -> dict[str, object]:
    return {f"{one.digest}": (one.metric, one.loss, one.seconds) for one in records if one.metric is not None}


def facts_of(record: Record) -> tuple[object, ...]:
    return (
        record.number,
        record.state,
        record.assignment,
        record.metric,
        record.promotions and record.promotions[0].metric,
    )


def hashes(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
def test_extend_tighter_budget_reuses_trials(finished: Outcome, config: SearchConfig) -> None:
    """A tighter budget reuses what was trained, checks it against the new limit, and confirms the winner again."""
    most = tighter_than(finished)
    tighter = run(change(config, budget_ms=most, extend=True))
    within = {r.number for r in trained(finished.records) if r.timing and r.timing.ms <= most}
    over = {r.number for r in trained(finished.records)} - within
    by_number = {record.number: record for record in tighter.records}
    assert within
    assert over
    assert all(by_number[number] == finished.records[number] for number in within), (
        "kept as they are, not trained again"
    )
    assert {by_number[number].state for number in over} == {"over_budget"}
    assert all(by_number[number].metric == finished.records[number].metric for number in over)
    assert len(trained(tighter.records)) == config.trials
    assert all(r.timing and r.timing.ms <= most for r in trained(tighter.records))
    assert tighter.best
    assert tighter.best.timing
    assert tighter.best.timing.ms <= most
    assert tighter.confirmation
    assert finished.confirmation
    assert tighter.confirmation.looks == finished.confirmation.looks + 1
    assert any(text.startswith(f"extended, budget_ms: was 100.0, is now {most}") for text in tighter.about.code)
    assert (
        f"{len(over)} over budget, trained when the budget was larger" in (tighter.folder / "report.html").read_text()
    )
    again = run(change(config, budget_ms=most))
    assert (again.records, again.confirmation) == (tighter.records, tighter.confirmation), "now it is that search"


@pytest.mark.slow
def test_extend_study_keeps_all_scores(finished: Outcome, config: SearchConfig) -> None:
    """The study keeps the scores of candidates that are over the new budget, with their constraints."""
    most = tighter_than(finished)
    done = run(change(config, budget_ms=most, extend=True))
    study = optuna.load_study(study_name="run", storage=f"sqlite:///{done.folder / STUDY}")
    for record in finished.records:
        trial = study.trials[record.number]
        assert trial.value == record.metric
        assert record.timing
        assert trial.constraints["latency"] == pytest.approx(record.timing.ms / most - 1)
    assert study.best_trial.constraints["latency"] <= 0


@pytest.mark.slow
def test_extend_back_to_wider_budget(finished: Outcome, config: SearchConfig) -> None:
    """Going back to the wider budget counts the same trials again and trains nothing."""
    tighter = run(change(config, budget_ms=tighter_than(finished), extend=True))
    back = run(change(config, extend=True))
    known = scores(finished.records) | scores(tighter.records)
    assert scores(back.records) == known
    assert len(trained(back.records)) == len(known) > config.trials, "nothing was trained for it"
    assert back.confirmation
    assert back.confirmation.looks == 3


@pytest.mark.slow
def test_extend_wider_budget_retries_pruned(finished: Outcome, config: SearchConfig) -> None:
    """A candidate that was over the budget may be tried under a wider one."""
    shutil.rmtree(config.output)
    narrow = run(change(config, budget_ms=tighter_than(finished, rank=1), trials=4))
    untrained = {r.digest for r in narrow.records if r.state == "over_budget"}
    assert untrained
    wide = run(change(config, extend=True, trials=12))
    assert scores(narrow.records).items() <= scores(wide.records).items()
    assert not untrained & {r.digest for r in wide.records if r.state == "over_budget"}
    assert all(one.state in ("trained", "duplicate", "too_many_blocks") for one in wide.records)
    numbers = [record.number for record in wide.records]
    assert len(set(numbers)) == len(numbers)
    assert len(trained(wide.records)) == 12


@pytest.mark.slow
def test_extend_larger_space_reuses_training(finished: Outcome, config: SearchConfig) -> None:
    """A search space that offers more reuses what was trained."""
    Path(config.space).write_text(MORE)
    more = run(change(config, extend=True, trials=12))
    assert scores(finished.records).items() <= scores(more.records).items()
    new = [record for record in trained(more.records) if record.number > finished.records[-1].number]
    assert any("eca" in record.describe() or "reduction=8" in record.describe() or record.blocks == 3 for record in new)
    assert all("layer4" in " ".join(record.assignment) for record in more.records)
    assert any("choices.max_blocks: was 2, is now 3" in text for text in more.about.code)
    assert load_search(more.folder).outcome.records == more.records


@pytest.mark.parametrize(
    ("space", "fields", "message"),
    [
        (
            TWO_BLOCKS,
            {"budget_ms": 50.0},
            r"budget_ms: was 100\.0, is now 50\.0\. Resume it under the present terms with --ext",
        ),
        (TWO_BLOCKS, {"sampler": "tpe"}, r"sampler: was 'additive', is now 'tpe'\. Resume it under the present terms"),
        (
            MORE,
            {},
            r"choices\.max_blocks: was 2, is now 3; .*layer1\.0\.bn2 and at 3 other places: was \[.*\. Resume it",
        ),
        (TWO_BLOCKS, {"extend": True, "seed": 5}, r"seed: was 0, is now 5\. Repeat the first command"),
        (
            TWO_BLOCKS,
            {"extend": True, "epochs": 2, "budget_ms": 5.0},
            r"compared\. epochs: was 1, is now 2\. R",
        ),
        (TWO_BLOCKS, {"extend": True, "budget_mb": 900.0}, r"budget_mb: was None, is now 900\.0\. Repeat"),
        (
            TWO_BLOCKS.replace("[4, 16]", "[4]"),
            {"extend": True},
            r"is now \['none', 'se\(.*a space that offers more",
        ),
        (
            TWO_BLOCKS.replace("blocks: 2", "blocks: 1"),
            {"extend": True},
            r"\.max_blocks: was 2, is now 1\. --ext",
        ),
    ],
)
@pytest.mark.slow
def test_extend_refuses_another_search(
    config: SearchConfig, space: str, fields: dict[str, object], message: str
) -> None:
    """Another search is refused with the difference, and no file changes."""
    Path(config.space).write_text(space)
    before = hashes(Path(config.output))
    with pytest.raises(SearchError, match=message):
        run(change(config, **fields))
    assert hashes(Path(config.output)) == before


def test_check_same_shortens_long_lists() -> None:
    """A long list of differences is cut short, and its remainder counted."""
    before, now = ({"budget_mb": None, "versions": {f"package {n}": part for n in range(11)}} for part in (1, 2))
    with pytest.raises(SearchError, match=r"package 0: was 1, is now 2; .*; and 3 more\. Resume it nevertheless"):
        check_same(before, now, "there")
    assert len(check_same(before, now, "there", extend=True)) == 11


def test_extend_suggests_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a run directory to extend, the command names the one that may be meant."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "test_resnet-pairs-auto-10ms").mkdir(parents=True)
    (tmp_path / "runs" / "test_resnet-pairs-auto-10ms" / STUDY).touch()
    result = CliRunner().invoke(build_app(), ["search", "test_resnet", "--budget-ms", "8", "--extend"])
    assert result.exit_code == 2
    assert "--output runs/test_resnet-pairs-auto-10ms" in " ".join(result.stderr.split())
    assert not (tmp_path / "runs" / "test_resnet-pairs-auto-8ms").exists()


@pytest.mark.slow
def test_extend_refuses_shared_study(finished: Outcome, config: SearchConfig) -> None:
    """A study that others may share keeps its budget."""
    shared = change(config, storage=f"sqlite:///{Path(config.output) / STUDY}", budget_ms=50.0, extend=True)
    with pytest.raises(SearchError, match=r"others may be at its study, .* budget_ms: was 100\.0, is now 50\.0\. Rep"):
        run(shared)


@pytest.mark.slow
def test_extend_keeps_resumable_old_study(finished: Outcome, config: SearchConfig) -> None:
    """The old study stays beside the new one and can be resumed."""
    run(change(config, budget_ms=tighter_than(finished), extend=True))
    folder = Path(config.output)
    for name in (STUDY, TRIALS):
        (folder / f"{name}.before-extend-1").replace(folder / name)
    assert run(config).records == finished.records
    assert (folder / "best.before-extend-1").is_dir()


@pytest.mark.slow
def test_extend_resumes_after_interrupt(
    finished: Outcome, config: SearchConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A run that is interrupted while it is extended goes on by the same command."""
    other = change(config, output=str(tmp_path / "straight" / "run"), budget_ms=tighter_than(finished), extend=True)
    shutil.copytree(config.output, other.output)

    def die(path: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:  # the journal is the new one by then, and the study the old one
        patched.setattr("attnsurgery.search.storage.rebuild.replace_file", die)
        with pytest.raises(KeyboardInterrupt):
            run(change(other, output=config.output))
    dead = run(change(other, output=config.output))
    assert [facts_of(record) for record in dead.records] == [facts_of(record) for record in run(other).records]


@pytest.mark.slow
def test_extended_study_can_be_repaired(finished: Outcome, config: SearchConfig) -> None:
    """The study of an extended search can be repaired from its journal."""
    tighter = run(change(config, budget_ms=tighter_than(finished), extend=True))
    (tighter.folder / STUDY).unlink()
    repair(tighter.folder)
    repaired = load_search(tighter.folder).outcome
    assert repaired.records == tighter.records
    assert repaired.seconds == pytest.approx(tighter.seconds, rel=0.5)
    assert run(change(config, budget_ms=tighter_than(finished))).records == tighter.records


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "float32"), ("cuda", "bfloat16"), ("cuda", "float32")])
def test_search_before_new_setting_resumes(device: str, dtype: str) -> None:
    """A search from before a setting existed resumes if it did what the setting now says, and is refused otherwise."""
    settings = {"budget_ms": 10.0, "device": device, "dtype": dtype, "mode": "eager", "channels_last": False}
    train_dtype = "bfloat16" if dtype == "bfloat16" else "float32"
    now = fixed_part(SearchConfig(**settings, train_dtype=train_dtype), {})  # type: ignore[arg-type]
    added = ("budget_ips", "tf32", "cudnn_benchmark", "cold_cache", "train_dtype")
    before = {name: value for name, value in now.items() if name not in added}
    assert check_same(before, now, "there") == {}
    with pytest.raises(SearchError, match="cold_cache: was False, is now True"):
        check_same(before, {**now, "cold_cache": True}, "there")
