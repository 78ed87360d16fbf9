"""Image folders as people have them are read as they are meant, or the first lines say what was left out."""

from __future__ import annotations

import io
import json
import re
import shlex
import struct
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageDraw
from rich.console import Console
from safetensors.torch import load_file, save_file
from timm.models._hub import save_config_for_hf
from torch import nn
from typer.testing import CliRunner

from attnsurgery.cli import build_app
from attnsurgery.cli._search_view import LiveView
from attnsurgery.cli.search import command_of
from attnsurgery.data import Data, Preprocessing, load_data
from attnsurgery.data.folder import read_folder, readable, role_of
from attnsurgery.data.picture import Depth, Rendering
from attnsurgery.data.source import decode
from attnsurgery.errors import SearchError, UsageError
from attnsurgery.evaluate import EVALUATORS, TrainSettings
from attnsurgery.search import SearchConfig
from attnsurgery.search.compatibility import check_same
from attnsurgery.search.coordinator import start
from attnsurgery.search.execution.assemble import assemble
from attnsurgery.search.execution.baseline import starting_weights
from attnsurgery.search.execution.bench import Bench
from attnsurgery.search.execution.pretrained_base import can_reorder, check_head, label_names, reorder, resolve_base
from attnsurgery.search.listener import Listener
from attnsurgery.search.watching import Watching
from attnsurgery.search.workers.launch import LAUNCHERS
from attnsurgery.tasks.classification import Classification
from attnsurgery.timm_plugin.architectures import for_images
from tests._searches import small_search, write_images, write_space

SMALL = Preprocessing((3, 16, 16), mean=(0.0,) * 3, std=(1.0,) * 3)
"""Pixels come out as 0 to 1."""

Draw = Callable[[int], Image.Image]


def noise(index: int, level: int = 0, size: int = 24) -> Image.Image:
    pixels = np.random.default_rng([index, level]).integers(0, 90, (size, size, 3)) + level
    return Image.fromarray(pixels.astype(np.uint8))


def write(
    folder: Path, count: int, level: int = 0, ending: str = ".png", first: int = 0, draw: Draw | None = None
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(first, first + count):
        image = draw(index) if draw else noise(index, level)
        image.save(folder / f"{index}{ending}")


def two_classes(root: Path, count: int = 6, **how: object) -> Path:
    write(root / "cat", count, 0, **how)  # type: ignore[arg-type]
    write(root / "dog", count, 160, **how)  # type: ignore[arg-type]
    return root


def notes_of(data: Data) -> str:
    return "\n".join(data.notes)


# Which files are images.


@pytest.mark.parametrize("ending", [".webp", ".bmp", ".tif", ".JPG", ".jp2", ".gif"])
@pytest.mark.slow
def test_images_of_every_pil_suffix_are_read(tmp_path: Path, ending: str) -> None:
    """Images of every suffix that PIL reads are used, also beside others and in capitals."""
    if ending.lower() not in readable():
        pytest.skip(f"this PIL does not read {ending}")
    two_classes(tmp_path, ending=".jpg")
    two_classes(tmp_path, ending=ending, first=6) if ending != ".JPG" else two_classes(tmp_path, ending=ending)
    data = load_data(str(tmp_path), SMALL)
    assert len(data.train) + len(data.val) + len(data.test) == 24


def test_files_without_image_count_by_suffix(tmp_path: Path) -> None:
    """Files that are no images are counted by their suffix."""
    two_classes(tmp_path)
    (tmp_path / "cat" / "labels.txt").write_text("cat")
    (tmp_path / "dog" / "photo.heic").write_bytes(b"ftypheic")
    (tmp_path / "dog" / "other.heic").write_bytes(b"ftypheic")
    assert "not read as images: 2 .heic, 1 .txt" in notes_of(load_data(str(tmp_path), SMALL))


def test_class_of_unreadable_kinds_refused(tmp_path: Path) -> None:
    """A class that holds only photos of kinds that PIL cannot read is refused."""
    two_classes(tmp_path)
    (tmp_path / "bird").mkdir()
    (tmp_path / "bird" / "1.heic").write_bytes(b"ftypheic")
    with pytest.raises(SearchError, match=r"bird holds 1 image of kinds that PIL does not read here \(\.heic\)"):
        load_data(str(tmp_path), SMALL)


def test_folders_of_systems_are_left_out(tmp_path: Path) -> None:
    """.ipynb_checkpoints, __MACOSX and hidden files inside a class are left out, and counted."""
    two_classes(tmp_path)
    write(tmp_path / "cat" / ".ipynb_checkpoints", 2)
    write(tmp_path / "cat" / "__MACOSX", 2)
    write(tmp_path / "__MACOSX", 2)
    noise(0).save(tmp_path / "dog" / "._1.png")
    data = load_data(str(tmp_path), SMALL)
    assert data.classes == ("cat", "dog")
    assert len(data.train) + len(data.val) + len(data.test) == 12
    assert "left out: 4 hidden files or folders" in notes_of(data)


def test_hidden_folder_is_no_class(tmp_path: Path) -> None:
    """A hidden folder beside the classes, as notebooks leave behind, is no class and shifts no label."""
    two_classes(tmp_path)
    write(tmp_path / ".ipynb_checkpoints", 4)
    assert load_data(str(tmp_path), SMALL).classes == ("cat", "dog")


def test_empty_class_loose_images_are_named(tmp_path: Path) -> None:
    """An empty class, and images outside of any class, are named."""
    two_classes(tmp_path)
    (tmp_path / "bird").mkdir()
    noise(0).save(tmp_path / "loose.png")
    text = notes_of(load_data(str(tmp_path), SMALL))
    assert "not used: 1 image in no class folder (loose.png is the first)" in text
    assert f"no images in: {tmp_path.name}/bird/" in text


def test_circular_link_is_followed_once(tmp_path: Path) -> None:
    """A link that leads in a circle is followed once."""
    two_classes(tmp_path / "real")
    (tmp_path / "data").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "real" / name)
    (tmp_path / "real" / "cat" / "up").symlink_to(tmp_path / "real" / "cat")
    data = load_data(str(tmp_path / "data"), SMALL)
    assert len(data.train) + len(data.val) + len(data.test) == 12


# Which folders are splits.


@pytest.mark.parametrize(
    ("name", "role"),
    [
        *(("train_set", "train"), ("Training Set", "train"), ("TRAIN", "train"), ("trainData", "train")),
        *(("val_set", "val"), ("vali", "val"), ("Validation", "val"), ("val2017", "val"), ("valid", "val")),
        *(
            ("test_set", "test"),
            ("test-images", "test"),
            ("hold_out", "test"),
            ("holdout", "test"),
            ("testing", "test"),
        ),
        *(("cat", None), ("trains", None), ("valley", None), ("attest", None), ("invalid", None), ("set", None)),
    ],
)
def test_split_names_have_many_spellings(name: str, role: str | None) -> None:
    """Splits are recognised by many spellings of their names."""
    assert role_of(name) == role


