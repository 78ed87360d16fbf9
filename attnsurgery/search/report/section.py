"""Section: one part of the page, as words and the pictures between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bokeh.plotting import figure


@dataclass(frozen=True)
class Mark:
    """A line of a key."""

    sign: str
    """As HTML: a letter that looks like the mark."""
    colour: str
    words: str


@dataclass(frozen=True)
class Section:
    """Words are HTML: whatever came from outside is escaped by who wrote the section."""

    anchor: str
    title: str
    above: str = ""
    figures: tuple[figure, ...] = ()
    """Side by side where they are several."""
    key: tuple[Mark, ...] = ()
    """What stands for what in the pictures."""
    below: str = ""
