"""Hooks of pytest: a run with -m gpu in which nothing ran fails and says so, and counts are shown however quiet it is.

tests/conftest.py takes them in. addopts has one -q, and with a second pytest itself no longer says how many tests ran.
"""

from __future__ import annotations

import pytest

KINDS = ("failed", "error", "passed", "skipped", "xfailed", "xpassed", "deselected")
NOTHING_RAN = "no GPU test ran: all that were selected were skipped. See why with -rs."


def counts(config: pytest.Config) -> dict[str, int]:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    stats = reporter.stats if reporter is not None else {}
    return {kind: len(stats[kind]) for kind in KINDS if stats.get(kind)}


def nothing_ran(session: pytest.Session) -> bool:
    """Whether GPU tests were asked for by their marker, and every one of them was skipped."""
    items = getattr(session, "items", [])
    asked = "gpu" in (session.config.option.markexpr or "")
    return (
        asked
        and bool(items)
        and all(item.get_closest_marker("gpu") for item in items)
        and not session.config.option.collectonly
        and not {"passed", "failed", "error", "xfailed", "xpassed"} & set(counts(session.config))
    )


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput") and nothing_ran(session):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    config = terminalreporter.config
    if config.option.verbose < -1:
        terminalreporter.write_line(", ".join(f"{count} {kind}" for kind, count in counts(config).items()))
    session = getattr(terminalreporter, "_session", None)
    if session is not None and nothing_ran(session):
        terminalreporter.write_line(NOTHING_RAN, red=True)
