"""How the best candidate became better trial by trial, beside what drawing candidates at random would have come to."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from bokeh.models import BasicTicker, Span
from bokeh.plotting import figure

from attnsurgery.search.report.colours import BLUE, INK, LIGHT, LIGHT_ORANGE, ORANGE
from attnsurgery.search.report.figures import chart, hover, label_losses, padded_range, source
from attnsurgery.search.report.section import Mark, Section
from attnsurgery.search.report.words import counted, score, scored_by
from attnsurgery.search.result.record import trained
from attnsurgery.search.result.statistics import best_so_far, expected_best, without_outliers

if TYPE_CHECKING:
    from attnsurgery.search.report.control import Control
    from attnsurgery.search.result.outcome import Outcome


def section(outcome: Outcome, control: Control | None) -> Section | None:
    """The best so far over trained candidates; None before there is any."""
    found = trained(outcome.records)
    if not found:
        return None
    random = control.trained if control else [] if _all_drawn(outcome) else outcome.drawn
    lowest = ", lowest rung" if outcome.top_rung else ""
    by = outcome.config.rank_by
    made = chart("trained candidates", f"{scored_by(by)}{lowest}", 340)
    scores, randoms = ([score(record, 0, by) for record in some] for some in (found, random))
    base = score(outcome.base, 0, by)
    count = list(range(1, len(found) + 1))
    marks = made.scatter("x", "y", source=source(found, x=count, y=scores), size=6, color=BLUE, alpha=0.3)
    hover(made, [marks])
    made.add_layout(Span(location=base, dimension="width", line_color=INK, line_dash="dotted"))
    key = [Mark("●", LIGHT, "each candidate"), Mark("━", BLUE, "best so far"), Mark("┈", INK, "base")]
    if control:
        _draw_steps(made, best_so_far(randoms), LIGHT_ORANGE, 1.5)
        key.append(Mark("━", LIGHT_ORANGE, "best so far of the random control"))
    if len(randoms) > 1:
        expected = expected_best(randoms)
        made.line(list(range(1, len(expected) + 1)), expected, line_color=ORANGE, line_width=2.2, line_dash="dashed")
        key.append(Mark("╍", ORANGE, "expected best of so many random candidates"))
    _draw_steps(made, best_so_far(scores), BLUE, 2.2)
    shown = [*without_outliers(scores), max(scores), base, *without_outliers(randoms)]
    made.y_range = padded_range(shown)
    if by == "loss":
        label_losses(made)
    made.x_range.start, made.x_range.end = 0.5, max(len(found), len(random)) + 0.5
    made.xaxis.ticker = BasicTicker(min_interval=1, num_minor_ticks=0)
    words = f'<p class="faint">{_about(outcome, control)}</p>'
    return Section("progress", "Progress", figures=(made,), key=tuple(key), below=words)


def _draw_steps(made: figure, values: Sequence[float], colour: str, width: float) -> None:
    made.step(list(range(1, len(values) + 1)), list(values), mode="after", line_color=colour, line_width=width)


def _about(outcome: Outcome, control: Control | None) -> str:
    """What the random control is here, and how far it can be trusted."""
    drawn = outcome.drawn
    if control:
        return (
            "The control is another search of the same space, base and data, "
            f"<code>{escape(str(control.folder))}</code>, whose {counted(len(control.trained), 'trained candidate')} "
            "were drawn at random: in the order in which it came to them, and as the mean over all orders."
        )
    if outcome.config.sampler == "random":
        return "All candidates of this search were drawn at random: it is a control for others, and needs none."
    if _all_drawn(outcome):
        return "So far all candidates were drawn at random: there is nothing to hold beside a random control yet."
    if len(drawn) > 1:
        return (
            f"The random control is the expected best of 1 to {len(drawn)} of the {len(drawn)} trained candidates with "
            "which this search began and which were drawn uniformly at random, over all orders. Beyond them nothing is "
            "known: give a search with <code>--sampler random</code> as <code>--control</code> for more."
        )
    return (
        "There is no random control: none, or only one, of the trained candidates was drawn at random, so whether "
        "choosing did any good cannot be told. Give a search of the same space with <code>--sampler random</code> as "
        "<code>--control</code>."
    )


def _all_drawn(outcome: Outcome) -> bool:
    return len(outcome.drawn) == outcome.trained
