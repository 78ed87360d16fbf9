"""The laws that every section of the report keeps; a new file in report/sections/ is tested by itself."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from attnsurgery.search.report import render, section
from attnsurgery.search.report import sections as package
from attnsurgery.search.report.control import Control
from attnsurgery.search.report.section import Section, builders, register
from attnsurgery.search.report.template import html
from attnsurgery.search.result.outcome import Outcome
from tests._searches import outcome, search, trial

BUILDERS = {build.__module__.rpartition(".")[2]: build for build in builders()}
FAR = 1_000_000
"""An order after those of all sections of the package, present and future."""
FILES = [path.stem for path in Path(package.__path__[0]).glob("[!_]*.py")]


@pytest.fixture(params=["no trial", "nothing trained", "trained", "promoted", "confirmed beside a control"])
def findings(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Outcome, Control | None]:
    """A search at some stage, with its control if it has one."""
    records = {
        "nothing trained": [trial(0, None, 2.5)],
        "trained": search(12),
        "promoted": search(30, rungs=2),
        "confirmed beside a control": search(30),
    }
    if request.param == "no trial":
        return replace(outcome(tmp_path, search(1)), records=[], confirmation=None), None
    confirmed = request.param == "confirmed beside a control"
    control = Control(tmp_path / "other", search(10, seed=1)) if confirmed else None
    return outcome(tmp_path, records[request.param], judged=confirmed), control


def test_section_file_registers_its_section() -> None:
    """A file in report/sections/ is on the page without being named anywhere else."""
    assert sorted(BUILDERS) == sorted(FILES)
    assert len(builders()) == len(FILES)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.slow
def test_section_is_built_at_any_stage(name: str, findings: tuple[Outcome, Control | None]) -> None:
    """A section is complete, or None, whatever a search has come to."""
    part = BUILDERS[name](*findings)
    if part is not None:
        assert re.fullmatch(r"[a-z-]+", part.anchor)
        assert part.title.strip() == part.title != ""
        assert all(hasattr(words, "__html__") for words in (part.above, part.below) if words)


def test_section_anchors_are_unique(tmp_path: Path) -> None:
    """Links of the table of contents lead to one section each."""
    parts = [build(outcome(tmp_path, search(30, rungs=2)), None) for build in builders()]
    anchors = [part.anchor for part in parts if part is not None]
    assert len(anchors) > 5
    assert len(set(anchors)) == len(anchors)


@pytest.mark.slow
def test_new_section_is_shown_in_its_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A registered section stands on the page between its neighbours, and its plain text is escaped."""
    monkeypatch.setattr(section, "_builders", dict(section._builders))

    @register(order=FAR + 1)
    def last(findings: Outcome, control: Control | None) -> Section | None:
        return Section("last", "Last")

    @register(order=FAR)
    def extra(findings: Outcome, control: Control | None) -> Section | None:
        return Section("extra", "Extra: of <this> search", below=f"{len(findings.records)} < 7")

    page = render(outcome(tmp_path, search(6)))
    assert page.index('id="checklist"') < page.index('id="extra"') < page.index('id="last"')
    assert '<a href="#extra">Extra</a>' in page
    assert "Extra: of &lt;this&gt; search" in page
    assert "6 &lt; 7" in page


def test_section_order_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sections with the same order are an error that names both and the free orders nearby."""
    monkeypatch.setattr(section, "_builders", {})

    def first(findings: Outcome, control: Control | None) -> Section | None:
        return None

    def second(findings: Outcome, control: Control | None) -> Section | None:
        return None

    register(order=FAR)(first)
    register(order=FAR)(first)
    register(order=FAR + 1)(first)
    message = rf"two sections of the report have order {FAR}: \S+first and \S+second\. Free orders nearby: ([\d, ]+)\."
    with pytest.raises(ValueError, match=message) as error:
        register(order=FAR)(second)
    free = re.search(message, str(error.value))
    assert free is not None
    assert {int(order) for order in free[1].split(", ")} == set(range(FAR - 4, FAR + 5)) - {FAR, FAR + 1}


def test_template_escapes_and_is_strict() -> None:
    """Values are escaped once, HTML is kept, and a missing value is an error."""
    inner = html("<b>{{ words }}</b>", words="a < b")
    assert html("<p>{{ inner }}</p>", inner=inner) == "<p><b>a &lt; b</b></p>"
    with pytest.raises(UndefinedError, match="'words' is undefined"):
        html("<b>{{ words }}</b>")
