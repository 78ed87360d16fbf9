"""Which block does well at which place: the mean of what candidates with it are better than the base."""

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
from attnsurgery.search.report.figures import chart, plain
from attnsurgery.search.report.section import Section, register
from attnsurgery.search.report.template import html
from attnsurgery.search.report.words import quantity
from attnsurgery.search.result.record import trained
from attnsurgery.search.result.statistics import gains, without_outliers

if TYPE_CHECKING:
    from attnsurgery.search.report.control import Control
    from attnsurgery.search.result.outcome import Outcome

_ROW, _LETTER = 26, 6.4
"""Pixels that a row is high, and a letter wide."""
_LEANING = 0.7
"""Radians by which names of blocks lean where there are few."""
_WIDE = 9
"""With more kinds of blocks than this a cell has no room for more than a count."""
_PALETTE = interp_palette(tuple(reversed(RdBu11)), 101)
"""From red, worse than the base, over white to blue; told apart with any colour vision."""
_DARK = 0.6
"""Share of the most from which on a cell is so dark that its words are white."""

_HOVER = [("block", "@label"), ("at", "@place"), ("mean gain", "@gain"), ("of", "@count"), ("from .. to", "@reach")]


@register(order=30)
def section(outcome: Outcome, control: Control | None = None) -> Section | None:
    """Places by blocks; None before anything was trained."""
    base = outcome.base.top1
    cells = gains(trained(outcome.records), base) if base is not None else {}
    if not cells:
        return None
    positions = {place.name: index for index, place in enumerate(outcome.about.places)}
    places = sorted({place for place, _ in cells}, key=lambda place: positions.get(place, len(positions)))
    labels = sorted({label for _, label in cells})
    lean = _LEANING if len(labels) <= _WIDE else math.pi / 2
    plot = chart(
        "",
        "",
        60 + _ROW * len(places) + round(_LETTER * math.sin(lean) * min(60, max(map(len, labels)))),
        x_range=FactorRange(*map(plain, labels)),
        y_range=FactorRange(*map(plain, reversed(places))),
    )
    means = without_outliers([100 * fmean(values) for values in cells.values()])  # one that broke down is just red
    most = max(map(abs, means)) or 1.0
    mapper = LinearColorMapper(palette=_PALETTE, low=-most, high=most)
    winner = outcome.best.assignment if outcome.best else {}
    columns = _columns(cells, winner, most, wide=len(labels) <= _WIDE)
    edge = {"line_color": "edge", "line_width": "width"}
    rectangles = plot.rect("x", "y", 0.94, 0.9, source=columns, fill_color=transform("mean", mapper), **edge)
    middle = {"text_align": "center", "text_baseline": "middle", "text_font_size": "11px"}
    plot.text("x", "y", "words", source=columns, text_color="ink", **middle)
    plot.add_tools(HoverTool(renderers=[rectangles], tooltips=_HOVER))
    bar = ColorBar(color_mapper=mapper, ticker=BasicTicker(desired_num_ticks=7), width=10, padding=4)
    bar.formatter = PrintfTickFormatter(format="%+.1f")
    bar.background_fill_color, bar.major_tick_line_color = None, None
    plot.add_layout(bar, "right")
    plot.grid.grid_line_color = None
    plot.xaxis.major_label_orientation = lean
    return Section(
        "blocks",
        "Blocks and places",
        figures=(plot,),
        below=html(_CAPTION, rung=" on the lowest rung" if outcome.top_rung else ""),
    )


def _columns(
    cells: Mapping[tuple[str, str], Sequence[float]], winner: Mapping[str, str], most: float, wide: bool
) -> ColumnDataSource:
    columns: dict[str, list[object]] = {name: [] for name in _COLUMNS}
    for (place, label), values in cells.items():
        mean = 100 * fmean(values)
        best = winner.get(place) == label
        row = (
            plain(label),
            plain(place),
            mean,
            f"{round(mean, 1) + 0.0:+.1f} ({len(values)})" if wide else f"{len(values)}",
            label,
            place,
            f"{mean:+.2f} points",
            quantity(len(values), "candidate"),
            f"{100 * min(values):+.2f} .. {100 * max(values):+.2f}",
            INK if best else "white",
            2.0 if best else 1.0,
            "white" if abs(mean) > _DARK * most else INK,
        )
        for name, value in zip(_COLUMNS, row, strict=True):
            columns[name].append(value)
    return ColumnDataSource(columns)


_COLUMNS = ("x", "y", "mean", "words", "label", "place", "gain", "count", "reach", "edge", "width", "ink")


_CAPTION = """\
<p class="faint">Each cell: by how many points of validation top-1 the trained candidates with that block at that place
are better than the base{{ rung }}, on average, and how many they are. Framed are the blocks of the best; what is blank
no trained candidate has. This describes the candidates of this search and explains nothing: their other blocks vary
along, and those that did well were tried more often.</p>
"""
