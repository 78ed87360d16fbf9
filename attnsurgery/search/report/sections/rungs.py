"""Does a short training predict a longer one: each two neighbouring rungs against each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bokeh.models import Title
from bokeh.plotting import figure

from attnsurgery.search.report.colours import BLUE
from attnsurgery.search.report.figures import chart, hover, label_losses, padded_range, source
from attnsurgery.search.report.section import Section, register
from attnsurgery.search.report.template import html
from attnsurgery.search.report.words import quantity, rung_name, score, score_label
from attnsurgery.search.result.record import Record, trained
from attnsurgery.search.result.statistics import kendall_tau_b
from attnsurgery.settings import RankBy

if TYPE_CHECKING:
    from attnsurgery.search.report.control import Control
    from attnsurgery.search.result.outcome import Outcome

_FEW = 5
"""Rank correlations of fewer say hardly anything."""


@register(order=40)
def section(outcome: Outcome, control: Control | None = None) -> Section | None:
    """One scatter for each rung that has another below it; None where no candidate was promoted."""
    candidates = trained(outcome.records)
    both = [[record for record in candidates if record.reached > rung] for rung in range(outcome.top_rung)]
    if not both:
        return None
    by = outcome.config.rank_by
    figures = tuple(_scatter(rung, records, by) for rung, records in enumerate(both))
    sentences = [_words(rung, records, by) for rung, records in enumerate(both)]
    if outcome.trust:
        sentences.append(f"The supernet, rung 1: {outcome.trust.sentence()}.")
    return Section(
        "rungs",
        "Rungs: does a short training predict a longer one?",
        figures=figures,
        below=html(_BELOW, sentences=sentences),
    )


_BELOW = """\
<p>{{ sentences | join(" ") }}</p>
<p class="faint">Kendall's tau-b is 1 where both rungs order candidates alike, and 0 where they have nothing to do with
each other. Only promoted candidates are on both: it tells how the lower rung orders the better ones among themselves,
which is harder than to tell good from bad.</p>
"""


def _scatter(rung: int, records: Sequence[Record], by: RankBy) -> figure:
    lower, higher = _scores(rung, records, by), _scores(rung + 1, records, by)
    plot = chart(
        f"{score_label(by)}, {rung_name(rung)}",
        rung_name(rung + 1),
        340,
        x_range=padded_range(lower, 0.1),
        y_range=padded_range(higher, 0.1),
    )
    plot.add_layout(Title(text=_tau(rung, records, by), text_font_style="normal", text_font_size="13px"), "above")
    marks = plot.scatter("x", "y", source=source(records, x=lower, y=higher), size=9, color=BLUE, alpha=0.7)
    hover(plot, [marks])
    if by == "loss":
        label_losses(plot, x=True)
    return plot


def _tau(rung: int, records: Sequence[Record], by: RankBy) -> str:
    tau = kendall_tau_b(_scores(rung, records, by), _scores(rung + 1, records, by))
    return f"tau-b {'undefined' if tau is None else f'{tau:.2f}'}, {quantity(len(records), 'candidate')}"


def _words(rung: int, records: Sequence[Record], by: RankBy) -> str:
    few = ", which is too few to mean much" if len(records) < _FEW else ""
    return f"{rung_name(rung).capitalize()} to {rung_name(rung + 1)}: {_tau(rung, records, by)}{few}."


def _scores(rung: int, records: Sequence[Record], by: RankBy) -> list[float]:
    return [score(record, rung, by) for record in records]
