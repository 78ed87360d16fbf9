"""The runner of scripts/bench/gpu on dummy steps: limits, resuming, killed processes and red rows; without a GPU."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "scripts" / "bench"

DUMMY = """
import os, signal, subprocess, sys, time
from pathlib import Path
from gpu_bench.pytest_step import run_tests
from gpu_bench.rows import NoTime, Refused

HERE = Path(__file__).parent

def make_row(rows, key, maker=None):
    def noted():
        with (HERE / "made.txt").open("a") as file:
            file.write(key + "\\n")
        return maker() if maker else {"value": 1, "say": "here"}
    rows.make(key, noted)

def three(rows, tiny):
    for key in "abc":
        make_row(rows, key)
    print("printed, and no row: {'step': 'x'}")

def slow(rows, tiny):
    make_row(rows, "first")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (HERE / "child.txt").write_text(str(child.pid))
    make_row(rows, "second", lambda: time.sleep(60))

def mixed(rows, tiny):
    def refuse():
        raise Refused("no place for it")
    make_row(rows, "good")
    make_row(rows, "refused", refuse)
    make_row(rows, "bad", lambda: 1 / 0 if not (HERE / "mended").exists() else {"say": "mended"})

def dying(rows, tiny):
    make_row(rows, "before")
    make_row(rows, "deadly", lambda: os.kill(os.getpid(), signal.SIGKILL))
    make_row(rows, "after")

def hasty(rows, tiny):
    def too_long():
        raise NoTime

    rows.make("long", dict, needs_s=1000.0)
    rows.make("longer", too_long)

def tests(rows, tiny):
    run_tests(rows, HERE / "suite", tiny)
"""


@pytest.fixture(autouse=True)
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes scripts/bench importable, lets steps find the dummies, and restores signal handlers afterwards."""
    (tmp_path / "dummy.py").write_text(DUMMY)
    monkeypatch.syspath_prepend(str(BENCH))
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., tuple[int, dict[str, dict[str, object]]]]:
    """Runs dummies as steps; returns the exit code, and how each step ended."""

    def of(
        *names: str, limit_s: float = 60.0, minutes: float = 2.0, tiny: bool = False
    ) -> tuple[int, dict[str, dict[str, object]]]:
        from gpu_bench.runner import Runner, Step

        steps = [Step(name, 1, f"dummy:{name}", limit_s, 1.0, "a dummy") for name in names]
        code = Runner(tmp_path / "out", "h100", minutes, tiny, path=(str(tmp_path),)).run(steps)
        return code, json.loads((tmp_path / "out" / "summary.json").read_text())["steps"]

    return of


def rows(tmp_path: Path) -> dict[str, dict[str, object]]:
    lines = (tmp_path / "out" / "rows-h100.jsonl").read_text().splitlines()
    return {row["key"]: row for row in map(json.loads, lines)}


def keys_made(tmp_path: Path) -> list[str]:
    return (tmp_path / "made.txt").read_text().split()


def test_rows_carry_conditions_not_prints(run: Callable[..., object], tmp_path: Path) -> None:
    """Rows carry their conditions, and what a step prints goes to the log."""
    assert run("three")[0] == 0  # type: ignore[index]
    assert list(rows(tmp_path)) == ["a", "b", "c"]
    assert rows(tmp_path)["a"]["conditions"].items() >= {"card": "h100"}.items()  # type: ignore[attr-defined]
    assert "printed, and no row" in (tmp_path / "out" / "log.txt").read_text()


@pytest.mark.slow
def test_time_limit_kills_step_and_children(run: Callable[..., object], tmp_path: Path) -> None:
    """At its limit a step and its children are killed, and the next step runs."""
    code, results = run("slow", "three", limit_s=4.0)  # type: ignore[misc]
    assert code == 1
    assert results["slow"]["how"] == "timed out"
    assert "at second" in results["slow"]["why"]
    assert results["three"]["how"] == "done", "the next has its turn"
    assert list(rows(tmp_path)) == ["first", "a", "b", "c"]
    assert has_ended(int((tmp_path / "child.txt").read_text()))


