"""Several classes for each image of a list.

Shape letters: N images, K classes.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from attnsurgery.data.folder import TEST, TRAIN, VAL
from attnsurgery.data.listing import LABEL_COLUMNS, Entry, Listing, check_classes, named_columns, repeated, text_of
from attnsurgery.data.source import Sources
from attnsurgery.data.wording import count, listed
from attnsurgery.errors import SearchError, UsageError

_SEPARATORS = ("|", ";", ",")
"""What separates the names in a cell; the first that any cell contains, or else spaces."""
WANTED = (
    "a table whose column of labels has the names of all classes of an image, such as 'cat|dog', or a column of 0 and "
    "1 for each class"
)
"""What data of several classes an image looks like."""


def several_classes_each(listing: Listing) -> Sources:
    """The images of a list, each with a 0 or 1 for every class, (N, K), and its rarest class as its label.

    Images are divided into splits by their rarest class; the number K stands for images of no class.

    Raises:
        UsageError: no column holds labels.
        SearchError: a cell is no list of names, or a split has a class that training does not have.
    """
    columns, note = _columns(listing)
    by_column = len(columns) > 1 or (columns == listing.requested and _is_binary(listing, columns[0]))
    if by_column or columns[0] not in (*listing.requested, *named_columns(columns, LABEL_COLUMNS)):
        names_of = {id(entry): _marked(listing, columns, entry) for entry in listing.entries}
    else:
        separator = _separator(listing, columns[0])
        names_of = {id(entry): _named(listing, columns[0], separator, entry) for entry in listing.entries}
        if separator:
            note = f"several classes of an image are separated by {'spaces' if separator == ' ' else separator}"
    parts = listing.parts(listing.entries)
    sets: dict[str, set[str]] = {}
    for entry in listing.entries:
        sets.setdefault(entry.image, set()).update(names_of[id(entry)])
    single = {role: list({entry.image: entry for entry in members}.values()) for role, members in parts.items()}
    classes, notes = check_classes(
        listing, {role: set().union(*(sets[entry.image] for entry in members)) for role, members in single.items()}
    )
    if not classes:
        raise SearchError(f"{listing.where}: no image to train on has a class in {listed(map(repr, columns))}.")
    frequency = Counter(name for entry in single[TRAIN] for name in sets[entry.image])
    rank = {name: (frequency[name], index) for index, name in enumerate(classes)}
    number = {name: index for index, name in enumerate(classes)}
    sources = {}
    for role, members in single.items():
        targets_NK = torch.zeros(len(members), len(classes))
        strata = []
        for row, entry in enumerate(members):
            names = sets[entry.image]
            targets_NK[row, [number[name] for name in names]] = 1.0
            strata.append(number[min(names, key=rank.__getitem__)] if names else len(classes))
        sources[role] = listing.source(members, strata, targets_NK)
    merged = repeated(entry for members in parts.values() for entry in members)
    empty = sum(not names for names in sets.values())
    all_notes = (
        *listing.notes,
        *([note] if note else []),
        *([f"put together: {count(len(merged), 'image')} with several rows ({merged[0]})"] if merged else []),
        *([f"of no class: {count(empty, 'image')}"] if empty else []),
        *notes,
    )
    return Sources(
        listing.name,
        tuple(classes),
        sources[TRAIN],
        sources.get(VAL),
        sources.get(TEST),
        notes=all_notes,
        outputs=len(classes),
    )


def _columns(listing: Listing) -> tuple[tuple[str, ...], str]:
    """The columns that hold the classes, and a note on those that were found by their content.

    Raises:
        UsageError: there are none.
    """
    if listing.requested:
        return listing.requested, ""
    named = named_columns(listing.columns, LABEL_COLUMNS)
    if len(named) == 1:
        return named, ""
    binary = tuple(column for column in listing.columns if _is_binary(listing, column))
    if not binary:
        raise UsageError(
            f"{listing.where} says no classes of its images: --task multilabel needs {WANTED}. Its columns are "
            f"{listed(listing.columns) or 'only those of images'}; others than {', '.join(LABEL_COLUMNS)} stand behind "
            f"a colon, such as --data {listing.where}:tags."
        )
    unused = [column for column in listing.columns if column not in binary]
    return binary, f"not used: {'columns' if len(unused) > 1 else 'column'} {listed(unused)}" if unused else ""


def _is_binary(listing: Listing, column: str) -> bool:
    """Whether a column holds 0 or 1 for each image."""
    return {text_of(entry.cells.get(column)) for entry in listing.entries} <= {"0", "1", "0.0", "1.0"}


def _marked(listing: Listing, columns: Sequence[str], entry: Entry) -> set[str]:
    """The columns in which an image has a 1.

    Raises:
        SearchError: a cell is not 0 or 1.
    """
    marked = set()
    for column in columns:
        text = text_of(entry.cells.get(column))
        if text not in ("0", "1", "0.0", "1.0"):
            raise SearchError(
                f"{listing.where}: the column {column!r} of {entry.image} holds {text!r}, and a column for a class "
                "holds 0 or 1."
            )
        if text.startswith("1"):
            marked.add(column)
    return marked


def _separator(listing: Listing, column: str) -> str:
    """What separates the names in the cells of a column; '' if no cell is text with several names."""
    texts = [
        value for entry in listing.entries if isinstance(value := entry.cells.get(column), str) and not _is_list(value)
    ]
    for separator in _SEPARATORS:
        if any(separator in text for text in texts):
            return separator
    return " " if any(re.search(r"\S\s+\S", text) for text in texts) else ""


def _named(listing: Listing, column: str, separator: str, entry: Entry) -> set[str]:
    """The names in a cell.

    Raises:
        SearchError: the cell is no list of names.
    """
    value: Any = entry.cells.get(column)
    if isinstance(value, str) and _is_list(value):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise SearchError(
                f"{listing.where}: the {column!r} of {entry.image} is no JSON list of names: {value} ({error})."
            ) from None
    if isinstance(value, str):
        value = value.split(separator if separator != " " else None) if separator else [value]
    if isinstance(value, Mapping):
        raise SearchError(f"{listing.where}: the {column!r} of {entry.image} is no list of names.")
    if not isinstance(value, list | tuple):
        value = [value]
    return {name for item in value if (name := text_of(item))}


def _is_list(text: str) -> bool:
    return text.lstrip().startswith("[")
