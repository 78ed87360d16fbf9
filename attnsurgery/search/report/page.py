"""The page: what was found in a few sentences, then section after section, and one script that draws the pictures.

Nothing is ever fetched: the page forbids itself any connection, and any script but its own two, known by their hashes.
Without scripts everything but the pictures is there.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from attnsurgery.search.report.section import Section
from attnsurgery.search.report.words import called, ms, percent
from attnsurgery.search.result.record import Record

if TYPE_CHECKING:
    from attnsurgery.search.report.control import Control
    from attnsurgery.search.result.outcome import Outcome

_STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")

_NO_SCRIPT = '<noscript><p class="note">Pictures need JavaScript, which is off; all the rest is here.</p></noscript>'


def render(outcome: Outcome, control: Control | None = None) -> str:
    """The whole page."""
    from attnsurgery.search.report.figures import embedded, library  # Bokeh takes a while to import

    sections = list(_sections(outcome, control))
    pictures = {_name(section, index): made for section in sections for index, made in enumerate(section.figures)}
    places, script = embedded(pictures)
    scripts = [library(), script]
    title = f"{outcome.config.base}, {Path(outcome.config.space).stem}, {outcome.budgets.describe()}"
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_policy(scripts)}">',
            '<meta name="viewport" content="width=device-width">',
            f"<title>attnsurgery: {escape(title)}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{escape(title)}</h1>",
            *_summary(outcome),
            _contents(sections),
            _NO_SCRIPT,
            *(_shown(section, places) for section in sections),
            *(f"<script>{text}</script>" for text in scripts),
            "</body></html>\n",
        ]
    )


def _sections(outcome: Outcome, control: Control | None) -> Iterator[Section]:
    """What there is to show, in order."""
    from attnsurgery.search.report import (
        checklist,
        conditions,
        heat_map,
        pareto,
        progress,
        proxies,
        rungs,
        trials,
        winner,
    )

    found = (
        pareto.section(outcome),
        progress.section(outcome, control),
        heat_map.section(outcome),
        rungs.section(outcome),
        proxies.section(outcome),
        winner.section(outcome),
        trials.section(outcome),
        conditions.section(outcome),
        checklist.section(outcome, control),
    )
    yield from (section for section in found if section is not None)


def _summary(outcome: Outcome) -> Iterator[str]:
    best, base = outcome.best, outcome.base
    if outcome.interrupted:
        yield f'<p class="verdict">Interrupted: the same command goes on from here. {_so_far(outcome)}</p>'
    elif outcome.confirmation is None and best is not None:
        yield f'<p class="verdict">Not finished: {_so_far(outcome)}</p>'
    if outcome.confirmation:
        yield f'<p class="verdict">{escape(outcome.confirmation.sentence())}</p>'
    if best is None or best.timing is None:
        yield f"<p>No candidate was trained within {outcome.budgets.describe()} so far.</p>"
        return
    name = str(best.recipe["name"]) if best.recipe else ""
    called_best = "The winner" if outcome.confirmation else "Best on validation"
    yield (
        f"<p>{called_best}: <b>{escape(best.what())}</b> (trial {best.number}, <code>{escape(name)}</code>), "
        f"{percent(best.final_top1)} on validation at {ms(best.timing)}; {_against(best, base)}"
        f"{f' at {base.timing.ms:.3g} ms' if base.timing else ''}.</p>"
    )
    if outcome.confirmation:
        if choice := outcome.confirmation.choice():
            yield f"<p>Chosen among {escape(choice)}.</p>"
        again, budget = outcome.confirmation.timing, outcome.config.most_ms
        words = ""
        if budget is not None:
            over = again.ms > budget
            words = f", which is over the budget of {budget:g} ms" if over else ", within the budget"
        yield f"<p>Measured again after the search: {ms(again)}{words}.</p>"


def _so_far(outcome: Outcome) -> str:
    return (
        f"{outcome.trained} of {outcome.config.trials} wanted candidates are trained, and the best has not been judged "
        "on test images."
    )


def _against(best: Record, base: Record) -> str:
    """The base's accuracy to hold the best's against: of an equally long training."""
    rung = min(best.reached, base.reached)
    if rung == best.reached:
        return f"the base trained equally long: {percent(base.top1_on(rung))}"
    return (
        f"the base was not trained that long; on {called(rung)}, which both were on, {percent(best.top1_on(rung))} "
        f"against its {percent(base.top1_on(rung))}"
    )


def _contents(sections: list[Section]) -> str:
    links = (f'<a href="#{section.anchor}">{escape(section.title.partition(":")[0])}</a>' for section in sections)
    return f"<nav>{' · '.join(links)}</nav>"


def _shown(section: Section, places: dict[str, str]) -> str:
    key = "".join(f'<span><b style="color: {mark.colour}">{mark.sign}</b> {mark.words}</span>' for mark in section.key)
    key = f'<p class="key">{key}</p>' if key else ""
    drawn = "".join(f'<div class="paper">{key}{places[_name(section, i)]}</div>' for i in range(len(section.figures)))
    pictures = f'<div class="pictures">{drawn}</div>' if drawn else ""
    head = f'<h2 id="{section.anchor}">{escape(section.title)}</h2>'
    return f"<section>{head}{section.above}{pictures}{section.below}</section>"


def _name(section: Section, index: int) -> str:
    return f"{section.anchor}-{index}"


def _policy(scripts: list[str]) -> str:
    """What a browser may do with the page: draw it."""
    hashes = " ".join(f"'sha256-{_hash(script)}'" for script in scripts)
    return f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:"


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