def has_ended(pid: int) -> bool:
    """Whether a process ends soon; a zombie that nobody has waited for counts as ended."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
            os.kill(pid, 0)
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
def test_second_run_makes_only_the_rest(run: Callable[..., object], tmp_path: Path) -> None:
    first, _ = run("mixed")  # type: ignore[misc]
    (tmp_path / "mended").touch()
    second, results = run("mixed")  # type: ignore[misc]
    assert (first, second) == (1, 0)
    assert keys_made(tmp_path) == ["good", "refused", "bad", "bad"], "red rows alone are made again"
    assert results["mixed"]["how"] == "done"
    assert rows(tmp_path)["bad"]["say"] == "mended"


def test_error_is_red_and_refusal_is_not(run: Callable[..., object], tmp_path: Path) -> None:
    """An error makes a red row; a refusal does not."""
    code, results = run("mixed")  # type: ignore[misc]
    assert (code, results["mixed"]["how"], results["mixed"]["why"]) == (1, "red", "bad")
    by_key = rows(tmp_path)
    assert (by_key["refused"]["state"], by_key["refused"]["say"]) == ("refused", "no place for it")
    assert "ZeroDivisionError" in str(by_key["bad"]["say"])


@pytest.mark.slow
def test_dead_process_costs_one_row(run: Callable[..., object], tmp_path: Path) -> None:
    code, results = run("dying")  # type: ignore[misc]
    assert (code, results["dying"]["how"], results["dying"]["why"]) == (1, "red", "deadly")
    assert keys_made(tmp_path) == ["before", "deadly", "after"]
    assert "SIGKILL" in str(rows(tmp_path)["deadly"]["say"])


def test_step_without_time_is_not_red(run: Callable[..., object], tmp_path: Path) -> None:
    """A step that runs out of time is partial, one without time is skipped, and neither is red."""
    code, results = run("hasty")  # type: ignore[misc]
    assert (code, results["hasty"]["how"]) == (0, "part")
    code, results = run("three", minutes=0.01)  # type: ignore[misc]
    assert (code, results["three"]["how"]) == (0, "skipped")
    assert not (tmp_path / "made.txt").exists()


@pytest.mark.parametrize(
    ("body", "how"),
    [
        ("@pytest.mark.gpu\n@pytest.mark.skip(reason='no CUDA device')\ndef test_it(): ...", "red"),
        ("@pytest.mark.gpu\ndef test_it(): ...", "done"),
        ("@pytest.mark.gpu\ndef test_it(): assert 1 == 2", "red"),
        ("import nothing_of_this_name\n@pytest.mark.gpu\ndef test_it(): ...", "red"),
    ],
)
@pytest.mark.slow
def test_pytest_run_proving_nothing_is_red(run: Callable[..., object], tmp_path: Path, body: str, how: str) -> None:
    """A pytest run that fails, cannot be collected or runs no GPU test is red."""
    suite = tmp_path / "suite"
    suite.mkdir()
    (suite / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    (suite / "test_one.py").write_text(f"import pytest\n{body}\n")
    (suite / "test_other.py").write_text("raise SystemExit('not marked, and so never imported')")
    code, results = run("tests")  # type: ignore[misc]
    assert (code, results["tests"]["how"]) == (int(how == "red"), how)


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.slow
def test_tiny_run_has_one_case_of_each_test(run: Callable[..., object], tmp_path: Path, tiny: bool) -> None:
    """A tiny run takes one case of each test, and gives a reason for the rest."""
    suite = tmp_path / "suite"
    suite.mkdir()
    (suite / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    two = "import pytest\n@pytest.mark.gpu\n@pytest.mark.parametrize('n', [1, 2])\ndef test_{}(n): ...\n"
    (suite / "test_gpu.py").write_text(two.format("alone"))
    (suite / "test_other.py").write_text(two.format("other"))
    assert run("tests", tiny=tiny)[0] == 0  # type: ignore[index]
    states = {key.rpartition("::")[2]: row["state"] for key, row in rows(tmp_path).items()}
    common_states = {"test_other[1]": "done", "at least one test ran": "done"}
    if tiny:
        assert states == {**common_states, "test_alone": "refused"}
    else:
        assert states == {**common_states, **dict.fromkeys(["test_other[2]", "test_alone[1]", "test_alone[2]"], "done")}


@pytest.mark.parametrize(("some", "state"), [(True, "done"), (False, None)])
def test_partial_rows_suffice_in_tiny_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, some: bool, state: str | None
) -> None:
    """Some rows of a script that ran out of time are enough in a tiny run alone."""
    from gpu_bench import blocks_step
    from gpu_bench.rows import Rows

    script = tmp_path / "slow.py"
    script.write_text("import time; time.sleep(60)")
    (tmp_path / "blocks-h100.jsonl").write_text("{}\n")
    monkeypatch.setattr(blocks_step, "SCRIPT", script)
    step_rows = Rows(tmp_path / "rows-h100.jsonl", "blocks")
    blocks_step.run_script(step_rows, "blocks", [], 0.1, partial_suffices=some)
    assert step_rows.all().get("blocks", {}).get("state") == state
    assert step_rows.left_out == ([] if some else ["blocks"])


def test_rows_survive_a_killed_runner(tmp_path: Path) -> None:
    """Rows that were finished are on disk, and no process that was started is left."""
    program = f"""
