"""Tests of which files a search may write, which files it trusts, and what it reports of its own numbers."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import optuna
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import attnsurgery.search.execution.jobs as jobs_module
from attnsurgery.cli import build_app
from attnsurgery.cli._console import building
from attnsurgery.cli._search_view import files_of
from attnsurgery.data import Preprocessing, load_data
from attnsurgery.data.contents import load_digests
from attnsurgery.errors import AttnSurgeryError, NothingFeasibleError, SearchError, UsageError
from attnsurgery.evaluate import Score, TrainSettings
from attnsurgery.evaluate.finetune import FineTune
from attnsurgery.latency import Conditions, Latency
from attnsurgery.latency.fixed import FixedLatency
from attnsurgery.recipe.strict_yaml import reads
from attnsurgery.recipe.text import load
from attnsurgery.search import Listener, Outcome, SearchConfig, run
from attnsurgery.search.compatibility import check_same
from attnsurgery.search.coordinator.confirm import confirm
from attnsurgery.search.coordinator.start import starting_weights_of
from attnsurgery.search.execution.assemble import assemble
from attnsurgery.search.execution.baseline import hash_of
from attnsurgery.search.execution.bench import Bench
from attnsurgery.search.execution.jobs import Job
from attnsurgery.search.execution.preview import _seconds, preview
from attnsurgery.search.files import Journal
from attnsurgery.search.result.confirmation import Confirmation
from attnsurgery.search.result.limits import Budgets
from attnsurgery.search.result.statistics import gain_of
from attnsurgery.search.storage.facts import stored_facts
from attnsurgery.search.storage.run_directory import (
    CONFIG,
    MARK,
    WEIGHTS,
    check_free,
    mark,
    remove_own,
    replace_own,
    set_aside,
    write_own,
)
from attnsurgery.search.storage.schema import TRIALS, trials_of
from attnsurgery.search.storage.urls import check_url
from attnsurgery.search.workers.pool import WorkerPool
from tests._searches import change, small_search, timing, trial, write_images, write_space

pytestmark = pytest.mark.usefixtures("no_pictures", "one_thread")


SMALL = Preprocessing.of(timm.create_model("test_resnet"), (3, 32, 32))


def weights(path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    safetensors.torch.save_file(timm.create_model("test_resnet", num_classes=2).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A search of one candidate, which started from weights of a file."""
    folder = tmp_path_factory.mktemp("search")
    config = small_search(write_images(folder / "images"), write_space(folder), folder / "run")
    return run(change(config, trials=1, checkpoint=str(weights(folder / "a.safetensors", 1))))


@pytest.fixture
def copied(finished: Outcome, tmp_path: Path) -> SearchConfig:
    """The settings of a copy of the finished search."""
    shutil.copytree(finished.folder, tmp_path / "run")
    return change(finished.config, output=str(tmp_path / "run"))


@pytest.fixture
def config(finished: Outcome, tmp_path: Path) -> SearchConfig:
    """The settings of the same search, not yet started, without weights of its own."""
    return change(finished.config, output=str(tmp_path / "run"), checkpoint=None)


