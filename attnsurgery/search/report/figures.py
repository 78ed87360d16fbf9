"""What all pictures have in common: paper and colours, marks with their hover, and the way into the page.

The paper is light in dark mode, too: Bokeh draws on a canvas, which no style sheet reaches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from bokeh.document import Document
from bokeh.embed import components
from bokeh.models import Axis, ColumnDataSource, GlyphRenderer, HoverTool, LinearAxis, Range1d
from bokeh.plotting import figure
from bokeh.resources import Resources

from attnsurgery.search.report.colours import AXIS, GREY, INK, LINE, PAPER
from attnsurgery.search.report.words import loss, ms, percent, record_name
from attnsurgery.search.result.record import Record

_HOVER = """
<div style="max-width: 26rem; white-space: normal; font: 13px/1.45 system-ui, sans-serif; color: #1f2430">
<b>@who</b> &nbsp; @outcome<br>@blocks<br>@latency<br>@score<br>@parameters</div>
"""
"""Bokeh puts in values as text, never as HTML."""


def chart(x: str, y: str, height: int, **more: Any) -> figure:
    """An empty picture as wide as the page, with the names of its axes."""
    tools = "pan,box_zoom,reset,save"
    plot = figure(
        height=height,
        sizing_mode="stretch_width",
        tools=tools,
        x_axis_label=x,
        y_axis_label=y,
        background_fill_color=PAPER,
        border_fill_color=PAPER,
        outline_line_color=None,
        **more,
    )
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    plot.grid.grid_line_color = LINE
    plot.axis.axis_label_text_font_style = "normal"
    plot.axis.axis_label_text_color = INK
    plot.axis.major_label_text_color = GREY
    plot.axis.axis_line_color = plot.axis.major_tick_line_color = AXIS
    plot.axis.minor_tick_line_color = None
    plot.axis.axis_label_text_font_size = "13px"
    plot.axis.major_label_text_font_size = "12px"
    return plot


def source(records: Iterable[Record], **columns: Sequence[float]) -> ColumnDataSource:
    """Records as the columns that the hover reads, beside those that say where each is drawn."""
    rows = list(records)
    words = {
        "who": [record_name(record) for record in rows],
        "outcome": ["" if record.top1 is not None else "over budget, not trained" for record in rows],
        "blocks": [record.describe() for record in rows],
        "latency": [ms(record.timing) for record in rows],
        "score": [_scores(record) for record in rows],
        "parameters": [f"{record.parameters:,} parameters" if record.parameters else "" for record in rows],
    }
    return ColumnDataSource({**words, **columns})


def _scores(record: Record) -> str:
    """Both scores on each rung that the candidate was on."""
    if record.top1 is None:
        return ""
    rungs = range(record.reached + 1)
    top1s, losses = (" → ".join(words(record, rung) for rung in rungs) for words in (_top1, loss))
    return f"{top1s} on validation, loss {losses}"


def _top1(record: Record, rung: int) -> str:
    return percent(record.top1_on(rung))


def hover(plot: figure, renderers: Sequence[GlyphRenderer]) -> None:
    """What the pointer tells of a mark that stands for a record."""
    plot.add_tools(HoverTool(renderers=list(renderers), tooltips=_HOVER))


def padded_range(values: Sequence[float], margin: float = 0.06) -> Range1d:
    """A range that holds the values, and some room."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = margin * (high - low or abs(high) * 0.2 or 1.0)
    return Range1d(low - room, high + room)


def label_losses(plot: figure, *, x: bool = False) -> None:
    """Write losses on the axes where scores are losses with their sign turned, so that better stays up (and right).

    Call it when the ranges are final. The second range moves along when the first is dragged or zoomed.
    """
    up = plot.y_range
    plot.extra_y_ranges = {"loss": Range1d(-up.start, -up.end)}
    plot.add_layout(_instead(plot.yaxis[0], y_range_name="loss"), "left")
    if x:
        plot.extra_x_ranges = {"loss": Range1d(-plot.x_range.start, -plot.x_range.end)}
        plot.add_layout(_instead(plot.xaxis[0], x_range_name="loss"), "below")


def _instead(axis: Axis, **ranges: str) -> LinearAxis:
    """An axis that looks like another, which is hidden."""
    looks = axis.properties_with_values(include_defaults=False)
    axis.visible = False
    return LinearAxis(**{**{name: looks[name] for name in _LOOKS if name in looks}, **ranges})


_LOOKS = (
    "axis_label",
    "axis_label_text_font_style",
    "axis_label_text_color",
    "axis_label_text_font_size",
    "major_label_text_color",
    "major_label_text_font_size",
    "axis_line_color",
    "major_tick_line_color",
    "minor_tick_line_color",
)


def plain(text: str) -> str:
    """The text as it is: what Bokeh would take for a formula is broken up, invisibly."""
    return text.replace("$$", "$\u200b$").replace("\\", "\\\u200b")


def embedded(figures: Mapping[str, figure]) -> tuple[dict[str, str], str]:
    """Where each picture goes, as HTML, and the script that draws them all there."""
    if not figures:
        return {}, ""
    document = Document()
    with document.models.freeze():  # once for all, instead of looking for all models again with each picture
        for plot in figures.values():
            document.add_root(plot)
    script, places = components(dict(figures), wrap_script=False)
    return places, script


@cache
def library() -> str:
    """BokehJS, as far as the pictures need it."""
    return "\n".join(Resources(mode="inline", components=["bokeh"], log_level="error").js_raw)
