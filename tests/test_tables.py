"""Tables of images and labels, and folders with metadata, are read as they are meant, or one paragraph says why not."""

from __future__ import annotations

import builtins
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from attnsurgery.cli import build_app
from attnsurgery.data import Data, count_files
from attnsurgery.errors import SearchError, UsageError
from attnsurgery.search import run
from tests._searches import change, small_search, write_space
from tests._tables import labels_by_image, load, parts, rows_of, two_classes, write_pictures, write_table

pytestmark = pytest.mark.usefixtures("one_thread")


def notes_of(data: Data) -> str:
    return "\n".join(data.notes)


# Files and columns.


@pytest.mark.parametrize("name", ["labels.csv", "labels.tsv", "labels.jsonl", "Labels.CSV"])
def test_table_is_read(tmp_path: Path, name: str) -> None:
    """Each image has the class of its row, and the three splits are drawn from them."""
    rows = two_classes(tmp_path)
    table = write_table(tmp_path / name, rows)
    data = load(table)
    assert data.describe() == f"{table.stem}: 8 train, 2 validation, 2 test, 2 classes: dark, light"
    assert labels_by_image(data) == {row["image"]: row["label"] for row in rows}
    x_BCHW, labels_B = next(data.val.eval_batches(8, "cpu"))
    assert torch.equal(x_BCHW.mean((1, 2, 3)) > 0.5, labels_B == 1)
    assert count_files(str(table)) == 12


def test_table_of_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = two_classes(tmp_path)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "labels.parquet")
    assert labels_by_image(load(tmp_path / "labels.parquet")) == {row["image"]: row["label"] for row in rows}
    (tmp_path / "other.parquet").write_bytes(b"no table")
    with pytest.raises(SearchError, match=r"other\.parquet is no Parquet file that pyarrow reads"):
        load(tmp_path / "other.parquet")


def test_column_that_holds_images(tmp_path: Path) -> None:
    """Images in the table itself, as the files of Hugging Face have them, are refused."""
    rows = [{"image": {"bytes": "...", "path": None}, "label": "cat"}]
    with pytest.raises(SearchError, match=r"the column 'image' holds images or lists, and not paths"):
        load(write_table(tmp_path / "labels.jsonl", rows))


