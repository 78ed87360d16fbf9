"""The best candidate as a diagram of the model: its stages in a row, with the sites of the space and their blocks.

It is plain HTML and no figure, so it needs no script, wraps on a narrow screen, and adapts to dark mode.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from attnsurgery.search.report.colours import FAMILIES
from attnsurgery.search.report.section import Section, register
from attnsurgery.search.report.template import html
from attnsurgery.search.report.words import quantity
from attnsurgery.search.result.about import About, Spot
from attnsurgery.search.result.record import Record
from attnsurgery.search.space import INPUT_SIZE, NONE

if TYPE_CHECKING:
    from attnsurgery.search.report.control import Control
    from attnsurgery.search.result.outcome import Outcome


@register(order=60)
def section(outcome: Outcome, control: Control | None = None) -> Section | None:
    """The best candidate's blocks at their sites; None if there is no such candidate."""
    best = outcome.best
    if best is None:
        return None
    about, labels = outcome.about, _blocks(best)
    families = sorted({_family(label) for record in outcome.records for label in _blocks(record).values()})
    colours = {family: FAMILIES[index % len(FAMILIES)] for index, family in enumerate(families)}
    channels, *own = about.input_size
    height, width = (best.recipe or {}).get("input_size") or own
    resized = [height, width] != own
    boxes = [_Box("images", _size(channels, height, width))]
    for stage in about.stages:
        size = _size(stage.channels, stage.height, stage.width)
        own_blocks = f"{quantity(stage.blocks, 'block')} of the base"
        boxes.append(_Box(f"stage {stage.number}", size, own_blocks, _lines(about, stage.number, labels, colours)))
    outside = [line for number in _other_stages(about) for line in _lines(about, number, labels, colours)]
    if outside:
        boxes.append(_Box("outside the stages", lines=outside))
    boxes.append(_Box("head"))
    return Section(
        "winner",
        "The best candidate",
        below=html(
            _BELOW,
            boxes=boxes,
            base=outcome.config.base,
            blocks=quantity(best.blocks, "block"),
            own=_size(*own) if resized else "",
        ),
    )


_BELOW = """\
<div class="model">
{% for box in boxes %}
<div class="stage{{ "" if box.lines or box.own_blocks else " small" }}"><h3>{{ box.title }}</h3>
<p>{{ box.size }}{% if box.own_blocks %}<br>{{ box.own_blocks }}{% endif %}</p>
{% for line in box.lines %}
{% if line.empty %}
<div class="empty">{% for address in line.empty %}<span title="{{ address }}">○</span> {% endfor %}</div>
{% else %}
<div class="block" style="--c: {{ line.colour }}" title="{{ line.size }}"><b>{{ line.family }}</b>
{%- if line.options %}<br>{{ line.options }}{% endif %}<br><span>{{ line.site }}</span></div>
{% endif %}
{% endfor %}
</div>
{{ "" if loop.last else '<div class="arrow" aria-hidden="true">→</div>' | safe }}
{% endfor %}
</div>
<p class="faint">{{ base }} with {{ blocks }}. ○ is a site of the search space at which the candidate has no block.
{% if own %}
Its input size is not that of the base; the sizes in the stages are those for the base, with images of
{{ own }} pixels.
{% endif %}
</p>
"""


def _blocks(record: Record) -> dict[str, str]:
    """The blocks of a candidate by place."""
    return {place: label for place, label in record.assignment.items() if label != NONE and place != INPUT_SIZE}


@dataclass(frozen=True)
class _Line:
    """A block, or neighbouring sites without a block."""

    empty: tuple[str, ...] = ()
    """Addresses of the sites without a block; () for a block."""
    family: str = ""
    options: str = ""
    site: str = ""
    size: str = ""
    colour: str = ""


@dataclass(frozen=True)
class _Box:
    """A part of the model: the input, a stage, the head."""

    title: str
    size: str = ""
    """Channels, height and width of its features."""
    own_blocks: str = ""
    """Number of the base's own blocks there, as text."""
    lines: Sequence[_Line] = ()


def _size(*numbers: int) -> str:
    return " \N{MULTIPLICATION SIGN} ".join(map(str, numbers))


def _other_stages(about: About) -> list[int | None]:
    """Stage numbers of sites outside the model's stages; None for sites without a stage."""
    numbers = {spot.stage for place in about.places for spot in place.spots} - {stage.number for stage in about.stages}
    return sorted(numbers, key=lambda stage: (stage is None, stage or 0))


def _lines(about: About, stage: int | None, labels: Mapping[str, str], colours: Mapping[str, str]) -> list[_Line]:
    """The sites of a stage in order of execution."""
    lines: list[_Line] = []
    for empty, group in groupby(_spots(about, stage, labels), key=lambda pair: not pair[1]):
        if empty:
            lines.append(_Line(empty=tuple(spot.address for spot, _ in group)))
        else:
            lines += [_block(spot, label, colours[_family(label)]) for spot, label in group]
    return lines


def _spots(about: About, stage: int | None, labels: Mapping[str, str]) -> Iterator[tuple[Spot, str]]:
    """The sites of the space in the stage, once for each block at a site, or once with '' if it has none."""
    labels_at: dict[str, tuple[Spot, list[str]]] = {}
    for place in about.places:
        for spot in place.spots:
            if spot.stage == stage:
                blocks = labels_at.setdefault(spot.address, (spot, []))[1]
                blocks += [labels[place.name]] if place.name in labels else []
    for spot, blocks in sorted(labels_at.values(), key=lambda pair: pair[0].depth):
        yield from ((spot, label) for label in blocks or [""])


def _block(spot: Spot, label: str, colour: str) -> _Line:
    return _Line(
        family=_family(label),
        options=label.partition("(")[2].removesuffix(")"),
        site=f"{'around' if spot.role == 'span' else 'at'} {spot.address}",
        size=_size(spot.channels, spot.height, spot.width),
        colour=colour,
    )


def _family(label: str) -> str:
    return label.partition("(")[0]
