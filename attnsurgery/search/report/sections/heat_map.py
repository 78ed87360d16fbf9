"""The mean gain over the base of the candidates with a certain block at a certain place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from bokeh.models import (
    BasicTicker,
    ColorBar,
    ColumnDataSource,
    FactorRange,
    HoverTool,
    LinearColorMapper,
    PrintfTickFormatter,
)
from bokeh.palettes import RdBu11, interp_palette
from bokeh.transform import transform

from attnsurgery.search.report.colours import INK
from attnsurgery.search.report.figures import chart, without_formulas
from attnsurgery.search.report.section import Section, register
from attnsurgery.search.report.template import html
from attnsurgery.search.report.words import quantity
from attnsurgery.search.result.record import trained
from attnsurgery.search.result.statistics import gains, without_outliers

if TYPE_CHECKING:
    from attnsurgery.search.report.control import Control
    from attnsurgery.search.result.outcome import Outcome

_ROW_HEIGHT, _LETTER_WIDTH = 26, 6.4
"""In pixels."""
_LABEL_ANGLE = 0.7
"""Angle of the names of blocks if there are few, in radians; many are vertical."""
_MAX_WIDE_COLUMNS = 9
"""With more columns, a cell has room only for the number of candidates."""
_PALETTE = interp_palette(tuple(reversed(RdBu11)), 101)
"""From red, worse than the base, over white to blue; distinguishable with any colour vision."""
_DARK_SHARE = 0.6
"""Share of the largest absolute mean above which a cell is so dark that its text is white."""

_HOVER = [("block", "@label"), ("at", "@place"), ("mean gain", "@gain"), ("over", "@count"), ("range", "@range")]


@register(order=30)
def section(outcome: Outcome, control: Control | None = None) -> Section | None:
    """Places by blocks; None if no candidate with a block was trained."""
    base = outcome.base.metric
    cells = gains(trained(outcome.records), base) if base is not None else {}
    if not cells:
        return None
    positions = {place.name: index for index, place in enumerate(outcome.about.places)}
    places = sorted({place for place, _ in cells}, key=lambda place: positions.get(place, len(positions)))
    labels = sorted({label for _, label in cells})
    wide = len(labels) <= _MAX_WIDE_COLUMNS
    angle = _LABEL_ANGLE if wide else math.pi / 2
    plot = chart(
        "",
        "",
        60 + _ROW_HEIGHT * len(places) + round(_LETTER_WIDTH * math.sin(angle) * min(60, max(map(len, labels)))),
        x_range=FactorRange(*map(without_formulas, labels)),
        y_range=FactorRange(*map(without_formulas, reversed(places))),
    )
    means = without_outliers([100 * fmean(values) for values in cells.values()])  # outliers get the last colour
    limit = max(map(abs, means)) or 1.0
    mapper = LinearColorMapper(palette=_PALETTE, low=-limit, high=limit)
    winner = outcome.best.assignment if outcome.best else {}
    columns = _columns(cells, winner, limit, wide=wide)
    edge_style = {"line_color": "edge", "line_width": "width"}
    rectangles = plot.rect("x", "y", 0.94, 0.9, source=columns, fill_color=transform("mean", mapper), **edge_style)
    text_style = {"text_align": "center", "text_baseline": "middle", "text_font_size": "11px"}
    plot.text("x", "y", "words", source=columns, text_color="ink", **text_style)
    plot.add_tools(HoverTool(renderers=[rectangles], tooltips=_HOVER))
    bar = ColorBar(color_mapper=mapper, ticker=BasicTicker(desired_num_ticks=7), width=10, padding=4)
    bar.formatter = PrintfTickFormatter(format="%+.1f")
    bar.background_fill_color, bar.major_tick_line_color = None, None
    plot.add_layout(bar, "right")
    plot.grid.grid_line_color = None
    plot.xaxis.major_label_orientation = angle
    return Section(
        "blocks",
        "Blocks and places",
        figures=(plot,),
        below=html(_CAPTION, rung=" on the lowest rung" if outcome.top_rung else "", metric=outcome.about.metric),
    )


def _columns(
    cells: Mapping[tuple[str, str], Sequence[float]], winner: Mapping[str, str], limit: float, wide: bool
) -> ColumnDataSource:
    columns: dict[str, list[object]] = {name: [] for name in _COLUMNS}
    for (place, label), values in cells.items():
        mean = 100 * fmean(values)
        best = winner.get(place) == label
        row = (
            without_formulas(label),
            without_formulas(place),
            mean,
            f"{round(mean, 1) + 0.0:+.1f} ({len(values)})" if wide else f"{len(values)}",
            label,
            place,
            f"{mean:+.2f} points",
            quantity(len(values), "candidate"),
            f"{100 * min(values):+.2f} .. {100 * max(values):+.2f}",
            INK if best else "white",
            2.0 if best else 1.0,
            "white" if abs(mean) > _DARK_SHARE * limit else INK,
        )
        for name, value in zip(_COLUMNS, row, strict=True):
            columns[name].append(value)
    return ColumnDataSource(columns)


_COLUMNS = ("x", "y", "mean", "words", "label", "place", "gain", "count", "range", "edge", "width", "ink")


_CAPTION = """\
<p class="faint">Each cell shows the mean gain in validation {{ metric }} over the base{{ rung }}, in points, of the
trained candidates with that block at that place, and their number. The blocks of the best candidate are framed. A cell
is blank if no trained candidate has that block there. A row input_size shows the candidates of each input size. The
gains are descriptive, not causal: the candidates also differ in their other blocks, and choices that did well were
tried more often.</p>
"""
