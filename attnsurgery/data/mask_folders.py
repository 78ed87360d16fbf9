"""Reads folders of images and masks: which mask belongs to which image, which split both are in, what the classes are.

A mask has the size of its image, and each pixel is the number of its class: in one channel, by a palette, or by a
colour that `classes.txt` gives to a class. docs/data.md has the rules as a table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median_low

from PIL import Image

from attnsurgery.data.folder import TEST, TRAIN, VAL, formats, role_of, walk
from attnsurgery.data.mask_classes import Mask, by_value, classes_in_masks, read, read_classes, size_of
from attnsurgery.data.picture import upright_size
from attnsurgery.data.source import Masks, Source, Sources, decode
from attnsurgery.data.wording import count
from attnsurgery.errors import SearchError, UsageError

_IMAGES = ("image", "images", "img", "imgs", "jpegimages", "leftimg8bit", "photo", "photos", "picture", "pictures")
_MASKS = (
    *("mask", "masks", "label", "labels", "annotation", "annotations", "annot", "annots", "gt", "gtfine"),
    *("segmentation", "segmentations", "segmentationclass", "target", "targets"),
)
_SUFFIX = re.compile(r"[_-](mask|masks|label|labels|labelids|labeltrainids|gt|gtfine|seg|segmentation|l|leftimg8bit)$")
"""What is left out at the end of the name of an image or a mask, in lower case."""
_SAMPLE = 16
"""Number of masks whose sizes are looked at."""


def read_mask_folders(root: Path) -> Sources:
    """Images with masks; no image is decoded, and masks only where `classes.txt` does not say what they hold.

    Raises:
        SearchError: there are no masks, or masks without images alone; `classes.txt` or a mask cannot be read.
    """
    pairs, notes = _pairs(root)
    named = read_classes(root)
    convert: Callable[[Image.Image, Path], Mask]
    if named is None:
        classes, values = classes_in_masks([mask for part in pairs.values() for _, mask in part])
        convert = partial(by_value, values)
    else:
        classes, convert = named.names, named.convert
        notes += [f"pixels of {', '.join(named.void)} do not count"] if named.void else []
    if len(classes) < 2:
        raise SearchError(f"{root}: the masks hold {len(classes)} class, and at least two are needed.")
    parts = {role: _source(root, of_role, convert) for role, of_role in pairs.items()}
    name = root.name or root.resolve().name
    return Sources(name, classes, parts[TRAIN], parts.get(VAL), parts.get(TEST), notes=tuple(notes))


def _source(root: Path, pairs: Sequence[tuple[Path, Path]], convert: Callable[[Image.Image, Path], Mask]) -> Source:
    """The images of a split.

    Args:
        root: the folder of all.
        pairs: image and mask.
        convert: the numbers of classes in a mask.
    """
    images = tuple(image for image, _ in pairs)
    masks = tuple(mask for _, mask in pairs)
    sizes = [size_of(mask) for mask in masks[:: max(1, len(masks) // _SAMPLE)]]
    size = (median_low(height for height, _ in sizes), median_low(width for _, width in sizes))

    def open_mask(index: int) -> Image.Image:
        mask = read(masks[index])
        with Image.open(images[index], formats=formats()) as image:
            width, height = upright_size(image)
            if (width, height) != mask.size:
                raise SearchError(
                    f"{masks[index]} is of {mask.width} x {mask.height} pixels and its image, {images[index].name}, of "
                    f"{width} x {height}. A mask has a class for each pixel of its upright image."
                )
        return Image.fromarray(convert(mask, masks[index]))

    return Source(
        ids=tuple(image.relative_to(root).as_posix() for image in images),
        labels=(0,) * len(images),
        open=lambda index: decode(images[index]),
        paths=images,
        masks=Masks(open_mask, masks, size),
    )


def _pairs(root: Path) -> tuple[dict[str, list[tuple[Path, Path]]], list[str]]:
    """By split, each image with its mask; and lines on what was left out.

    Raises:
        SearchError: no folder holds masks, no image has one, or there is no training split.
    """
    found: dict[bool, dict[tuple[str, str], Path]] = {False: {}, True: {}}
    for path in walk(root).images():
        role, is_mask, key = _place(path.relative_to(root))
        found[is_mask].setdefault((role, key), path)
    images, masks = found[False], found[True]
    if not masks:
        raise SearchError(
            f"{root} has no folder of masks. Segmentation needs images and masks of the same names: DIR/images/1.jpg "
            "and DIR/masks/1.png, or DIR/train/images/, DIR/train/masks/, DIR/test/images/ and so on."
        )
    shared = sorted(images.keys() & masks.keys())
    if not shared:
        image, mask = (next(iter(paths.values())).relative_to(root) for paths in (images or masks, masks))
        raise SearchError(
            f"{root}: no image has a mask of the same name; {len(images):,} images such as {image}, {len(masks):,} "
            f"masks such as {mask}."
        )
    roles = {role for role, _ in shared}
    if roles - {""} and TRAIN not in roles:
        raise SearchError(f"{root} has masks for {', '.join(sorted(roles))} and none for train. Add them.")
    notes = []
    if alone := sorted(images.keys() - masks.keys()):
        first = images[alone[0]].relative_to(root)
        notes.append(f"left out: {count(len(alone), 'image')} without a mask ({first} is the first)")
    if alone := sorted(masks.keys() - images.keys()):
        first = masks[alone[0]].relative_to(root)
        notes.append(f"left out: {count(len(alone), 'mask')} without an image ({first} is the first)")
    pairs: dict[str, list[tuple[Path, Path]]] = {}
    for role, key in shared:
        pairs.setdefault(role or TRAIN, []).append((images[role, key], masks[role, key]))
    return pairs, notes


def _place(path: Path) -> tuple[str, bool, str]:
    """The split of a file, whether it is a mask, and a text that image and mask have in common.

    Args:
        path: relative to the root.
    """
    role, is_mask, rest = "", False, []
    for part in path.parts[:-1]:
        word = part.lower()
        bare = word.removesuffix("annot") if word != "annot" else word  # SegNet's trainannot
        if word in _MASKS or bare != word:
            is_mask = True
        if found := role_of(bare):
            role = role or found
        elif word not in _IMAGES and word not in _MASKS:
            rest.append(part)
    stem = path.stem.lower()
    while stem != (shorter := _SUFFIX.sub("", stem)):
        stem = shorter
    return role, is_mask, "/".join([*rest, stem])


def find_masked(spec: str | None) -> Sources:
    """The images with masks that `--data` names.

    Raises:
        UsageError: there is no such folder.
        SearchError: as `read_mask_folders`.
    """
    if spec is None:
        raise UsageError("--task segmentation needs --data DIR, a folder with images/ and masks/.")
    if not Path(spec).is_dir():
        raise UsageError(
            f"--data {spec}: there is no such directory. Segmentation needs a folder with images/ and masks/, or with "
            "train/images/, train/masks/, test/images/ and so on."
        )
    return read_mask_folders(Path(spec))
