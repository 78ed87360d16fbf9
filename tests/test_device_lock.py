"""A measurement is alone on its device, between processes and searches, and never waits for itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from attnsurgery.search import Listener
from attnsurgery.search import device_lock as lock_module
from attnsurgery.search.device_lock import DeviceLock, device_lock
from attnsurgery.search.watching import StopRequested, Watching
from attnsurgery.search.workers import worker

pytestmark = pytest.mark.skipif(lock_module.fcntl is None, reason="this system has no flock")

PROGRAM = """
import importlib.util, os, sys, time
spec = importlib.util.spec_from_file_location("lock_module", sys.argv[1])
lock_module = importlib.util.module_from_spec(spec)
sys.modules["lock_module"] = lock_module
spec.loader.exec_module(lock_module)
kind, name, folder = sys.argv[2:]
log = os.open(f"{folder}/log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
lock, deadline = lock_module.device_lock("cpu"), time.monotonic() + 60

def note(what):
    os.write(log, f"{name} {what} {time.monotonic_ns()}\\n".encode())

def text():
    return open(f"{folder}/log").read()

if kind == "train":
    with lock.shared():
        while not os.path.exists(f"{folder}/stop") and time.monotonic() < deadline:
            lock.yield_to_measurements()
            note("begin")
            time.sleep(0.01)
            note("end")
else:
    while min(text().count(f"train{number} end") for number in range(2)) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    for turn in range(5):
        note("wants")
        with lock.exclusive():
            note("begin")
            time.sleep(0.02)
            note("end")
"""


@pytest.fixture(autouse=True)
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATTNSURGERY_LOCKS", str(tmp_path / "locks"))
    return tmp_path / "locks"


def start_process(kind: str, name: str, folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", PROGRAM, str(lock_module.__file__), kind, name, str(folder)])


@pytest.mark.slow
def test_lock_measurements_exclude_steps(tmp_path: Path) -> None:
    """Measurements of two processes overlap with no step of two trainings, and are not starved by them."""
    (tmp_path / "log").touch()
    training = [start_process("train", f"train{number}", tmp_path) for number in range(2)]
    measuring = [start_process("measure", f"measure{number}", tmp_path) for number in range(2)]
    try:
        assert [process.wait(timeout=120) for process in measuring] == [0, 0]
        (tmp_path / "stop").touch()
        assert [process.wait(timeout=60) for process in training] == [0, 0]
    finally:
        for process in (*training, *measuring):
            process.kill()
            process.wait()
    entries = [(name, what, int(at)) for name, what, at in map(str.split, (tmp_path / "log").read_text().splitlines())]
    entries.sort(key=lambda entry: entry[2])
    assert Counter(what for name, what, _ in entries if name.startswith("measure"))["end"] == 10
    at_work: set[str] = set()
    waiting: dict[str, Counter[str]] = {}
    for name, what, _ in entries:
        if what == "wants":
            waiting[name] = Counter()
        elif what == "end":
            at_work.remove(name)
        elif name.startswith("measure"):
            assert not at_work, f"{name} measures while {at_work} work"
            # one step may begin between the wish and the closing of the gate, or behind the other's measurement
            assert max(waiting.pop(name).values(), default=0) <= 3, (
                "it waited for the end of a step, and not of a training"
            )
            at_work.add(name)
        else:
            assert not any(other.startswith("measure") for other in at_work), f"{name} steps while {at_work} measures"
            at_work.add(name)
            for steps in waiting.values():
                steps[name] += 1


@pytest.mark.slow
def test_lock_ends_with_its_process(tmp_path: Path) -> None:
    """A lock is released when the process that holds it is killed."""
    (tmp_path / "log").touch()
    process = start_process("train", "train0", tmp_path)
    try:
        while "end" not in (tmp_path / "log").read_text():
            assert process.poll() is None
        process.send_signal(signal.SIGSTOP)  # in its shared lock, and not to be asked for it
        lock = device_lock("cpu")
        waits: list[int] = []

        def waiting() -> None:
            waits.append(1)
            if len(waits) == 5:
                process.kill()

        lock.waiting = waiting
        with lock.exclusive():
            assert len(waits) >= 5
    finally:
        process.kill()
        process.wait()


def lock_elsewhere(locks: Path) -> DeviceLock:
    """The lock as another process or search has it."""
    device_lock("cpu")
    return DeviceLock("cpu", locks / "cpu")


class Refused(Exception):
    pass


def refuse() -> None:
    raise Refused


def test_lock_never_waits_for_itself(locks: Path) -> None:
    """A measurement within a job waits for other processes and never for itself."""
    lock, other = device_lock("cpu"), lock_elsewhere(locks)
    assert device_lock("cpu") is lock
    other.waiting = lock.waiting = refuse
    with lock.shared():
        with other.shared():
            lock.yield_to_measurements()  # nobody wants to measure
        with pytest.raises(Refused), other.exclusive():
            pass
        with lock.exclusive(), lock.exclusive(), lock.shared():
            lock.yield_to_measurements()
            with pytest.raises(Refused), other.shared():
                pass
        with pytest.raises(Refused), other.exclusive():
            pass
    with other.exclusive():
        with pytest.raises(Refused):
            lock.yield_to_measurements()
        with pytest.raises(Refused), lock.shared():
            pass
    with lock.exclusive():
        pass


def test_long_wait_is_told_once(locks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait that takes long is said once, and says what may be the reason; a short one is not."""
    other, told, asked = lock_elsewhere(locks), list[str](), list[int]()

    class Told(Listener):
        def phase(self, text: str) -> None:
            told.append(text)

    def stop() -> bool:
        asked.append(1)
        return len(asked) > 20

    for seconds, count in ((1e9, 0), (0.0, 1)):
        monkeypatch.setattr(lock_module, "_LONG_S", seconds)
        Watching(Told(), stop, device_lock("cpu"))
        asked.clear()
        with other.exclusive(), pytest.raises(StopRequested), device_lock("cpu").shared():
            pass
        assert len(told) == count
    assert "waiting for another search or measurement on this device" in told[0]


def test_lock_abandoned_wait_opens_the_gate(locks: Path) -> None:
    """A process that gives up waiting leaves no gate closed."""
    lock, other = device_lock("cpu"), lock_elsewhere(locks)
    other.waiting = lock.waiting = refuse
    with lock.shared():
        with pytest.raises(Refused), other.exclusive():
            pass
        lock.yield_to_measurements()
        with other.shared():
            pass


def test_step_yields_to_measurement_and_stop(locks: Path) -> None:
    """A training step lets a measurement in, and a stop ends it while it waits."""
    done = threading.Event()

    def measure() -> None:
        with device_lock("cpu").exclusive():  # of this thread
            done.set()

    watch = Watching(Listener(), lambda: False, device_lock("cpu"))
    with device_lock("cpu").shared():
        thread = threading.Thread(target=measure)
        thread.start()
        while not done.is_set():
            watch.step()
        thread.join()
    other = lock_elsewhere(locks)
    answers = iter([False, False, True])
    watch = Watching(Listener(), lambda: next(answers), device_lock("cpu"))
    with other.exclusive(), pytest.raises(StopRequested):
        watch.step()


def test_lock_synchronizes_before_release(locks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is synchronized before it is released, or its queued work would run during the measurement."""
    order: list[str] = []
    lock, other = device_lock("cpu"), lock_elsewhere(locks)
    monkeypatch.setattr(lock, "_synchronize", lambda: order.append("finished"))
    with lock.shared():
        lock.yield_to_measurements()
        assert not order, "nobody waits, so nothing is waited for"

        def leave() -> None:
            order.append("left")
            lock_module._unlock(gate)

        gate = other._files[1]
        assert lock_module._try_lock(gate, exclusive=True)
        lock.waiting = leave
        lock.yield_to_measurements()
    assert order == ["finished", "left", "finished"]
    with lock.shared(), lock.exclusive():
        assert order == ["finished", "left", "finished", "finished"]


def test_lock_names_card_by_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card is named by its UUID and not by its number, where it has one."""
    cards = {0: "6f9e0b1c-0000-4c4e-8a50-000000000001", 1: "6f9e0b1c-0000-4c4e-8a50-000000000002"}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=cards[index]))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    names = [lock_module._name(device) for device in ("cuda:0", "cuda:1", "cuda", "cpu")]
    assert names == [f"cuda-{cards[0]}", f"cuda-{cards[1]}", f"cuda-{cards[1]}", "cpu"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setitem(cards, 0, cards[1])
    assert lock_module._name("cuda:0") == names[1]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(name="an old one"))
    assert lock_module._name("cuda:0") == "cuda-0-1", "by what is left"


