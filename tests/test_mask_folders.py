"""Folders of images and masks: layouts, classes, colours, errors, and masks that follow their images into batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from attnsurgery.data import IGNORED, Data, Preprocessing, load_data
from attnsurgery.data.mask_folders import find_masked, read_mask_folders
from attnsurgery.errors import SearchError, UsageError
from attnsurgery.tasks import task_of

SIZE = (24, 32)
"""Height and width of the pictures."""
PLAIN = Preprocessing((3, *SIZE), mean=(0.0,) * 3, std=(1.0,) * 3, interpolation="nearest")
find = task_of("segmentation").sources
Mask = npt.NDArray[np.uint8]


def mask_of(seed: int, classes: int = 3) -> Mask:
    """Blocks of 4 x 4 pixels of one class each; all classes occur."""
    small = np.random.default_rng(seed).integers(0, classes, (SIZE[0] // 4, SIZE[1] // 4))
    small.flat[:classes] = np.arange(classes)
    return small.repeat(4, 0).repeat(4, 1).astype(np.uint8)


def image_of(mask: Mask) -> Image.Image:
    """A picture whose grey tells the class."""
    return Image.fromarray(np.stack([60 * mask] * 3, axis=-1).astype(np.uint8))


def write_masks(
    root: Path,
    count: int = 10,
    place: Callable[[int], tuple[str, str]] = lambda i: (f"images/{i}.png", f"masks/{i}.png"),
    save: Callable[[Mask], Image.Image] = Image.fromarray,
) -> Path:
    """Images and masks.

    Args:
        root: the folder.
        count: number of images.
        place: by number, the names of the two files.
        save: makes a picture of a mask.
    """
    for index in range(count):
        image, mask = (root / name for name in place(index))
        image.parent.mkdir(parents=True, exist_ok=True)
        mask.parent.mkdir(parents=True, exist_ok=True)
        image_of(mask_of(index)).save(image)
        save(mask_of(index)).save(mask)
    return root


def classes_in(data: Data) -> set[int]:
    return {int(value) for _, masks in data.test.eval_batches(100, "cpu") for value in masks.unique()}


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("{s}/images/{i}.png", "{s}/labels/{i}.png"),
        ("images/{s}/{i}.png", "masks/{s}/{i}.png"),
        ("{s}/{i}.png", "{s}annot/{i}.png"),
        ("JPEGImages/{s}/{i}.png", "SegmentationClass/{s}/{i}.png"),
        ("leftImg8bit/{s}/city/{i}_leftImg8bit.png", "gtFine/{s}/city/{i}_gtFine_labelIds.png"),
        ("img/{s}/{i}.png", "annotations/{s}/{i}_mask.png"),
    ],
)
def test_layouts_of_splits(tmp_path: Path, image: str, mask: str) -> None:
    """Each image finds its mask, and its split."""
    for split in ("train", "val", "test"):
        write_masks(tmp_path, 3, lambda i, s=split: (image.format(s=s, i=f"{s}{i}"), mask.format(s=s, i=f"{s}{i}")))
    sources = read_mask_folders(tmp_path)
    assert [len(part.ids) for part in (sources.train, sources.val, sources.test) if part] == [3, 3, 3]
    assert sources.classes == ("0", "1", "2")
    assert sources.test is not None
    assert "test" in sources.test.ids[0]
    assert sources.test.masks is not None
    for index in range(3):
        picture, labels = np.asarray(sources.test.open(index)), np.asarray(sources.test.masks.open(index))
        assert np.array_equal(picture[..., 0], 60 * labels)


def test_splits_are_drawn_where_there_are_none(tmp_path: Path) -> None:
    data = load_data(str(write_masks(tmp_path, 20)), PLAIN, find=find)
    assert (len(data.train), len(data.val), len(data.test)) == (12, 4, 4)
    assert not data.is_classed
    assert data.num_classes == 3
    assert not data.unbalanced
    assert len({*data.train.ids, *data.val.ids, *data.test.ids}) == 20


@pytest.mark.parametrize("memory_bytes", [2**30, 0])
@pytest.mark.parametrize("augment", ["none", "shift", "light"])
def test_masks_move_with_their_images(tmp_path: Path, augment: str, memory_bytes: int) -> None:
    """Whatever is done to training images is done to their masks, in memory and from files."""
    data = load_data(
        str(write_masks(tmp_path)), PLAIN, find=find, augment=augment, memory_bytes=memory_bytes, workers=0
    )
    seen = 0
    for epoch in range(3):
        for x_BCHW, masks_BHW in data.train.train_batches(3, "cpu", 1, epoch):
            assert masks_BHW.dtype == torch.uint8
            assert torch.equal((x_BCHW[:, 0] * 255 / 60).round().byte(), masks_BHW)
            seen += len(masks_BHW)
    assert seen == 18


def test_masks_keep_their_size_for_evaluation(tmp_path: Path) -> None:
    """Masks of validation and test images have their own size, whatever the size of a model's images."""
    data = load_data(str(write_masks(tmp_path)), replace(PLAIN, input_size=(3, 12, 16)), find=find)
    x_BCHW, masks_BHW = next(data.train.train_batches(2, "cpu", 0, 0))
    assert (x_BCHW.shape[2:], masks_BHW.shape[1:]) == ((12, 16), (12, 16))
    for there in (data, data.at((48, 64))):
        x_BCHW, masks_BHW = next(there.test.eval_batches(2, "cpu"))
        assert x_BCHW.shape[2:] == there.preprocessing.input_size[1:]
        assert masks_BHW.shape[1:] == SIZE
        index = int(Path(there.test.ids[0]).stem)
        assert np.array_equal(masks_BHW[0].numpy(), mask_of(index))


