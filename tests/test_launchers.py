"""Workers that other systems run give the same trials as local ones, and clear errors where they cannot run."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from attnsurgery.errors import SearchError, UnknownNameError, UsageError
from attnsurgery.search import Listener, Outcome, SearchConfig, run
from attnsurgery.search.execution.jobs import Job
from attnsurgery.search.workers import spawn
from attnsurgery.search.workers.launch import LAUNCHERS, processes
from attnsurgery.search.workers.launch.mailbox import ANSWERS, BEAT, ORDERS, Inbox, Lines, Outbox, add
from attnsurgery.search.workers.processes import ProcessPool
from attnsurgery.search.workers.worker import serve_mailbox
from tests._searches import change, small_search, write_images, write_space

pytestmark = pytest.mark.usefixtures("no_pictures", "one_thread", "warm_workers")


@pytest.fixture
def config(tmp_path: Path) -> SearchConfig:
    images, space = write_images(tmp_path / "images"), write_space(tmp_path)
    return change(small_search(images, space, tmp_path / "run"), workers=2, in_step=True, trials=3)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The outcome of the search with processes of this machine."""
    folder = tmp_path_factory.mktemp("straight")
    images, space = write_images(folder / "images"), write_space(folder)
    return run(change(small_search(images, space, folder / "run"), workers=2, in_step=True, trials=3))


def essence(outcome: Outcome) -> list[tuple[object, ...]]:
    return [(r.number, r.state, dict(r.assignment), r.digest, r.metric, r.loss, r.timing) for r in outcome.records]


@pytest.mark.parametrize(("launcher", "launcher_args"), [("ray", ""), ("submitit", "cluster=local timeout_min=10")])
@pytest.mark.slow
def test_launchers_give_the_same_trials(
    config: SearchConfig, straight: Outcome, launcher: str, launcher_args: str
) -> None:
    """The trials are the same whichever launcher starts the workers."""
    pytest.importorskip(launcher)
    there = run(change(config, launcher=launcher, launcher_args=launcher_args))
    assert essence(there) == essence(straight)
    assert there.confirmation == straight.confirmation
    assert not (there.folder / ".jobs").exists(), "mailboxes go with the search"


