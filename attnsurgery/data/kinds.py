"""Which kind of data `--data` names: a table, an `imagefolder` of Hugging Face, shards of webdataset, or another."""

from __future__ import annotations

from pathlib import Path

from attnsurgery.data.class_sets import WANTED, several_classes_each
from attnsurgery.data.classes import one_class_each
from attnsurgery.data.listing import LABEL_COLUMNS, Listing, named_columns
from attnsurgery.data.rows import ENDINGS, is_table
from attnsurgery.data.shards import holds_shards, shards_listing
from attnsurgery.data.source import Sources, find_sources
from attnsurgery.data.tables import metadata_listing, table_listing
from attnsurgery.errors import SearchError, UsageError

SHARDS = "wds/"
"""Begins the name of data that is read as shards, whatever else is beside them."""


def is_local(spec: str) -> bool:
    """Whether the data is in files on this machine."""
    path, _ = _path_of(spec)
    return path.is_dir() or is_table(path) or path.suffix.lower() == ".tar"


def classed_sources(spec: str) -> Sources:
    """The images that `--data` names, each of one class; all kinds of data but embedded ones.

    Raises:
        UsageError: there is no such data, or no column with its labels.
        SearchError: it cannot be read, or is ambiguous.
    """
    listing = listing_of(spec)
    if listing is None:
        return find_sources(spec)
    if listing.requested or named_columns(listing.columns, LABEL_COLUMNS) or not _is_folder(spec):
        return one_class_each(listing)
    try:  # captions or boxes beside class folders
        sources = find_sources(spec)
    except SearchError:
        return one_class_each(listing)
    return Sources(
        sources.name,
        sources.classes,
        sources.train,
        sources.val,
        sources.test,
        notes=(*sources.notes, "not used: the metadata file, which has no column of labels"),
    )


def several_classes(spec: str) -> Sources:
    """The images that `--data` names, each of any number of classes.

    Raises:
        UsageError: there is no such data, or it is of a kind with one class an image.
        SearchError: it cannot be read, or is ambiguous.
    """
    listing = listing_of(spec)
    if listing is None:
        lacks = "its folders give one class an image" if Path(spec).is_dir() else "it is no table of images"
        raise UsageError(f"--data {spec}: {lacks}, and --task multilabel needs {WANTED}.")
    return several_classes_each(listing)


def listing_of(spec: str) -> Listing | None:
    """The images that `--data` names, with all that is said of them; None for other kinds of data.

    Args:
        spec: a table such as 'labels.csv', a folder with metadata.csv, a folder of .tar files, or one of these. Columns
            may stand behind a colon: 'labels.csv:file,breed'.

    Raises:
        UsageError, SearchError: as `classed_sources`.
    """
    path, columns = _path_of(spec)
    if (spec.startswith(SHARDS) and not Path(spec).exists()) or path.suffix.lower() == ".tar":
        return shards_listing(path, columns)
    if path.suffix.lower() in ENDINGS:
        if not path.is_file():
            raise UsageError(f"--data {spec}: there is no table {path}.{_tables_beside(path)}")
        return table_listing(path, columns)
    if not path.is_dir():
        return None
    return metadata_listing(path, columns) or (shards_listing(path, columns) if holds_shards(path) else None)


def _path_of(spec: str) -> tuple[Path, str]:
    """The path that a specification names, and the columns behind the colon."""
    text = spec if Path(spec).exists() else spec.removeprefix(SHARDS)
    name, _, columns = text.rpartition(":")
    if name and not Path(text).exists():
        return Path(name), columns
    return Path(text), ""


def _is_folder(spec: str) -> bool:
    path, _ = _path_of(spec)
    return path.is_dir() and not holds_shards(path)


def _tables_beside(path: Path) -> str:
    if not path.parent.is_dir():
        return f" There is no folder {path.parent} either."
    tables = sorted(entry.name for entry in path.parent.iterdir() if is_table(entry))
    return f" Its folder has {', '.join(tables[:5])}." if tables else " Its folder has no table."