def test_images_are_not_cropped(tmp_path: Path) -> None:
    """With a crop of timm's an image would lose its borders, and the mask would not fit."""
    cropping = Preprocessing((3, 12, 12), (0.0,) * 3, (1.0,) * 3, "nearest", crop_pct=0.5)
    data = load_data(str(write_masks(tmp_path)), cropping, find=find, augment="none")
    x_BCHW, masks_BHW = next(data.train.train_batches(2, "cpu", 0, 0))
    assert torch.equal((x_BCHW[:, 0] * 255 / 60).round().byte(), masks_BHW)


def test_named_classes_and_void(tmp_path: Path) -> None:
    """Names count in their order; pixels of `void` do not count, wherever it stands."""
    write_masks(tmp_path)
    (tmp_path / "classes.txt").write_text("road\nvoid\ncar\n")
    data = load_data(str(tmp_path), PLAIN, find=find)
    assert data.classes == ("road", "car")
    assert classes_in(data) == {0, 1, IGNORED}
    assert "pixels of void do not count" in data.notes
    index = int(Path(data.test.ids[0]).stem)
    _, masks_BHW = next(data.test.eval_batches(1, "cpu"))
    assert np.array_equal(masks_BHW[0].numpy(), np.array([0, IGNORED, 1], np.uint8)[mask_of(index)])


@pytest.mark.parametrize("line", ["{name} #{r:02x}{g:02x}{b:02x}", "{name} {r} {g} {b}", "{name}, {r}, {g}, {b}"])
def test_masks_in_colours(tmp_path: Path, line: str) -> None:
    colours = np.array([[128, 64, 128], [0, 0, 142], [70, 70, 70]], np.uint8)
    write_masks(tmp_path, save=lambda mask: Image.fromarray(colours[mask]))
    names = ("road", "big car", "building")
    rows = [line.format(name=name, r=r, g=g, b=b) for name, (r, g, b) in zip(names, colours.tolist(), strict=True)]
    (tmp_path / "classes.txt").write_text("\n".join(rows))
    data = load_data(str(tmp_path), PLAIN, find=find)
    assert data.classes == names
    index = int(Path(data.test.ids[0]).stem)
    _, masks_BHW = next(data.test.eval_batches(1, "cpu"))
    assert np.array_equal(masks_BHW[0].numpy(), mask_of(index))


def test_masks_with_a_palette_or_of_one_thing(tmp_path: Path) -> None:
    """A palette's numbers are classes; 0 and 255 alone are background and object."""

    def with_palette(mask: Mask) -> Image.Image:
        image = Image.fromarray(mask).convert("P")
        image.putdata(mask.flatten().tolist())
        image.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
        return image

    assert read_mask_folders(write_masks(tmp_path / "palette", save=with_palette)).classes == ("0", "1", "2")
    thing = write_masks(
        tmp_path / "thing", save=lambda mask: Image.fromarray(np.where(mask == 1, 255, 0).astype(np.uint8))
    )
    data = load_data(str(thing), PLAIN, find=find)
    assert data.classes == ("background", "object")
    assert classes_in(data) == {0, 1}


