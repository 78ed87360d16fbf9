"""The tests marked gpu, one row each. A run in which all tests were skipped is red."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from gpu_bench.rows import DONE, RED, REFUSED, RESTART, Rows
from gpu_bench.runner import ROOT

RUN = "at least one test ran"
_MARK = re.compile(r"\bmark\.gpu\b")
_NEEDED_S = 5.0
CARD_ONLY = "test_gpu.py"
"""The file of tests that fail, or take minutes, with a fake of a card."""


class ToRows:
    """A pytest plugin that writes a row for each test, and deselects tests that have a row.

    Args:
        rows: of the step.
        tiny: run only the first case of each test, and no test that needs a real card.
    """

    def __init__(self, rows: Rows, tiny: bool = False) -> None:
        self.rows, self.tiny, self.device_lost = rows, tiny, False

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        selected = self._first_cases(items) if self.tiny else items
        selected = [item for item in selected if not self.rows.has(item.nodeid)]
        config.hook.pytest_deselected(items=[item for item in items if item not in selected])
        items[:] = selected

    def _first_cases(self, items: list[pytest.Item]) -> list[pytest.Item]:
        """The first case of each test; a test that needs a real card gets a row with the reason for its omission."""
        firsts = {item.nodeid.partition("[")[0]: item for item in reversed(items) if item.get_closest_marker("gpu")}
        for name, item in reversed(firsts.items()):
            if item.path.name == CARD_ONLY and not self.rows.has(name):
                self.rows.add(name, {"state": REFUSED, "say": "left out of a tiny run: only a card can show it"})
        return [item for item in reversed(firsts.values()) if item.path.name != CARD_ONLY]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.rows.add(report.nodeid or "collection", {"state": RED, "say": _last_line(report.longreprtext)})

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        if self.rows.left_s() < _NEEDED_S:
            self.rows.left_out.append(item.nodeid)
            item.add_marker(pytest.mark.skip(reason="no time left"))
        self.rows.begin(item.nodeid)
        result = yield
        self.rows.begin("")
        if self.device_lost:
            item.session.shouldstop = "the device is lost for this process"
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.nodeid in self.rows.left_out:
            return
        if report.failed:
            row = {"state": RED, "say": f"{report.when}: {_last_line(report.longreprtext)}"}
            self.device_lost = self.device_lost or _device_lost()
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else "expected to fail"
            row = {"state": REFUSED, "say": f"skipped: {reason}"}
        elif report.when == "call":
            row = {"state": DONE, "say": "passed"}
        else:
            return
        self.rows.add(report.nodeid, row, report.duration)


def _last_line(text: str) -> str:
    """The error in a traceback."""
    errors = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    return (" | ".join(errors[:4]) or text.strip().rpartition("\n")[2])[:600]


def _device_lost() -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def marked_files(folder: Path) -> list[Path]:
    """The files with tests marked gpu; the others need not be imported."""
    return [path for path in sorted(folder.rglob("test_*.py")) if _MARK.search(path.read_text())]


def run_tests(rows: Rows, folder: Path, tiny: bool = False) -> None:
    files = marked_files(folder)
    plugin = ToRows(rows, tiny)
    options = ["-m", "gpu", "-v", "-o", "addopts=--strict-markers", "-p", "no:cacheprovider", "-p", "no:xdist"]
    if files:
        pytest.main([*options, "--continue-on-collection-errors", *map(str, files)], plugins=[plugin])
    if plugin.device_lost:
        raise SystemExit(RESTART)
    ran = [key for key, row in rows.all().items() if row["state"] in (DONE, RED) and key != RUN]
    say = f"{len(ran)} ran" if ran else f"all tests of {len(files)} files were skipped"
    if not rows.left_out:
        rows.add(RUN, {"state": DONE if ran else RED, "say": say})


def run(rows: Rows, tiny: bool) -> None:
    run_tests(rows, ROOT / "tests", tiny)