def test_parquet_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pyarrow, the message has the command that installs it."""
    actual = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return actual(name, *arguments)

    for name in [name for name in sys.modules if name.partition(".")[0] == "pyarrow"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    (tmp_path / "labels.parquet").touch()
    with pytest.raises(UsageError, match=r"pip install 'attnsurgery\[parquet\]'"):
        load(tmp_path / "labels.parquet")


@pytest.mark.parametrize(("delimiter", "encoding"), [(";", "utf-8"), ("\t", "utf-8"), (",", "utf-8-sig")])
def test_table_of_spreadsheets(tmp_path: Path, delimiter: str, encoding: str) -> None:
    """Semicolons, tabs and the mark that Excel puts in front are understood."""
    table = write_table(tmp_path / "labels.csv", two_classes(tmp_path), delimiter, encoding)
    assert load(table).classes == ("dark", "light")


@pytest.mark.parametrize(
    ("image", "label", "columns"),
    [
        ("file_name", "category", ""),
        ("Filepath", "Class", ""),
        ("img", "breed", ":breed"),
        ("photo", "breed", ":photo,breed"),
        ("photo", "label", ":photo"),
        ("path", "breed", ":breed,path"),
    ],
)
def test_columns_are_found(tmp_path: Path, image: str, label: str, columns: str) -> None:
    """Columns are found by their names, or named behind a colon."""
    rows = rows_of(tmp_path / "images", ["dark", "light"] * 6, image, label)
    table = write_table(tmp_path / "labels.csv", [{"index": index, **row} for index, row in enumerate(rows)])
    assert labels_by_image(load(f"{table}{columns}")) == {row[image]: row[label] for row in rows}


def test_columns_of_pandas_and_quotes(tmp_path: Path) -> None:
    """A first column without a name, quoted cells and empty lines do no harm."""
    two_classes(tmp_path)
    lines = [f'{index},"images/{index:02}.png","{"a, dark one" if index % 2 == 0 else "light"}"' for index in range(12)]
    (tmp_path / "labels.csv").write_text("\n".join([",image,label", *lines, "", ""]))
    assert load(tmp_path / "labels.csv").classes == ("a, dark one", "light")


@pytest.mark.parametrize(
    ("names", "order"),
    [(["10", "9", "9", "10"], ("9", "10")), (["b", "a", "a", "b"], ("a", "b")), (["1.0", "0"] * 2, None)],
)
def test_classes_are_in_order(tmp_path: Path, names: list[str], order: tuple[str, ...] | None) -> None:
    """Numbers are in numeric order, names in theirs; JSON numbers are numbers."""
    rows = rows_of(tmp_path / "images", names * 3)
    if order is None:
        assert load(write_table(tmp_path / "labels.csv", rows)).classes == ("0", "1")
        rows = [{**row, "label": float(row["label"])} for row in rows]
    table = write_table(tmp_path / "labels.jsonl", rows)
    assert load(table).classes == (order or ("0", "1"))


# Splits and groups.


def test_split_column(tmp_path: Path) -> None:
    """Splits are called as folders are; unusual names are reported."""
    rows = two_classes(tmp_path, 24)
    names = ["training", "training", "dev", "dev", "test", "test"]
    for index, row in enumerate(rows):
        row["split"] = names[index % 6]
    data = load(write_table(tmp_path / "labels.csv", rows))
    assert parts(data)["val"] == [row["image"] for row in rows if row["split"] == "dev"]
    assert parts(data)["test"] == [row["image"] for row in rows if row["split"] == "test"]
    assert "read as splits: 'dev' is the val split, 'training' is the train split" in notes_of(data)


def test_split_column_of_folds(tmp_path: Path) -> None:
    rows = [{**row, "fold": index % 5} for index, row in enumerate(two_classes(tmp_path))]
    data = load(write_table(tmp_path / "labels.csv", rows))
    assert "not used: column fold, whose numbers are no names of splits" in notes_of(data)
    assert len(data.val) == 2


@pytest.mark.parametrize("task", ["classification", "multilabel"])
def test_group_column(tmp_path: Path, task: str) -> None:
    """Images of one group stay in one split; --group-by goes before it."""
    rows = [{**row, "patient": f"p{index // 4}"} for index, row in enumerate(two_classes(tmp_path, 48))]
    table = write_table(tmp_path / "labels.csv", rows)
    group_of = {row["image"]: row["patient"] for row in rows}
    data = load(table, task)
    groups = [{group_of[name] for name in names} for names in parts(data).values()]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 12
    assert "grouped: 48 images in 12 groups, each in one split" in notes_of(data)
    assert "grouped: 48 images in 5 groups" in notes_of(load(table, task, group_by=r"images/(\d)"))


def test_group_in_two_splits_is_reported(tmp_path: Path) -> None:
    rows = two_classes(tmp_path, 24)
    for index, row in enumerate(rows):
        row |= {"patient": f"p{index // 4 % 3}", "split": "test" if index >= 12 else "train"}
    data = load(write_table(tmp_path / "labels.csv", rows))
    assert "WARNING groups in two splits: 3 groups of the test split are in the training split too (p0)" in notes_of(
        data
    )


# What is left out, and what is refused.


def test_table_notes_what_is_left_out(tmp_path: Path) -> None:
    """Rows without a label or an image, and repeated rows, are left out and counted."""
    rows = two_classes(tmp_path)
    extra = [
        {"image": "images/00.png", "label": "dark"},
        {"image": "", "label": "dark"},
        {"image": "images/02.png", "label": "dark"},
    ]
    rows[3]["label"] = ""
    data = load(write_table(tmp_path / "labels.csv", [*rows, *extra]))
    assert "left out: 1 row without a label (images/03.png is the first)" in notes_of(data)
    assert "left out: 1 row without an image (row 14 is the first)" in notes_of(data)
    assert "left out: 2 rows that repeat another" in notes_of(data)
    assert len(labels_by_image(data)) == 11


def test_table_with_absolute_paths(tmp_path: Path) -> None:
    """Absolute paths inside the table's folder are relative ones; others are reported."""
    folder = tmp_path / "table"
    folder.mkdir()
    inside = [{**row, "image": str(folder / row["image"])} for row in two_classes(folder)]
    data = load(write_table(folder / "labels.csv", inside))
    assert "absolute" not in notes_of(data)
    assert "images/00.png" in labels_by_image(data)
    outside = [{**row, "image": str(tmp_path / row["image"])} for row in two_classes(tmp_path)]
    assert "12 images with absolute paths" in notes_of(load(write_table(folder / "labels.csv", outside)))


