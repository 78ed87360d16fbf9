"""Section: one part of the page, with text and figures, and the decorator that registers it."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from bokeh.plotting import figure

    from attnsurgery.search.report.control import Control
    from attnsurgery.search.result.outcome import Outcome

_PACKAGE = "attnsurgery.search.report.sections"


@dataclass(frozen=True)
class Mark:
    """An entry of the key of a figure."""

    sign: str
    """A letter that looks like the mark."""
    colour: str
    words: str


@dataclass(frozen=True)
class Section:
    """One part of the page. Its strings are escaped, unless `template.html()` made them."""

    anchor: str
    """The fragment of links to the section; unique on the page."""
    title: str
    """The table of contents shows the part before a colon."""
    above: str = ""
    """HTML or text above the figures."""
    figures: tuple[figure, ...] = ()
    """The figures, which are drawn side by side."""
    key: tuple[Mark, ...] = ()
    """The meaning of the marks in the figures."""
    below: str = ""
    """HTML or text below the figures."""


if TYPE_CHECKING:
    Build = Callable[[Outcome, Control | None], Section | None]
    B = TypeVar("B", bound=Build)
else:
    B = TypeVar("B")

_builders: dict[int, Build] = {}
_NEARBY = 4
"""Distance within which an error suggests free orders."""


def register(order: int) -> Callable[[B], B]:
    """Decorate the function that builds a section from an outcome and its random control, or returns None.

    Args:
        order: the page shows sections in ascending order.

    Raises:
        ValueError: another section has this order; the message names both and the nearest orders that are free.
    """

    def add(build: B) -> B:
        if _builders.setdefault(order, build) is not build:
            free = sorted(set(range(order - _NEARBY, order + _NEARBY + 1)) - set(_builders))
            raise ValueError(
                f"two sections of the report have order {order}: {_full_name(_builders[order])} and "
                f"{_full_name(build)}. Free orders nearby: {', '.join(map(str, free)) or 'none'}."
            )
        return build

    return add


def _full_name(build: Build) -> str:
    return f"{build.__module__}.{build.__qualname__}"


def builders() -> list[Build]:
    """The functions that build sections, in the order of the page."""
    package = importlib.import_module(_PACKAGE)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{_PACKAGE}.{module.name}")
    return [_builders[order] for order in sorted(_builders)]