@pytest.fixture
def no_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test when images are read: a refusal comes before that."""
    monkeypatch.setattr(
        "attnsurgery.search.execution.assemble.load_data", lambda *args, **kwargs: pytest.fail("images were read")
    )


class PhaseRecorder(Listener):
    def __init__(self) -> None:
        self.phases: list[str] = []

    def phase(self, text: str) -> None:
        self.phases.append(text)


def hashes(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


# Whose directory it is


def _winners(folder: Path) -> None:
    (folder / "best").mkdir()
    (folder / "best" / "my_weights.pth").write_text("w")


def _recipe(folder: Path) -> None:
    (folder / "best.yaml").write_text("mine")


def _stray_base(folder: Path) -> None:
    weights(folder / WEIGHTS, 5)


def _journal(folder: Path) -> None:
    """Writes a file of that name as another program does; issues about MLflow and Lightning report such files."""
    (folder / TRIALS).write_text('{"trial": 1, "format": 1}\n{"fact": "format", "value": "jsonl"}\n')


def _study(folder: Path) -> None:
    """Writes a database of Optuna's with a study of the user's own."""
    study = optuna.create_study(storage=f"sqlite:///{folder / 'study.db'}", study_name="mine")
    study.set_user_attr("owner", "me")


def _database(folder: Path) -> None:
    (folder / "study.db").write_bytes(b"no database")


OTHERS = [_winners, _recipe, _stray_base, _journal, _study, _database]


@pytest.mark.parametrize("fill", OTHERS)
@pytest.mark.slow
def test_directory_of_others_is_refused(config: SearchConfig, no_images: None, fill: Any) -> None:
    """A directory with files of others is refused and stays as it is."""
    folder = Path(config.output)
    folder.mkdir()
    fill(folder)
    before = hashes(folder)
    for way in (run, preview):
        with pytest.raises(UsageError, match=r"run is no run directory and not empty: it holds .* Name another one"):
            way(config)
    assert hashes(folder) == before


def test_check_free_takes_empty_or_new(tmp_path: Path) -> None:
    """A file is no directory; an empty or a new directory is accepted."""
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        check_free(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    for name in (".lock", ".gitkeep", f".{MARK}.0123abcd.partial"):
        (tmp_path / "empty" / name).touch()
        check_free(tmp_path / "empty")
    check_free(tmp_path / "new" / "er")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("file_name", ["study.db", TRIALS, MARK])
def test_directory_known_by_mark_or_files(copied: SearchConfig, file_name: str) -> None:
    """A run directory is known by its mark, or by its study or journal where it has none."""
    folder = Path(copied.output)
    for path in folder.iterdir():
        if path.is_file() and path.name not in (file_name, WEIGHTS):
            path.unlink()
    check_free(folder)
    mark(folder)
    assert (folder / MARK).is_file()
    if file_name != MARK:
        remove_own(folder, WEIGHTS)
        assert not (folder / WEIGHTS).exists(), "weights from before there were notes are the search's own"


def test_report_is_not_written_among_others(copied: SearchConfig, tmp_path: Path) -> None:
    """The report of a study in another storage is not written into a folder of others."""
    folder = tmp_path / "project"
    folder.mkdir()
    _recipe(folder)
    words = ["report", str(folder), "--storage", f"sqlite:///{copied.output}/study.db"]
    result = CliRunner().invoke(build_app(), words)
    assert result.exit_code == 2
    assert "project is no run directory and not empty: it holds best.yaml" in result.stderr
    assert [path.name for path in folder.iterdir()] == ["best.yaml"]


def test_current_directory_is_refused_too(
    config: SearchConfig, no_images: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The current directory is refused like any other that is not empty."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.sh").touch()
    with pytest.raises(UsageError, match=r"it holds run\.sh"):
        run(change(config, output="."))
    assert [path.name for path in tmp_path.iterdir()] == ["run.sh"]


# What is written there


def test_write_own_replaces_only_its_own(tmp_path: Path) -> None:
    """Only files that the search has written are replaced; others are kept under another name."""
    assert write_own(tmp_path, "best.yaml", "one") == ""
    assert write_own(tmp_path, "best.yaml", "two") == "", "its own"
    (tmp_path / "best.yaml").write_text("two, and a note of mine")
    assert write_own(tmp_path, "best.yaml", "three") == "best.yaml.kept-1"
    (tmp_path / "best.yaml").unlink()
    (tmp_path / "best.yaml").symlink_to(tmp_path / "best.yaml.kept-1")
    assert write_own(tmp_path, "best.yaml", "four") == "best.yaml.kept-2"
    (tmp_path / "front.csv").mkdir()
    assert write_own(tmp_path, "front.csv", "x") == "front.csv.kept-1"
    assert (tmp_path / "best.yaml.kept-1").read_text() == "two, and a note of mine"
    assert (tmp_path / "best.yaml.kept-2").is_symlink()
    assert (tmp_path / "best.yaml").read_text() == "four"
    assert set_aside(tmp_path, "best.yaml") == "", "its own again"


@pytest.mark.parametrize("change_it", [None, "add", "edit", "folder"])
def test_replace_own_keeps_a_changed_one(tmp_path: Path, change_it: str | None) -> None:
    """A directory of the search is replaced, and kept if anything in it is not its own."""

    def new_folder(text: str) -> Path:
        (tmp_path / ".new").mkdir()
        (tmp_path / ".new" / "model.safetensors").write_text(text)
        return tmp_path / ".new"

    assert replace_own(tmp_path, "best", new_folder("one")) == ""
    if change_it == "add":
        (tmp_path / "best" / "my_weights.pth").write_text("w")
    elif change_it == "edit":
        (tmp_path / "best" / "model.safetensors").write_text("trained on")
    elif change_it == "folder":
        (tmp_path / "best" / "notes").mkdir()
    before = {path.name for path in (tmp_path / "best").iterdir()}
    kept_name = replace_own(tmp_path, "best", new_folder("two"))
    assert kept_name == ("best.kept-1" if change_it else "")
    assert (tmp_path / "best" / "model.safetensors").read_text() == "two"
    if change_it:
        assert {path.name for path in (tmp_path / kept_name).iterdir()} == before


def test_remove_own_leaves_files_of_others(tmp_path: Path) -> None:
    """A folder of the search is emptied of its own files alone."""
    (tmp_path / "confirming").mkdir()
    write_own(tmp_path, "confirming/base-0.safetensors", b"x")
    (tmp_path / "confirming" / "mine.txt").write_text("m")
    remove_own(tmp_path, "confirming")
    assert [path.name for path in (tmp_path / "confirming").iterdir()] == ["mine.txt"]
    (tmp_path / "confirming" / "mine.txt").unlink()
    remove_own(tmp_path, "confirming")
    assert not (tmp_path / "confirming").exists()


@pytest.mark.slow
def test_users_files_survive_second_verdict(
    copied: SearchConfig,
) -> None:
    """A search that goes on to another verdict keeps files of its user and tells of the second look."""
    folder = Path(copied.output)
    (folder / "best" / "my_weights.pth").write_text("w")
    with (folder / "best.yaml").open("a") as file:
        file.write("# a note of mine\n")
    recorder = PhaseRecorder()
    again = run(change(copied, confirm_seeds=2), recorder)
    assert (folder / "best.kept-1" / "my_weights.pth").read_text() == "w"
    assert (folder / "best.yaml.kept-1").read_text().endswith("# a note of mine\n")
    assert any("kept as best.kept-1" in text for text in recorder.phases)
    assert sorted(path.name for path in (folder / "best").iterdir()) == [
        "config.json",
        "model.safetensors",
        "recipe.yaml",
    ]
    assert again.confirmation is not None
    sentence = "This is look 2 of this search at the test images"
    assert sentence in again.confirmation.sentence()
    assert sentence in " ".join((folder / "best.yaml").read_text().replace("\n# ", " ").split())
    assert sentence in (folder / "report.html").read_text()
    assert load(folder / "best.yaml").digest() == again.confirmation.digest


# What is believed


class JobCounter:
    """Answers every job with starting weights and counts the jobs."""

    def __init__(self) -> None:
        self.job_count = 0

    def all(self, jobs: list[Job]) -> list[Mapping[str, Any]]:
        self.job_count += 1
        return [{"weights": "made", "fresh": "all", "head": ""}]


@pytest.mark.parametrize("name", [WEIGHTS, "supernet.safetensors"])
def test_stray_weights_are_not_believed(tmp_path: Path, name: str) -> None:
    """Weights that no study knows are not used, and are kept."""
    weights(tmp_path / name, 5)
    pool, recorder = JobCounter(), PhaseRecorder()
    assert starting_weights_of(cast(WorkerPool, pool), cast(Bench, SimpleNamespace()), tmp_path, {}, recorder) == "made"
    assert pool.job_count == 1
    assert not (tmp_path / name).exists()
    assert (tmp_path / f"{name}.kept-1").is_file()
    assert f"{name} was not made by this search" in recorder.phases[0]


def test_weights_must_be_those_of_the_study(tmp_path: Path) -> None:
    """The weights are those that the study began with, or it is an error."""
    weights(tmp_path / WEIGHTS, 5)
    attributes = {"config": {"weights": hash_of(tmp_path / WEIGHTS)}, "base": {"latency": {}}}
    pool = JobCounter()
    assert (
        starting_weights_of(cast(WorkerPool, pool), cast(Bench, SimpleNamespace()), tmp_path, attributes, Listener())
        == attributes["config"]["weights"]
    )
    assert pool.job_count == 0
    weights(tmp_path / WEIGHTS, 6)
    with pytest.raises(SearchError, match=r"does not hold the weights that the search began with"):
        starting_weights_of(cast(WorkerPool, pool), cast(Bench, SimpleNamespace()), tmp_path, attributes, Listener())
    assert (tmp_path / WEIGHTS).is_file()


@pytest.mark.parametrize("name", ["digits", "./photos"])
def test_run_directory_is_not_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A run directory of the name of the data would be read as data; nothing is made."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"--output {name} and --data {name} name the same folder"):
        run(SearchConfig(budget_ms=1.0, data=name, output=name))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("other", ["b", None])
@pytest.mark.slow
def test_resume_refuses_other_weights(copied: SearchConfig, tmp_path: Path, other: str | None) -> None:
    """Other weights are refused when a search goes on."""
    before = hashes(Path(copied.output))
    checkpoint = None if other is None else str(weights(tmp_path / "b.safetensors", 2))
    with pytest.raises(SearchError, match=r"weights_given: was '[0-9a-f]{16}', is now .*begin another beside it"):
        run(change(copied, checkpoint=checkpoint, trials=2))
    assert hashes(Path(copied.output)) == before


@pytest.mark.slow
def test_weights_are_known_by_their_content(finished: Outcome, tmp_path: Path) -> None:
    """The same weights in another file are the same."""
    torch.save(safetensors.torch.load_file(str(finished.config.checkpoint)), tmp_path / "same.pth")
    digests = {assemble(change(finished.config, checkpoint=name), Listener()).source_digest for name in (
        finished.config.checkpoint, str(tmp_path / "same.pth")
    )}  # fmt: skip
    assert len(digests) == 1
    assert None not in digests
    assert assemble(change(finished.config, checkpoint=None), Listener()).source_digest is None


def test_older_search_without_digest_resumes() -> None:
    """A search from before digests of weights were recorded goes on."""
    assert check_same({"data": "d/plain", "seed": 0}, {"seed": 0, "weights_given": "a"}, "there") == {}


# Data


def prints(folder: Path, known: dict[str, list[Any]] | None = None) -> str:
    return load_data(str(folder), SMALL, decode=False, check=False, known=known).fingerprint


def test_data_is_known_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`d/plain/` for `d/plain`, an absolute path, a moved copy: the same; other pixels under the same names: others."""
    write_images(tmp_path / "d" / "plain")
    monkeypatch.chdir(tmp_path)
    first = prints(Path("d/plain"))
    shutil.copytree("d/plain", "moved/elsewhere", copy_function=shutil.copy)
    (tmp_path / "link").symlink_to("moved/elsewhere")
    ways = ["d/plain/", str(tmp_path / "d" / "plain"), "moved/elsewhere", "link", "d/../d/plain"]
    assert {prints(Path(way)) for way in ways} == {first}
    image = tmp_path / "moved" / "elsewhere" / "dark" / "3.png"
    image_bytes = bytearray(image.read_bytes())
    image_bytes[-20] ^= 1
    image.write_bytes(image_bytes)
    assert prints(tmp_path / "moved" / "elsewhere") != first, "one bit, in as many bytes"
    image.rename(image.with_name("99.png"))
    assert prints(tmp_path / "moved" / "elsewhere") != first


