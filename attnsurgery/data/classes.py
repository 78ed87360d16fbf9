"""One class for each image of a list."""

from __future__ import annotations

import re
from collections.abc import Sequence

from attnsurgery.data.folder import TEST, TRAIN, VAL
from attnsurgery.data.listing import Entry, Listing, check_classes, left_out, only_label_column, text_of
from attnsurgery.data.source import Sources
from attnsurgery.data.wording import count, listed
from attnsurgery.errors import SearchError

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


def one_class_each(listing: Listing) -> Sources:
    """The images of a list, each of the class that its label names.

    Raises:
        UsageError: no column holds the labels, or several do.
        SearchError: labels are no classes, an image has two, or there are fewer than two classes.
    """
    column = only_label_column(listing)
    labels = [_label(listing, column, entry) for entry in listing.entries]
    empty = [entry.image for entry, label in zip(listing.entries, labels, strict=True) if not label]
    used = [entry for entry, label in zip(listing.entries, labels, strict=True) if label]
    labelled = list(zip(used, _whole(listing, column, list(filter(None, labels))), strict=True))
    label_of: dict[str, str] = {}
    for entry, label in labelled:
        if label_of.setdefault(entry.image, label) != label:
            raise SearchError(
                f"{listing.where} has {entry.image} in two classes, {label_of[entry.image]} and {label}. Keep one of "
                "the rows; where images have several classes, use --task multilabel."
            )
    parts = listing.parts([entry for entry, _ in labelled])
    single = {role: list({entry.image: entry for entry in members}.values()) for role, members in parts.items()}
    twice = len(labelled) - sum(map(len, single.values()))
    classes, notes = check_classes(
        listing, {role: {label_of[entry.image] for entry in members} for role, members in single.items()}
    )
    if len(classes) < 2:
        raise SearchError(
            f"{listing.where} has images of one class, {classes[0]!r}, in the column {column!r}; at least two classes "
            "are needed."
        )
    number = {name: index for index, name in enumerate(classes)}
    sources = {
        role: listing.source(members, [number[label_of[entry.image]] for entry in members])
        for role, members in single.items()
    }
    notes = [
        *listing.notes,
        *left_out(listing, empty, "without a label"),
        *([f"left out: {count(twice, 'row')} that {'repeats' if twice == 1 else 'repeat'} another"] if twice else []),
        *notes,
    ]
    return Sources(
        listing.name, tuple(classes), sources[TRAIN], sources.get(VAL), sources.get(TEST), notes=tuple(notes)
    )


def _label(listing: Listing, column: str, entry: Entry) -> str:
    value = entry.cells.get(column)
    if isinstance(value, list | tuple):
        if len(value) > 1:
            raise SearchError(
                f"{listing.where}: {entry.image} has {len(value)} labels in {column!r}. Where images have several "
                "classes, use --task multilabel."
            )
        value = value[0] if value else None
    if isinstance(value, dict):
        raise SearchError(f"{listing.where}: the {column!r} of {entry.image} is no name or number of a class.")
    return text_of(value)


def _whole(listing: Listing, column: str, labels: Sequence[str]) -> list[str]:
    """The labels; numbers such as 3.0, as other programs write columns with empty cells, as whole ones.

    Raises:
        SearchError: all labels are numbers, and some are not whole.
    """
    if not all(_NUMBER.fullmatch(label) for label in labels):
        return list(labels)
    if fractions := [label for label in labels if not float(label).is_integer()]:
        raise SearchError(
            f"{listing.where}: the column {column!r} holds numbers that are not whole ({listed(fractions)}), and "
            "classes are names or whole numbers."
        )
    return [label if re.fullmatch(r"[+-]?\d+", label) else str(int(float(label))) for label in labels]
