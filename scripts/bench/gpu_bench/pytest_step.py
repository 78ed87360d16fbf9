"""The tests marked gpu, a row for each. A run in which every test was skipped proves nothing, and is red."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from gpu_bench.rows import AGAIN, DONE, RED, REFUSED, Rows
from gpu_bench.runner import ROOT

RUN = "at least one test ran"
_MARK = re.compile(r"\bmark\.gpu\b")
_NEEDED_S = 5.0
CARD_ALONE = "test_gpu.py"
"""Of these tests a fake of a card makes failures, or minutes of Python."""


class ToRows:
    """Writes what became of each test, and leaves out what is known already.

    Args:
        tiny: only the first case of each test, and none of what only a card can show.
    """

    def __init__(self, rows: Rows, tiny: bool = False) -> None:
        self.rows, self.tiny, self.lost = rows, tiny, False

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        kept = self._few(items) if self.tiny else items
        kept = [item for item in kept if not self.rows.there(item.nodeid)]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept

    def _few(self, items: list[pytest.Item]) -> list[pytest.Item]:
        """The first case of each test; a test of a card alone has a row that says why it is left out."""
        firsts = {item.nodeid.partition("[")[0]: item for item in reversed(items) if item.get_closest_marker("gpu")}
        for name, item in reversed(firsts.items()):
            if item.path.name == CARD_ALONE and not self.rows.there(name):
                self.rows.add(name, {"state": REFUSED, "say": "left out of a tiny run: only a card can show it"})
        return [item for item in reversed(firsts.values()) if item.path.name != CARD_ALONE]

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
        if self.lost:
            item.session.shouldstop = "the device is lost for this process"
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.nodeid in self.rows.left_out:
            return
        if report.failed:
            row = {"state": RED, "say": f"{report.when}: {_last_line(report.longreprtext)}"}
            self.lost = self.lost or _device_lost()
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else "expected to fail"
            row = {"state": REFUSED, "say": f"skipped: {reason}"}
        elif report.when == "call":
            row = {"state": DONE, "say": "passed"}
        else:
            return
        self.rows.add(report.nodeid, row, report.duration)


def _last_line(text: str) -> str:
    """The error, of a traceback."""
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


def marked(folder: Path) -> list[Path]:
    """The files that have such tests; the others need not be imported."""
    return [path for path in sorted(folder.rglob("test_*.py")) if _MARK.search(path.read_text())]


def run_tests(rows: Rows, folder: Path, tiny: bool = False) -> None:
    files = marked(folder)
    plugin = ToRows(rows, tiny)
    options = ["-m", "gpu", "-v", "-o", "addopts=--strict-markers", "-p", "no:cacheprovider", "-p", "no:xdist"]
    if files:
        pytest.main([*options, "--continue-on-collection-errors", *map(str, files)], plugins=[plugin])
    if plugin.lost:
        raise SystemExit(AGAIN)
    ran = [key for key, row in rows.all().items() if row["state"] in (DONE, RED) and key != RUN]
    say = f"{len(ran)} ran" if ran else f"all tests of {len(files)} files were skipped"
    if not rows.left_out:
        rows.add(RUN, {"state": DONE if ran else RED, "say": say})


def run(rows: Rows, tiny: bool) -> None:
    run_tests(rows, ROOT / "tests", tiny)