def test_unchanged_files_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that have not changed are not read again."""
    folder = write_images(tmp_path / "images")
    for path in folder.rglob("*.png"):
        os.utime(path, (1_000_000_000, 1_000_000_000))
    digests: dict[str, list[Any]] = {}
    first = prints(folder, digests)
    assert len(digests) == 40
    cache = tmp_path / "kept.json"
    cache.write_text(json.dumps(digests))
    names_read: list[str] = []
    real = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: names_read.append(file.name) or real(file, name))
    assert prints(folder, load_digests(cache)) == first
    assert names_read == []
    os.utime(folder / "dark" / "3.png", (1_000_000_001, 1_000_000_001))
    assert prints(folder, load_digests(cache)) == first
    assert [Path(name).name for name in names_read] == ["3.png"]
    cache.write_text("[torn")
    assert load_digests(cache) == {}
    fresh: dict[str, list[Any]] = {}
    (folder / "dark" / "3.png").touch()
    prints(folder, fresh)
    assert len(fresh) == 39, "what was written just now may be written again in the same instant"


@pytest.mark.slow
def test_resume_takes_moved_same_images(copied: SearchConfig, tmp_path: Path) -> None:
    """A search goes on with its images under another name, and not with other images."""
    shutil.copytree(str(copied.data), tmp_path / "moved")
    moved = change(copied, data=f"{tmp_path / 'moved'}/")
    before = run(moved).records
    assert len(before) == 1
    assert (Path(copied.output) / ".images.json").is_file()
    for path in (tmp_path / "moved").rglob("*.png"):
        Image.new("RGB", (32, 32), (9, 9, 9)).save(path)
    for extend in (False, True):
        with pytest.raises(SearchError, match=r"images: was '[0-9a-f]{16}', is now"):
            run(change(moved, trials=2, extend=extend))


# Studies


@pytest.mark.parametrize("fill", ["trial", "attribute", "minimize"])
@pytest.mark.slow
def test_study_of_others_is_not_written(config: SearchConfig, no_images: None, fill: str) -> None:
    """The last part of --output names a study that another program has made in the same database."""
    url = f"sqlite:///{Path(config.output).parent / 'shared.db'}"
    direction = "minimize" if fill == "minimize" else "maximize"
    study = optuna.create_study(storage=url, study_name="run", direction=direction)
    if fill == "trial":
        study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    elif fill == "attribute":
        study.set_user_attr("format", "csv")
    with pytest.raises(SearchError, match=r"has a study 'run' that no search has made: .* Nothing was written"):
        run(change(config, storage=url))
    untouched = optuna.load_study(storage=url, study_name="run")
    assert (len(untouched.trials), untouched.user_attrs) == (
        fill == "trial",
        {"format": "csv"} if fill == "attribute" else {},
    )


def test_empty_study_is_taken_over(copied: SearchConfig, tmp_path: Path) -> None:
    """An empty study is taken over, and one of a search is known."""
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    optuna.create_study(storage=url, study_name="run", direction="maximize")
    assert stored_facts(tmp_path / "run", url) == {}
    assert stored_facts(tmp_path / "nothing", None) == {}
    assert stored_facts(Path(copied.output), None)["format"] == 1


@pytest.mark.parametrize(
    ("url", "error", "message"),
    [
        ("postgresql+psycopg2x://me@127.0.0.1:1/db", UsageError, "names no database that is known here"),
        ("oracel://me:secret@host/db", UsageError, r"oracel://me:\*\*\*@host/db names no database that is known here"),
        ("nonsense", UsageError, "not a database URL. It reads like sqlite:///study.db"),
        ("grpc://nowhere", UsageError, "grpc://host:port"),
        ("sqlite:////nowhere/at/all/study.db", SearchError, "cannot be opened"),
        ("postgres://me@127.0.0.1:1/db", (SearchError, UsageError), r"cannot be opened|attnsurgery\[postgres\]"),
    ],
)
def test_unusable_storage_is_refused_first(
    config: SearchConfig, no_images: None, url: str, error: Any, message: str
) -> None:
    """A storage that cannot be used is refused before anything is read or trained."""
    with pytest.raises(error, match=message):
        run(change(config, storage=url))
    assert not (Path(config.output) / WEIGHTS).exists()
    if error is UsageError:
        with pytest.raises(error, match=message):
            preview(change(config, storage=url))


def test_postgres_means_postgresql(monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLAlchemy 1.4 dropped the spelling that hosts of databases still hand out (sqlalchemy issue 5799)."""
    urls: list[str] = []
    monkeypatch.setattr("sqlalchemy.create_engine", lambda url: urls.append(url) or pytest.skip())
    for url in ("postgres://me@host/db", "postgres+psycopg2://me@host/db"):
        with pytest.raises(pytest.skip.Exception):
            check_url(url)
    assert urls == ["postgresql+psycopg://me@host/db", "postgresql+psycopg2://me@host/db"]


