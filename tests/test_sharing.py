"""Several searches share one study: no candidate is trained twice, counts are exact, expired trials are taken over."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState
from sqlalchemy.exc import IntegrityError

from attnsurgery.errors import SearchError, UsageError
from attnsurgery.search import Listener, run
from attnsurgery.search.storage import urls
from attnsurgery.search.storage.leases import CLAIM, LEASE, Sharing
from attnsurgery.search.storage.store import Store
from attnsurgery.search.storage.urls import without_password
from tests import warm_start
from tests._searches import change, small_search, write_images, write_space

ROOT = Path(__file__).parents[1]
LETTERS = {"letter": CategoricalDistribution(("a", "b"))}


def member(storage: str, folder: Path, lease_s: float = 30.0) -> tuple[optuna.Study, Sharing]:
    folder.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(storage=storage, study_name="shared", load_if_exists=True)
    return study, Sharing(study, folder, lease_s)


@pytest.fixture
def storage(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'shared.db'}"


def next_number(study: optuna.Study) -> int:
    return study.ask(LETTERS).number


@pytest.mark.slow
def test_claim_of_a_twin_goes_to_the_first(storage: str, tmp_path: Path) -> None:
    """Of two searches with the same candidate the later one gives way."""
    (study, one), (_, other) = member(storage, tmp_path / "1"), member(storage, tmp_path / "2")
    first, second, third = next_number(study), next_number(study), next_number(study)
    assert one.claim(first, "x", lambda: 9, set) == "mine"
    assert other.claim(second, "x", lambda: 9, set) == "twin"
    assert other.claim(third, "y", lambda: 9, set) == "mine"
    assert study.trials[second].user_attrs[CLAIM] is None


@pytest.mark.slow
def test_last_place_is_claimed_once(storage: str, tmp_path: Path) -> None:
    """The last place is given once, and a finished candidate takes no place."""
    (study, one), (_, other) = member(storage, tmp_path / "1"), member(storage, tmp_path / "2")
    first, second, third = next_number(study), next_number(study), next_number(study)
    assert one.claim(second, "x", lambda: 1, set) == "mine", "nobody else was there"
    assert other.claim(first, "y", lambda: 1, set) == "full", "though its number is lower"
    assert other.claim(third, "z", lambda: 2, lambda: {"z"}) == "twin"


@pytest.mark.slow
def test_lower_number_waits_for_the_higher(storage: str, tmp_path: Path) -> None:
    """The lower number waits until the higher one has given way."""
    (study, one), (_, other) = member(storage, tmp_path / "1"), member(storage, tmp_path / "2")
    low, high = next_number(study), next_number(study)
    other.lease(study.trials[high])
    study._storage.set_trial_user_attr(study.trials[high]._trial_id, CLAIM, {"digest": "x", "sure": False})
    answers: list[str] = []
    waiting = threading.Thread(target=lambda: answers.append(one.claim(low, "x", lambda: 9, set)))
    waiting.start()
    time.sleep(0.6)
    assert answers == []
    assert other.claim(high, "x", lambda: 9, set) == "twin"
    waiting.join(10)
    assert answers == ["mine"]


@pytest.mark.slow
def test_expired_lease_returns_trial_once(storage: str, tmp_path: Path) -> None:
    """An expired lease is lost and its trial returns once; that of a dead local process needs no waiting."""
    (study, one), (_, other) = member(storage, tmp_path / "1", 1.0), member(storage, tmp_path / "2", 1.0)
    number = next_number(study)
    elsewhere = {"owner": "0", "host": "elsewhere", "pid": 1, "until": 0.0}
    study._storage.set_trial_user_attr(study.trials[number]._trial_id, LEASE, elsewhere)
    assert [trial.number for trial in one.elsewhere()] == [number]
    assert one.lost() == other.lost() == []
    time.sleep(1.1)
    study._storage.set_trial_user_attr(study.trials[number]._trial_id, LEASE, {**elsewhere, "until": 1.0})
    assert one.lost() == [], "it was renewed"
    time.sleep(1.1)
    (expired,) = one.lost()
    assert one.elsewhere() == []
    for taker in (one, other):
        taker.inherit(expired, {"slot": 0})
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.WAITING]
    assert study.trials[1].params == study.trials[0].params
    assert study.trials[1].user_attrs == {"slot": 0}

    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    reissued = next_number(study)  # the one that was put back
    assert reissued == 1
    here = one._lease()
    study._storage.set_trial_user_attr(study.trials[reissued]._trial_id, LEASE, {**here, "owner": "0", "pid": dead.pid})
    assert [trial.number for trial in one.lost()] == [reissued]


@pytest.mark.slow
def test_members_have_one_leader_at_a_time(storage: str, tmp_path: Path) -> None:
    """One member leads, and the next one when it has left."""
    _, one = member(storage, tmp_path / "1")
    _, other = member(storage, tmp_path / "2")
    assert not one.leads(), "others may have joined at the same moment"
    time.sleep(3.1)
    assert one.leads()
    assert not other.leads()
    one.leave()
    assert other.leads()


@pytest.mark.parametrize("refusals", [1, 99])
def test_storage_opens_beside_another_creator(storage: str, refusals: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database is opened again where another search creates its tables at the same moment; not without end."""
    real, calls = optuna.storages.RDBStorage, []

    def refuse_first(*arguments: object, **options: object) -> object:
        calls.append(arguments)
        if len(calls) <= refusals:
            raise IntegrityError("CREATE TABLE studies", None, Exception("duplicate key value"))
        return real(*arguments, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(urls, "_PAUSE_S", 0.0)
        patch.setattr(optuna.storages, "RDBStorage", refuse_first)
        if refusals == 1:
            opened = urls.open_storage(storage)
        else:
            with pytest.raises(IntegrityError):
                urls.open_storage(storage)
    if refusals == 1:
        assert isinstance(opened, real)
        urls.close(opened)
        assert len(calls) == 2
    else:
        assert len(calls) == urls._ATTEMPTS


def test_storage_errors_hide_secrets(tmp_path: Path) -> None:
    """Secrets stay out of errors, and missing drivers are named."""
    with pytest.raises(UsageError, match=r"grpc://host:port"):
        Store(tmp_path, "grpc://nowhere", *[None] * 3)  # type: ignore[arg-type]
    if importlib.util.find_spec("pymysql") is None:
        config = change(small_search(tmp_path, tmp_path, tmp_path / "run"), storage="mysql://me:secret@localhost/db")
        with pytest.raises((UsageError, SearchError)) as raised:
            Store(tmp_path, config.storage, *[None] * 3)  # type: ignore[arg-type]
        assert "secret" not in str(raised.value)
        assert "attnsurgery[mysql]" in str(raised.value)
    assert without_password("postgresql://me:secret@host/db") == "postgresql://me:***@host/db"
    assert "secret" not in without_password("postgresql://me@host/db?password=secret&sslmode=require")
    assert "sslmode=require" in without_password("postgresql://me@host/db?password=secret&sslmode=require")
    if importlib.util.find_spec("grpc") is not None:
        with pytest.raises(SearchError, match=r"at grpc://127\.0\.0\.1:1 cannot be opened: failed to connect"):
            Store(tmp_path, "grpc://127.0.0.1:1", *[None] * 3)  # type: ignore[arg-type]


@pytest.fixture(params=["grpc", "postgresql"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, str]]:
    """The URL that searches are given, and one that leads to the database itself."""
    yield from _proxy(tmp_path) if request.param == "grpc" else _postgres(tmp_path)


def _proxy(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """Runs Optuna's proxy in front of SQLite."""
    pytest.importorskip("grpc")
    port, behind = 20000 + (os.getpid() + 7) % 20000, f"sqlite:///{tmp_path / 'shared.db'}"
    program = "import sys; from optuna.storages import get_storage, run_grpc_proxy_server as run; "
    program += "run(get_storage(sys.argv[1]), host='127.0.0.1', port=int(sys.argv[2]))"
    process = subprocess.Popen([sys.executable, "-c", program, behind, str(port)], stderr=subprocess.DEVNULL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            optuna.storages.GrpcStorageProxy(host="127.0.0.1", port=port).wait_server_ready(timeout=60)
        yield f"grpc://127.0.0.1:{port}", behind
    finally:
        process.kill()
        process.wait()


def _postgres(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """Runs a real server on loopback, with a data directory of its own, and under another user where we are root."""
    servers = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if not servers:
        pytest.skip("needs PostgreSQL (Debian: apt-get install postgresql)")
    bin, data = servers[-1].parent, tmp_path / "data"
    as_user: list[str] = []
    if os.geteuid() == 0:
        data = Path(
            subprocess.run(
                ["mktemp", "-d", "-t", "attnsurgery-pg-XXXXXX"], capture_output=True, text=True
            ).stdout.strip()
        )
        shutil.chown(data, "postgres", "postgres")
        as_user = ["runuser", "-u", "postgres", "--"]
    port = 20000 + os.getpid() % 20000
    subprocess.run([*as_user, bin / "initdb", "-D", data, "-A", "trust", "-U", "me"], check=True, capture_output=True)
    options = ["-h", "127.0.0.1", "-p", str(port), "-k", str(data)]
    process = subprocess.Popen([*as_user, bin / "postgres", "-D", data, *options], stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            ready = subprocess.run([bin / "pg_isready", "-h", "127.0.0.1", "-p", str(port)], capture_output=True)
            if ready.returncode == 0:
                break
            time.sleep(0.2)
        address = f"me:secret@127.0.0.1:{port}/postgres"
        yield f"postgresql://{address}", f"postgresql+psycopg://{address}"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
        shutil.rmtree(data, ignore_errors=True)


@pytest.mark.slow
def test_shared_study_survives_killed_search(server: tuple[str, str], tmp_path: Path) -> None:
    """Two searches share a study and one is killed: all trials, none twice, no password anywhere."""
    paths = f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'plugins'}"
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "DUMMY_SECONDS": "3"}
    words = (
        "search --budget-ms 100 --latency fixed --evaluator dummy --space se --trials 12 --input-size 32 --workers 2"
    )
    words += " --base-epochs 1 --epochs 3 --lr 1e-3 --block-lr-scale 10"
    words += " --finalists 1 --confirm-seeds 1 --lease-seconds 10"
    environment["ATTNSURGERY_STORAGE"] = server[0]
    folders = [tmp_path / name / "shared" for name in ("one", "other")]
    processes = []
    for folder in folders:
        with (tmp_path / f"{folder.parent.name}.log").open("w") as log:
            command = [*warm_start.python(), "-m", "attnsurgery", *words.split(), "--output", str(folder)]
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    database = optuna.storages.RDBStorage(server[1])
    one, other = processes
    name = folders[0] / ".owner"
    deadline = time.monotonic() + 200
    while not (name.exists() and any(lease["owner"] == name.read_text() for lease in leases(database, "RUNNING"))):
        assert one.poll() is None, (tmp_path / "one.log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    listed = subprocess.run(["ps", "-A", "-ww", "-o", "args"], capture_output=True, text=True, check=True).stdout
    assert "attnsurgery.search.workers.worker" in listed
    assert not [line for line in listed.splitlines() if "secret" in line]
    one.kill()
    one.wait()
    assert other.wait(timeout=240) == 0, (tmp_path / "other.log").read_text()
    study = optuna.load_study(study_name="shared", storage=database)
    records = [trial.user_attrs["record"] for trial in study.trials if "record" in trial.user_attrs]
    trained = [record["digest"] for record in records if record["state"] == "trained"]
    assert len(trained) == 12
    assert Counter(trained).most_common(1)[0][1] == 1
    assert not leases(database, "RUNNING")
    assert len({lease["owner"] for lease in leases(database)}) == 2, "both have worked"
    database.remove_session()
    database.engine.dispose()
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.suffix in {".log", ".html", ".jsonl", ".yaml", ".csv", ".json"}:
            assert "secret" not in path.read_text(errors="replace"), path


def leases(storage: optuna.storages.RDBStorage, *states: str) -> list[dict[str, object]]:
    """Returns the leases of the trials of the shared study in these states, or in any."""
    if "shared" not in optuna.get_all_study_names(storage):
        return []
    trials = optuna.load_study(study_name="shared", storage=storage).trials
    return [t.user_attrs[LEASE] for t in trials if LEASE in t.user_attrs and (not states or t.state.name in states)]


@pytest.mark.slow
def test_shared_study_resumes_in_directory(storage: str, tmp_path: Path) -> None:
    """A shared study goes on in the same directory with the same trials."""
    images, space = write_images(tmp_path / "images"), write_space(tmp_path)
    config = change(small_search(images, space, tmp_path / "run"), storage=storage, evaluator="blocks")
    first = run(change(config, trials=2))
    assert first.trained == 2
    again = run(change(config, trials=3))
    assert again.trained == 3
    assert [record.assignment for record in again.records[:2]] == [record.assignment for record in first.records]


@pytest.mark.parametrize("moment", ["trial_started", "timed"])
@pytest.mark.slow
def test_search_lets_go_of_trials_taken_over(storage: str, tmp_path: Path, moment: str) -> None:
    """A laptop that slept: its first trial is another's before it has begun it, or by the time it is trained."""
    images, space = write_images(tmp_path / "images"), write_space(tmp_path)
    config = change(small_search(images, space, tmp_path / "run"), storage=storage, evaluator="blocks", trials=2)

    def sleeps(number: int, _: object) -> None:
        if number == 0:
            database = optuna.storages.RDBStorage(storage)
            study = optuna.load_study(study_name="run", storage=database)
            database.set_trial_state_values(study.trials[0]._trial_id, TrialState.FAIL)
            database.remove_session()
            database.engine.dispose()

    laptop = Listener()
    setattr(laptop, moment, sleeps)
    outcome = run(config, laptop)
    assert outcome.trained == 2
    assert 0 not in {record.number for record in outcome.records}
