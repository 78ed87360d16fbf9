"""Images with what a table, or a file beside each of them, says of them: labels, splits, groups.

A task makes its targets of such a list (`attnsurgery.data.classes`, `attnsurgery.data.class_sets`).
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from attnsurgery.data.folder import TEST, TRAIN, VAL, role_of
from attnsurgery.data.source import Source, decode
from attnsurgery.data.wording import count, listed
from attnsurgery.errors import SearchError, UsageError, did_you_mean

IMAGE_COLUMNS = ("image", "path", "file", "filename", "file_name", "image_path", "filepath", "img")
LABEL_COLUMNS = ("label", "class", "category", "target", "labels")
SPLIT_COLUMNS = ("split", "fold", "subset", "set")
GROUP_COLUMNS = ("group", "groups", "group_id", "patient", "patient_id", "subject", "subject_id")


@dataclass(frozen=True)
class Entry:
    """An image with what is said of it."""

    image: str
    """Its name, unique in the data: a path relative to the data."""
    cells: Mapping[str, Any]
    """What is said of it, by column."""
    role: str | None = None
    """The split that it is in; None if the data does not say."""
    group: str = ""
    """The group that it is in; '' if the data does not say."""


@dataclass(frozen=True)
class Listing:
    """Images in the order of their names, one image possibly in several entries."""

    name: str
    """Of the data."""
    where: str
    """The table, or what else the entries are from, for messages."""
    entries: tuple[Entry, ...]
    columns: tuple[str, ...]
    """Columns that may hold labels."""
    requested: tuple[str, ...] = ()
    """Columns that the user has named for labels; () if none."""
    paths: Mapping[str, Path] | None = None
    """The file of each image; None if images are in no file of their own."""
    read: Callable[[str], bytes] | None = None
    """Reads the encoded image of a name, where images are in no file of their own."""
    content: Callable[[], str] = str
    """As in `Source`."""
    notes: tuple[str, ...] = ()
    """What was left out or has an unusual name, a line each."""

    def noted(self, *notes: str) -> Listing:
        """The same images with more notes."""
        return replace(self, notes=(*self.notes, *notes))

    def parts(self, entries: Sequence[Entry]) -> dict[str, list[Entry]]:
        """The entries by split; all in the training split if the data does not say.

        Args:
            entries: those that are used.

        Raises:
            SearchError: there is no training split, or an image is in two splits.
        """
        parts: dict[str, list[Entry]] = {}
        for entry in entries:
            parts.setdefault(entry.role or TRAIN, []).append(entry)
        if TRAIN not in parts:
            found = f"only images of {', '.join(parts)}" if parts else "no image"
            raise SearchError(
                f"{self.where} has {found} with labels, and none to train on. Add rows of the train split."
            )
        of: dict[str, str] = {}
        for role, members in parts.items():
            for entry in members:
                if of.setdefault(entry.image, role) != role:
                    raise SearchError(
                        f"{self.where} has {entry.image} in two splits, {of[entry.image]} and {role}. Keep one of the "
                        "rows: images that a model was trained on cannot test it."
                    )
        return {role: parts[role] for role in (TRAIN, VAL, TEST) if role in parts}

    def source(self, entries: Sequence[Entry], labels: Sequence[int], targets: torch.Tensor | None = None) -> Source:
        """The images of a split.

        Args:
            entries: of which each is an image of its own.
            labels: as in `Source`.
            targets: as in `Source`.
        """
        ids = tuple(entry.image for entry in entries)
        groups = tuple(entry.group or f"={entry.image}" for entry in entries)
        read, paths = self.read, tuple(self.paths[name] for name in ids) if self.paths is not None else ()
        source = Source(
            ids=ids,
            labels=tuple(labels),
            open=lambda index: decode(paths[index]),
            paths=paths,
            content=self.content,
            targets=targets,
            read=read and (lambda index: read(ids[index])),
            groups=groups if any(entry.group for entry in entries) else (),
        )
        return source if read is None else replace(source, open=lambda index: decode(source.file(index)))


def only_label_column(listing: Listing) -> str:
    """The column of the labels, as requested or else by its name.

    Raises:
        UsageError: there is none, or there are several.
    """
    named = listing.requested or named_columns(listing.columns, LABEL_COLUMNS)
    if len(named) == 1:
        return named[0]
    if not named:
        raise UsageError(
            f"{listing.where} has no column {', '.join(LABEL_COLUMNS[:-1])} or {LABEL_COLUMNS[-1]}; "
            f"{_others(listing.columns)}Name the column of the labels behind a colon, such as --data "
            f"{listing.where}:{listing.columns[0] if listing.columns else 'breed'}."
        )
    raise UsageError(
        f"{listing.where} has {len(named)} columns of labels, {listed(named)}, and an image has one class. Name one of "
        f"them behind a colon, such as --data {listing.where}:{named[0]}. Where an image has several classes, use "
        "--task multilabel."
    )


def named_columns(columns: Iterable[str], spellings: Sequence[str]) -> tuple[str, ...]:
    """The columns of one of these names, whatever their case."""
    return tuple(column for column in columns if column.strip().lower() in spellings)


def requested_columns(where: str, listing: str, columns: Sequence[str]) -> tuple[str, ...]:
    """The columns that stand behind the colon.

    Args:
        where: the table, for the message.
        listing: their names, with commas between them.
        columns: of the table.

    Raises:
        UsageError: the table has no such column.
    """
    requested = tuple(name.strip() for name in listing.split(",") if name.strip())
    for name in requested:
        if name not in columns:
            raise UsageError(
                f"{where} has no column {name!r}; {_others(columns)}{did_you_mean(name, columns).strip()}".strip()
            )
    return requested


def only_column(where: str, columns: Sequence[str], spellings: Sequence[str], content: str) -> str | None:
    """The column of one of these names; None if there is none.

    Args:
        where: the table, for the message.
        columns: of the table.
        spellings: the names.
        content: what such a column holds, for the message.

    Raises:
        UsageError: there are several.
    """
    named = named_columns(columns, spellings)
    if len(named) > 1:
        raise UsageError(
            f"{where} has {len(named)} columns for {content}: {listed(named)}. Keep one, or rename others."
        )
    return named[0] if named else None


def roles_of(where: str, column: str, values: Sequence[Any]) -> tuple[list[str | None], str]:
    """The split of each row, and a note on unusual spellings ('' if there are none).

    Numbers of folds are no splits: then all are None, and the note says so.

    Raises:
        SearchError: a value is no name of a split, or two are names of the same one.
    """
    texts = [text_of(value) for value in values]
    kinds = sorted(set(texts))
    if all(re.fullmatch(r"-?\d+", kind) for kind in kinds):
        return [None] * len(texts), f"not used: column {column}, whose numbers are no names of splits"
    roles = {kind: role_of(kind) for kind in kinds}
    if unknown := [kind for kind, role in roles.items() if role is None]:
        of = sum(text in unknown for text in texts)
        raise SearchError(
            f"{where}: {count(of, 'row')} of the column {column!r} {'is' if of == 1 else 'are'} "
            f"{listed(repr(kind) for kind in unknown)}, which is no split. Splits are called train, val and test, or "
            "similarly (training, valid, dev, holdout ...)."
        )
    by_role: dict[str | None, list[str]] = {}
    for kind, role in roles.items():
        by_role.setdefault(role, []).append(kind)
    for role, spelled in by_role.items():
        if len(spelled) > 1 and len({text.lower() for text in spelled}) > 1:
            raise SearchError(
                f"{where}: {listed(map(repr, spelled))} of the column {column!r} all read as the {role} split. Give "
                "each split one name."
            )
    renamed = [f"{spelled[0]!r} is the {role} split" for role, spelled in by_role.items() if spelled[0] != role]
    return [roles[text] for text in texts], f"read as splits: {', '.join(renamed)}" if renamed else ""


def text_of(value: Any) -> str:
    """A cell as text, in composed Unicode (NFC): '' if it is empty, and '3' for the number 3.0."""
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return unicodedata.normalize("NFC", str(value)).strip()


def in_order(names: Iterable[str]) -> list[str]:
    """Names of classes in their order: by number if all are whole numbers, else by name."""
    names = set(names)
    if all(re.fullmatch(r"[+-]?\d+", name) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def check_classes(listing: Listing, parts: Mapping[str, set[str]]) -> tuple[list[str], list[str]]:
    """The classes, those of the training split, and notes on splits that lack some.

    Args:
        listing: the data, for messages.
        parts: by split, the classes that its images have.

    Raises:
        SearchError: a split has a class that the training split lacks.
    """
    classes, notes = in_order(parts[TRAIN]), []
    for role, present in parts.items():
        if unexpected := in_order(present - parts[TRAIN]):
            raise SearchError(
                f"{listing.where}: the {role} split has classes that training does not have: {listed(unexpected)}."
            )
        if missing := [name for name in classes if name not in present]:
            notes.append(f"the {role} split has no images of {listed(missing)}")
    return classes, notes


def left_out(listing: Listing, images: Sequence[str], reason: str) -> list[str]:
    """A note on rows that are not used, or [] if there are none."""
    return [f"left out: {count(len(images), 'row')} {reason} ({images[0]} is the first)"] if images else []


def repeated(entries: Iterable[Entry]) -> list[str]:
    """The images of more than one entry."""
    return [name for name, number in Counter(entry.image for entry in entries).items() if number > 1]


def _others(columns: Sequence[str]) -> str:
    return f"its other columns are {listed(columns)}. " if columns else "it has no other columns. "
