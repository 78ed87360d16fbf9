"""The best score after each trained candidate, compared with random search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bokeh.models import BasicTicker, Span
from bokeh.plotting import figure
from markupsafe import Markup

from attnsurgery.samplers import SAMPLERS
from attnsurgery.search.report.colours import BLUE, INK, LIGHT, LIGHT_ORANGE, ORANGE
from attnsurgery.search.report.figures import add_tooltips, chart, label_losses, padded_range, source
from attnsurgery.search.report.section import Mark, Section, register
from attnsurgery.search.report.template import html
from attnsurgery.search.report.words import quantity, score, score_label
from attnsurgery.search.result.record import trained
from attnsurgery.search.result.statistics import best_so_far, expected_best, without_outliers

if TYPE_CHECKING:
    from attnsurgery.search.report.control import Control
    from attnsurgery.search.result.outcome import Outcome


@register(order=20)
def section(outcome: Outcome, control: Control | None = None) -> Section | None:
    """The best score so far over the number of trained candidates; None if there are none."""
    candidates = trained(outcome.records)
    if not candidates:
        return None
    random_candidates = control.trained if control else [] if _all_drawn(outcome) else outcome.drawn
    lowest = ", lowest rung" if outcome.top_rung else ""
    by = outcome.config.rank_by
    plot = chart("trained candidates", f"{score_label(by, outcome.about.metric)}{lowest}", 340)
    scores, random_scores = (
        [score(record, 0, by) for record in records] for records in (candidates, random_candidates)
    )
    base = score(outcome.base, 0, by)
    counts = list(range(1, len(candidates) + 1))
    marks = plot.scatter("x", "y", source=source(candidates, x=counts, y=scores), size=6, color=BLUE, alpha=0.3)
    add_tooltips(plot, [marks])
    plot.add_layout(Span(location=base, dimension="width", line_color=INK, line_dash="dotted"))
    key = [Mark("●", LIGHT, "each candidate"), Mark("━", BLUE, "best so far"), Mark("┈", INK, "base")]
    if control:
        _draw_steps(plot, best_so_far(random_scores), LIGHT_ORANGE, 1.5)
        key.append(Mark("━", LIGHT_ORANGE, "best so far of the random control"))
    if len(random_scores) > 1:
        expected = expected_best(random_scores)
        plot.line(list(range(1, len(expected) + 1)), expected, line_color=ORANGE, line_width=2.2, line_dash="dashed")
        key.append(Mark("╍", ORANGE, "expected best of the same number of random candidates"))
    _draw_steps(plot, best_so_far(scores), BLUE, 2.2)
    visible_scores = [*without_outliers(scores), max(scores), base, *without_outliers(random_scores)]
    plot.y_range = padded_range(visible_scores)
    if by == "loss":
        label_losses(plot)
    plot.x_range.start, plot.x_range.end = 0.5, max(len(candidates), len(random_scores)) + 0.5
    plot.xaxis.ticker = BasicTicker(min_interval=1, num_minor_ticks=0)
    below = html('<p class="faint">{{ caption }}</p>', caption=_caption(outcome, control))
    return Section("progress", "Progress", figures=(plot,), key=tuple(key), below=below)


def _draw_steps(plot: figure, values: Sequence[float], colour: str, width: float) -> None:
    plot.step(list(range(1, len(values) + 1)), list(values), mode="after", line_color=colour, line_width=width)


_OTHER_SEARCH = (
    "The control is another search of the same space, base and data, <code>{{ folder }}</code>. Its "
    "{{ trained_candidates }} were drawn at random. They are drawn in their own order, and as the mean over all orders."
)
_FIRST_CANDIDATES = (
    "The random control is the expected best of 1 to {{ drawn }} of the {{ drawn }} trained candidates with which this "
    "search began, averaged over all orders. They were drawn uniformly at random. For a longer control, give the run "
    "directory of a search with <code>--sampler random</code> as <code>--control</code>."
)
_NO_CONTROL = (
    "There is no random control, because at most one of the trained candidates was drawn at random. Whether this "
    "search was better than random search is therefore unknown. To find out, give the run directory of a search of the "
    "same space with <code>--sampler random</code> as <code>--control</code>."
)


def _caption(outcome: Outcome, control: Control | None) -> Markup:
    """An explanation of the random control, or why there is none."""
    drawn = len(outcome.drawn)
    if control:
        trained_candidates = quantity(len(control.trained), "trained candidate")
        return html(_OTHER_SEARCH, folder=control.folder, trained_candidates=trained_candidates)
    if SAMPLERS.draws_uniformly(outcome.config.sampler):
        return html("This is a random search: it can be the control of other searches, and needs none itself.")
    if _all_drawn(outcome):
        return html(
            "So far all candidates were drawn at random, so there is nothing to compare with a random control yet."
        )
    return html(_FIRST_CANDIDATES, drawn=drawn) if drawn > 1 else html(_NO_CONTROL)


def _all_drawn(outcome: Outcome) -> bool:
    return len(outcome.drawn) == outcome.trained
