"""How the best candidate became better trial by trial, beside what drawing candidates at random would have come to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bokeh.models import BasicTicker, Span
from bokeh.plotting import figure
from markupsafe import Markup

from attnsurgery.samplers import SAMPLERS
from attnsurgery.search.report.colours import BLUE, INK, LIGHT, LIGHT_ORANGE, ORANGE
from attnsurgery.search.report.figures import chart, hover, label_losses, padded_range, source
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
    """The best so far over trained candidates; None before there is any."""
    candidates = trained(outcome.records)
    if not candidates:
        return None
    random = control.trained if control else [] if _all_drawn(outcome) else outcome.drawn
    lowest = ", lowest rung" if outcome.top_rung else ""
    by = outcome.config.rank_by
    plot = chart("trained candidates", f"{score_label(by)}{lowest}", 340)
    scores, randoms = ([score(record, 0, by) for record in some] for some in (candidates, random))
    base = score(outcome.base, 0, by)
    count = list(range(1, len(candidates) + 1))
    marks = plot.scatter("x", "y", source=source(candidates, x=count, y=scores), size=6, color=BLUE, alpha=0.3)
    hover(plot, [marks])
    plot.add_layout(Span(location=base, dimension="width", line_color=INK, line_dash="dotted"))
    key = [Mark("●", LIGHT, "each candidate"), Mark("━", BLUE, "best so far"), Mark("┈", INK, "base")]
    if control:
        _draw_steps(plot, best_so_far(randoms), LIGHT_ORANGE, 1.5)
        key.append(Mark("━", LIGHT_ORANGE, "best so far of the random control"))
    if len(randoms) > 1:
        expected = expected_best(randoms)
        plot.line(list(range(1, len(expected) + 1)), expected, line_color=ORANGE, line_width=2.2, line_dash="dashed")
        key.append(Mark("╍", ORANGE, "expected best of so many random candidates"))
    _draw_steps(plot, best_so_far(scores), BLUE, 2.2)
    shown = [*without_outliers(scores), max(scores), base, *without_outliers(randoms)]
    plot.y_range = padded_range(shown)
    if by == "loss":
        label_losses(plot)
    plot.x_range.start, plot.x_range.end = 0.5, max(len(candidates), len(random)) + 0.5
    plot.xaxis.ticker = BasicTicker(min_interval=1, num_minor_ticks=0)
    below = html('<p class="faint">{{ about }}</p>', about=_about(outcome, control))
    return Section("progress", "Progress", figures=(plot,), key=tuple(key), below=below)


def _draw_steps(plot: figure, values: Sequence[float], colour: str, width: float) -> None:
    plot.step(list(range(1, len(values) + 1)), list(values), mode="after", line_color=colour, line_width=width)


_OTHER_SEARCH = (
    "The control is another search of the same space, base and data, <code>{{ folder }}</code>, whose "
    "{{ trained_candidates }} were drawn at random: in the order in which it came to them, and as the mean over all "
    "orders."
)
_FIRST_CANDIDATES = (
    "The random control is the expected best of 1 to {{ drawn }} of the {{ drawn }} trained candidates with which this "
    "search began and which were drawn uniformly at random, over all orders. Beyond them nothing is known: give a "
    "search with <code>--sampler random</code> as <code>--control</code> for more."
)
_NO_CONTROL = (
    "There is no random control: none, or only one, of the trained candidates was drawn at random, so whether choosing "
    "did any good cannot be told. Give a search of the same space with <code>--sampler random</code> as "
    "<code>--control</code>."
)


def _about(outcome: Outcome, control: Control | None) -> Markup:
    """What the random control is here, and how far it can be trusted."""
    drawn = len(outcome.drawn)
    if control:
        trained_candidates = quantity(len(control.trained), "trained candidate")
        return html(_OTHER_SEARCH, folder=control.folder, trained_candidates=trained_candidates)
    if SAMPLERS.draws_uniformly(outcome.config.sampler):
        return html("All candidates of this search were drawn at random: it is a control for others, and needs none.")
    if _all_drawn(outcome):
        return html("So far all candidates were drawn at random: there is nothing to hold beside a random control yet.")
    return html(_FIRST_CANDIDATES, drawn=drawn) if drawn > 1 else html(_NO_CONTROL)


def _all_drawn(outcome: Outcome) -> bool:
    return len(outcome.drawn) == outcome.trained
