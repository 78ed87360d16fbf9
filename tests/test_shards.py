"""Shards of webdataset: images and labels in .tar files."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from attnsurgery.cli import build_app
from attnsurgery.data import count_files
from attnsurgery.data.shards import _index
from attnsurgery.errors import SearchError, UsageError
from attnsurgery.search import run
from tests._searches import change, small_search, write_space
from tests._tables import (
    encoded,
    labels_by_image,
    load,
    parts,
    picture,
    samples,
    write_pictures,
    write_shard,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("ending", ["cls", "json"])
def test_shards_are_read(tmp_path: Path, ending: str) -> None:
    """Each image has the class beside it, from whichever shard; images are those that were written."""
    folder = tmp_path / "photos"
    for shard in range(2):
        write_shard(folder / f"{shard:04}.tar", samples(["dark", "light"] * 4, first=8 * shard, ending=ending))
    data = load(folder)
    assert data.describe() == "photos: 8 train, 4 validation, 4 test, 2 classes: dark, light"
    expected = {f"{index // 8:04}.tar/{index:03}.png": ("dark", "light")[index % 2] for index in range(16)}
    assert labels_by_image(data) == expected
    for part in (data.train, data.val, data.test):
        x_BCHW, labels_B = next(part.eval_batches(64, "cpu"))
        assert ((x_BCHW.mean((1, 2, 3)) > 0.5) == (labels_B == 1)).all()
    assert count_files(str(folder)) == 16
    assert labels_by_image(load(f"wds/{folder}")) == expected


def test_shards_of_splits(tmp_path: Path) -> None:
    """The names of shards, or of their folders, say their splits; classes may be numbers."""
    for name, first in (("set-train-0000", 0), ("set-train-0001", 12), ("set-val-0000", 24)):
        write_shard(tmp_path / f"{name}.tar", samples(["10", "9"] * 6, first))
    data = load(tmp_path)
    assert data.classes == ("9", "10")
    assert {name.partition("/")[0] for name in parts(data)["val"]} == {"set-val-0000.tar"}
    assert {name.partition("/")[0] for name in parts(data)["train"]} == {"set-train-0000.tar", "set-train-0001.tar"}
    for name in ("training", "test"):
        write_shard(tmp_path / "folders" / name / "0000.tar", samples(["10", "9"] * 6))
    data = load(tmp_path / "folders")
    assert {name.partition("/")[0] for name in parts(data)["test"]} == {"test"}
    assert "read as splits: training* is the train split" in data.notes


def test_shard_of_class_folders(tmp_path: Path) -> None:
    """A .tar file of an image folder is read as that, also with splits and a folder around them."""
    members = {f"{label}/{index}.png": encoded(index, level) for label, level in (("dark", 0), ("light", 160))
               for index in range(6)}  # fmt: skip
    data = load(write_shard(tmp_path / "photos.tar", members))
    assert data.describe().startswith("photos: ")
    assert labels_by_image(data) == {f"photos.tar/{name}": name.partition("/")[0] for name in members}
    split = {f"photos/{part}/{name}": content for part in ("train", "test") for name, content in members.items()}
    data = load(write_shard(tmp_path / "split.tar", split))
    assert data.classes == ("dark", "light")
    assert all("/photos/test/" in name for name in parts(data)["test"])
    assert len(data.test) == 12


def test_shards_beside_images(tmp_path: Path) -> None:
    """An image folder stays one, whatever archives lie in it; wds/ asks for the shards."""
    write_shard(tmp_path / "backup.tar", samples(["grey", "dark"] * 6))
    for label in ("dark", "light"):
        write_pictures(tmp_path / label, [label] * 6)
    assert load(tmp_path).classes == ("dark", "light")
    assert load(f"wds/{tmp_path}").classes == ("dark", "grey")


def test_shards_note_what_is_left_out(tmp_path: Path) -> None:
    members = samples(["dark", "light"] * 6) | {"x.cls": b"dark", "000.txt": b"a caption", "000.mask.png": b"mask"}
    members |= {"._000.png": b"of macOS", "lonely.png": encoded(50, 0)}
    data = load(write_shard(tmp_path / "0.tar", members))
    notes = "\n".join(data.notes)
    assert "left out: 1 label without an image" in notes
    assert "not read in shards: 1 .txt, 1 .mask.png" in notes
    assert "left out: 1 row without a label (0.tar/lonely.png is the first)" in notes
    assert len(labels_by_image(data)) == 12


def test_json_with_several_fields(tmp_path: Path) -> None:
    """A field is named behind a colon, or has a usual name."""
    members = {}
    for index in range(12):
        label = ("dark", "light")[index % 2]
        members[f"a/{index}.png"] = encoded(index, 160 * (index % 2))
        members[f"a/{index}.json"] = json.dumps({"breed": label, "width": 24}).encode()
    path = write_shard(tmp_path / "0.tar", members)
    assert load(f"{path}:breed").classes == ("dark", "light")
    with pytest.raises(UsageError, match=r"has no column label,.*its other columns are breed, width\."):
        load(path)
    members["a/0.json"] = b"{"
    with pytest.raises(SearchError, match=r"0\.tar: the \.json of a/0\.png is no JSON"):
        load(write_shard(tmp_path / "0.tar", members))


def test_shards_that_cannot_be_meant(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no such file or folder of \.tar files"):
        load(f"wds/{tmp_path / 'none'}")
    with pytest.raises(UsageError, match=r"the folder holds no \.tar file"):
        load(f"wds/{tmp_path}")
    path = write_shard(tmp_path / "train-0.tar", samples(["dark", "light"] * 3))
    write_shard(tmp_path / "more.tar", samples(["dark", "light"] * 3, 6))
    with pytest.raises(SearchError, match=r"such as train-0\.tar, and others without: more\.tar\. Call them"):
        load(tmp_path)
    content = path.read_bytes()
    path.write_bytes(gzip.compress(content))
    with pytest.raises(SearchError, match=r"train-0\.tar as a \.tar file: .*It is compressed: unpack it"):
        load(path)
    path.write_bytes(content[: len(content) // 3])
    with pytest.raises(SearchError, match=r"cannot read .*train-0\.tar as a \.tar file"):
        load(path)
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "0.tar.gz").write_bytes(gzip.compress(content))
    with pytest.raises(UsageError, match=r"0\.tar\.gz is compressed, and its images cannot be read at random"):
        load(f"wds/{tmp_path / 'packed'}")
    unlabelled = {f"{index}.png": encoded(index, 0) for index in range(4)}
    with pytest.raises(SearchError, match=r"images without labels and outside of class folders"):
        load(write_shard(tmp_path / "unlabelled.tar", unlabelled))
    two = samples(["dark", "light"] * 3) | {"000.jpg": encoded(0, 0)}
    with pytest.raises(SearchError, match=r"two\.tar has 000\.png, 000\.jpg, and one image should belong to a label"):
        load(write_shard(tmp_path / "two.tar", two))
    with pytest.raises(SearchError, match=r"text\.tar holds no image; its shards hold 1 \.txt"):
        load(write_shard(tmp_path / "text.tar", {"000.txt": b"a"}))


def test_damaged_image_in_a_shard(tmp_path: Path) -> None:
    members = samples(["dark", "light"] * 6)
    members["003.png"] = members["003.png"][:100]
    with pytest.raises(SearchError, match=r"1 of \d+ images cannot be read: 0\.tar/003\.png"):
        load(write_shard(tmp_path / "0.tar", members))


def test_copies_in_shards_are_found(tmp_path: Path) -> None:
    train = samples(["dark", "light"] * 6)
    write_shard(tmp_path / "train.tar", train)
    write_shard(tmp_path / "test.tar", samples(["dark", "light"] * 3, 20) | {"020.png": train["000.png"]})
    assert "1 of 6 test images are also among the training images (test.tar/020.png is train.tar/000.png)" in "\n".join(
        load(tmp_path).notes
    )


def test_deep_image_in_a_shard(tmp_path: Path) -> None:
    """16-bit images have the same range whether or not images are checked first, as in workers."""
    members = samples(["dark", "light"] * 6)
    for index in range(12):
        file = io.BytesIO()
        Image.fromarray(np.asarray(picture(index, 0).convert("L")).astype(np.uint16) * 8).save(file, "PNG")
        members[f"{index:03}.png"] = file.getvalue()
    path = write_shard(tmp_path / "0.tar", members)
    checked, unchecked = load(path), load(path, check=False)
    assert any("scaled to 8 bits" in note for note in checked.notes)
    assert torch.equal(next(checked.val.eval_batches(8, "cpu"))[0], next(unchecked.val.eval_batches(8, "cpu"))[0])


def test_shards_larger_than_memory(tmp_path: Path) -> None:
    """Worker processes read the same images as this one."""
    path = write_shard(tmp_path / "0.tar", samples(["dark", "light"] * 6))
    small, large = load(path), load(path, memory_bytes=0, workers=1)
    assert torch.equal(next(small.val.eval_batches(8, "cpu"))[0], next(large.val.eval_batches(8, "cpu"))[0])


def test_fingerprint_of_shards(tmp_path: Path) -> None:
    """It changes with a byte of an image and with a label, and not with the place of the shards."""
    members = samples(["dark", "light"] * 6)
    before = load(write_shard(tmp_path / "a" / "0.tar", members)).fingerprint
    assert load(write_shard(tmp_path / "b" / "0.tar", members)).fingerprint == before
    other = members | {"000.png": encoded(99, 0)}
    assert load(write_shard(tmp_path / "c" / "0.tar", other)).fingerprint != before
    swapped = members | {"000.cls": b"light", "001.cls": b"dark"}
    assert load(write_shard(tmp_path / "d" / "0.tar", swapped)).fingerprint != before


def test_shard_is_indexed_once(tmp_path: Path) -> None:
    """A changed shard is indexed again."""
    path = write_shard(tmp_path / "0.tar", samples(["dark", "light"] * 6))
    _index.cache_clear()
    load(path)
    load(path)
    assert _index.cache_info().misses == 1
    write_shard(path, samples(["grey", "light"] * 8))
    assert load(path).classes == ("grey", "light")


@pytest.mark.slow
def test_search_on_shards(tmp_path: Path) -> None:
    """A dry run and a search accept shards, in workers too; the winner names its classes."""
    folder = tmp_path / "photos"
    for shard in range(2):
        write_shard(folder / f"{shard:04}.tar", samples(["dark", "light"] * 10, first=20 * shard))
    space = write_space(tmp_path)
    command = ["search", "--space", str(space), "--data", str(folder), "--budget-ms", "100", "--dry-run", "--device"]
    result = CliRunner().invoke(build_app(), [*command, "cpu", "--latency", "fixed", "--input-size", "32"])
    assert result.exit_code == 0, result.output
    outcome = run(change(small_search(folder, space, tmp_path / "run"), trials=1, workers=1))
    assert outcome.about.data.endswith("2 classes: dark, light")
    saved = json.loads((outcome.folder / "best" / "config.json").read_text())
    assert saved["pretrained_cfg"]["label_names"] == ["dark", "light"]