@pytest.mark.parametrize(
    "names", [("train_set", "val_set", "test_set"), ("Training Set", "Validation Set", "Test Set")]
)
def test_splits_of_other_spelling_recognised(tmp_path: Path, names: tuple[str, ...]) -> None:
    """Folders such as "Training Set" are splits and no classes."""
    for first, name in enumerate(names):
        two_classes(tmp_path / name, first=100 * first)
    data = load_data(str(tmp_path), SMALL)
    assert data.classes == ("cat", "dog")
    assert {image.partition("/")[0] for image in data.test.ids} == {names[2]}
    assert f"{names[0]}/ is the train split" in notes_of(data)


def test_splits_of_unknown_names_are_refused(tmp_path: Path) -> None:
    """Folders of unknown names that hold folders of the same names are refused, and not read as classes."""
    for name in ("part_a", "part_b"):
        two_classes(tmp_path / name)
    with pytest.raises(SearchError, match=r"\(part_a, part_b\) hold folders of the same names \(cat, dog\)"):
        load_data(str(tmp_path), SMALL)


def test_classes_with_inner_folder_are_read(tmp_path: Path) -> None:
    """Classes with one inner folder, as in Tiny ImageNet's CLASS/images/, are read."""
    write(tmp_path / "cat" / "images", 6)
    write(tmp_path / "dog" / "images", 6, 160)
    assert load_data(str(tmp_path), SMALL).classes == ("cat", "dog")


def test_folders_beside_splits_are_named(tmp_path: Path) -> None:
    """Folders beside the splits, and a split without classes, are named as unused."""
    two_classes(tmp_path / "train")
    two_classes(tmp_path / "old", first=50)
    write(tmp_path / "test", 5, first=90)
    text = notes_of(load_data(str(tmp_path), SMALL))
    assert "not used: old/ with 12 images" in text
    assert "not used: test/ with 5 images, which lie in no class folders" in text


@pytest.mark.parametrize(("one", "other"), [("val", "valid"), ("holdout", "test"), ("train", "train_set")])
def test_split_of_two_folders_is_refused(tmp_path: Path, one: str, other: str) -> None:
    """Two folders that both read as one split are refused."""
    for first, name in enumerate(dict.fromkeys(["train", one, other])):
        two_classes(tmp_path / name, first=50 * first)
    with pytest.raises(SearchError, match=rf"has {one}/ and {other}/, which both read as"):
        load_data(str(tmp_path), SMALL)


def test_class_may_be_called_train(tmp_path: Path) -> None:
    """A class may be called "train" where no other folder is a split."""
    for level, name in ((0, "bus"), (80, "car"), (160, "train")):
        write(tmp_path / name, 6, level)
    assert read_folder(tmp_path).classes == ("bus", "car", "train")


def test_folder_above_data_names_it(tmp_path: Path) -> None:
    """The folder above the data set is refused with the one that is meant."""
    two_classes(tmp_path / "archive")
    with pytest.raises(SearchError, match=rf"holds 1 class with images .* Did you mean {tmp_path}/archive\?"):
        load_data(str(tmp_path), SMALL)


@pytest.mark.slow
def test_describe_names_the_classes(tmp_path: Path) -> None:
    """The description names the classes, and counts those beyond the first ten."""
    assert load_data(str(two_classes(tmp_path)), SMALL).describe().endswith("2 classes: cat, dog")
    for number in range(40):
        write(tmp_path / f"species_{number:02d}", 3, number)
    assert load_data(str(tmp_path), SMALL).describe().endswith("species_09 and 30 more")


# Pixels as their owner sees them.


def pixels(image: Image.Image, rendering: Rendering | None = None) -> np.ndarray:  # type: ignore[type-arg]
    return np.asarray((rendering or Rendering())(image))


@pytest.mark.parametrize("memory_bytes", [2**30, 0])
def test_16_bit_pixels_are_scaled_not_cut(tmp_path: Path, memory_bytes: int) -> None:
    """Pixels of 16 bits are scaled to 8, and not cut off at 255."""
    for name, low in (("cat", 0), ("dog", 2000)):
        draw = lambda index, low=low: Image.fromarray(  # noqa: E731
            np.random.default_rng(index).integers(low, low + 2000, (24, 24)).astype(np.uint16)
        )
        write(tmp_path / name, 6, draw=draw)
    data = load_data(str(tmp_path), SMALL, memory_bytes=memory_bytes, workers=0)
    for split in (data.train, data.val):
        for x, y in split.eval_batches(64, "cpu"):
            levels = x.flatten(1).mean(dim=1)
            assert (x >= 1.0).float().mean() < 0.01
            assert torch.allclose(levels, torch.where(y == 0, 1000 / 4095, 3000 / 4095), atol=0.03)
    assert "scaled to 8 bits: all images of whole numbers, 0 to 4095 becoming 0 to 255" in notes_of(data)


def test_16_bit_scale_is_same_without_check(tmp_path: Path) -> None:
    """A worker that does not check all images scales them in the same way."""
    write(tmp_path / "cat", 6, draw=lambda n: Image.fromarray(np.full((8, 8), n, np.uint16)))
    write(tmp_path / "dog", 6, draw=lambda n: Image.fromarray(np.full((8, 8), 9000 + n, np.uint16)))
    one, other = (load_data(str(tmp_path), SMALL, check=check) for check in (True, False))
    assert torch.equal(next(one.val.eval_batches(9, "cpu"))[0], next(other.val.eval_batches(9, "cpu"))[0])


@pytest.mark.parametrize(
    ("values", "depth"),
    [
        ([(0, 200)], Depth(0, 255)),
        ([(5, 256), (0, 9)], Depth(0, 511)),
        ([(3, 4095)], Depth(0, 4095)),
        ([(3, 65535)], Depth(0, 65535)),
        ([(-1000, 3071)], Depth(-1000, 3071)),
    ],
)
def test_depth_is_range_of_bits_in_use(values: list[tuple[int, int]], depth: Depth) -> None:
    """The range of pixels is that of the bits in use; the last case is a CT image in Hounsfield units."""
    assert Depth.over(Depth(*pair) for pair in values) == depth


