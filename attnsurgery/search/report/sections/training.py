"""How the settings of the trainings were chosen: the trainings that were tried, with their scores."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from attnsurgery.search.report.section import Section, register
from attnsurgery.search.report.template import html
from attnsurgery.search.report.words import percent
from attnsurgery.search.tuning import MARGIN, Attempt, Training, Tuned

if TYPE_CHECKING:
    from attnsurgery.search.report.control import Control
    from attnsurgery.search.result.outcome import Outcome


@register(order=45)
def section(outcome: Outcome, control: Control | None = None) -> Section | None:
    """One row for each training; None if the settings were given."""
    tuning = outcome.about.tuning
    if tuning is None:
        return None
    tuned = Tuned.from_dict(tuning["tuned"])
    rows = []
    attempts = {Attempt.of(key): result for key, result in tuning["tuning"].items()}
    for attempt, result in attempts.items():
        name, training = ("base", tuned.base) if attempt.part == "base" else ("candidate", tuned.candidates)
        blocks = f"{attempt.training.block_lr_scale:g}" if attempt.part == "probe" else ""
        score = percent(result["metric"]) if "metric" in result else "diverged"
        loss = f"{result['loss']:.4f}" if "loss" in result else ""
        chosen = attempt == _nearest(attempt.part, training, attempts)
        rows.append((name, f"{attempt.training.lr:g}", blocks, attempt.training.epochs, score, loss, chosen))
    return Section(
        "training",
        "Training: was the base trained out?",
        below=html(
            _BELOW,
            rows=rows,
            words=tuned.words(),
            margin=f"{100 * MARGIN:g}",
            out=tuned.trained_out,
            metric=outcome.about.metric,
        ),
    )


def _nearest(part: str, chosen: Training, attempts: Iterable[Attempt]) -> Attempt | None:
    """The longest attempt with the chosen rates that is not longer than what was chosen."""
    rates = (chosen.lr, chosen.block_lr_scale)
    alike = [
        attempt
        for attempt in attempts
        if attempt.part == part
        and (attempt.training.lr, attempt.training.block_lr_scale) == rates
        and attempt.training.epochs <= chosen.epochs
    ]
    return max(alike, key=lambda attempt: attempt.training.epochs, default=None)


_BELOW = """\
<p>Chosen: {{ words }}.</p>
<table><thead><tr><th>model</th><th class="n">learning rate</th><th class="n">times that, blocks</th>
<th class="n">epochs</th><th class="n">validation {{ metric }}</th><th class="n">loss</th><th></th></tr></thead>
<tbody>
{% for name, lr, blocks, epochs, score, loss, chosen in rows %}
<tr><td>{{ name }}</td><td class="n">{{ lr }}</td><td class="n">{{ blocks }}</td><td class="n">{{ epochs }}</td>
<td class="n">{{ score }}</td><td class="n">{{ loss }}</td><td>{{ "chosen" if chosen else "" }}</td></tr>
{% endfor %}
</tbody></table>
<p class="faint">The base is trained with several learning rates, and then for longer, until twice the epochs gain less
than {{ margin }} points. A candidate with blocks in every second place stands for all candidates in the choice of
their rates and length. All are trained for the longer of both lengths. The scores of the chosen rows are the best of
several, so they are a little too high.
{% if out == False %}The base still gained where this ended: with more --epochs it may reach the winner's accuracy
without any block.{% endif %}</p>
"""