def empty(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        row["label"] = ""


def one_class(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        row["label"] = "dark"


def missing(rows: list[dict[str, Any]]) -> None:
    rows[1]["image"] = rows[2]["image"] = "images/none.png"


def two_splits(rows: list[dict[str, Any]]) -> None:
    for index, row in enumerate(rows):
        row["split"] = "test" if index > 7 else "train"
    rows.append({**rows[0], "split": "test"})


def unknown_split(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        row["split"] = "mine"


def same_split(rows: list[dict[str, Any]]) -> None:
    for index, row in enumerate(rows):
        row["split"] = ("train", "val", "dev")[index % 3]


def no_training(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        row["split"] = "test"


def new_class(rows: list[dict[str, Any]]) -> None:
    for index, row in enumerate(rows):
        row["split"] = "test" if index > 7 else "train"
    rows[-1]["label"] = "grey"


def two_labels(rows: list[dict[str, Any]]) -> None:
    rows.append({**rows[0], "label": "light"})


def fractions(rows: list[dict[str, Any]]) -> None:
    for index, row in enumerate(rows):
        row["label"] = index / 4


def two_columns(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        row["category"] = "x"


def no_label(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        row["breed"] = row.pop("label")


def no_image(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        row["photo"] = row.pop("image")


@pytest.mark.parametrize(
    ("spoil", "kind", "message"),
    [
        (empty, SearchError, r"has no image with labels, and none to train on"),
        (one_class, SearchError, r"has images of one class, 'dark', in the column 'label'; at least two"),
        (missing, SearchError, r"names 1 image of 11 that is not there: images/none\.png\. Paths are relative to"),
        (two_splits, SearchError, r"has images/00\.png in two splits, train and test\. Keep one of the rows"),
        (unknown_split, SearchError, r"12 rows of the column 'split' are 'mine', which is no split"),
        (same_split, SearchError, r"'dev', 'val' of the column 'split' all read as the val split"),
        (no_training, SearchError, r"has only images of test with labels, and none to train on"),
        (new_class, SearchError, r"the test split has classes that training does not have: grey"),
        (two_labels, SearchError, r"has images/00\.png in two classes, (dark|light) and (dark|light)"),
        (
            fractions,
            SearchError,
            r"'label' holds numbers that are not whole \(0\.25, 0\.5, 0\.75, 1\.25, 1\.5 and 4 more\)",
        ),
        (two_columns, UsageError, r"has 2 columns of labels, label, category, and an image has one class"),
        (no_label, UsageError, r"has no column label,.*its other columns are breed\. .*labels\.csv:breed"),
        (no_image, UsageError, r"has no column image,.*but label, photo\. .*behind a colon, images first"),
    ],
)
def test_table_that_cannot_be_meant(
    tmp_path: Path, spoil: Callable[[list[dict[str, Any]]], None], kind: type[Exception], message: str
) -> None:
    rows = two_classes(tmp_path)
    spoil(rows)
    with pytest.raises(kind, match=message) as caught:
        load(write_table(tmp_path / "labels.csv", rows))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", r"has no rows"),
        ("a.csv", b"image,label\n", r"has no rows"),
        ("a.csv", b"image,label\n1.png,caf\xe9\n", r"is no UTF-8 text: byte 21 begins no character\. Save it as UTF-8"),
        ("a.csv", b"image,label\n1.png,a,b\n", r"line 2: 3 cells in a table of 2 columns \(image, label\)"),
        ("a.csv", b"image,label,label\n1.png,a,b\n", r"has two columns with the name 'label'"),
        ("a.jsonl", b'{"image": 1}\n{"image"\n', r"line 2: no JSON \("),
        ("a.jsonl", b"[1]\n", r"line 1: no JSON object"),
    ],
)
def test_table_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SearchError, match=message):
        load(tmp_path / name)


def test_table_that_is_not_there(tmp_path: Path) -> None:
    """The tables beside it are named; an unknown column is refused with the nearest one."""
    table = write_table(tmp_path / "labels.csv", two_classes(tmp_path))
    with pytest.raises(UsageError, match=r"there is no table .*label\.csv\. Its folder has labels\.csv\."):
        load(tmp_path / "label.csv")
    with pytest.raises(UsageError, match=r"has no column 'labl'; its other columns are image, label\. Did you mean"):
        load(f"{table}:labl")


def test_fingerprint_of_a_table(tmp_path: Path) -> None:
    """It changes with a label or an image, and not with the order of rows or the name of the table."""
    rows = two_classes(tmp_path)
    before = load(write_table(tmp_path / "labels.csv", rows)).fingerprint
    assert load(write_table(tmp_path / "other.csv", rows[::-1])).fingerprint == before
    rows[0]["label"], rows[1]["label"] = rows[1]["label"], rows[0]["label"]
    assert load(write_table(tmp_path / "labels.csv", rows)).fingerprint != before


# Folders with metadata, as Hugging Face has them.


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_metadata_at_the_root(tmp_path: Path, name: str) -> None:
    rows = rows_of(tmp_path / "photos", ["dark", "light"] * 6, "file_name")
    for row in rows:
        row["file_name"] = row["file_name"].removeprefix("photos/")
    write_table(tmp_path / "photos" / name, rows)
    data = load(tmp_path / "photos")
    assert data.describe() == "photos: 8 train, 2 validation, 2 test, 2 classes: dark, light"
    assert labels_by_image(data) == {row["file_name"]: row["label"] for row in rows}


@pytest.mark.parametrize("at_root", [False, True])
def test_metadata_of_splits(tmp_path: Path, at_root: bool) -> None:
    """Each split has a table, or one table names images in folders of splits."""
    every = []
    for split, count in (("train", 12), ("test", 4)):
        names = write_pictures(tmp_path / split, ["dark", "light"] * (count // 2), first=count)
        rows = [
            {"file_name": name, "breed": label} for name, label in zip(names, ["dark", "light"] * count, strict=False)
        ]
        every += [{**row, "file_name": f"{split}/{row['file_name']}"} for row in rows]
        if not at_root:
            write_table(tmp_path / split / "metadata.csv", rows)
    if at_root:
        write_table(tmp_path / "metadata.csv", every)
    data = load(f"{tmp_path}:breed")
    assert labels_by_image(data) == {row["file_name"]: row["breed"] for row in every}
    assert parts(data)["test"] == [row["file_name"] for row in every if row["file_name"].startswith("test")]


def test_metadata_without_labels(tmp_path: Path) -> None:
    """Beside class folders, a table without labels is reported; without them, the labels are missed."""
    for label in ("dark", "light"):
        write_pictures(tmp_path / label, [label] * 6)
    write_table(tmp_path / "metadata.csv", [{"file_name": "dark/00.png", "text": "a caption"}])
    data = load(tmp_path)
    assert len(labels_by_image(data)) == 12
    assert "not used: the metadata file, which has no column of labels" in notes_of(data)
    write_table(tmp_path / "metadata.csv", [{"photo": "dark/00.png", "label": "dark"}])
    assert len(labels_by_image(load(tmp_path))) == 12
    (tmp_path / "metadata.csv").write_bytes(b"caf\xe9,b\n1,2,3,4\n")
    assert len(labels_by_image(load(tmp_path))) == 12
    captions = tmp_path / "captions"
    (name,) = write_pictures(captions, ["dark"])
    write_table(captions / "metadata.csv", [{"file_name": name, "text": "a caption"}])
    with pytest.raises(UsageError, match=r"metadata\.csv has no column label,"):
        load(captions)


def test_metadata_that_is_ambiguous(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "val", ["dark", "light"] * 3, "file_name")
    for folder in ("val", "valid"):
        (tmp_path / folder).mkdir(exist_ok=True)
        write_table(tmp_path / folder / "metadata.csv", rows)
    with pytest.raises(SearchError, match=r"has val/ and valid/, which both read as the val split"):
        load(tmp_path)
    write_table(tmp_path / "val" / "metadata.jsonl", rows)
    with pytest.raises(SearchError, match=r"val has metadata\.csv, metadata\.jsonl\. Keep one of them"):
        load(tmp_path)


# Searches.


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["table", "metadata"])
def test_search_on_a_table(tmp_path: Path, kind: str) -> None:
    """A dry run and a search accept the data; the winner and the report name its classes."""
    rows = two_classes(tmp_path, 40)
    spec = write_table(tmp_path / "labels.csv", rows)
    if kind == "metadata":
        spec.rename(tmp_path / "metadata.csv")
        (tmp_path / "metadata.csv").write_text(
            (tmp_path / "metadata.csv").read_text().replace("image,label", "file_name,label")
        )
        spec = tmp_path
    space = write_space(tmp_path)
    command = ["search", "--space", str(space), "--data", str(spec), "--budget-ms", "100", "--dry-run", "--device"]
    result = CliRunner().invoke(build_app(), [*command, "cpu", "--latency", "fixed", "--input-size", "32"])
    assert result.exit_code == 0, result.output
    outcome = run(change(small_search(spec, space, tmp_path / "run"), trials=1, class_weights="balanced"))
    assert outcome.about.data.endswith("2 classes: dark, light")
    saved = json.loads((outcome.folder / "best" / "config.json").read_text())
    assert saved["pretrained_cfg"]["label_names"] == ["dark", "light"]
    assert "2 classes: dark, light" in (outcome.folder / "report.html").read_text()
