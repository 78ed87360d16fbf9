"""What a run of the tests says of itself, in runs of a tiny file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.summary import NOTHING_RAN

ROOT = str(Path(__file__).parents[1])

TESTS = """
import pytest

@pytest.mark.gpu
@pytest.mark.skip(reason="no CUDA device")
def test_on_a_gpu(): ...

@pytest.mark.gpu
@pytest.mark.skipif({skipped}, reason="no second CUDA device")
def test_on_two(): ...

def test_anywhere(): ...
"""


def pytest_run(folder: Path, *words: str, skipped: bool = True) -> tuple[int, str]:
    (folder / "conftest.py").write_text("from tests.summary import pytest_sessionfinish, pytest_terminal_summary\n")
    (folder / "pytest.ini").write_text("[pytest]\naddopts = -q\nmarkers = gpu: needs one\n")
    (folder / "test_tiny.py").write_text(TESTS.format(skipped=skipped))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *words]
    environment = {**os.environ, "PYTHONPATH": ROOT}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("quiet", [(), ("-q",), ("-v",)])
def test_gpu_tests_that_were_all_skipped_say_so_and_fail(tmp_path: Path, quiet: tuple[str, ...]) -> None:
    code, output = pytest_run(tmp_path, "-m", "gpu", *quiet)
    assert code == 1
    assert NOTHING_RAN in output
    assert "2 skipped" in output


def test_one_gpu_test_that_ran_is_enough(tmp_path: Path) -> None:
    code, output = pytest_run(tmp_path, "-m", "gpu", "-q", skipped=False)
    assert code == 0
    assert NOTHING_RAN not in output
    assert "1 passed, 1 skipped, 1 deselected" in output


@pytest.mark.parametrize("words", [(), ("-m", "not gpu"), ("-m", "gpu", "--collect-only")])
def test_skipped_gpu_tests_are_no_failure_where_they_were_not_asked_for(tmp_path: Path, words: tuple[str, ...]) -> None:
    code, output = pytest_run(tmp_path, *words)
    assert code == 0, output
    assert NOTHING_RAN not in output
