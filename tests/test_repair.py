"""Repair of a run directory whose study or journal is damaged, is missing, or is of another version."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import optuna
import pytest
from typer.testing import CliRunner

from attnsurgery.cli import build_app
from attnsurgery.errors import SearchError, UsageError
from attnsurgery.search import Outcome, SearchConfig, run
from attnsurgery.search.files import Journal, locked
from attnsurgery.search.storage.load import load_search
from attnsurgery.search.storage.repair import repair
from attnsurgery.search.storage.schema import STUDY, TRIALS, facts_of, trials_of
from tests._searches import change, small_search, write_images, write_space

pytestmark = pytest.mark.usefixtures("no_pictures", "one_thread")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A search with two rungs, whose trials hold more than the study records."""
    folder = tmp_path_factory.mktemp("search")
    config = small_search(write_images(folder / "images"), write_space(folder), folder / "run")
    return run(change(config, rungs="blocks:1", trials=3))


@pytest.fixture
def damaged(finished: Outcome, tmp_path: Path) -> Path:
    shutil.copytree(finished.folder, tmp_path / "run")
    return tmp_path / "run"


def config_in(finished: Outcome, folder: Path) -> SearchConfig:
    return change(finished.config, output=str(folder))


def trials_in(folder: Path) -> list[tuple[str, dict[str, object], object, dict[str, object]]]:
    """Returns what samplers see of a study."""
    study = optuna.load_study(study_name="run", storage=f"sqlite:///{folder / STUDY}")
    return [(trial.state.name, trial.params, trial.values, trial.constraints) for trial in study.trials]


def overwrite(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[100 : len(content) // 2] = b"\xff" * (len(content) // 2 - 100)
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [Path.unlink, overwrite, lambda path: path.write_bytes(b"")])
@pytest.mark.slow
def test_repair_rebuilds_study_from_journal(finished: Outcome, damaged: Path, damage: object) -> None:
    """A study is rebuilt from the journal, and the search goes on as if nothing had happened."""
    before = trials_in(damaged)
    damage(damaged / STUDY)  # type: ignore[operator]
    result = repair(damaged)
    assert (result.from_study, result.from_journal, result.damaged_lines) == (None, len(finished.records), 0)
    assert trials_in(damaged) == before
    assert load_search(damaged).outcome.records == finished.records
    again = run(config_in(finished, damaged))
    assert again.records == finished.records
    assert again.confirmation == finished.confirmation
    more = run(change(config_in(finished, damaged), trials=4))
    straight = run(change(finished.config, trials=4, output=f"{damaged}-straight"))
    assert [r.assignment for r in more.records] == [r.assignment for r in straight.records]


@pytest.mark.parametrize("cut", ["a line in the middle", "everything"])
@pytest.mark.slow
def test_repair_rebuilds_journal_from_study(finished: Outcome, damaged: Path, cut: str) -> None:
    """A journal is rebuilt from the study, and the search goes on."""
    lines = (damaged / TRIALS).read_bytes().splitlines(keepends=True)
    lines = [] if cut == "everything" else [*lines[:3], lines[3][:40] + b"\n", *lines[4:]]
    (damaged / TRIALS).write_bytes(b"".join(lines))
    if lines:
        with pytest.raises(
            SearchError, match=r"is damaged and is not the last line\. If it is of a search, attnsurgery repair"
        ):
            run(config_in(finished, damaged))
    result = repair(damaged)
    assert result.damaged_lines == (1 if lines else 0)
    entries = Journal(damaged / TRIALS).read()
    assert list(trials_of(entries).values()) == finished.records
    assert facts_of(entries)["config"]["budget_ms"] == 100.0
    assert run(config_in(finished, damaged)).records == finished.records


@pytest.mark.slow
def test_repair_of_sound_files_keeps_both(finished: Outcome, damaged: Path) -> None:
    """The old files are kept, and the repair of a sound directory changes nothing."""
    before, journal = trials_in(damaged), (damaged / TRIALS).read_bytes()
    result = repair(damaged)
    assert result.kept == (f"{STUDY}.before-repair-1", f"{TRIALS}.before-repair-1")
    assert (damaged / f"{TRIALS}.before-repair-1").read_bytes() == journal
    assert trials_in(damaged) == before
    assert repair(damaged).kept == (f"{STUDY}.before-repair-2", f"{TRIALS}.before-repair-2")
    assert load_search(damaged).outcome.records == finished.records


def test_repair_refuses_unknown_searches(damaged: Path, tmp_path: Path) -> None:
    """A directory that says nothing of its search is refused and left alone."""
    (damaged / STUDY).unlink()
    entries = [line for line in (damaged / TRIALS).read_text().splitlines() if '"fact"' not in line]
    (damaged / TRIALS).write_text("\n".join(entries) + "\n")
    (damaged / ".lock").unlink(missing_ok=True)
    there = sorted(path.name for path in damaged.iterdir())
    with pytest.raises(SearchError, match=r"neither study.db nor trials.jsonl says what the search was"):
        repair(damaged)
    assert sorted(path.name for path in damaged.iterdir()) == there
    with pytest.raises(UsageError, match="is no run directory"):
        repair(tmp_path)
    with locked(damaged), pytest.raises(SearchError, match="another search is running"):
        repair(damaged)


def test_newer_format_is_refused(finished: Outcome, damaged: Path) -> None:
    """A directory that a newer version has written is refused by run, read and repair."""
    study = optuna.load_study(study_name="run", storage=f"sqlite:///{damaged / STUDY}")
    study.set_user_attr("format", 2)
    with (damaged / TRIALS).open("a") as file:
        file.write(json.dumps({"fact": "format", "value": 2}) + "\n")
    journal = (damaged / TRIALS).read_bytes()
    for way in (lambda: run(config_in(finished, damaged)), lambda: load_search(damaged), lambda: repair(damaged)):
        with pytest.raises(SearchError, match=r"written by a newer attnsurgery \(format 2, and this one knows 1\)"):
            way()
    assert (damaged / TRIALS).read_bytes() == journal


@pytest.mark.slow
def test_repair_command_reports_its_finds(damaged: Path) -> None:
    """The command says which file it could not read and how many trials there are."""
    overwrite(damaged / STUDY)
    result = CliRunner().invoke(build_app(), ["repair", str(damaged)])
    assert result.exit_code == 0, result.output
    assert "study.db   could not be read" in result.stdout
    assert "trained    " not in result.stdout
    assert "of these 3 trained" in result.stdout


@pytest.mark.slow
def test_other_versions_need_extend(finished: Outcome, damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other versions of the software are refused with the difference, and extend goes on."""
    monkeypatch.setattr("attnsurgery.search.execution.bench.timm.__version__", "9.9.9")
    config = config_in(finished, damaged)
    with pytest.raises(
        SearchError, match=r"versions.timm: was '[\d.]+', is now '9.9.9'\. Resume it nevertheless with --ext"
    ):
        run(config)
    again = run(change(config, extend=True))
    assert again.records == finished.records
    assert any(text.startswith("extended, versions.timm: was") for text in again.about.code)
    assert run(config).records == finished.records, "now it is that of before"


def test_new_output_gets_the_next_number(damaged: Path) -> None:
    """--new begins another search beside the old one, under the next free name."""
    from attnsurgery.cli.search import _free

    assert _free(str(damaged)) == f"{damaged}-2"
    Path(f"{damaged}-2").mkdir()
    assert _free(str(damaged)) == f"{damaged}-3"
    assert _free(f"{damaged}-other") == f"{damaged}-other"
