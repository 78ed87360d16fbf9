"""Whether short trainings predict longer ones: the scores of each rung against those of the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bokeh.models import Title
from bokeh.plotting import figure

from attnsurgery.search.report.colours import BLUE
from attnsurgery.search.report.figures import add_tooltips, chart, label_losses, padded_range, source
from attnsurgery.search.report.section import Section, register
from attnsurgery.search.report.template import html
from attnsurgery.search.report.words import quantity, rung_name, score, score_label
from attnsurgery.search.result.record import Record, trained
from attnsurgery.search.result.statistics import kendall_tau_b
from attnsurgery.settings import RankBy

if TYPE_CHECKING:
    from attnsurgery.search.report.control import Control
    from attnsurgery.search.result.outcome import Outcome

_MIN_CANDIDATES = 5
"""With fewer candidates, a rank correlation is hardly informative."""


@register(order=40)
def section(outcome: Outcome, control: Control | None = None) -> Section | None:
    """One scatter plot for each pair of neighbouring rungs; None if no candidate was promoted."""
    candidates = trained(outcome.records)
    promoted = [[record for record in candidates if record.reached > rung] for rung in range(outcome.top_rung)]
    if not promoted:
        return None
    by = outcome.config.rank_by
    figures = tuple(
        _scatter(rung, records, by, score_label(by, outcome.about.metric)) for rung, records in enumerate(promoted)
    )
    sentences = [_sentence(rung, records, by) for rung, records in enumerate(promoted)]
    if outcome.trust:
        sentences.append(f"Supernet, on rung 1: {outcome.trust.sentence()}.")
    return Section(
        "rungs",
        "Rungs: does a short training predict a longer one?",
        figures=figures,
        below=html(_BELOW, sentences=sentences),
    )


_BELOW = """\
<p>{{ sentences | join(" ") }}</p>
<p class="faint">Kendall's tau-b is 1 if both rungs rank the candidates in the same order, and 0 if their rankings are
unrelated. Only promoted candidates have scores on both rungs. The value therefore shows how well the lower rung ranks
the better candidates, which is harder than separating good candidates from bad ones.</p>
"""


def _scatter(rung: int, records: Sequence[Record], by: RankBy, label: str) -> figure:
    lower, higher = _scores(rung, records, by), _scores(rung + 1, records, by)
    plot = chart(
        f"{label}, {rung_name(rung)}",
        rung_name(rung + 1),
        340,
        x_range=padded_range(lower, 0.1),
        y_range=padded_range(higher, 0.1),
    )
    plot.add_layout(Title(text=_tau(rung, records, by), text_font_style="normal", text_font_size="13px"), "above")
    marks = plot.scatter("x", "y", source=source(records, x=lower, y=higher), size=9, color=BLUE, alpha=0.7)
    add_tooltips(plot, [marks])
    if by == "loss":
        label_losses(plot, x=True)
    return plot


def _tau(rung: int, records: Sequence[Record], by: RankBy) -> str:
    tau = kendall_tau_b(_scores(rung, records, by), _scores(rung + 1, records, by))
    return f"tau-b {'undefined' if tau is None else f'{tau:.2f}'}, {quantity(len(records), 'candidate')}"


def _sentence(rung: int, records: Sequence[Record], by: RankBy) -> str:
    few = ", which is too few to mean much" if len(records) < _MIN_CANDIDATES else ""
    return f"{rung_name(rung).capitalize()} to {rung_name(rung + 1)}: {_tau(rung, records, by)}{few}."


def _scores(rung: int, records: Sequence[Record], by: RankBy) -> list[float]:
    return [score(record, rung, by) for record in records]
