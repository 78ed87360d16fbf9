"""Numbers and names in the sentences of notes and errors."""

from __future__ import annotations

from collections.abc import Iterable

_LISTED = 5
"""Number of things that a message lists."""
_PLURALS = {"class": "classes", "hidden file or folder": "hidden files or folders"}


def count(number: int, noun: str) -> str:
    """A number with a noun, in the plural if need be."""
    return f"{number:,} {noun if number == 1 else _PLURALS.get(noun, f'{noun}s')}"


def listed(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    items = list(names)
    more = len(items) - _LISTED
    return ", ".join(items[:_LISTED]) + (f" and {more} more" if more > 0 else "")
