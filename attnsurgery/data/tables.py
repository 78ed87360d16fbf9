"""Tables of images and labels: a file with a row for each image, or an `imagefolder` of Hugging Face.

docs/data.md has the rules as a table.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from attnsurgery.data.folder import TRAIN, role_of
from attnsurgery.data.listing import (
    GROUP_COLUMNS,
    IMAGE_COLUMNS,
    SPLIT_COLUMNS,
    Entry,
    Listing,
    left_out,
    named_columns,
    only_column,
    requested_columns,
    roles_of,
    text_of,
)
from attnsurgery.data.rows import Row, is_table, read_rows
from attnsurgery.data.wording import count, listed
from attnsurgery.errors import SearchError, UsageError

_METADATA = "metadata"
"""Name of the tables of an `imagefolder`, without their ending."""
_FILE_NAME = "file_name"
"""Their column of images."""


def table_listing(path: Path, requested: str) -> Listing:
    """The images of a table, whose paths are relative to its folder.

    Args:
        path: the table.
        requested: columns for images and labels, with commas between them; '' to find them by name.

    Raises:
        UsageError: a column is missing or ambiguous, or a package for the file.
        SearchError: the table or one of its splits cannot be read, or images are missing.
    """
    rows = read_rows(path)
    columns = _columns(rows)
    named = requested_columns(str(path), requested, columns)
    image, labels = _image_column(path, named, columns)
    return replace(_listing(path, path.parent, rows, image, labels), name=path.stem)


def metadata_listing(root: Path, requested: str) -> Listing | None:
    """The images of an `imagefolder`: a folder with `metadata.csv`, or with one in each folder of a split.

    Args:
        root: the folder.
        requested: columns for labels, with commas between them; '' to find them by name.

    Returns:
        None where there is no such table, or none with a column `file_name`.

    Raises:
        UsageError, SearchError: as `table_listing`.
    """
    folders = {entry.name: root / entry.name for entry in sorted(os.scandir(root), key=lambda entry: entry.name)}
    splits = [(role, table) for name in folders if (role := role_of(name)) and (table := _metadata(folders[name]))]
    if not splits:
        table = _metadata(root)
        rows = _metadata_rows(table) if table else []
        if table is None or not rows:
            return None
        named = requested_columns(str(table), requested, _columns(rows))
        return _by_folder(replace(_listing(table, root, rows, _FILE_NAME, named), name=_name(root)))
    for role, _ in splits:
        same = [f"{table.parent.name}/" for other, table in splits if other == role]
        if len(same) > 1:
            raise SearchError(
                f"{root} has {' and '.join(same)}, which both read as the {role} split. Keep one, and move the other "
                "out of the folder or put their images together."
            )
    listings = []
    for role, table in splits:
        rows = _metadata_rows(table)
        if not rows:
            return None
        named = requested_columns(str(table), requested, _columns(rows))
        part = _listing(table, root, rows, _FILE_NAME, named)
        listings.append(replace(part, entries=tuple(replace(entry, role=role) for entry in part.entries)))
    first = next((part for (role, _), part in zip(splits, listings, strict=True) if role == TRAIN), listings[0])
    renamed = [f"{table.parent.name}/ is the {role} split" for role, table in splits if table.parent.name != role]
    return replace(
        first,
        name=_name(root),
        where=str(root),
        entries=tuple(entry for part in listings for entry in part.entries),
        columns=tuple(dict.fromkeys(column for part in listings for column in part.columns)),
        paths={name: path for part in listings for name, path in (part.paths or {}).items()},
        notes=(
            *([f"read as splits: {', '.join(renamed)}"] if renamed else []),
            *(note for part in listings for note in part.notes),
        ),
    )


def _name(root: Path) -> str:
    return root.name or root.resolve().name


def _metadata(folder: Path) -> Path | None:
    """The metadata file of a folder.

    Raises:
        SearchError: there are several.
    """
    if not folder.is_dir():
        return None
    tables = sorted(entry for entry in folder.iterdir() if entry.stem == _METADATA and is_table(entry))
    if len(tables) > 1:
        raise SearchError(f"{folder} has {listed(table.name for table in tables)}. Keep one of them.")
    return tables[0] if tables else None


def _metadata_rows(table: Path) -> list[Row]:
    """The rows of a metadata file; [] where it has no column `file_name`, and need be no table at all."""
    if _FILE_NAME.encode() not in table.read_bytes():
        return []
    rows = read_rows(table)
    return rows if _FILE_NAME in _columns(rows) else []


def _by_folder(listing: Listing) -> Listing:
    """The same images, in the splits whose folders they are in, if the table has no splits and all are in such."""
    roles = {entry.image: role_of(PurePosixPath(entry.image).parts[0]) for entry in listing.entries}
    if any(entry.role for entry in listing.entries) or not all(roles.values()) or TRAIN not in roles.values():
        return listing
    return replace(listing, entries=tuple(replace(entry, role=roles[entry.image]) for entry in listing.entries))


def _columns(rows: Sequence[Row]) -> list[str]:
    """The names of all columns, in the order in which they appear."""
    return list(dict.fromkeys(column for row in rows for column in row))


def _image_column(path: Path, named: tuple[str, ...], columns: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """The column of images, and those of labels that were named.

    A column behind the colon is that of images if it has a usual name for that, or else if it is the first of those and
    no column of the table has such a name.

    Raises:
        UsageError: no column is known to hold images, or several.
    """
    image = next(iter(named_columns(named, IMAGE_COLUMNS)), None)
    if image is None and not (named and len(named_columns(columns, IMAGE_COLUMNS)) != 1):
        image = only_column(str(path), columns, IMAGE_COLUMNS, "images")
    if image is None and named:
        image = named[0]
    if image is None:
        raise UsageError(
            f"{path} has no column {', '.join(IMAGE_COLUMNS[:-1])} or {IMAGE_COLUMNS[-1]} for the paths of images, but "
            f"{listed(columns)}. Its first row must name the columns; other names stand behind a colon, images first, "
            f"such as --data {path}:{','.join((columns if len(columns) > 1 else ['photo', 'breed'])[:2])}."
        )
    return image, tuple(name for name in named if name != image)


def _listing(table: Path, root: Path, rows: Sequence[Row], image: str, labels: tuple[str, ...]) -> Listing:
    """The images of a table.

    Args:
        table: its file, in whose folder the images are.
        root: the folder of the data, to which the names of images are relative.
        rows: of the table.
        image: the column of images.
        labels: the columns of labels that the user has named.
    """
    columns = _columns(rows)
    where = str(table)
    free = [column for column in columns if column not in (image, *labels)]
    split, group = (
        only_column(where, free, spellings, content)
        for spellings, content in ((SPLIT_COLUMNS, "splits"), (GROUP_COLUMNS, "groups"))
    )
    roles, note = roles_of(where, split, [row.get(split) for row in rows]) if split else ([None] * len(rows), "")
    entries: list[Entry] = []
    paths: dict[str, Path] = {}
    nameless = []
    for number, (row, role) in enumerate(zip(rows, roles, strict=True), start=1):
        if isinstance(row.get(image), dict | list | bytes):
            raise SearchError(
                f"{where}: the column {image!r} holds images or lists, and not paths of images. A data set of Hugging "
                "Face is read by its name, hfds/..., or as a folder of images with metadata.csv."
            )
        text = text_of(row.get(image))
        if not text:
            nameless.append(f"row {number}")
            continue
        path = table.parent / text
        name = _relative(path, root)
        paths[name] = path
        entries.append(Entry(name, row, role, text_of(row.get(group)) if group else ""))
    _refuse_missing(table, paths)
    entries.sort(key=lambda entry: entry.image)
    listing = Listing(
        "",
        where,
        tuple(entries),
        tuple(column for column in columns if column not in (image, split, group)),
        labels,
        paths,
    )
    absolute = [name for name in paths if os.path.isabs(name)]
    return listing.noted(
        *([note] if note else []),
        *left_out(listing, nameless, "without an image"),
        *([_absolute(absolute)] if absolute else []),
    )


def _absolute(names: Sequence[str]) -> str:
    return (
        f"outside the table's folder: {count(len(names), 'image')} with absolute paths ({names[0]} is the first), so "
        "the data is another one on other machines"
    )


def _relative(path: Path, root: Path) -> str:
    """The name of an image: its path relative to the data, or an absolute one outside of it."""
    text = os.path.normpath(path)
    if path.is_absolute() and os.path.isabs(root) is False:
        root = Path(os.path.abspath(root))
    relative = os.path.relpath(text, root)
    return Path(text if relative.startswith("..") and os.path.isabs(text) else relative).as_posix()


def _refuse_missing(table: Path, paths: Mapping[str, Path]) -> None:
    """
    Raises:
        SearchError: images are not there; the message counts them and names the first.
    """
    missing = [name for name, path in paths.items() if not _is_file(path)]
    if missing:
        raise SearchError(
            f"{table} names {count(len(missing), 'image')} of {len(paths):,} that {_are(missing)} not there: "
            f"{listed(missing)}. Paths are relative to the folder of the table, {table.parent}. Fetch the images, or "
            "remove their rows."
        )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or has a zero byte
        return False


def _are(items: Iterable[str]) -> str:
    return "is" if len(list(items)) == 1 else "are"
