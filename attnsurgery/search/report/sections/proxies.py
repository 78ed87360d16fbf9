"""The rank correlation of training-free proxies with the scores of trained candidates."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnsurgery.search.report.section import Section, register
from attnsurgery.search.report.template import html
from attnsurgery.search.report.words import quantity, score
from attnsurgery.search.result.record import Record, trained
from attnsurgery.search.result.statistics import kendall_tau_b

if TYPE_CHECKING:
    from attnsurgery.search.report.control import Control
    from attnsurgery.search.result.outcome import Outcome

_MIN_CANDIDATES = 5
"""With fewer candidates, a rank correlation is hardly informative."""
_NAMES = {
    "parameters": "parameters",
    "macs": "multiply-accumulates",
    "grad_norm": "gradient norm of one batch (Abdelfattah et al., ICLR 2021)",
    "synflow": "synaptic flow (Tanaka et al., NeurIPS 2020)",
}


@register(order=50)
def section(outcome: Outcome, control: Control | None = None) -> Section | None:
    """One row for each proxy; None if too few candidates were trained."""
    candidates, by = trained(outcome.records), outcome.config.rank_by
    measure = f"validation {outcome.about.metric}" if by == "metric" else "negated validation loss"
    rows = []
    for name, description in _NAMES.items():
        pairs = [(value, score(record, 0, by)) for record in candidates if (value := _value(record, name)) is not None]
        if len(pairs) >= _MIN_CANDIDATES:
            tau = kendall_tau_b([value for value, _ in pairs], [target for _, target in pairs])
            rows.append((description, "undefined" if tau is None else f"{tau:+.2f}", quantity(len(pairs), "candidate")))
    if not rows:
        return None
    return Section(
        "proxies",
        "Proxies: can the ranking be predicted without training?",
        below=html(_BELOW, rows=rows, measure=measure),
    )


_BELOW = """\
<table><thead><tr><th>proxy</th><th class="n">tau-b</th><th></th></tr></thead>
<tbody>
{% for proxy, tau, count in rows %}
<tr><td>{{ proxy }}</td><td class="n">{{ tau }}</td><td>{{ count }}</td></tr>
{% endfor %}
</tbody></table>
<p class="faint">Kendall's tau-b between the proxy and the {{ measure }} after training. A value near 0 means that
only training distinguishes the candidates. A value far from 0 means that the proxy predicts their ranking without
training. The search does not use proxies.</p>
"""


def _value(record: Record, name: str) -> float | None:
    return {"parameters": record.parameters, "macs": record.macs}.get(name) or record.proxies.get(name)
