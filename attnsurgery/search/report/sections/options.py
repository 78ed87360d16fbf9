"""The ways to spend the budget that were compared: blocks, other models, other input sizes, or nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnsurgery.search.report.section import Section, register
from attnsurgery.search.report.template import html
from attnsurgery.search.report.words import percent, points
from attnsurgery.search.result.options import Option, best_of

if TYPE_CHECKING:
    from attnsurgery.search.report.control import Control
    from attnsurgery.search.result.outcome import Outcome


@register(order=15)
def section(outcome: Outcome, control: Control | None = None) -> Section | None:
    """One row for each option, the fastest first; None before the verdict and in old studies."""
    confirmation = outcome.confirmation
    if confirmation is None or not confirmation.options:
        return None
    best = best_of(confirmation.options)
    rows = [(*_row(option), option == best) for option in sorted(confirmation.options, key=_latency)]
    return Section(
        "options",
        "How to spend the budget",
        below=html(_BELOW, rows=rows, advice=confirmation.advice(), title=outcome.about.metric),
    )


def _latency(option: Option) -> float:
    return option.timing.ms if option.timing else float("inf")


def _row(option: Option) -> tuple[str, ...]:
    gain = interval = ""
    if option.gain is not None and option.low is not None and option.high is not None:
        gain, interval = points(option.gain), f"{100 * option.low:+.2f} to {100 * option.high:+.2f}"
    state = option.left_out or ("may be the best" if option.may_be_best else "surely not the best")
    rate = f"{option.training['lr']:g}" if option.training else ""
    metric = "" if option.metric is None else percent(option.metric)
    ms = f"{option.timing.ms:.3g} ms" if option.timing else ""
    trainings = "" if option.trainings is None else str(option.trainings)
    return option.name, ms, metric, trainings, gain, interval, rate, state


_BELOW = """\
<p>{{ advice }}</p>
<table><thead><tr><th>option</th><th class="n">latency</th><th class="n">test {{ title }}</th>
<th class="n">trainings</th><th class="n">against the base</th><th class="n">95 % interval</th>
<th class="n">learning rate</th><th></th></tr></thead>
<tbody>
{% for name, ms, metric, trainings, gain, interval, rate, state, best in rows %}
<tr><td>{% if best %}<b>{{ name }}</b>{% else %}{{ name }}{% endif %}</td><td class="n">{{ ms }}</td>
<td class="n">{{ metric }}</td><td class="n">{{ trainings }}</td><td class="n">{{ gain }}</td>
<td class="n">{{ interval }}</td><td class="n">{{ rate }}</td><td>{{ state }}</td></tr>
{% endfor %}
</tbody></table>
<p class="faint">All were trained equally long from the same seeds, each with its own best learning rate where the
search chose it, and tested on the same images. What was surely not the best after the first seeds was trained from no
further ones. An option may be the best if no other one is significantly better; the
truly best one is among them with a probability of at least 95 %. Of these, the fastest is recommended.</p>
"""