@pytest.mark.parametrize("values", [[0.0, 0.5, 1.0], [0.0, 127.5, 255.0], [-1.0, 0.0, 1.0], [0.0, 4e4, 8e4]])
def test_float_pixels_are_scaled(values: list[float]) -> None:
    """Floating-point pixels are scaled to 0..255."""
    image = Image.fromarray(np.array([values], np.float32))
    assert image.mode == "F"
    assert pixels(image, Rendering("L")).tolist() == [[0, 128, 255]]


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bit_tiff_in_either_byte_order(tmp_path: Path, order: str) -> None:
    """A TIFF file states the order of its bytes, which PIL reads as I;16 or I;16B; both are scaled alike."""
    tags = {
        256: (2, 1),
        257: (1, 1),
        258: (16, 1),
        259: (1, 1),
        262: (1, 1),
        273: (0, 1),
        277: (1, 1),
        278: (1, 1),
        279: (4, 1),
    }
    head = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8) + struct.pack(f"{order}H", len(tags))
    tags[273] = (8 + 2 + 12 * len(tags) + 4, 1)
    for tag, (value, count) in tags.items():
        head += struct.pack(f"{order}HHII", tag, 4, count, value)
    (tmp_path / "deep.tif").write_bytes(head + bytes(4) + struct.pack(f"{order}2H", 0, 32768))
    image = decode(tmp_path / "deep.tif")
    assert image.mode.startswith("I;16")
    assert pixels(image, Rendering("L", Depth(0, 65535))).tolist() == [[0, 128]]


def test_32_bit_pixels_are_scaled() -> None:
    """Pixels of 32-bit numbers are scaled to 0..255."""
    image = Image.fromarray(np.array([[0, 2**15, 2**16 - 1]], np.int32))
    assert image.mode == "I"
    assert pixels(image, Rendering("L", Depth(0, 65535))).tolist() == [[0, 128, 255]]


def test_nan_and_infinite_pixels_are_black() -> None:
    """A pixel that is NaN or infinite is black."""
    image = Image.fromarray(np.array([[np.nan, 1.0, 0.0, np.inf]], np.float32))
    assert pixels(image, Rendering("L")).tolist() == [[0, 255, 0, 255]]


def photo_with_exif(orientation: int) -> Image.Image:
    """An upright image, red in its left half, as a camera stores it: rotated, with its EXIF orientation."""
    image = Image.new("RGB", (40, 20), "blue")
    ImageDraw.Draw(image).rectangle((0, 0, 19, 19), fill="red")
    back = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    return image if back is None else image.transpose(back)


@pytest.mark.parametrize("ending", ["jpeg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(ending: str, orientation: int) -> None:
    """A photo is turned upright by the orientation of its EXIF data."""
    stored, file = photo_with_exif(orientation), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(file, ending, exif=exif, **({"quality": 95} if ending != "tiff" else {}))
    image = decode(file).convert("RGB")
    assert image.size == (40, 20)
    (red, _, no_blue), (no_red, _, blue) = image.getpixel((5, 10)), image.getpixel((34, 10))  # type: ignore[misc]
    assert min(red, blue) > 200
    assert max(no_red, no_blue) < 60


def test_exif_orientation_is_counted(tmp_path: Path) -> None:
    """Photos that were turned upright are counted."""
    two_classes(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("cat", "dog"):
        noise(7).save(tmp_path / name / "phone.jpg", exif=exif)
    assert "turned upright: 2 images, as their EXIF data says" in notes_of(load_data(str(tmp_path), SMALL))


@pytest.mark.filterwarnings("ignore")
def test_exif_damage_costs_no_image(tmp_path: Path) -> None:
    """Damaged EXIF data loses no image."""
    file = io.BytesIO()
    noise(0).save(file, "jpeg", exif=b"Exif\0\0MM\0*\0\0\0\xff broken")
    assert decode(file).size == (24, 24)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("CMYK", (1, 1), (255, 0, 0, 0)), (0, 255, 255)),
        (Image.new("LA", (1, 1), (0, 0)), (255, 255, 255)),
        (Image.new("LA", (1, 1), (90, 255)), (90, 90, 90)),
        (Image.new("RGBA", (1, 1), (0, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (1, 1), (200, 0, 0, 255)), (200, 0, 0)),
        (Image.new("1", (1, 1), 1), (255, 255, 255)),
        (Image.new("RGB", (1, 1), (1, 2, 3)), (1, 2, 3)),
    ],
)
def test_pixels_are_colours_as_displayed(image: Image.Image, expected: tuple[int, ...]) -> None:
    """Transparent pixels lie on white, and CMYK is converted as ink."""
    assert tuple(pixels(image)[0, 0]) == expected


def test_pixels_of_transparent_palette(tmp_path: Path) -> None:
    """The transparent colour of a palette becomes white."""
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 10, 200, 30])
    image.putdata([0, 1])
    image.save(tmp_path / "p.png", transparency=0)
    assert pixels(decode(tmp_path / "p.png")).tolist() == [[[255, 255, 255], [10, 200, 30]]]


def test_image_mode_follows_channels() -> None:
    """One, three and four channels have the modes L, RGB and RGBA; other numbers are refused."""
    assert [Preprocessing((channels, 8, 8)).image_mode for channels in (1, 3, 4)] == ["L", "RGB", "RGBA"]
    with pytest.raises(SearchError, match="the model takes 12 channels"):
        load_data("digits", Preprocessing((12, 8, 8)))


# Copies, and images that belong together.


def test_split_copied_from_training_is_named(tmp_path: Path) -> None:
    """Test images that are also training images are counted and named."""
    for part in ("train", "test"):
        two_classes(tmp_path / part)
    data = load_data(str(tmp_path), SMALL)
    assert data.shared is not None
    text = "the same byte for byte: 10 of 12 test images are also among the training images (test/cat/"
    assert text in notes_of(data)
    assert "2 of 12 test images are also among the validation images" in notes_of(data), "held out of training"


def test_disjoint_splits_share_nothing(tmp_path: Path) -> None:
    """Splits that share no image have no note on shared images."""
    for first, part in ((0, "train"), (50, "test")):
        two_classes(tmp_path / part, first=first)
    assert load_data(str(tmp_path), SMALL).shared == ()


