"""The page: the result in a few sentences, the sections, and one script that draws the figures.

The page loads nothing: its Content-Security-Policy forbids all connections, and all scripts except its own two, which
it identifies by their hashes. Without scripts, everything except the figures is shown.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from attnsurgery.search.report.section import builders
from attnsurgery.search.report.template import html, html_file
from attnsurgery.search.report.words import budgeted_latency, ms, percent, rung_name
from attnsurgery.search.result.record import Record

if TYPE_CHECKING:
    from attnsurgery.search.report.control import Control
    from attnsurgery.search.result.outcome import Outcome


def render(outcome: Outcome, control: Control | None = None) -> str:
    """The whole page as HTML."""
    from attnsurgery.search.report.figures import embed, library  # Bokeh takes a while to import

    sections = [section for build in builders() if (section := build(outcome, control)) is not None]
    figures = {f"{section.anchor}-{i}": figure for section in sections for i, figure in enumerate(section.figures)}
    divs, script = embed(figures)
    scripts = [library(), script]
    return html_file(
        "page.html",
        policy=_policy(scripts),
        title=f"{outcome.config.base}, {Path(outcome.config.space).stem}, {outcome.budgets.describe()}",
        summary=_summary(outcome),
        sections=sections,
        divs={name: Markup(div) for name, div in divs.items()},
        scripts=[Markup(script) for script in scripts],
    )


_SUMMARY = """\
{% for text in verdicts %}
<p class="verdict">{{ text }}</p>
{% endfor %}
{% if best %}
<p>{{ role }}: <b>{{ best }}</b> (trial {{ number }}, <code>{{ name }}</code>), {{ result }}.</p>
{% if choice %}
<p>Chosen among {{ choice }}.</p>
{% endif %}
{% if final_latency %}
<p>Latency measured again after the search: {{ final_latency }}.</p>
{% endif %}
{% else %}
<p>No candidate within {{ budgets }} has been trained so far.</p>
{% endif %}
"""


def _summary(outcome: Outcome) -> Markup:
    """The verdict if there is one, the best candidate, and its final latency."""
    best, confirmation = outcome.best, outcome.confirmation
    if best is None or best.timing is None:
        return html(_SUMMARY, verdicts=_verdicts(outcome), best="", budgets=outcome.budgets.describe())
    return html(
        _SUMMARY,
        verdicts=_verdicts(outcome),
        best=best.describe(),
        role="The winner" if confirmation else "Best on validation",
        number=best.number,
        name=best.recipe["name"] if best.recipe else "",
        result=f"{percent(best.final_metric)} on validation at {ms(best.timing)}. "
        f"{_base_comparison(best, outcome.base)}",
        choice=confirmation.choice() if confirmation else "",
        final_latency=(budgeted_latency(confirmation.timing, outcome.config.latency_budget_ms) if confirmation else ""),
    )


def _verdicts(outcome: Outcome) -> list[str]:
    """The state of a search that has not ended, and the verdict of one that was confirmed."""
    progress = (
        f"{outcome.trained} of {outcome.config.trials} requested candidates are trained, and the best has not been "
        "evaluated on test images."
    )
    verdicts = []
    if outcome.interrupted:
        verdicts.append(f"Interrupted: the same command resumes the search. {progress}")
    elif outcome.confirmation is None and outcome.best is not None:
        verdicts.append(f"Not finished: {progress}")
    if outcome.confirmation:
        verdicts += [text for text in (outcome.confirmation.sentence(), outcome.confirmation.advice()) if text]
    return verdicts


def _base_comparison(best: Record, base: Record) -> str:
    """The base's accuracy after an equally long training, and its latency."""
    rung = min(best.reached, base.reached)
    latency = f" at {base.timing.ms:.3g} ms" if base.timing else ""
    if rung == best.reached:
        return f"The base, trained equally long, has {percent(base.metric_on(rung))}{latency}"
    return (
        f"The base was not trained as long. On {rung_name(rung)}, the highest that both reached, the candidate has "
        f"{percent(best.metric_on(rung))}, and the base has {percent(base.metric_on(rung))}{latency}"
    )


def _policy(scripts: list[str]) -> str:
    """The Content-Security-Policy that allows a browser to draw the page and nothing else."""
    hashes = " ".join(f"'sha256-{_hash(script)}'" for script in scripts)
    return f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:"


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
