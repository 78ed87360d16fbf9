"""A table of all trials, and the number of trials in each state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from attnsurgery.search.report.section import Section, register
from attnsurgery.search.report.template import html
from attnsurgery.search.report.words import STATES, loss, ms, percent, rung_name, state
from attnsurgery.search.result.record import Record

if TYPE_CHECKING:
    from attnsurgery.search.report.control import Control
    from attnsurgery.search.result.outcome import Outcome


@register(order=70)
def section(outcome: Outcome, control: Control | None = None) -> Section:
    """The number of trials in each state, and the table."""
    counts = Counter(state(record) for record in outcome.records)
    tally = ", ".join(f"{counts[name]} {label}" for name, label in STATES.items() if counts[name])
    rungs = range(outcome.top_rung + 1)
    names = (f"val {outcome.about.metric}", "val loss")
    best = outcome.best.number if outcome.best else None
    records = [
        record for record in outcome.records if record.state != "too_many_blocks"
    ]  # only the tally includes those
    return Section(
        "trials",
        "Trials",
        above=html(
            _ABOVE,
            tally=tally or "none yet",
            candidates=f"{outcome.about.candidates:,}",
            sizes=", ".join(f"{size} pixels {base_ms:.3g} ms" for size, base_ms in outcome.about.base_ms.items()),
        ),
        below=html(
            _BELOW,
            columns=[(name, rung_name(rung) if outcome.top_rung else "") for rung in rungs for name in names],
            rows=[_row(outcome.base, rungs, None), *(_row(record, rungs, best) for record in records)],
        ),
    )


_ABOVE = (
    "<p>{{ tally }}. The space has {{ candidates }} candidates."
    "{% if sizes %} Input sizes, with the latency of the base alone: {{ sizes }}.{% endif %}</p>"
)
_BELOW = """\
<div class="scroll"><table>
<thead><tr>
<th class="n">trial</th><th>blocks</th><th class="n">latency, ms</th>
{% for name, rung in columns %}
<th class="n">{{ name }}{% if rung %}<br>{{ rung }}{% endif %}</th>
{% endfor %}
<th class="n">parameters</th><th>outcome</th>
</tr></thead>
<tbody>
{% for row in rows %}
<tr{% if row.best %} class="best"{% endif %}>
<td class="n">{{ row.number }}</td><td class="what">{{ row.blocks }}</td>
{% for number in row.numbers %}
<td class="n">{{ number }}</td>
{% endfor %}
<td>{{ row.outcome }}</td></tr>
{% endfor %}
</tbody></table></div>
"""


@dataclass(frozen=True)
class _Row:
    """A row of the table, as text."""

    number: str
    blocks: str
    numbers: list[str]
    """Latency, the two scores on each rung, parameters; '' if there is no value."""
    outcome: str
    best: bool


def _row(record: Record, rungs: Sequence[int], best: int | None) -> _Row:
    scores = [text for rung in rungs for text in (percent(record.metric_on(rung)), loss(record, rung))]
    parameters = f"{record.parameters:,}" if record.parameters else ""
    return _Row(
        number="base" if record.number < 0 else str(record.number),
        blocks=record.describe(),
        numbers=[ms(record.timing, unit=""), *scores, parameters],
        outcome=_outcome(record),
        best=record.number == best,
    )


def _outcome(record: Record) -> str:
    """The state of a trial, with its reason."""
    text = "reference" if record.number < 0 else STATES[state(record)]
    if record.duplicate_of is not None:
        text += f" (same as {'the base' if record.duplicate_of < 0 else f'trial {record.duplicate_of}'})"
    if record.reason:
        text += f": {record.reason}"
    if record.halted:
        text += f"; not promoted: {record.halted}"
    return text