def photo(index: int) -> Image.Image:
    """Smooth noise, which has shapes as a photo has."""
    small = Image.fromarray(np.random.default_rng(index).integers(0, 255, (6, 6, 3)).astype(np.uint8))
    return small.resize((64, 64), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("change", ["compressed", "smaller", "brighter"])
@pytest.mark.slow
def test_near_copies_are_found(tmp_path: Path, change: str) -> None:
    """Images that were made smaller, brighter or compressed again are found as copies."""
    for name, first in (("cat", 0), ("dog", 100)):
        write(tmp_path / "train" / name, 6, first=first, draw=photo)
        write(tmp_path / "val" / name, 3, first=first + 30, draw=photo)
        write(tmp_path / "test" / name, 3, first=first + 50, draw=photo)
        again = photo(first)
        if change == "smaller":
            again = again.resize((40, 40))
        if change == "brighter":
            again = again.point(lambda value: min(255, value + 4))
        again.save(tmp_path / "test" / name / "again.jpg", quality=60)
    notes = notes_of(load_data(str(tmp_path), SMALL))
    assert "the same but for small differences: 2 of 8 test images are also among the training images" in notes


@pytest.mark.parametrize(("side", "pixels"), [(64, 1), (224, 4)])
@pytest.mark.slow
def test_shifted_copies_are_found(tmp_path: Path, side: int, pixels: int) -> None:
    """Shifted copies of an image in several splits, which score 100 % with random labels, are found."""

    def shifted(index: int) -> Image.Image:
        small = np.random.default_rng(index // 6).integers(0, 255, (6, 6, 3)).astype(np.uint8)
        whole = Image.fromarray(small).resize((side + 40, side + 40), Image.Resampling.BICUBIC)
        start = pixels * (index % 6)
        return whole.crop((start, start, start + side, start + side))

    write(tmp_path / "cat", 36, draw=shifted)
    write(tmp_path / "dog", 36, first=36, draw=shifted)
    match = re.search(
        r"small differences: (\d+) of 14 test images are also among the tr", notes_of(load_data(str(tmp_path), SMALL))
    )
    assert match
    assert int(match[1]) >= 10
    for folder in ("cat", "dog"):
        for path in (tmp_path / folder).iterdir():
            if int(path.stem) % 6:
                path.unlink()
    assert load_data(str(tmp_path), SMALL).shared == (), "one of each"


def test_drawings_on_even_ground_differ(tmp_path: Path) -> None:
    """Drawings on an even ground, whose difference hashes are nearly all zero, are not counted as copies."""

    def dot(index: int) -> Image.Image:
        image = Image.new("L", (64, 64), 0)
        x, y = 12 * (index % 5), 12 * (index // 5 % 5)
        ImageDraw.Draw(image).ellipse((x, y, x + 8, y + 8), fill=255)
        return image

    for part, first in (("train", 0), ("test", 12)):
        write(tmp_path / part / "cat", 6, first=first, draw=dot)
        write(tmp_path / part / "dog", 6, first=first + 6, draw=dot)
    assert load_data(str(tmp_path), SMALL).shared == ()


def test_image_in_two_classes_is_reported(tmp_path: Path) -> None:
    """An image that is in two classes is reported."""
    two_classes(tmp_path)
    noise(0).save(tmp_path / "dog" / "cat.png")
    assert "in two classes: 1 image is a byte copy of one of another class (dog/cat.png is cat/0.png)" in notes_of(
        load_data(str(tmp_path), SMALL)
    )


def patients(root: Path, count: int = 12, scans: int = 3) -> Path:
    for patient in range(count):
        for scan in range(scans):
            folder = root / ("ill" if patient % 2 else "well")
            folder.mkdir(parents=True, exist_ok=True)
            noise(10 * patient + scan).save(folder / f"p{patient:02d}_{scan}.png")
    return root


def groups(data: Data) -> tuple[set[str], set[str], set[str]]:
    train, val, test = (
        {image.rpartition("/")[2].partition("_")[0] for image in split.ids}
        for split in (data.train, data.val, data.test)
    )
    return train, val, test


@pytest.mark.parametrize("pattern", [r"/(p\d+)_", r"p\d+", r"(?P<patient>p\d+)"])
@pytest.mark.slow
def test_group_by_keeps_group_in_one_split(tmp_path: Path, pattern: str) -> None:
    """The images of a group are in one split; without the pattern they are not."""
    data = load_data(str(patients(tmp_path)), SMALL, group_by=pattern)
    train, val, test = groups(data)
    assert not train & val | train & test | val & test
    assert len(train | val | test) == 12
    for split in (data.train, data.val, data.test):
        assert split.labels.unique().tolist() == [0, 1]
    assert len(data.val) == pytest.approx(36 / 5, abs=3)
    assert "grouped: 36 images in 12 groups, each in one split" in notes_of(data)
    assert groups(load_data(str(tmp_path), SMALL, group_by=pattern)) == (train, val, test)
    apart_train, apart_val, _ = groups(load_data(str(tmp_path), SMALL))
    assert apart_train & apart_val, "without the pattern they are torn apart"


def test_group_by_too_few_groups_is_refused(tmp_path: Path) -> None:
    """A class with too few groups is refused by name."""
    with pytest.raises(SearchError, match=r"class 'ill' into 2 groups .* and 3 are needed"):
        load_data(str(patients(tmp_path, count=4)), SMALL, group_by=r"p\d+")


@pytest.mark.parametrize(
    ("pattern", "words"), [("(", "is no regular expression"), ("patient", "is found in none of the images' paths")]
)
def test_group_pattern_sans_match_is_refused(tmp_path: Path, pattern: str, words: str) -> None:
    """A pattern that is no regular expression or matches no path is refused."""
    with pytest.raises(UsageError, match=words):
        load_data(str(patients(tmp_path)), SMALL, group_by=pattern)


def test_group_in_two_splits_is_reported(tmp_path: Path) -> None:
    """A group that is in two splits of the folder is reported with a warning."""
    patients(tmp_path / "train")
    patients(tmp_path / "test", count=4, scans=4)
    text = notes_of(load_data(str(tmp_path), SMALL, group_by=r"(p\d+)"))
    assert "WARNING groups in two splits: 4 groups of the test split are in the training split too (p00)" in text


# What is opened before anything is trained.


def truncate(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize("ending", [".png", ".jpg"])
def test_truncated_image_is_found_at_start(tmp_path: Path, ending: str) -> None:
    """A truncated test image is found at the start, also where memory does not hold the images."""
    for first, part in ((0, "train"), (50, "test")):
        two_classes(tmp_path / part, first=first, ending=ending)
    truncate(tmp_path / "test" / "dog" / f"51{ending}")
    steps: list[tuple[str, int, int]] = []
    with pytest.raises(SearchError, match=rf"1 of 12 images cannot be read: test/dog/51{ending}"):
        load_data(
            str(tmp_path), SMALL, memory_bytes=0, workers=0, decode=False, on_load=lambda *step: steps.append(step)
        )
    assert steps[-1] == ("checking test", 12, 12)


# How training images are varied.


def arrow(right: bool, index: int) -> Image.Image:
    image = Image.new("L", (32, 32), 30)
    draw, rng = ImageDraw.Draw(image), np.random.default_rng(index)
    x, y, long = int(rng.integers(3, 9)), int(rng.integers(8, 24)), int(rng.integers(12, 18))
    draw.line((x, y, x + long, y), fill=220, width=2)
    tip, back = (x + long, -5) if right else (x, 5)
    draw.line((tip, y, tip + back, y - 5), fill=220, width=2)
    draw.line((tip, y, tip + back, y + 5), fill=220, width=2)
    return image


@pytest.fixture(scope="module")
def arrows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("arrows")
    write(root / "left", 80, draw=lambda index: arrow(False, index))
    write(root / "right", 80, draw=lambda index: arrow(True, 1000 + index))
    return root


def test_mirroring_off_if_labels_change(arrows: Path) -> None:
    """Where left and right are the classes, images are shifted and not mirrored."""
    data = load_data(str(arrows), SMALL)
    assert data.augment == "shift"
    assert "not mirrored, which seems to change labels" in notes_of(data)
    assert "--augment none" in notes_of(data)


def test_mirroring_on_demand_warns(arrows: Path) -> None:
    """Mirroring that the user chose is done, with a warning."""
    data = load_data(str(arrows), SMALL, augment="light")
    assert data.augment == "light"
    assert "WARNING mirroring seems to change labels" in notes_of(data)


def test_mirroring_is_on_if_sides_are_alike(tmp_path: Path) -> None:
    """Where up and down are the classes, a flip from left to right preserves them, and images are mirrored."""
    write(tmp_path / "down", 60, draw=lambda index: arrow(True, index).rotate(90))
    write(tmp_path / "up", 60, draw=lambda index: arrow(False, index).rotate(90))
    data = load_data(str(tmp_path), SMALL)
    assert data.augment == "light"
    assert "WARNING" not in notes_of(data)


def test_digits_are_shifted_not_mirrored() -> None:
    """The embedded digits are shifted and not mirrored."""
    assert load_data("digits", SMALL, decode=False).augment == "shift"


@pytest.mark.parametrize("augment", ["none", "shift", "light", "timm"])
@pytest.mark.slow
def test_augmentation_is_same_from_files(arrows: Path, augment: str) -> None:
    """Augmentation is the same whether or not memory holds the images."""
    in_memory, from_files = (
        load_data(str(arrows), SMALL, augment=augment, memory_bytes=memory, workers=0, check=False).train
        for memory in (2**30, 0)
    )
    both = zip(in_memory.train_batches(16, "cpu", 3, 1), from_files.train_batches(16, "cpu", 3, 1), strict=True)
    for (x, y), (x_read, y_read) in both:
        assert torch.equal(x, x_read)
        assert torch.equal(y, y_read)


def test_augment_none_leaves_images_alone(arrows: Path) -> None:
    """Without augmentation a training image is unchanged."""
    split = load_data(str(arrows), SMALL, augment="none", check=False).train
    plain, _ = next(split.eval_batches(len(split), "cpu"))
    batch, _ = next(split.train_batches(len(split), "cpu", 0, 0))
    assert torch.equal(plain.sort(dim=0)[0], batch.sort(dim=0)[0])


def test_augment_unknown_is_refused(arrows: Path) -> None:
    """An unknown augmentation is refused with those there are."""
    with pytest.raises(UsageError, match="Known: none, shift, light, timm"):
        load_data(str(arrows), SMALL, augment="heavy")


# Classes of very different sizes.


@pytest.mark.slow
def test_unbalanced_classes_are_reported(tmp_path: Path) -> None:
    """Unbalanced classes are reported with the accuracy of a constant guess."""
    write(tmp_path / "many", 200)
    write(tmp_path / "few", 4, 160)
    data = load_data(str(tmp_path), SMALL)
    assert data.unbalanced
    assert "unbalanced: 120 training images of many, 2 of few. Always predicting many is right for 97.6 %" in notes_of(
        data
    )


def test_photo_with_preview_is_one_image(tmp_path: Path) -> None:
    """Phones append a preview to a photo, which is ignored; a film's frames are counted."""
    two_classes(tmp_path, ending=".jpg")
    noise(7).save(tmp_path / "cat" / "phone.mpo", save_all=True, append_images=[noise(8)])
    data = load_data(str(tmp_path), SMALL)
    assert len(data.train) + len(data.val) + len(data.test) == 13
    assert "frame" not in notes_of(data)
    noise(7).save(tmp_path / "cat" / "film.gif", save_all=True, append_images=[noise(8)])
    assert "first frame only: 1 image with several frames" in notes_of(load_data(str(tmp_path), SMALL))


def test_balanced_classes_are_not_reported(tmp_path: Path) -> None:
    """Balanced classes have no note."""
    data = load_data(str(two_classes(tmp_path)), SMALL)
    assert not data.unbalanced
    assert "unbalanced" not in notes_of(data)


@pytest.mark.slow
def test_balanced_accuracy_weighs_classes(tmp_path: Path) -> None:
    """A constant guess is right in 97.6 % of the images, and its balanced accuracy is one half."""
    write(tmp_path / "few", 4, 160)
    write(tmp_path / "many", 200)
    data = load_data(str(tmp_path), SMALL)
    constant_NK = torch.tensor([[0.0, 1.0]]).expand(len(data.val), 2)
    assert data.classes == ("few", "many")
    evaluation = Classification().evaluate(constant_NK, data.val.labels)
    assert evaluation.metric == pytest.approx(40 / 41)
    assert evaluation.balanced == pytest.approx(0.5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 2))
    assert EVALUATORS["finetune"](data, TrainSettings(epochs=1)).score(model, 0).balanced is not None
    digits = load_data("digits", SMALL)
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 10))
    assert EVALUATORS["finetune"](digits, TrainSettings(epochs=1)).score(model, 0).balanced is None


# Data sets of Hugging Face, whose columns have many names.


class Image_:
    """The type of a column of images, known by its name 'Image'."""

    def __init__(self, decode: bool = True) -> None:
        self.decode = decode


class ClassLabel:
    def __init__(self, names: list[str]) -> None:
        self.names = names


class Value:
    def __init__(self, dtype: str) -> None:
        self.dtype = dtype


Image_.__name__ = "Image"


class Rows:
    """The part of a datasets.Dataset that timm's reader uses."""

    def __init__(self, features: dict[str, object], rows: list[dict[str, object]]) -> None:
        self.features, self._rows = features, rows
        self.info = types.SimpleNamespace(features=features, splits=None)

    def cast_column(self, name: str, feature: object) -> Rows:
        assert name in self.features
        return self

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, key: int | str) -> object:
        return [row[key] for row in self._rows] if isinstance(key, str) else self._rows[key]