@pytest.mark.slow
def test_launcher_names_its_missing_extra(config: SearchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher whose package is missing names the extra that installs it."""
    for package, extra in (("ray", "ray"), ("submitit", "slurm")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UsageError, match=rf"--launcher {package} needs a package.*attnsurgery\[{extra}\]"):
            run(change(config, launcher=package))
    with pytest.raises(UnknownNameError, match=r"no launcher 'rey'\. Did you mean 'ray'"):
        run(change(config, launcher="rey"))


@pytest.mark.parametrize(
    ("launcher", "launcher_args", "message"),
    [
        ("local", "gpus=2", "local does not take gpus. It takes nothing"),
        ("local", "gpus", "does not read as NAME=VALUE"),
        ("local", "a=[", "does not read as NAME=VALUE"),
        ("ray", "gpus=2", "ray does not take gpus. It takes accelerator_type, address, memory, num_cpus, num_gpus"),
        ("submitit", "cluster=local moons=3", "submitit says: .*moons"),
        ("submitit", "cluster=moon", "submitit says: .*moon"),
    ],
)
@pytest.mark.slow
def test_launcher_refuses_unknown_arguments(
    config: SearchConfig, launcher: str, launcher_args: str, message: str
) -> None:
    """What a launcher cannot be asked for."""
    if launcher != "local":
        pytest.importorskip(launcher)
    with pytest.raises(UsageError, match=message):
        run(change(config, launcher=launcher, launcher_args=launcher_args))


def test_launcher_needs_workers_to_start() -> None:
    """A launcher together with --workers 0 is refused."""
    with pytest.raises(UsageError, match="--launcher ray starts workers, and --workers 0 wants none"):
        SearchConfig(budget_ms=1.0, workers=0, launcher="ray")


@pytest.mark.slow
def test_worker_with_other_torch_is_refused(config: SearchConfig) -> None:
    """A worker with other versions of the software is refused, unless the search may be extended."""
    for extend in (False, True):
        launcher = LAUNCHERS["local"](change(config, extend=extend))
        Path(config.output).mkdir(exist_ok=True)
        pool = ProcessPool(launcher, Listener(), lambda: False, versions={"torch": "0.1", "latency": "computed"})
        try:
            if extend:
                pool.all([Job("weights")])
                continue
            with pytest.raises(SearchError, match=r"worker \d on .* has other software.*versions.latency: here 'comp"):
                pool.all([Job("weights")])
        finally:
            pool.close()


@pytest.mark.slow
def test_worker_that_never_starts_ends_all(config: SearchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that never starts ends the search with its last words, and costs no trial."""
    monkeypatch.setattr(spawn, "COMMAND", (sys.executable, "-c", "raise SystemExit('no torch there')"))
    with pytest.raises(SearchError, match=r"started 3 times in vain: .* code 1: no torch there\. Finished results"):
        run(change(config, workers=1))


def test_prepared_worker_does_the_first_job(config: SearchConfig) -> None:
    """The process that was started early is the first worker, and one that was never needed ends with the launcher."""
    Path(config.output).mkdir(exist_ok=True)
    used, unused = (processes.Processes(change(config, workers=1)) for _ in range(2))
    spares = []
    for launcher in (used, unused):
        launcher.prepare()
        assert launcher._spare is not None
        spares.append(launcher._spare)
    pool = ProcessPool(used, Listener(), lambda: False)
    try:
        pool.all([Job("weights")])
        assert [slot.link._process.pid for slot in pool._slots] == [spares[0].pid]  # type: ignore[union-attr]
        assert spares[0].poll() is None
    finally:
        pool.close()
        unused.close()
    assert all(spare.poll() is not None for spare in spares)
    assert not list(Path(config.output).glob("worker-*.log"))


@pytest.mark.slow
def test_worker_started_early_is_taken_over(config: SearchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher takes the worker of the command line; one that has exited or was not needed is replaced or ended."""
    monkeypatch.setattr(spawn, "COMMAND", (sys.executable, "-m", "attnsurgery.search.workers.worker"))  # no fork
    Path(config.output).mkdir(exist_ok=True)
    launcher = processes.Processes(change(config, workers=1))
    with spawn.started_early():
        (early,) = spawn._waiting
        launcher.prepare()
        assert launcher._spare is early
    assert early.poll() is None
    pool = ProcessPool(launcher, Listener(), lambda: False)
    try:
        pool.all([Job("weights")])
        assert Path(f"/proc/{early.pid}/fd/2").resolve() == launcher.log(0).resolve()
    finally:
        pool.close()

    with spawn.started_early():
        (exited,) = spawn._waiting
        exited.kill()
        exited.wait()
        assert spawn.take() is None
    with spawn.started_early():
        (unused,) = spawn._waiting
    assert unused.poll() is not None
    assert spawn.take() is None


class Box:
    """A mailbox, and the lines that its worker has read."""

    def __init__(self, folder: Path, gone_s: float) -> None:
        folder.mkdir()
        for name in (ORDERS, ANSWERS, BEAT):
            (folder / name).touch()
        self.folder, self.read = folder, list[str]()
        self._thread = threading.Thread(target=self._follow, args=(Inbox(folder, gone_s),), daemon=True)
        self._thread.start()

    def _follow(self, inbox: Inbox) -> None:
        for line in inbox:
            self.read.append(line)

    def has_ended(self, within_s: float) -> bool:
        self._thread.join(within_s)
        return not self._thread.is_alive()


def test_mailbox_passes_lines_in_order(tmp_path: Path) -> None:
    """A mailbox passes whole lines in order, and a removed one ends the reading."""
    box = Box(tmp_path / "box", 60.0)
    add(box.folder / ORDERS, '{"a": 1}\n{"b": ')
    deadline = time.monotonic() + 20
    while len(box.read) < 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    add(box.folder / ORDERS, '"ü"}\n')
    while len(box.read) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert box.read == ['{"a": 1}', '{"b": "ü"}']
    out, lines = Outbox(box.folder), Lines(box.folder / ANSWERS)
    out.write("one\n")
    assert lines.new() == [], "not flushed"
    out.flush()
    out.write("two\n")
    out.flush()
    assert lines.new() == ["one", "two"]
    (box.folder / ORDERS).unlink()
    assert box.has_ended(20), "the search has taken it away"


@pytest.mark.slow
def test_mailbox_worker_needs_a_heartbeat(tmp_path: Path) -> None:
    """A worker with a mailbox ends when the heartbeat of the search stops."""
    box = Box(tmp_path / "box", 6.0)
    for count in range(4):
        (box.folder / BEAT).write_text(f"{count}")
        assert not box.has_ended(2.0), "somebody counts"
    assert box.has_ended(30.0)


@pytest.fixture
def mailbox(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    folder = tmp_path / "mailbox"
    folder.mkdir()
    for name in (ORDERS, ANSWERS, BEAT):
        (folder / name).touch()
    program = f"from attnsurgery.search.workers.worker import serve_mailbox; serve_mailbox({str(folder)!r})"
    process = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "OMP_NUM_THREADS": "1"})
    yield folder, process
    process.kill()
    process.wait()


@pytest.mark.slow
def test_worker_ends_with_its_mailbox(mailbox: tuple[Path, subprocess.Popen[bytes]]) -> None:
    """A worker ends when its mailbox is removed, and does not start on one that was already used."""
    folder, process = mailbox
    deadline = time.monotonic() + 60
    while not (folder / ANSWERS).read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert (folder / ANSWERS).read_text() == '{"sign": true}\n'
    serve_mailbox(str(folder))  # of a worker that was put back into a queue: returns at once
    assert (folder / ANSWERS).read_text() == '{"sign": true}\n'
    (folder / ORDERS).unlink()
    assert process.wait(timeout=30) == 0