# The verdict


def simulated(
    finalists: int, luck: np.random.Generator, diverging: str = "", gain: float = 0.0, **settings: Any
) -> tuple[Confirmation, set[tuple[str, str, int]]]:
    """A confirmation of candidates that are all as good as the base, each training with its own luck, which shows on
    validation and test images alike; and its trainings: kind, who, and which seed.

    Args:
        diverging: the candidate whose training for the verdict fails.
        gain: what all candidates are better by than the base.
        settings: of the search.
    """
    metrics: dict[tuple[str, str, int], float] = {}

    def work(kind: str, *requests: Mapping[str, Any]) -> list[dict[str, Any]]:
        if kind == "winner":
            return [{"timing": asdict(timing(1.0))}]
        results: list[dict[str, Any]] = []
        for one in requests:
            key = kind, one["record"]["digest"] if one["record"] else "base", one["index"]
            metric = metrics.setdefault(key, 0.8 + gain * (one["record"] is not None) + float(luck.normal(0.0, 0.01)))
            fails = key[:2] == ("final training", diverging)
            right = np.packbits(luck.random(1000) < metric).tobytes().hex()
            tested = {"images": 1000, "right": right, "balanced": None, "epochs": 1}
            score = {"metric": metric, "loss": 1 - metric, **tested}
            results.append({"failed": "the loss became infinite."} if fails else score)
        return results

    order = [trial(number, 0.9 - number / 100, 1.0) for number in range(finalists)]
    config = SearchConfig(**{"budget_params": 10**9, "finalists": finalists, "confirm_seeds": 2, **settings})
    return confirm(config, Budgets.of(config), order, Latency(**_latency()), work), set(metrics)