Hub = Callable[..., None]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Replaces the package `datasets`, which need not be installed, by one data set with the splits of the test."""

    def publish(features: dict[str, object], **splits: list[dict[str, object]]) -> None:
        def load_dataset(name: str, split: str = "train", cache_dir: str | None = None) -> Rows:
            if split not in splits:
                raise ValueError(f"Unknown split {split!r}. Should be one of {list(splits)}.")
            return Rows(features, splits[split])

        fake: Any = types.ModuleType("datasets")
        fake.load_dataset, fake.Image = load_dataset, Image_
        monkeypatch.setitem(sys.modules, "datasets", fake)
        monkeypatch.delitem(sys.modules, "timm.data.readers.reader_hfds", raising=False)

    return publish


def row(index: int, **labels: int) -> dict[str, object]:
    file = io.BytesIO()
    noise(index).save(file, "png")
    return {"img": {"bytes": file.getvalue()}, **labels}


FEATURES: dict[str, object] = {"img": Image_(), "label": ClassLabel(["plane", "car"])}


def test_hub_single_columns_are_found(hub: Hub) -> None:
    """The one image column and the one label column of a data set are found, whatever their names."""
    hub(FEATURES, train=[row(i, label=i % 2) for i in range(12)], test=[row(50 + i, label=i % 2) for i in range(4)])
    data = load_data("hfds/cifar10", SMALL)
    assert data.classes == ("plane", "car")
    assert [len(data.train), len(data.val), len(data.test)] == [10, 2, 4]
    x, y = next(data.test.eval_batches(4, "cpu"))
    assert y.tolist() == [0, 1, 0, 1]
    assert torch.allclose(x[1].mean(), torch.tensor(np.asarray(noise(51)).mean() / 255, dtype=torch.float32), atol=0.02)


def test_hub_label_column_has_to_be_named(hub: Hub) -> None:
    """Of several label columns the user names one, and an unknown name is refused with those there are."""
    features = {"img": Image_(), "fine_label": ClassLabel(["a", "b"]), "coarse_label": ClassLabel(["x", "y"])}
    hub(features, train=[row(i, fine_label=i % 2, coarse_label=i // 6) for i in range(12)])
    with pytest.raises(UsageError, match=r"fine_label, coarse_label\. Name one .* hfds/cifar100:fine_label"):
        load_data("hfds/cifar100", SMALL)
    assert load_data("hfds/cifar100:coarse_label", SMALL).classes == ("x", "y")
    with pytest.raises(UsageError, match="there is no column 'label', but img, fine_label, coarse_label"):
        load_data("hfds/cifar100:label", SMALL)


def test_hub_labels_without_names_are_found(hub: Hub) -> None:
    """A column of labels that are numbers without names is found."""
    features = {"img": Image_(), "digit": Value("int64"), "source": Value("string")}
    hub(features, train=[row(i, digit=i % 2) for i in range(12)])
    assert load_data("hfds/numbers", SMALL).classes == ("0", "1")


def test_hub_data_without_labels_is_refused(hub: Hub) -> None:
    """A data set of the hub without a column of labels is refused."""
    hub({"img": Image_(), "text": Value("string")}, train=[row(0)])
    with pytest.raises(UsageError, match="none of its columns holds labels; it has img, text"):
        load_data("hfds/captions", SMALL)


def test_hub_split_without_labels_is_unused(hub: Hub) -> None:
    """A test split whose labels are -1, as in benchmarks with hidden answers, is not used."""
    hub(FEATURES, train=[row(i, label=i % 2) for i in range(12)], test=[row(50 + i, label=-1) for i in range(4)])
    data = load_data("hfds/benchmark", SMALL)
    assert [len(data.train), len(data.val), len(data.test)] == [8, 2, 2]
    assert "not used: the test split, whose 4 images have no labels" in notes_of(data)


@pytest.mark.parametrize(("label", "split"), [(-1, "test"), (2, "test"), (1, "validation")])
def test_hub_label_not_in_training_refused(hub: Hub, label: int, split: str) -> None:
    """A label of -1, one past the names, and one of a class that training lacks are refused."""
    features = {"img": Image_(), "label": ClassLabel(["a", "b", "c"])}
    hub(
        features,
        train=[row(i, label=2 * (i % 2) if label == 1 else i % 2) for i in range(12)],
        **{split: [row(50, label=0), row(51, label=label)]},
    )
    with pytest.raises(SearchError, match=rf"1 images of the {split} split are labelled {label}, which"):
        load_data("hfds/odd", SMALL)


def test_hub_without_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package `datasets`, a data set of the hub is refused with the reason."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="needs a package that is not installed"):
        load_data("hfds/cifar10", SMALL)


# A classifier that comes with the weights.


class Reader(nn.Module):
    """Classifies how dark an image is, with certainty, in the order of outputs that it is given."""

    def __init__(self, order: list[int]) -> None:
        super().__init__()
        self.fc = nn.Linear(1, 3)
        self.order = order
        with torch.no_grad():
            weight = torch.tensor([[-9.0], [0.0], [9.0]])
            bias = torch.tensor([3.0, 0.0, -6.0])
            self.fc.weight.copy_(weight[order])
            self.fc.bias.copy_(bias[order])

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.fc(x.flatten(1).mean(dim=1, keepdim=True) * 1.0)
        return logits


@pytest.fixture(scope="module")
def greys(tmp_path_factory: pytest.TempPathFactory) -> Data:
    root = tmp_path_factory.mktemp("greys")
    for name, level in (("a_dark", 20), ("b_grey", 125), ("c_light", 230)):
        write(root / name, 30, draw=lambda index, level=level: Image.new("RGB", (16, 16), (level + index % 9,) * 3))
    return load_data(str(root), SMALL)


def test_head_check_accepts_right_order(greys: Data) -> None:
    """A classifier whose outputs are in the order of the images' classes fits."""
    check = check_head(Reader([0, 1, 2]), greys, TrainSettings())
    assert check.right == 1.0
    assert check.fits
    assert "is kept, whose classes have no names: it gets 100.0 % of 18 validation images right" in check.words()


