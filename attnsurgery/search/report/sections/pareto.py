"""The main figure: score over latency, with a mark for each candidate, the Pareto front and the budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bokeh.models import BoxAnnotation, GlyphRenderer, Label, Span
from bokeh.plotting import figure
from markupsafe import Markup

from attnsurgery.search.report.colours import BLUE, GREY, INK, RED
from attnsurgery.search.report.figures import add_tooltips, chart, label_losses, padded_range, source
from attnsurgery.search.report.section import Mark, Section, register
from attnsurgery.search.report.template import html
from attnsurgery.search.report.words import quantity, rung_name, score, score_label
from attnsurgery.search.result.record import Record, trained
from attnsurgery.search.result.statistics import without_outliers
from attnsurgery.settings import RankBy

if TYPE_CHECKING:
    from attnsurgery.search.report.control import Control
    from attnsurgery.search.result.outcome import Outcome

_MAX_BUDGET_RATIO = 3.0
"""A budget of more than this times the highest latency is stated in the caption and not drawn."""
_EXTRA_WIDTH = 0.6
"""Width for candidates over the budget to the right of the others, as a share of the width of the others."""


@register(order=10)
def section(outcome: Outcome, control: Control | None = None) -> Section:
    """Score and latency of all candidates that were measured."""
    groups, winner, by = _Groups.of(outcome), [outcome.best] if outcome.best else [], outcome.config.rank_by
    xs, ys = _visible_values(outcome, groups)
    floor = min(ys) - 0.07 * (max(ys) - min(ys) or 1.0)  # the height of candidates without a score
    y_range = padded_range([*ys, floor] if groups.over else ys, 0.04)
    plot = chart(
        "latency, ms", score_label(by, outcome.about.metric), 460, x_range=padded_range(xs, 0.04), y_range=y_range
    )
    budget = outcome.config.latency_budget_ms
    if budget is not None and budget <= max(xs):
        _draw_budget(plot, budget)
    lower, top, best = ([_score(record, by) for record in group] for group in (groups.lower, groups.top, winner))
    marks = [
        _draw(plot, groups.over, GREY, [floor] * len(groups.over), marker="x", size=7, line_alpha=0.8),
        _draw(plot, groups.lower, BLUE, lower, marker="circle", size=8, fill_alpha=0.0, line_alpha=0.45),
        _draw(plot, groups.top, BLUE, top, marker="circle", size=9, fill_alpha=0.75, line_color="white"),
    ]
    _draw_front(plot, outcome)
    marks.append(_draw(plot, [outcome.base], INK, [_base_score(outcome)], marker="square", size=11, line_color="white"))
    marks.append(_draw(plot, winner, RED, best, marker="diamond", size=17, line_color="white"))
    add_tooltips(plot, marks)
    if by == "loss":
        label_losses(plot)
    return Section(
        "pareto",
        f"{'Accuracy' if by == 'metric' else 'Loss'} and latency",
        figures=(plot,),
        key=_key(outcome, groups),
        below=_caption(outcome, groups, plot),
    )


@dataclass(frozen=True)
class _Groups:
    """The measured candidates, grouped by how they are drawn."""

    top: list[Record]
    """Trained up to the highest rung that any candidate reached."""
    lower: list[Record]
    """Trained on lower rungs only."""
    over: list[Record]
    """Over the budget, not trained."""

    @classmethod
    def of(cls, outcome: Outcome) -> _Groups:
        timed = [record for record in outcome.records if record.timing]
        return cls(
            top=[record for record in trained(timed) if record.reached == outcome.top_rung],
            lower=[record for record in trained(timed) if record.reached < outcome.top_rung],
            over=[record for record in timed if record.state == "over_budget"],
        )


def _visible_values(outcome: Outcome, groups: _Groups) -> tuple[list[float], list[float]]:
    """The latencies and scores that the axes include; others become visible by dragging."""
    candidates = [*groups.top, *groups.lower]
    winner = [outcome.best] if outcome.best else []
    xs = without_outliers(_ends(candidates)) + _ends([outcome.base, *winner])
    budget = outcome.config.latency_budget_ms
    if budget is not None and budget < _MAX_BUDGET_RATIO * max(xs):
        xs.append(budget)
    over = [_ms(record) for record in groups.over]
    max_ms = max(xs) + _EXTRA_WIDTH * (max(xs) - min(xs))
    xs += [ms for ms in over if ms <= max_ms] if candidates else without_outliers(over)
    ys = without_outliers([_score(record, outcome.config.rank_by) for record in candidates]) + [
        _score(record, outcome.config.rank_by) for record in winner
    ]
    return xs, [*ys, _base_score(outcome)]


def _ends(records: Sequence[Record]) -> list[float]:
    """Both ends of the confidence intervals of their latencies."""
    return [end for record in records if record.timing for end in (record.timing.low_ms, record.timing.high_ms)]


def _draw(
    plot: figure,
    records: Sequence[Record],
    colour: str,
    heights: Sequence[float],
    line_color: str | None = None,
    **style: object,
) -> GlyphRenderer:
    """Draw marks with the confidence intervals of their latencies."""
    timings = [record.timing for record in records if record.timing]
    columns = source(
        records,
        x=[timing.ms for timing in timings],
        y=list(heights),
        low=[timing.low_ms for timing in timings],
        high=[timing.high_ms for timing in timings],
    )
    plot.segment("low", "y", "high", "y", source=columns, line_color=colour, line_alpha=0.4, line_width=1.2)
    return plot.scatter("x", "y", source=columns, fill_color=colour, line_color=line_color or colour, **style)


def _draw_front(plot: figure, outcome: Outcome) -> None:
    """Draw the Pareto front as steps: the best score up to each latency."""
    xs, ys = (
        [_ms(record) for record in outcome.front],
        [_score(record, outcome.config.rank_by) for record in outcome.front],
    )
    if xs:
        end = min(plot.x_range.end, outcome.config.latency_budget_ms or plot.x_range.end)
        plot.step([*xs, max(xs[-1], end)], [*ys, ys[-1]], mode="after", line_color=BLUE, line_width=1.6)


def _draw_budget(plot: figure, budget: float) -> None:
    """Draw a line at the budget, and shade the area beyond it."""
    plot.add_layout(BoxAnnotation(left=budget, fill_color=GREY, fill_alpha=0.07, level="underlay"))
    plot.add_layout(Span(location=budget, dimension="height", line_color=RED, line_dash="dashed"))
    label = Label(x=budget, y=6, y_units="screen", x_offset=-6, text=f"budget {budget:g} ms", text_align="right")
    label.text_font_size, label.text_color = "12px", RED
    plot.add_layout(label)


def _key(outcome: Outcome, groups: _Groups) -> tuple[Mark, ...]:
    """The marks that occur in the figure."""
    highest = f"trained, {rung_name(outcome.top_rung)}" if groups.lower else "trained"
    marks = [
        (Mark("■", INK, "base"), [outcome.base]),
        (Mark("●", BLUE, highest), groups.top),
        (Mark("○", BLUE, "trained on lower rungs only"), groups.lower),
        (Mark("◆", RED, "best"), groups.top),
        (Mark("━", BLUE, "Pareto front"), groups.top),
        (Mark("\N{MULTIPLICATION SIGN}", GREY, "over budget: measured, not trained"), groups.over),
    ]
    return tuple(mark for mark, records in marks if records)


def _caption(outcome: Outcome, groups: _Groups, plot: figure) -> Markup:
    """An explanation of the figure, and the number of candidates outside it."""
    sentences = [
        "Horizontal bars are 95 % confidence intervals of latency.",
        "The Pareto front contains the best candidate up to each latency.",
    ]
    if groups.lower:
        sentences.append(
            "Scores on different rungs are not comparable. Only candidates on the highest rung can be on the front, "
            "and the others are drawn fainter."
        )
    budget = outcome.config.latency_budget_ms
    if budget is None:
        sentences.append(f"This search has no latency budget, but a budget of {outcome.budgets.describe()}.")
    elif budget > plot.x_range.end:
        sentences.append(f"The budget of {budget:g} ms is far to the right of the figure.")
    outside = sum(
        _ms(record) > plot.x_range.end
        or (record.metric is not None and _score(record, outcome.config.rank_by) < plot.y_range.start)
        for record in (*groups.top, *groups.lower, *groups.over)
    )
    if outside:
        sentences.append(f"Outside the visible range, which can be dragged: {quantity(outside, 'candidate')}.")
    return html('<p class="faint">{{ sentences | join(" ") }}</p>', sentences=sentences)


def _ms(record: Record) -> float:
    return record.timing.ms if record.timing else 0.0


def _score(record: Record, by: RankBy) -> float:
    """The score on the highest rung that the candidate reached."""
    return score(record, record.reached, by)


def _base_score(outcome: Outcome) -> float:
    """The base's score, on the rung of the front if it was trained there."""
    return score(outcome.base, min(outcome.top_rung, outcome.base.reached), outcome.config.rank_by)