@cache
def _latency() -> dict[str, Any]:
    backend = FixedLatency(Conditions(input_size=(3, 32, 32), threads=1))
    return asdict(backend.measure(timm.create_model("test_resnet").eval()))


def test_gain_is_free_of_winners_curse() -> None:
    """The reported gain is unbiased, and not that of the best of many noisy trainings."""
    luck = np.random.default_rng(0)
    verdicts = [simulated(3, luck)[0] for _ in range(200)]
    gains = [verdict.winner_metric - verdict.base_metric for verdict in verdicts]
    error = float(np.std(gains)) / len(gains) ** 0.5
    assert abs(float(np.mean(gains))) < 3 * error
    assert 3 * error < 0.0035, "a winner by choice would show more: 0.846 standard deviations of a mean of two"


def test_confirmation_trains_as_needed() -> None:
    """There are as many trainings as needed, and a single finalist is not trained to be chosen."""
    _, trainings = simulated(3, np.random.default_rng(1))
    assert Counter(kind for kind, _, _ in trainings) == {"training": 6, "final training": 4}
    assert {who for kind, who, _ in trainings if kind == "training"} == {trial(n, 0.9, 1.0).digest for n in range(3)}
    single, trainings = simulated(1, np.random.default_rng(1))
    assert Counter(kind for kind, _, _ in trainings) == {"final training": 4}
    assert len(single.finalists[0].metrics) == 2


