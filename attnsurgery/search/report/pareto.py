"""The main picture: score over latency, each mark a candidate, the front as steps, the budget as a line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bokeh.models import BoxAnnotation, GlyphRenderer, Label, Span
from bokeh.plotting import figure

from attnsurgery.search.report.colours import BLUE, GREY, INK, RED
from attnsurgery.search.report.figures import chart, hover, label_losses, padded_range, source
from attnsurgery.search.report.section import Mark, Section
from attnsurgery.search.report.words import called, counted, score, scored_by
from attnsurgery.search.result.record import Record, trained
from attnsurgery.search.result.statistics import without_outliers
from attnsurgery.settings import RankBy

if TYPE_CHECKING:
    from attnsurgery.search.result.outcome import Outcome

_FAR = 3.0
"""A budget so many times what anything takes is told, and not drawn."""
_BEYOND = 0.6
"""So far over the rest, as a share of its width, candidates over the budget are shown."""


def section(outcome: Outcome) -> Section:
    """Score and latency of all that was measured."""
    groups, best, by = _Groups.of(outcome), [outcome.best] if outcome.best else [], outcome.config.rank_by
    xs, ys = _shown(outcome, groups)
    floor = min(ys) - 0.07 * (max(ys) - min(ys) or 1.0)  # where those are drawn that have no score
    y_range = padded_range([*ys, floor] if groups.over else ys, 0.04)
    made = chart("latency, ms", scored_by(by), 460, x_range=padded_range(xs, 0.04), y_range=y_range)
    budget = outcome.config.most_ms
    if budget is not None and budget <= max(xs):
        _draw_budget(made, budget)
    lower, top, winner = ([_score(record, by) for record in some] for some in (groups.lower, groups.top, best))
    marks = [
        _draw(made, groups.over, GREY, [floor] * len(groups.over), marker="x", size=7, line_alpha=0.8),
        _draw(made, groups.lower, BLUE, lower, marker="circle", size=8, fill_alpha=0.0, line_alpha=0.45),
        _draw(made, groups.top, BLUE, top, marker="circle", size=9, fill_alpha=0.75, line_color="white"),
    ]
    _draw_front(made, outcome)
    marks.append(_draw(made, [outcome.base], INK, [_of_base(outcome)], marker="square", size=11, line_color="white"))
    marks.append(_draw(made, best, RED, winner, marker="diamond", size=17, line_color="white"))
    hover(made, marks)
    if by == "loss":
        label_losses(made)
    return Section(
        "pareto",
        f"{'Accuracy' if by == 'top1' else 'Loss'} and latency",
        figures=(made,),
        key=_key(outcome, groups),
        below=_caption(outcome, groups, made),
    )


@dataclass(frozen=True)
class _Groups:
    """Candidates that were measured, by how they are drawn."""

    top: list[Record]
    """Trained, on the highest rung that any reached."""
    lower: list[Record]
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


def _shown(outcome: Outcome, groups: _Groups) -> tuple[list[float], list[float]]:
    """The latencies and scores that the picture is made to show; the rest is a drag away."""
    found = [*groups.top, *groups.lower]
    marked = [outcome.best] if outcome.best else []
    xs = without_outliers(_ends(found)) + _ends([outcome.base, *marked])
    budget = outcome.config.most_ms
    if budget is not None and budget < _FAR * max(xs):
        xs.append(budget)
    over = [_ms(record) for record in groups.over]
    most = max(xs) + _BEYOND * (max(xs) - min(xs))
    xs += [ms for ms in over if ms <= most] if found else without_outliers(over)
    ys = without_outliers([_score(record, outcome.config.rank_by) for record in found]) + [
        _score(record, outcome.config.rank_by) for record in marked
    ]
    return xs, [*ys, _of_base(outcome)]


def _ends(records: Sequence[Record]) -> list[float]:
    """Both ends of the intervals of their latencies."""
    return [end for record in records if record.timing for end in (record.timing.low_ms, record.timing.high_ms)]


def _draw(
    made: figure,
    records: Sequence[Record],
    colour: str,
    heights: Sequence[float],
    line_color: str | None = None,
    **look: object,
) -> GlyphRenderer:
    """Marks with the intervals of their latencies."""
    timings = [record.timing for record in records if record.timing]
    found = source(
        records,
        x=[timing.ms for timing in timings],
        y=list(heights),
        low=[timing.low_ms for timing in timings],
        high=[timing.high_ms for timing in timings],
    )
    made.segment("low", "y", "high", "y", source=found, line_color=colour, line_alpha=0.4, line_width=1.2)
    return made.scatter("x", "y", source=found, fill_color=colour, line_color=line_color or colour, **look)


def _draw_front(made: figure, outcome: Outcome) -> None:
    """Steps: what can be had within so many milliseconds."""
    xs, ys = (
        [_ms(record) for record in outcome.front],
        [_score(record, outcome.config.rank_by) for record in outcome.front],
    )
    if xs:
        end = min(made.x_range.end, outcome.config.most_ms or made.x_range.end)
        made.step([*xs, max(xs[-1], end)], [*ys, ys[-1]], mode="after", line_color=BLUE, line_width=1.6)


def _draw_budget(made: figure, budget: float) -> None:
    """A line, and a shade over what is beyond it."""
    made.add_layout(BoxAnnotation(left=budget, fill_color=GREY, fill_alpha=0.07, level="underlay"))
    made.add_layout(Span(location=budget, dimension="height", line_color=RED, line_dash="dashed"))
    words = Label(x=budget, y=6, y_units="screen", x_offset=-6, text=f"budget {budget:g} ms", text_align="right")
    words.text_font_size, words.text_color = "12px", RED
    made.add_layout(words)


def _key(outcome: Outcome, groups: _Groups) -> tuple[Mark, ...]:
    """The marks that there are."""
    highest = f"trained, {called(outcome.top_rung)}" if groups.lower else "trained"
    marks = [
        (Mark("■", INK, "base"), [outcome.base]),
        (Mark("●", BLUE, highest), groups.top),
        (Mark("○", BLUE, "trained on lower rungs only"), groups.lower),
        (Mark("◆", RED, "best"), groups.top),
        (Mark("━", BLUE, "front"), groups.top),
        (Mark("&times;", GREY, "over budget: measured, not trained"), groups.over),
    ]
    return tuple(mark for mark, there in marks if there)


def _caption(outcome: Outcome, groups: _Groups, made: figure) -> str:
    said = ["Horizontal bars are 95 % intervals of the latency; the front is the best to be had in so many ms."]
    if groups.lower:
        said.append(
            "Scores of different rungs are not comparable: only candidates on the highest rung that any reached "
            "are on the front, the others are drawn fainter."
        )
    budget = outcome.config.most_ms
    if budget is None:
        said.append(f"There is no budget of latency here, but one of {outcome.budgets.describe()}.")
    elif budget > made.x_range.end:
        said.append(f"The budget of {budget:g} ms lies far to the right of the picture.")
    outside = sum(
        _ms(record) > made.x_range.end
        or (record.top1 is not None and _score(record, outcome.config.rank_by) < made.y_range.start)
        for record in (*groups.top, *groups.lower, *groups.over)
    )
    if outside:
        said.append(f"Outside the picture, a drag away: {counted(outside, 'candidate')}.")
    return f'<p class="faint">{" ".join(said)}</p>'


def _ms(record: Record) -> float:
    return record.timing.ms if record.timing else 0.0


def _score(record: Record, by: RankBy) -> float:
    """On the highest rung that the candidate was on."""
    return score(record, record.reached, by)


def _of_base(outcome: Outcome) -> float:
    """The base's, trained as those on the front if it was."""
    return score(outcome.base, min(outcome.top_rung, outcome.base.reached), outcome.config.rank_by)