@pytest.mark.parametrize("order", [[1, 2, 0], [1, 0, 2]])
def test_head_check_refuses_other_order(greys: Data, order: list[int]) -> None:
    """A classifier whose outputs are in another order does not fit, and its best order is reported."""
    check = check_head(Reader(order), greys, TrainSettings())
    assert check.right < 0.4
    assert check.best_order == 1.0
    assert not check.fits
    assert "100.0 % with its outputs in another order" in check.words()


def test_head_check_refuses_zero_weights(greys: Data) -> None:
    """A classifier that predicts nothing does not fit."""
    model = Reader([0, 1, 2])
    with torch.no_grad():
        model.fc.weight.zero_()
    assert not check_head(model, greys, TrainSettings()).fits


def test_head_is_reordered_by_names() -> None:
    """Outputs are put into the order of the names."""
    model, x = Reader([0, 1, 2]), torch.rand(5, 3, 4, 4)
    before = model(x)
    assert can_reorder(model, 3)
    reorder(model, ["a", "b", "c"], ["c", "a", "b"])
    assert torch.equal(model(x), before[:, [2, 0, 1]])


def base_weights(folder: Path, classes: list[str] | None = None, name: str = "test_resnet", **how: Any) -> Path:
    """A timm directory as `save_for_hf` writes it."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=how.pop("num_classes", len(classes or [1, 2])), **how)
    folder.mkdir()
    config = {"label_names": classes} if classes else {}
    save_config_for_hf(model, folder / "config.json", model_config=config)
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("photos") / "images")


def bench_of(tmp_path: Path, photos: Path, **changes: Any) -> tuple[Bench, list[str]]:
    lines: list[str] = []

    class Lines(Listener):
        def phase(self, text: str) -> None:
            lines.append(text)

        def data(self, description: str, notes: Sequence[str]) -> None:
            lines.extend([description, *notes])

    config = small_search(photos, write_space(tmp_path), tmp_path / "run").model_copy(update=changes)
    return assemble(config, Lines()), lines


@pytest.mark.slow
def test_bench_reorders_named_classifier(tmp_path: Path, photos: Path) -> None:
    """A classifier with names of classes is put into the order of the images' classes."""
    base_folder = base_weights(tmp_path / "given", ["light", "dark"])
    bench, lines = bench_of(tmp_path, photos, checkpoint=str(base_folder))
    rows = load_file(base_folder / "model.safetensors")["fc.weight"]
    assert torch.equal(bench.base.fc.weight.cpu(), rows[[1, 0]])
    assert bench.fresh == "nothing"
    assert "the outputs of the pretrained classifier are reordered as the images' classes" in lines


