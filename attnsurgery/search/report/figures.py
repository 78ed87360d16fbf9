"""What all figures have in common: background and colours, tooltips, and the HTML that embeds them.

Their background is light in dark mode as well, because style sheets do not apply to the canvas that Bokeh draws on.
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
"""Bokeh inserts values as text, never as HTML."""


def chart(x: str, y: str, height: int, **options: Any) -> figure:
    """An empty figure as wide as the page, with axis labels `x` and `y`."""
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
        **options,
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
    """Records as the columns that tooltips show, and the given columns, which determine where each is drawn."""
    rows = list(records)
    texts = {
        "who": [record_name(record) for record in rows],
        "outcome": ["" if record.metric is not None else "over budget, not trained" for record in rows],
        "blocks": [record.describe() for record in rows],
        "latency": [ms(record.timing) for record in rows],
        "score": [_scores(record) for record in rows],
        "parameters": [f"{record.parameters:,} parameters" if record.parameters else "" for record in rows],
    }
    return ColumnDataSource({**texts, **columns})


def _scores(record: Record) -> str:
    """Both scores on each rung that the candidate reached."""
    if record.metric is None:
        return ""
    rungs = range(record.reached + 1)
    metrics, losses = (" → ".join(text(record, rung) for rung in rungs) for text in (_metric, loss))
    return f"{metrics} on validation, loss {losses}"


def _metric(record: Record, rung: int) -> str:
    return percent(record.metric_on(rung))


def add_tooltips(plot: figure, renderers: Sequence[GlyphRenderer]) -> None:
    """Add tooltips to the marks of records."""
    plot.add_tools(HoverTool(renderers=list(renderers), tooltips=_HOVER))


def padded_range(values: Sequence[float], margin: float = 0.06) -> Range1d:
    """A range that contains the values, with a margin on both sides."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    padding = margin * (high - low or abs(high) * 0.2 or 1.0)
    return Range1d(low - padding, high + padding)


def label_losses(plot: figure, *, x: bool = False) -> None:
    """Label axes of negated losses with the losses, so that better values remain above (and to the right).

    Call it when the ranges are final. Both ranges move together when the figure is dragged or zoomed.
    """
    scores = plot.y_range
    plot.extra_y_ranges = {"loss": Range1d(-scores.start, -scores.end)}
    plot.add_layout(_replacement(plot.yaxis[0], y_range_name="loss"), "left")
    if x:
        plot.extra_x_ranges = {"loss": Range1d(-plot.x_range.start, -plot.x_range.end)}
        plot.add_layout(_replacement(plot.xaxis[0], x_range_name="loss"), "below")


def _replacement(axis: Axis, **ranges: str) -> LinearAxis:
    """An axis that looks like the given one, which is hidden."""
    style = axis.properties_with_values(include_defaults=False)
    axis.visible = False
    return LinearAxis(**{**{name: style[name] for name in _AXIS_STYLE if name in style}, **ranges})


_AXIS_STYLE = (
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


def without_formulas(text: str) -> str:
    """The text with invisible spaces in what Bokeh would otherwise typeset as a formula."""
    return text.replace("$$", "$\u200b$").replace("\\", "\\\u200b")


def embed(figures: Mapping[str, figure]) -> tuple[dict[str, str], str]:
    """The HTML element of each figure, and the script that draws all figures in them."""
    if not figures:
        return {}, ""
    document = Document()
    with document.models.freeze():  # collects the models once, and not again for each figure
        for plot in figures.values():
            document.add_root(plot)
    script, elements = components(dict(figures), wrap_script=False)
    return elements, script


@cache
def library() -> str:
    """The part of BokehJS that the figures need."""
    return "\n".join(Resources(mode="inline", components=["bokeh"], log_level="error").js_raw)