def test_lock_folder_ignores_tmpdir(monkeypatch: pytest.MonkeyPatch) -> None:
    """All searches of a user share one folder of locks, whatever TMPDIR is."""
    monkeypatch.delenv("ATTNSURGERY_LOCKS")
    folder = lock_module._folder()
    monkeypatch.setenv("TMPDIR", "/somewhere/else")
    assert lock_module._folder() == folder
    assert folder.stat().st_uid == os.getuid()


def test_lock_works_without_writable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that cannot be written locks nobody out."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("ATTNSURGERY_LOCKS", str(tmp_path / "file"))
    with device_lock("cpu").exclusive(), device_lock("cpu").shared():
        device_lock("cpu").yield_to_measurements()


def test_worker_sets_its_device_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker sets its CUDA device before anything else, and sets none for "cuda" or "cpu"."""
    order: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: order.append(f"set {device}"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"uuid-{index}"))

    def assemble(config: object, listener: object, *, check: bool, decode: bool) -> None:
        order.append("assemble")
        raise worker.UsageError("enough")

    monkeypatch.setattr(worker, "assemble", assemble)
    begin = {"threads": 1, "config": {"device": "cuda:1", "budget_ms": 1.0}}
    worker._Worker(begin, worker.Wire(sys.stderr), threading.Event()).assemble()
    assert order == ["set cuda:1", "assemble"]
    order.clear()
    worker.use_device("cuda")
    worker.use_device("cpu")
    assert order == []


def test_worker_reports_missing_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA device that is not there is reported with the number of those that are."""

    def no_such(device: torch.device) -> None:
        raise RuntimeError("CUDA error: invalid device ordinal")

    monkeypatch.setattr(torch.cuda, "set_device", no_such)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(worker.UsageError, match=r"--device cuda:7: \S+ has 2 CUDA devices"):
        worker.use_device("cuda:7")
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        worker.use_device("cuda:1")


def test_lock_forgets_finished_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock of a thread outlives its searches and asks none of the past whether to stop."""
    from attnsurgery.search.workers.pool import InProcessPool

    monkeypatch.setenv("ATTNSURGERY_LOCKS", str(tmp_path))
    bench = SimpleNamespace(config=SimpleNamespace(device="cpu"), backend=SimpleNamespace())
    pool = InProcessPool(bench, Listener(), lambda: True)  # type: ignore[arg-type]
    with pytest.raises(StopRequested):
        device_lock("cpu").waiting()
    pool.close()
    device_lock("cpu").waiting()