@pytest.mark.slow
def test_bench_normalises_by_config_of_base(tmp_path: Path, photos: Path) -> None:
    """Images are normalised with the mean and standard deviation of the directory's config.json."""
    base_folder = base_weights(tmp_path / "given", ["dark", "light"])
    usual, _ = bench_of(tmp_path, photos, checkpoint=str(base_folder))
    config = json.loads((base_folder / "config.json").read_text())
    config["pretrained_cfg"] |= {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.4, 0.25]}
    (base_folder / "config.json").write_text(json.dumps(config))
    for checkpoint in (base_folder, base_folder / "model.safetensors"):
        bench, _ = bench_of(tmp_path, photos, checkpoint=str(checkpoint))
        assert bench.base.pretrained_cfg["mean"] == (0.1, 0.2, 0.3)
        pixels, other = (next(one.data.val.eval_batches(2, "cpu"))[0] for one in (usual, bench))
        of_usual = Preprocessing.of(usual.base)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (of_usual.mean, of_usual.std))
        raw = pixels * std + mean
        expected = (raw - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.4, 0.25]).view(3, 1, 1)
        assert torch.allclose(other, expected, atol=1e-5)
    loose = tmp_path / "loose.safetensors"
    loose.write_bytes((base_folder / "model.safetensors").read_bytes())
    bench, _ = bench_of(tmp_path, photos, checkpoint=str(loose))
    assert Preprocessing.of(bench.base) == of_usual


@pytest.mark.slow
def test_bench_refits_head_of_other_classes(tmp_path: Path, photos: Path) -> None:
    """A classifier of other classes is fitted anew, although their number is the same."""
    base_folder = base_weights(tmp_path / "given", ["cat", "dog"])
    bench, lines = bench_of(tmp_path, photos, checkpoint=str(base_folder))
    assert bench.fresh == "head"
    assert any(
        "is of other classes (cat, dog) than the images (dark, light): a new one is fitted" in one for one in lines
    )


@pytest.mark.slow
def test_bench_checks_unnamed_head_on_images(tmp_path: Path, photos: Path) -> None:
    """A classifier without names of classes is checked on the validation images."""
    base_folder = base_weights(tmp_path / "given")
    bench, _ = bench_of(tmp_path, photos, checkpoint=str(base_folder / "model.safetensors"))
    (tmp_path / "run").mkdir()
    starting_weights(bench, Watching(Listener(), lambda: False))
    assert bench.fresh == "head"
    assert "a new one was fitted" in bench.head


@pytest.mark.slow
def test_bench_reports_data_before_training(tmp_path: Path, photos: Path) -> None:
    """The data are described before training."""
    bench, lines = bench_of(tmp_path, photos)
    assert "images: 24 train, 8 validation, 8 test, 2 classes: dark, light" in lines
    assert any(line.startswith("training images: shifted by up to 1/8") for line in lines)
    assert bench.config.augment == "light"


# Bases at other sizes, with other channels, under other names.


@pytest.mark.parametrize("pretrained", [False, True])
@pytest.mark.slow
def test_bench_builds_vit_for_image_size(tmp_path: Path, photos: Path, pretrained: bool) -> None:
    """A vision transformer is built for the size of the images."""
    fields = {"checkpoint": str(base_weights(tmp_path / "given", ["dark", "light"], "test_vit"))} if pretrained else {}
    bench, _ = bench_of(tmp_path, photos, base="test_vit", input_size=64, space="se", **fields)
    assert bench.anatomy.input_size == (3, 64, 64)
    assert bench.base(torch.rand(2, 3, 64, 64)).shape == (2, 2)


@pytest.mark.slow
def test_for_images_passes_size_where_needed() -> None:
    """Only a model that needs the size of the images gets it, and only where it differs."""
    assert for_images("swin_tiny_patch4_window7_224", (112, 112)) == {"img_size": (112, 112)}
    assert for_images("swin_tiny_patch4_window7_224", (224, 224)) == {}
    assert for_images("test_resnet", (112, 112)) == {}


@pytest.mark.slow
def test_bench_refuses_size_no_patches_fill(tmp_path: Path, photos: Path) -> None:
    """A size that is no multiple of the patch size is refused."""
    with pytest.raises(UsageError, match=r"test_vit cannot be built for images of 40 x 40: .* multiple of its patch"):
        bench_of(tmp_path, photos, base="test_vit", input_size=40, space="se")


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.slow
def test_bench_takes_weights_of_channels(tmp_path: Path, photos: Path, channels: int) -> None:
    """Weights for one or four channels are used with images of as many."""
    base_folder = base_weights(tmp_path / "given", ["dark", "light"], in_chans=channels)
    bench, _ = bench_of(tmp_path, photos, checkpoint=str(base_folder))
    x, _ = next(bench.data.val.eval_batches(2, "cpu"))
    assert x.shape[1] == channels
    assert bench.base(x).shape == (2, 2)


def test_bench_refuses_12_channel_weights(tmp_path: Path, photos: Path) -> None:
    """Weights for channels that no image file has are refused."""
    base_folder = base_weights(tmp_path / "given", ["dark", "light"], in_chans=12)
    with pytest.raises(SearchError, match="the model takes 12 channels, and image files have"):
        bench_of(tmp_path, photos, checkpoint=str(base_folder))


@pytest.mark.slow
def test_base_may_be_a_timm_directory(tmp_path: Path, photos: Path) -> None:
    """A timm directory can be the base, with its tag and its weights."""
    base_folder = base_weights(tmp_path / "given", ["dark", "light"])
    bench, _ = bench_of(tmp_path, photos, base=f"local-dir:{base_folder}")
    assert bench.config.base == "test_resnet.r160_in1k", "with the tag whose mean and std it was trained with"
    assert torch.equal(bench.base.fc.weight.cpu(), load_file(base_folder / "model.safetensors")["fc.weight"])


