"""The best candidate drawn on the model: its stages in a row, the places of the space in them, and what stands there.

Plain HTML and no picture: it reads without a script, wraps on a narrow screen, and follows light and dark.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import TYPE_CHECKING

from attnsurgery.search.report.colours import FAMILIES
from attnsurgery.search.report.section import Section
from attnsurgery.search.report.words import counted
from attnsurgery.search.result.about import About, Spot, Stage
from attnsurgery.search.space import NONE

if TYPE_CHECKING:
    from attnsurgery.search.result.outcome import Outcome


def section(outcome: Outcome) -> Section | None:
    """The winner's blocks at their places; None before there is one."""
    best = outcome.best
    if best is None:
        return None
    about, placed = outcome.about, {place: label for place, label in best.assignment.items() if label != NONE}
    families = sorted({_family(label) for record in outcome.records for label in record.assignment.values()} - {NONE})
    colours = {family: FAMILIES[index % len(FAMILIES)] for index, family in enumerate(families)}
    known = {stage.number for stage in about.stages}
    boxes = [
        _box("images", _size(*about.input_size), ""),
        *(
            _box(f"stage {stage.number}", _words(stage), _inside(about, stage.number, placed, colours))
            for stage in about.stages
        ),
    ]
    if elsewhere := "".join(_inside(about, number, placed, colours) for number in _others(about, known)):
        boxes.append(_box("outside the stages", "", elsewhere))
    boxes.append(_box("head", "", ""))
    drawn = '<div class="arrow" aria-hidden="true">→</div>'.join(boxes)
    return Section(
        "winner",
        "The best candidate",
        below=f'<div class="model">{drawn}</div><p class="faint">{escape(outcome.config.base)} with '
        f"{counted(best.blocks, 'block')}; ○ is a place that the space offers and the candidate leaves as it is.</p>",
    )


def _words(stage: Stage) -> str:
    return f"{_size(stage.channels, stage.height, stage.width)}<br>{counted(stage.blocks, 'block')} of its own"


def _size(channels: int, height: int, width: int) -> str:
    return f"{channels} &times; {height} &times; {width}"


def _others(about: About, known: set[int]) -> list[int | None]:
    """Where else places are than in the stages that are drawn."""
    found = {spot.stage for place in about.places for spot in place.spots} - known
    return sorted(found, key=lambda stage: (stage is None, stage or 0))


def _inside(about: About, stage: int | None, placed: Mapping[str, str], colours: Mapping[str, str]) -> str:
    """The places of a stage in order of execution: blocks as boxes, runs of empty places as one line of marks."""
    parts: list[str] = []
    empty: list[str] = []
    for spot, label in [*_spots(about, stage, placed), (None, "")]:
        if spot is not None and label is None:
            empty.append(f'<span title="{escape(spot.address)}">○</span>')
            continue
        if empty:
            parts.append(f'<div class="empty">{" ".join(empty)}</div>')
            empty = []
        if spot is not None and label is not None:
            parts.append(_block(spot, label, colours[_family(label)]))
    return "".join(parts)


def _spots(about: About, stage: int | None, placed: Mapping[str, str]) -> Iterator[tuple[Spot | None, str | None]]:
    """Every site of the space in the stage once, with what stands there or None."""
    found: dict[str, tuple[Spot, list[str]]] = {}
    for place in about.places:
        for spot in place.spots:
            if spot.stage == stage:
                labels = found.setdefault(spot.address, (spot, []))[1]
                labels += [placed[place.name]] if place.name in placed else []
    for spot, labels in sorted(found.values(), key=lambda pair: pair[0].depth):
        yield from ((spot, label) for label in labels)
        if not labels:
            yield spot, None


def _block(spot: Spot, label: str, colour: str) -> str:
    options = label.partition("(")[2].removesuffix(")")
    told = f"<br>{escape(options)}" if options else ""
    around = "around" if spot.role == "span" else "at"
    size = _size(spot.channels, spot.height, spot.width)
    return (
        f'<div class="block" style="--c: {colour}" title="{size}"><b>{escape(_family(label))}</b>{told}<br>'
        f"<span>{around} {escape(spot.address)}</span></div>"
    )


def _box(title: str, size: str, inside: str) -> str:
    small = "" if inside or title.startswith("stage") else " small"
    return f'<div class="stage{small}"><h3>{title}</h3><p>{size}</p>{inside}</div>'


def _family(label: str) -> str:
    return label.partition("(")[0]