@pytest.mark.parametrize(("gain", "difference", "seeds"), [(0.15, 0.5, 4), (0.0, 10.0, 5)])
def test_confirmation_adds_seeds_until_decided(gain: float, difference: float, seeds: int) -> None:
    """A gain far above or below the difference that matters is decided before the last look."""
    verdicts = [
        simulated(2, np.random.default_rng(n), gain=gain, confirm_seeds="auto", max_seeds=6, difference=difference)
        for n in range(3)
    ]
    for confirmation, trainings in verdicts:
        assert Counter(kind for kind, _, _ in trainings)["final training"] == 2 * confirmation.seeds
        assert Counter(kind for kind, _, _ in trainings)["training"] == 2 * 3
        assert (confirmation.first_seeds, confirmation.most_seeds) == (3, 6)
        assert confirmation.looks_at_seeds == confirmation.seeds - 2
        assert (confirmation.verdict == "better") == (gain > 0)
        says = "The gain is at least 0.5 points" if gain else "A gain of 10 points is ruled out"
        assert says in confirmation.sentence()
        assert confirmation.seeds <= seeds
    one, _ = verdicts[0]
    undecided = replace(one, low=difference / 100 - 0.01, high=difference / 100 + 0.01)
    assert "or more is open: that needs more test images" in undecided.sentence()
    assert "more seeds or test images" in replace(undecided, seeds=6).sentence()


def test_failed_winner_is_replaced_by_next() -> None:
    """A winner whose training for the verdict fails is replaced by the next finalist."""
    best, _ = simulated(3, np.random.default_rng(1))
    other, trainings = simulated(3, np.random.default_rng(1), diverging=best.digest)
    assert other.digest != best.digest
    assert [one.failed for one in other.finalists if one.digest == best.digest] == ["the loss became infinite."]
    assert sum(kind == "final training" and who == "base" for kind, who, _ in trainings) == 2, "the base once"
    with pytest.raises(SearchError, match="no finalist could be trained again: the loss became infinite"):
        simulated(1, np.random.default_rng(1), diverging=trial(0, 0.9, 1.0).digest or "")


@pytest.mark.parametrize(("finalists", "trainings"), [(1, 4 * 2), (3, 7 * 2), (9, 9 * 2)])
def test_preview_counts_verdict_trainings(finalists: int, trainings: int) -> None:
    """Two seeds each of winner and base, trained twice as long as a trial, and of as many finalists as there are
    candidates to choose from, here 5."""
    config = SearchConfig(
        budget_params=10**9,
        trials=5,
        finalists=finalists,
        confirm_seeds=2,
        latency_seconds=1e-9,
        lr=1e-3,
        block_lr_scale=1.0,
        epochs=4,
    )
    evaluator = SimpleNamespace(settings=TrainSettings())
    bench = cast(Bench, SimpleNamespace(config=config, fresh="nothing", evaluator=evaluator))
    assert _seconds(bench, [(5, 1.0)], 1.0) == pytest.approx(5 + 1 + trainings, abs=1e-3)


