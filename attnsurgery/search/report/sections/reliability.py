"""How reliable the ranking of candidates is: the scores of some that were trained from two seeds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnsurgery.search.report.section import Section, register
from attnsurgery.search.report.template import html
from attnsurgery.search.report.words import percent

if TYPE_CHECKING:
    from attnsurgery.search.report.control import Control
    from attnsurgery.search.result.outcome import Outcome


@register(order=35)
def section(outcome: Outcome, control: Control | None = None) -> Section | None:
    """One row for each candidate that was trained from two seeds; None if that was not done."""
    reliability = outcome.reliability
    if reliability is None:
        return None
    rows = []
    for entry in sorted(outcome.repeats.values(), key=lambda entry: entry["number"]):
        both = entry["first"], entry["second"]
        metrics = [percent(score["metric"]) if "metric" in score else "failed" for score in both]
        losses = [f"{score['loss']:.4f}" if "loss" in score else "" for score in both]
        rows.append((entry["number"], metrics, losses))
    words = reliability.words()
    std = reliability.in_units(reliability.std)
    return Section(
        "reliability",
        "Reliability: would another seed rank candidates alike?",
        below=html(_BELOW, rows=rows, words=words[0].upper() + words[1:], std=std, metric=outcome.about.metric),
    )


_BELOW = """\
<p>{{ words }}.</p>
<table><thead><tr><th class="n">trial</th><th class="n">validation {{ metric }}</th><th class="n">second seed</th>
<th class="n">loss</th><th class="n">second seed</th></tr></thead>
<tbody>
{% for number, metrics, losses in rows %}
<tr><td class="n">{{ number }}</td>{% for value in metrics + losses %}<td class="n">{{ value }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table>
<p class="faint">The first candidates of the search were trained on the lowest rung from a second seed. The intraclass
correlation, ICC(3,1) of Shrout and Fleiss (1979), is the share of the variance of a score that is between candidates:
1 if a score has no noise, 0 if candidates do not differ. The standard deviation of one training is {{ std }}, without
what a seed does to all candidates alike, because the trials of a search have one seed. Both seeds were scored on the
same images, so the chance in the choice of the validation images is not included. Nothing was chosen by the second
scores.</p>
"""
