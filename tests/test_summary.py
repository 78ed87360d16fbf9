"""A run of the tests reports skipped GPU tests rightly, shown by runs of a tiny file."""

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
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    return process.returncode, process.stdout + process.stderr


@pytest.mark.parametrize("quiet", [(), ("-q",), ("-v",)])
@pytest.mark.slow
def test_gpu_run_of_skips_says_so_and_fails(tmp_path: Path, quiet: tuple[str, ...]) -> None:
    """A run of GPU tests that were all skipped says so and fails."""
    code, output = pytest_run(tmp_path, "-m", "gpu", *quiet)
    assert code == 1
    assert NOTHING_RAN in output
    assert "2 skipped" in output


@pytest.mark.slow
def test_gpu_run_with_one_test_passes(tmp_path: Path) -> None:
    """A run of GPU tests passes when at least one of them ran."""
    code, output = pytest_run(tmp_path, "-m", "gpu", "-q", skipped=False)
    assert code == 0
    assert NOTHING_RAN not in output
    assert "1 passed, 1 skipped, 1 deselected" in output


@pytest.mark.parametrize("words", [(), ("-m", "not gpu"), ("-m", "gpu", "--collect-only")])
@pytest.mark.slow
def test_skips_pass_where_gpu_was_not_asked(tmp_path: Path, words: tuple[str, ...]) -> None:
    """Skipped GPU tests are no failure in a run that did not ask for them."""
    code, output = pytest_run(tmp_path, *words)
    assert code == 0, output
    assert NOTHING_RAN not in output