@pytest.mark.slow
def test_verdict_trains_from_fresh_seeds(copied: SearchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """No training of the verdict has the seed of another one."""
    seeds: list[int] = []

    def score(self: FineTune, model: torch.nn.Module, seed: int, **named: Any) -> Score:
        seeds.append(seed)
        return Score(0.5, 0.5, 0.1, 1, torch.ones(8, dtype=torch.bool))

    monkeypatch.setattr(FineTune, "score", score)
    outcome = run(change(copied, trials=2, finalists=2, confirm_seeds=1))
    trial_seed, one, other, winner, base = seeds
    assert one == other, "finalists are compared under the same seed"
    assert winner == base, "so are winner and base"
    assert len({trial_seed, one, winner}) == 3
    assert outcome.confirmation is not None
    assert outcome.confirmation.anew
    assert outcome.confirmation.choice().endswith("trained once more for the verdict, from fresh seeds")


@pytest.mark.slow
def test_changed_weights_are_trained_again(copied: SearchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of the confirmation that were changed after a stop are trained again."""
    seeds: list[int] = []
    real = FineTune.score

    def score(self: FineTune, model: torch.nn.Module, seed: int, **named: Any) -> Score:
        seeds.append(seed)
        return real(self, model, seed, **named)

    def dies(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FineTune, "score", score)
    again = change(copied, confirm_seeds=2)
    with monkeypatch.context() as patched:
        patched.setattr(jobs_module, "save_winner", dies)
        with pytest.raises(KeyboardInterrupt):
            run(again)
    assert len(seeds) == 4
    folder = Path(copied.output) / "confirming"
    (weights,) = folder.iterdir()
    other = load_file(weights)
    save_file({name: tensor + 1 for name, tensor in other.items()}, weights)
    run(again)
    assert len(seeds) == 5, "the one whose weights are others; the rest is known"
    assert [path.name for path in folder.iterdir()] == [f"{weights.name}.kept-1"]


# What is said at the end


@pytest.mark.slow
def test_full_disk_lets_the_report_wait(
    config: SearchConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A full disk lets the report wait, and the search goes on."""
    from attnsurgery.search.storage import run_directory

    real = run_directory.write_atomically

    def full(path: Path, content: str | bytes) -> None:
        if path.name == "report.html":
            raise SearchError(f"cannot write {path}: No space left on device.")
        real(path, content)

    monkeypatch.setattr(run_directory, "write_atomically", full)
    recorder = PhaseRecorder()
    outcome = run(config, recorder)
    assert outcome.trained == 1
    assert outcome.confirmation is not None
    assert "No space left on device" in outcome.unwritten
    assert sum(text.startswith("the report is not written yet: cannot write") for text in recorder.phases) == 1
    assert any("attnsurgery report" in line and "All trials are safe" in line for line in files_of(outcome))
    monkeypatch.setattr(run_directory, "write_atomically", real)
    result = CliRunner().invoke(build_app(), ["report", config.output])
    assert result.exit_code == 0
    assert (outcome.folder / "report.html").is_file()


def test_config_file_repeats_the_search(finished: Outcome) -> None:
    """The settings in a run directory make the same search, without permission to extend it."""
    values, _ = reads((finished.folder / CONFIG).read_text(), CONFIG)
    assert values["extend"] is False
    assert SearchConfig(**values) == finished.config.model_copy(update={"extend": False, "storage": None})


@pytest.mark.slow
def test_build_line_of_winner_runs(finished: Outcome, tmp_path: Path) -> None:
    """The line that builds the winner runs as it is, in a new process and with a quote in the path."""
    line = next(line for line in files_of(finished) if line.startswith("build it"))
    shutil.copytree(finished.folder / "best", tmp_path / "the winner's")
    program = f"{line.removeprefix('build it').strip()}; {building(tmp_path / chr(39).join(['the winner', 's']))}"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr


@pytest.mark.slow
def test_budget_that_none_keeps_ends_soon(
    config: SearchConfig,
) -> None:
    """A budget that nothing keeps to ends after a few measurements, also with latencies in the cache."""
    earlier = run(change(config, trials=2))
    assert earlier.base.timing is not None
    tight = change(config, budget_ms=earlier.base.timing.ms * 1.00001, output=f"{config.output}-2", trials=4)
    with pytest.raises(NothingFeasibleError, match=r"The fastest of \d+ measured"):
        run(tight)
    records = list(trials_of(Journal(Path(tight.output) / TRIALS).read()).values())
    assert 4 <= sum(record.timing is not None for record in records) <= 12
    assert len(records) <= 24
    fastest = min(record.timing.ms for record in records if record.timing)
    assert fastest <= min(record.timing.ms for record in earlier.records if record.timing)


@pytest.mark.slow
def test_preview_without_fit_has_no_trials(config: SearchConfig) -> None:
    """A preview in which nothing fits predicts no trials."""
    from attnsurgery.cli import _search_view

    few = preview(change(config, trials=64))
    assert not few.none_fits
    just_the_base = change(config, budget_ms=few.base_ms * 1.00001, trials=64)
    tight = preview(just_the_base)
    assert tight.none_fits
    assert tight.seconds < few.seconds
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_search_view, "print_lines", lines.extend)
        _search_view.print_preview(tight, just_the_base)
    assert "the search none of the 12 drawn fits: perhaps no candidate does" in lines[-1]
    assert "64 trained trials" not in lines[-1]


# The interval


@pytest.mark.parametrize("trainings", [1, 2])
def test_interval_of_equal_models_has_width(trainings: int) -> None:
    """Two models that no image tells apart may differ all the same, the less the more images there are."""
    right = np.ones((trainings, 80), dtype=bool)
    gain = gain_of(right, right)
    assert (gain.mean, gain.p_value) == (0.0, 1.0)
    assert 0.02 < gain.high < 0.05, "three in 80 may differ without one of them being seen"
    assert gain.low == pytest.approx(-gain.high)
    fewer = gain_of(right[:, :20], right[:, :20])
    assert fewer.high > 2 * gain.high


def test_interval_sees_trainings_differ() -> None:
    """Trainings that err on other images make an interval of some width at equal accuracies."""
    first, second = np.ones((2, 60), dtype=bool), np.ones((2, 60), dtype=bool)
    first[0, 0] = first[1, 1] = second[0, 2] = second[1, 3] = False
    gain = gain_of(first, second)
    assert gain.high - gain.low > 0.05


@pytest.mark.parametrize(
    ("images", "one", "other"), [(20, 0.1, 0.0), (40, 0.03, 0.01), (80, 0.02, 0.0), (80, 0.2, 0.1)]
)
@pytest.mark.slow
def test_interval_covers_gain_on_few_images(images: int, one: float, other: float) -> None:
    """The interval of few images contains the true gain as often as it says, and the test is no looser."""
    rng = np.random.default_rng(images)
    covering = alarms = 0
    for _ in range(600):
        draw_N = rng.random(images)
        first, second = draw_N >= other, ~((draw_N >= other) & (draw_N < other + one))
        gain = gain_of(first[None], second[None])
        covering += gain.low <= one - other <= gain.high
        same = gain_of(rng.random((1, images)) < 0.9, rng.random((1, images)) < 0.9)
        alarms += same.p_value < 0.05
    assert covering / 600 > 0.93
    assert alarms / 600 < 0.06


@pytest.mark.parametrize("luck", [0.0, 0.3])
def test_interval_covers_zero_by_trainings(luck: float) -> None:
    """The interval of few images and two trainings contains 0 as often as it says."""
    rng = np.random.default_rng(3)
    covering = 0
    for _ in range(400):
        ease_N = rng.normal(1.5, 1.0, 40)
        first, second = ease_N + rng.normal(0, luck, (2, 2, 1)) + rng.normal(0, 0.5, (2, 2, 40)) > 0
        gain = gain_of(first, second)
        covering += gain.low <= 0.0 <= gain.high
    assert covering / 400 > 0.93


@pytest.mark.parametrize(
    "wrong",
    [
        {"sampler": "nosuch"},
        {"evaluator": "nosuch"},
        {"metric": "nosuch"},
        {"task": "nosuch:Thing"},
        {"against": "nosuch"},
        {"data": "/nowhere"},
        {"checkpoint": "/nowhere"},
        {"budget_params": 1},
    ],
)
def test_directory_is_removed_where_nothing_was_written(config: SearchConfig, wrong: dict[str, object]) -> None:
    """An error before the search begins leaves no directory behind, and none that was there is removed."""
    folder = Path(config.output) / "inside" / "run"
    with pytest.raises(AttnSurgeryError):
        run(change(config, output=str(folder), **wrong))
    assert not Path(config.output).exists()
    folder.mkdir(parents=True)
    with pytest.raises(AttnSurgeryError):
        run(change(config, output=str(folder), **wrong))
    assert folder.exists()
