"""Searches that are killed, are stopped, or run out of disk: a short form of scripts/bench/crash.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest

from tests import warm_start

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds workers in /proc")


@pytest.mark.slow
def test_crash_script_loses_no_trial(tmp_path: Path) -> None:
    """Kills, a lack of memory, hangs, torn lines and a full disk lose no finished trial."""
    words = "--kills 3 --memory 1 --hangs 1 --trials 4 --training 1 --every 12 --json"
    process = subprocess.run(
        [sys.executable, "scripts/bench/crash.py", *words.split(), str(tmp_path / "figures.json")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-2000:]
    figures = json.loads((tmp_path / "figures.json").read_text())
    killed, torn, full = figures["killed"], figures["torn"], figures["full_disk"]
    none = ("finished_trials_lost", "trained_twice", "left_running", "studies_unreadable", "workers_left")
    assert {name: killed[name] for name in none} == dict.fromkeys(none, 0)
    assert killed["trained"] == killed["asked_for"]
    assert sum(killed["kills"].values()) == 3
    assert torn["bytes"] > 100
    assert (torn["not_read"], torn["studies_not_made"]) == (0, 0)
    if "skipped" not in full:
        assert full["exit_codes"] == [0, 1, 0]
        assert "cannot" in full["said"]
        assert full["lost"] == 0
        assert full["trained"] == 30


@pytest.fixture
def search(tmp_path: Path) -> list[str]:
    words = "search --budget-ms 100 --latency fixed --evaluator dummy --trials 4 --input-size 32 --base-epochs 1"
    return [*warm_start.python(), "-m", "attnsurgery", *words.split(), "--output", str(tmp_path / "run")]


def environment(**more: str) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'plugins'}",
        "OMP_NUM_THREADS": "1",
        **more,
    }


@pytest.mark.slow
def test_search_ctrl_c_once_and_twice(search: list[str], tmp_path: Path) -> None:
    """Ctrl-C once ends a search cleanly, twice at once, and the same command then resumes it."""
    first = subprocess.Popen(search, env=environment(DUMMY_SECONDS="2"), stderr=subprocess.PIPE, text=True)
    assert first.stderr is not None
    for line in first.stderr:  # the first trial has begun once the base is told
        if line.startswith("base "):
            break
    time.sleep(0.5)
    first.send_signal(signal.SIGINT)
    stderr = first.stderr.read()
    assert first.wait(timeout=60) == 130
    assert "Resume with:  attnsurgery search" in stderr
    assert (tmp_path / "run" / "report.html").is_file()
    study = optuna.load_study(study_name="run", storage=f"sqlite:///{tmp_path / 'run' / 'study.db'}")
    assert "RUNNING" not in {trial.state.name for trial in study.trials}
    first.stderr.close()

    (tmp_path / "injected_faults").mkdir()
    (tmp_path / "injected_faults" / "hang").touch()
    hanging = environment(DUMMY_FAULTS=str(tmp_path / "injected_faults"))
    second = subprocess.Popen(search, env=hanging, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while (tmp_path / "injected_faults" / "hang").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    for _ in range(2):
        second.send_signal(signal.SIGINT)
        time.sleep(0.5)
    assert second.wait(timeout=10) == 130
    assert second.stderr is not None
    second.stderr.close()

    last = subprocess.run(search, env=environment(), capture_output=True, text=True)
    assert last.returncode == 0, last.stderr
    study = optuna.load_study(study_name="run", storage=f"sqlite:///{tmp_path / 'run' / 'study.db'}")
    assert [trial.state.name for trial in study.trials if "record" in trial.user_attrs].count("COMPLETE") == 4
    assert {trial.state.name for trial in study.trials} == {"COMPLETE"}