def test_base_may_be_a_model_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of the hub can be the base, at a revision."""
    base_folder = base_weights(tmp_path / "given", ["dark", "light"])
    downloads: list[tuple[str, str, str | None]] = []

    def download(model: str, file: str, revision: str | None = None) -> str:
        downloads.append((model, file, revision))
        return str(base_folder / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    base = resolve_base("hf-hub:someone/birds@main", None)
    assert (base.base, base.checkpoint) == ("test_resnet.r160_in1k", str(base_folder / "model.safetensors"))
    assert downloads[0] == ("someone/birds", "config.json", "main")


def test_base_refusals_say_what_to_pass(tmp_path: Path) -> None:
    """A recipe, a bare path and a surgical directory are refused as a base with what to pass instead."""
    with pytest.raises(UsageError, match=r"best\.yaml is a recipe"):
        resolve_base("runs/best.yaml", None)
    base_folder = base_weights(tmp_path / "given", ["dark", "light"])
    with pytest.raises(UsageError, match=rf"Give it as local-dir:{base_folder}"):
        resolve_base(str(base_folder), None)
    config = json.loads((base_folder / "config.json").read_text())
    (base_folder / "config.json").write_text(
        json.dumps({**config, "architecture": "surgery", "model_args": {"base": "vgg11"}})
    )
    with pytest.raises(UsageError, match=r"was operated on, .* Give its base, vgg11"):
        resolve_base(f"local-dir:{base_folder}", None)


# What a search does with all this.


def cli(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(build_app(), [str(word) for word in ("search", *words)])
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def finished_search(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, list[object]]:
    """A short search of unbalanced data with a copy in the test split: its directory, output and command."""
    root = tmp_path_factory.mktemp("searched")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTNSURGERY_CACHE", str(root / "cache"))
        images = root / "images"
        for part, first in (("train", 0), ("val", 100), ("test", 200)):
            write(images / part / "many", 26, first=first)
            write(images / part / "few", 4, 160, first=first)
        noise(0).save(images / "test" / "many" / "copy.png")
        words: list[object] = ["--data", images, "--space", write_space(root), "--output", root / "run"]
        words += ["--latency", "fixed", "--workers", 0, "--input-size", 32, "--epochs", 1, "--base-epochs", 1]
        words += ["--lr", 1e-3, "--block-lr-scale", 10]
        words += ["--budget-ms", 100, "--finalists", 1, "--confirm-seeds", 1, "--trials", 1, "--augment", "none"]
        code, output = cli(*words)
    assert code == 0, output
    return root / "run", output, words


@pytest.mark.slow
def test_search_describes_its_data_first(finished_search: tuple[Path, str, list[object]]) -> None:
    """A search describes its data before it trains the base."""
    _, output, _ = finished_search
    lines = [line.strip() for line in output.splitlines()]
    assert lines[1] == "data     images: 30 train, 30 validation, 31 test, 2 classes: few, many"
    before = lines[: next(number for number, line in enumerate(lines) if line.startswith("training the base"))]
    assert "training images: as they are" in before
    assert any(line.startswith("unbalanced: 26 training images of many, 4 of few") for line in before)
    assert any(line.startswith("the same byte for byte: 1 of 31 test images are also") for line in before)


def test_search_prints_balanced_accuracy(finished_search: tuple[Path, str, list[object]]) -> None:
    """Balanced accuracy is printed beside top-1."""
    _, output, _ = finished_search
    assert re.search(r"base     .* % \(balanced \d+\.\d\d %\)  loss", output)
    assert "With all classes counted alike" in " ".join(output.split())


def test_report_describes_the_data(finished_search: tuple[Path, str, list[object]]) -> None:
    """The report describes the data, and marks splits that share images."""
    page = (finished_search[0] / "report.html").read_text()
    assert "2 classes: few, many" in page
    assert "training images: as they are" in page
    assert re.search(r"Is every image in one split only\?</td><td class=\"no\">", page)


@pytest.mark.slow
def test_search_resume_refuses_augmentation(finished_search: tuple[Path, str, list[object]]) -> None:
    """A search does not resume with another augmentation."""
    _, _, words = finished_search
    code, output = cli(*words, "--augment", "light")
    assert code == 1
    assert "augment: was 'none', is now 'light'" in " ".join(output.split())


def test_winner_directory_has_class_names(finished_search: tuple[Path, str, list[object]]) -> None:
    """The directory of the winner has the names of its classes."""
    config = json.loads((finished_search[0] / "best" / "config.json").read_text())
    assert label_names(str(finished_search[0] / "best"), nn.Identity()) == ("few", "many"), config


@pytest.mark.slow
def test_workers_get_settled_augmentation(arrows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search settles whether images may be mirrored, and its workers use that."""
    launchers: list[Any] = []

    class Remembered(LAUNCHERS["local"]):  # type: ignore[misc]
        def __init__(self, config: SearchConfig) -> None:
            super().__init__(config)
            launchers.append(self)

        def prepare(self) -> None:
            """Start no process."""

    monkeypatch.setattr(start, "LAUNCHERS", {"local": Remembered})
    monkeypatch.setattr(start, "ProcessPool", lambda *_, **__: types.SimpleNamespace(close=lambda: None))
    config = small_search(arrows, write_space(tmp_path), tmp_path / "run").model_copy(update={"workers": 1})
    with start.started_pool(config, Listener(), lambda: False, None) as (bench, _):
        assert bench.config.augment == "shift"
    assert [one.config.augment for one in launchers] == ["shift"]


def test_search_command_has_data_settings(tmp_path: Path) -> None:
    """The printed command of a search has its settings for the data."""
    config = small_search(tmp_path, tmp_path, tmp_path).model_copy(update={"augment": "none", "group_by": r"p\d+"})
    words = shlex.split(command_of(config))
    assert words[words.index("--augment") + 1] == "none"
    assert words[words.index("--group-by") + 1] == r"p\d+"


def test_live_view_keeps_lines_on_data(tmp_path: Path) -> None:
    """On a terminal the lines about the data stay."""
    screen = io.StringIO()
    config = small_search(tmp_path, tmp_path, tmp_path)
    LiveView(config, Console(file=screen, width=120)).data("photos: 4 images", ["not used: old/ with 12 images"])
    assert screen.getvalue().splitlines() == ["data     photos: 4 images", "         not used: old/ with 12 images"]


def test_search_before_augment_resumes() -> None:
    """Searches from before --augment existed resume: digits were shifted, images of folders mirrored too."""
    for data, augment in ((None, "shift"), ("photos", "light")):
        now = {"augment": augment, "group_by": None, "lr": 0.001}
        assert check_same({"data": data, "lr": 0.001}, now, "run") == {}