import sys
sys.path.insert(0, {str(BENCH)!r})
from pathlib import Path
from gpu_bench.runner import Runner, Step
out = Path({str(tmp_path)!r})
Runner(out / "out", "h100", 2.0, path=(str(out),)).run([Step("slow", 1, "dummy:slow", 60.0, 1.0, "a dummy")])
"""
    runner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL)
    child = tmp_path / "child.txt"
    while not (child.exists() and child.read_text()):
        assert runner.poll() is None
        time.sleep(0.05)
    runner.kill()
    runner.wait()
    assert has_ended(int(child.read_text()))
    assert list(rows(tmp_path)) == ["first"]


def test_torn_last_line_is_made_again(tmp_path: Path) -> None:
    from gpu_bench.rows import Rows, append, read

    path = tmp_path / "rows.jsonl"
    append(path, {"step": "s", "key": "a", "state": "done"})
    with path.open("a") as file:
        file.write('{"step": "s", "key": "b", "sta')
    step_rows = Rows(path, "s")
    assert (step_rows.has("a"), step_rows.has("b")) == (True, False)
    step_rows.make("b", lambda: {"value": 2})
    assert [row["key"] for row in read(path)] == ["a", "b"]


@pytest.mark.parametrize(
    ("card", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("Tesla T4", "t4"),
    ],
)
def test_results_are_named_by_the_card(card: str, name: str) -> None:
    from gpu_bench.rows import short

    assert short(card) == name


def test_steps_have_bodies_and_fit_a_call() -> None:
    """Each step has a body, looked for as text because importing takes seconds, and fits its call."""
    from gpu_bench.plan import STEPS

    assert len({step.name for step in STEPS}) == len(STEPS)
    for step in STEPS:
        module, _, function = step.body.partition(":")
        assert f"\ndef {function}(rows: Rows, tiny: bool)" in (BENCH / f"{module.replace('.', '/')}.py").read_text()
        assert step.min_s < step.limit_s


def test_steps_import_names_that_exist() -> None:
    """The names that steps import from other scripts exist there, which would otherwise show on a card alone."""
    imported = set()
    for path in (BENCH / "gpu_bench").glob("*.py"):
        tree = ast.parse(path.read_text())
        aliases: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                aliases |= {one.asname or one.name: one.name for one in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported |= {(node.module, one.name) for one in node.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
                imported.add((aliases[node.value.id], node.attr))
    ours = {(module, name) for module, name in imported if (BENCH / f"{module}.py").exists()}
    assert {module for module, _ in ours} == {"budget", "latency", "latency_model", "slot_costs"}
    for module, name in sorted(ours):
        assert name in defined(BENCH / f"{module}.py"), f"{module}.py has no {name}"


def defined(script: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.parse(script.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def test_table_says_not_yet_then_figure(tmp_path: Path) -> None:
    """The table says "not yet" until a row with the figure is there."""
    from gpu_bench import table
    from gpu_bench.rows import append

    assert "| resnet50_se | not yet |" in table.of(tmp_path)
    row = {"step": "latency", "key": "resnet50_se cudagraph b1", "state": "done", "base": "resnet50"}
    row |= {"surgical": "resnet50_se", "mode": "cudagraph", "batch": 1}
    figures = {"ratio": 1.0421, "ratio_95": [1.0411, 1.0431], "base_p50_ms": 0.7}
    append(tmp_path / "gpu-h100.jsonl", row | figures | {"conditions": {"torch": "2.11.0", "date": "2026-11-26T10"}})
    text = table.of(tmp_path)
    assert "h100: torch 2.11.0, 2026-11-26" in text
    assert "| resnet50_se | 1.042 ± 0.001 | not yet |" in text


def test_wheels_include_their_requirements(tmp_path: Path) -> None:
    """A folder of wheels holds everything that they require, and a version that does not fit is refused."""
    from gpu_bench.wheels import missing
    from packaging.requirements import Requirement

    requirements = [Requirement("numpy>=1"), Requirement("alpha>=2")]
    assert [str(one) for one in missing(tmp_path, requirements)] == ["alpha>=2"], "numpy is there"
    write_wheel(tmp_path, "alpha-2.1", "beta==1.4", "gamma; extra == 'more'", "delta; python_version < '3.12'")
    assert [str(one) for one in missing(tmp_path, requirements)] == ["beta==1.4"]
    write_wheel(tmp_path, "beta-1.4")
    assert missing(tmp_path, requirements) == []
    (tmp_path / "beta-1.4-py3-none-any.whl").rename(tmp_path / "beta-1.5-py3-none-any.whl")
    with pytest.raises(SystemExit, match=r"beta-1\.5-py3-none-any\.whl does not satisfy beta==1\.4"):
        missing(tmp_path, requirements)


def write_wheel(folder: Path, name: str, *needs: str) -> None:
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.dist-info/METADATA", "".join(f"Requires-Dist: {need}\n" for need in needs))
