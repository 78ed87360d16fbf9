"""Would one have known without training: how proxies order the candidates that were trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnsurgery.search.report.section import Section
from attnsurgery.search.report.words import counted, score
from attnsurgery.search.result.record import Record, trained
from attnsurgery.search.result.statistics import kendall_tau_b

if TYPE_CHECKING:
    from attnsurgery.search.result.outcome import Outcome

_FEW = 5
_NAMES = {
    "parameters": "parameters",
    "macs": "multiply-accumulates",
    "grad_norm": "gradient norm of one batch (Abdelfattah et al., ICLR 2021)",
    "synflow": "synaptic flow (Tanaka et al., NeurIPS 2020)",
}

_MEASURES = {"top1": "validation top-1", "loss": "validation loss, negated,"}


def section(outcome: Outcome) -> Section | None:
    """A line for each proxy; None where too few candidates were trained."""
    found, by = trained(outcome.records), outcome.config.rank_by
    rows = []
    for name, words in _NAMES.items():
        known = [(value, score(record, 0, by)) for record in found if (value := _value(record, name)) is not None]
        if len(known) >= _FEW:
            tau = kendall_tau_b([value for value, _ in known], [scored for _, scored in known])
            said = "undefined" if tau is None else f"{tau:+.2f}"
            rows.append(
                f'<tr><td>{words}</td><td class="n">{said}</td><td>{counted(len(known), "candidate")}</td></tr>'
            )
    if not rows:
        return None
    return Section(
        "proxies",
        "Proxies: would one have known without training?",
        below='<table><thead><tr><th>proxy</th><th class="n">tau-b</th><th></th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
        f'<p class="faint">Kendall\'s tau-b between the proxy and the {_MEASURES[by]} after training. Near 0, training '
        "was needed to tell candidates apart; far from it, the proxy would have told for nothing. The search does not "
        "follow them.</p>",
    )


def _value(record: Record, name: str) -> float | None:
    return {"parameters": record.parameters, "macs": record.macs}.get(name) or record.proxies.get(name)
