"""Reads the rows of a table: CSV, TSV, JSON lines or Parquet."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attnsurgery.errors import SearchError, UsageError

ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet")
"""Endings of files that are read as tables, in lower case."""
_DELIMITERS = (",", ";", "\t")

Row = Mapping[str, Any]
"""The cells of a row by the names of their columns; None or '' where a cell is empty."""


def is_table(path: Path) -> bool:
    """Whether a file of this name is read as a table."""
    return path.suffix.lower() in ENDINGS and path.is_file()


def read_rows(path: Path) -> list[Row]:
    """All rows of a table, in its order.

    Raises:
        UsageError: the package that reads Parquet is missing.
        SearchError: the file cannot be read, has no rows, or is no such table.
    """
    ending = path.suffix.lower()
    try:
        if ending == ".parquet":
            rows = _parquet(path)
        else:
            text = path.read_text(encoding="utf-8-sig")
            rows = _json_lines(path, text) if ending == ".jsonl" else _separated(path, text, ending == ".tsv")
    except UnicodeDecodeError as error:
        raise SearchError(
            f"{path} is no UTF-8 text: byte {error.start:,} begins no character. Save it as UTF-8."
        ) from None
    except OSError as error:
        raise SearchError(f"cannot read {path}: {error.strerror or error}.") from None
    if not rows:
        raise SearchError(f"{path} has no rows. A table has a row for each image, below the names of its columns.")
    return rows


def _separated(path: Path, text: str, by_tab: bool) -> list[Row]:
    """The rows of a CSV or TSV file.

    Raises:
        SearchError: a column has no name or that of another, or a row has more cells than there are columns.
    """
    delimiter = "\t" if by_tab else _delimiter(text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    rows: list[Row] = []
    header: list[str] = []
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if not header:
                header = _header(path, cells)
            elif any(cell.strip() for cell in cells[len(header) :]):
                raise SearchError(
                    f"{path}, line {reader.line_num}: {len(cells)} cells in a table of {len(header)} columns "
                    f"({', '.join(header)}). Put cells that contain {delimiter!r} into double quotes."
                )
            else:
                padded = [*cells, *[""] * len(header)]
                rows.append(dict(zip(header, padded, strict=False)))
    except csv.Error as error:
        raise SearchError(f"{path}, line {reader.line_num}: {error}.") from None
    return rows


def _delimiter(text: str) -> str:
    """The character that divides the first line into most cells; a comma if there is one column."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    return max(_DELIMITERS, key=lambda delimiter: len(next(csv.reader([first], delimiter=delimiter), [])))


def _header(path: Path, cells: Sequence[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    while names and not names[-1]:
        names.pop()
    if repeated := sorted({name for name in names if names.count(name) > 1 and name}):
        raise SearchError(f"{path} has two columns with the name {repeated[0]!r}. Rename one of them.")
    return [name or f"column {index + 1}" for index, name in enumerate(names)]  # such as the index that pandas writes


def _json_lines(path: Path, text: str) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise SearchError(f"{path}, line {number}: no JSON ({error}). Each line is an object of its own.") from None
        if not isinstance(row, dict):
            raise SearchError(f"{path}, line {number}: no JSON object, such as {{'image': '1.jpg', 'label': 'cat'}}.")
        rows.append(row)
    return rows


def _parquet(path: Path) -> list[Row]:
    try:
        import pyarrow  # type: ignore[import-not-found, import-untyped, unused-ignore]
        from pyarrow import parquet  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        raise UsageError(
            f"--data {path}: Parquet needs a package that is not installed:  pip install 'attnsurgery[parquet]'"
        ) from None
    try:
        rows: list[Row] = parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise SearchError(f"{path} is no Parquet file that pyarrow reads: {str(error).splitlines()[0]}") from None
    return rows