def test_links_to_folders_are_followed(tmp_path: Path) -> None:
    """A folder of links to the splits elsewhere is read as these."""
    write_masks(tmp_path / "there" / "train", 6)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "train").symlink_to(tmp_path / "there" / "train")
    (tmp_path / "here" / "train" / "images" / ".hidden.png").write_bytes(b"")
    assert len(read_mask_folders(tmp_path / "here").train.ids) == 6


def test_fingerprint_changes_with_a_mask(tmp_path: Path) -> None:
    folder = str(write_masks(tmp_path))
    before = load_data(folder, PLAIN, find=find).fingerprint
    assert load_data(folder, PLAIN, find=find).fingerprint == before
    Image.fromarray(mask_of(77)).save(tmp_path / "masks" / "3.png")
    assert load_data(folder, PLAIN, find=find).fingerprint != before


def test_images_and_masks_without_partner_are_reported(tmp_path: Path) -> None:
    write_masks(tmp_path)
    (tmp_path / "masks" / "3.png").unlink()
    (tmp_path / "images" / "5.png").unlink()
    notes = load_data(str(tmp_path), PLAIN, find=find).notes
    assert "left out: 1 image without a mask (images/3.png is the first)" in notes
    assert "left out: 1 mask without an image (masks/5.png is the first)" in notes


def _unlike_size(root: Path) -> None:
    Image.fromarray(mask_of(3)[:8]).save(root / "masks" / "3.png")


def _unread(root: Path) -> None:
    (root / "masks" / "3.png").write_bytes(b"no image")


def _colours(root: Path) -> None:
    pixels = np.zeros((*SIZE, 3), np.uint8)
    pixels[..., 0] = 200
    Image.fromarray(pixels).save(root / "masks" / "3.png")


def _unnamed(root: Path) -> None:
    (root / "classes.txt").write_text("road\ncar\n")


def _half_coloured(root: Path) -> None:
    (root / "classes.txt").write_text("road #112233\ncar\n")


def _grey(root: Path) -> None:
    ramp = np.arange(24 * 32, dtype=np.int64).reshape(SIZE) % 251
    Image.fromarray(ramp.astype(np.uint8)).save(root / "masks" / "3.png")


def _no_masks(root: Path) -> None:
    (root / "masks").rename(root / "other")


def _no_partner(root: Path) -> None:
    for path in list((root / "masks").iterdir()):
        path.rename(path.with_name(f"x{path.name}"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_unlike_size, r"3\.png is of 32 x 8 pixels and its image, 3\.png, of 32 x 24"),
        (_unread, r"cannot read the mask .*3\.png: cannot identify image file"),
        (_colours, r"3\.png is in colours\. Give classes\.txt, .* 'road #804080' or 'road 128 64 128'"),
        (_unnamed, r"has the value 2 in [\d,]+ pixels, and classes\.txt names the values 0 to 1; 255 is not counted"),
        (_half_coloured, "gives a colour to some classes and none to others"),
        (_grey, r"hold 251 different values, which are hardly classes"),
        (_no_masks, r"has no folder of masks\. Segmentation needs images and masks of the same names"),
        (
            _no_partner,
            r"no image has a mask of the same name; 10 images such as images/0\.png, 10 masks such as masks/x0",
        ),
    ],
)
def test_bad_masks_are_named(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(write_masks(tmp_path))
    with pytest.raises(SearchError, match=message):
        load_data(str(tmp_path), PLAIN, find=find)


@pytest.mark.parametrize("spec", [None, "nothing/here"])
def test_segmentation_needs_a_folder(spec: str | None) -> None:
    with pytest.raises(UsageError, match=r"needs .*a folder with images/ and masks/"):
        find_masked(spec)


def test_timm_augmentation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--augment timm crops images"):
        load_data(str(write_masks(tmp_path)), PLAIN, find=find, augment="timm")
