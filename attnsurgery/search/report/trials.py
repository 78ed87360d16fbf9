"""Every trial as a row of a table, and how many came to what."""

from __future__ import annotations

from collections import Counter
from html import escape
from typing import TYPE_CHECKING

from attnsurgery.search.report.section import Section
from attnsurgery.search.report.words import STATES, called, loss, ms, percent, state
from attnsurgery.search.result.record import Record

if TYPE_CHECKING:
    from attnsurgery.search.result.outcome import Outcome


def section(outcome: Outcome) -> Section:
    """The tally, and the table."""
    counts = Counter(state(record) for record in outcome.records)
    tally = ", ".join(f"{counts[name]} {words}" for name, words in STATES.items() if counts[name])
    said = f"<p>{escape(tally or 'none yet')}; the space has {outcome.about.candidates:,} candidates.</p>"
    return Section("trials", "Trials", above=said, below=f'<div class="scroll">{_table(outcome)}</div>')


def _table(outcome: Outcome) -> str:
    rungs = outcome.top_rung
    names = ("val top-1", "val loss")
    scores = [f"{name}<br>{called(rung)}" for rung in range(rungs + 1) for name in names] if rungs else [*names]
    numbers = [f'<th class="n">{words}</th>' for words in ("latency, ms", *scores, "parameters")]
    head = f'<tr><th class="n">trial</th><th>blocks</th>{"".join(numbers)}<th>outcome</th></tr>'
    rows = [_row(outcome.base, "base", "", rungs)]
    for record in outcome.records:
        if record.state == "too_many_blocks":
            continue  # nothing was built: the tally above is all there is to say
        best = outcome.best is not None and record.number == outcome.best.number
        rows.append(_row(record, str(record.number), ' class="best"' if best else "", rungs))
    return f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"


def _row(record: Record, number: str, attributes: str, rungs: int) -> str:
    outcome = "reference" if record.number < 0 else STATES[state(record)]
    if record.duplicate_of is not None:
        outcome += f" (as {'the base' if record.duplicate_of < 0 else f'trial {record.duplicate_of}'})"
    if record.reason:
        outcome += f": {record.reason}"
    if record.halted:
        outcome += f"; not promoted: {record.halted}"
    scores = [text for rung in range(rungs + 1) for text in (percent(record.top1_on(rung)), loss(record, rung))]
    parameters = f"{record.parameters:,}" if record.parameters else ""
    numbers = "".join(f'<td class="n">{words}</td>' for words in (ms(record.timing, unit=""), *scores, parameters))
    return (
        f'<tr{attributes}><td class="n">{number}</td><td class="what">{escape(record.what())}</td>{numbers}'
        f"<td>{escape(outcome)}</td></tr>"
    )
