"""Programs that start warm behave as those of a new interpreter."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import warm_start


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [*warm_start.python(), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)  # type: ignore[call-overload]


def test_warm_program_has_its_context(tmp_path: Path) -> None:
    """A program has the arguments, the standard input, the environment and the directory that it was given."""
    program = (
        "import os, sys; print(sys.argv, input(), os.environ['WORD'], os.getcwd()); print('error', file=sys.stderr)"
    )
    process = run("-c", program, "a", "b", input="line\n", cwd=tmp_path, env={**os.environ, "WORD": "word"})
    assert (process.returncode, process.stdout) == (0, f"['-c', 'a', 'b'] line word {tmp_path}\n")
    assert process.stderr == "error\n"


@pytest.mark.parametrize(
    ("program", "code", "error"),
    [
        ("raise SystemExit(7)", 7, ""),
        ("raise SystemExit('reason')", 1, "reason\n"),
        ("raise SystemExit", 0, ""),
        ("import os; os._exit(3)", 3, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, ""),
    ],
)
@pytest.mark.slow
def test_warm_program_ends_as_in_new_python(program: str, code: int, error: str) -> None:
    for process in (
        run("-c", program),
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True),
    ):
        assert (process.returncode, process.stderr) == (code, error)


def test_warm_module_runs_as_main() -> None:
    process = run("-m", "attnsurgery", "--version")
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("attnsurgery ")


def test_warm_program_finds_pythonpath_first(tmp_path: Path) -> None:
    """Modules are found on PYTHONPATH, and not in the folders of the server."""
    (tmp_path / "only_here.py").write_text("WORD = 'here'")
    program = "import only_here, importlib.util as u; print(only_here.WORD, u.find_spec('warm_start'))"
    process = run("-c", program, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert process.stdout == "here None\n", process.stderr


def sleeping() -> tuple[subprocess.Popen[str], int]:
    """A client, and the process identifier of its program."""
    program = "import os, time; print(os.getpid(), flush=True); time.sleep(100)"
    command = [*warm_start.python(), "-c", program]
    client = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert client.stdout is not None
    with client.stdout as output:
        return client, int(output.readline())


def test_warm_program_gets_signals() -> None:
    """SIGINT and SIGTERM reach the program, and end it as they end a new interpreter."""
    for number in (signal.SIGINT, signal.SIGTERM):
        client, _ = sleeping()
        client.send_signal(number)
        assert client.wait(60) == -number


def test_warm_program_dies_with_its_client() -> None:
    client, pid = sleeping()
    client.kill()
    client.wait()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_warm_start_preloads_own_modules() -> None:
    ours = [name for name in warm_start._PRELOADED if name.startswith("attnsurgery")]
    assert ours
    assert all(importlib.util.find_spec(name) for name in ours)
