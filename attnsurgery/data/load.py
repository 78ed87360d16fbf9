"""Three splits of labelled images: the search trains on one, chooses by the second, and never sees the third."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from attnsurgery.data import duplicates
from attnsurgery.data.augment import NAMES, describe, mirrors
from attnsurgery.data.batches import FileSplit, MemorySplit, Split
from attnsurgery.data.contents import digests_of
from attnsurgery.data.embedded import embedded_name, embedded_sources
from attnsurgery.data.flips import check_flips
from attnsurgery.data.kinds import classed_sources, is_local
from attnsurgery.data.masks import check_masks
from attnsurgery.data.partition import find_groups, split_sources
from attnsurgery.data.picture import Rendering
from attnsurgery.data.preprocess import Preprocessing
from attnsurgery.data.resized import Resized, Sides
from attnsurgery.data.scan import Scan, conversion_notes, depths, depths_of, scan
from attnsurgery.data.source import Source, Sources
from attnsurgery.errors import UsageError
from attnsurgery.settings import Augment

_UNBALANCED = 3.0
"""Ratio of the largest class to the smallest from which on top-1 alone says little."""
_CLASSES = 12
"""Number of classes that `Data.describe` names at most."""
_LETTERS = 160
"""Number of letters that the names of these classes have at most."""

Find = Callable[[str | None, Sides], Sources]
"""The images that a specification names, with targets; embedded ones are drawn for an input of this height and width.
"""
OnLoad = Callable[[str, int, int], None]
"""Called with the name of a step, the number of images that are done, and their total."""


@dataclass(frozen=True)
class FirstTask:
    """What a base without weights is trained on before the data itself."""

    name: str
    """What the images show."""
    classes: tuple[str, ...]
    train: Split


@dataclass(frozen=True)
class Data:
    """What a search trains on (`train`), chooses by (`val`) and is evaluated on once, at the end (`test`)."""

    name: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    train: Split
    val: Split
    test: Split
    compute_fingerprint: Callable[[], str]
    """Computes the fingerprint, for which all image files are read."""
    augment: Augment = "light"
    """How training images are varied."""
    notes: tuple[str, ...] = ()
    """What is not as one might expect, a line each: images left out, converted or in two splits, unbalanced classes."""
    shared: tuple[str, ...] | None = None
    """What the splits have in common, a line each; None where that was not checked."""
    first: FirstTask | None = None
    """What a base without weights is trained on first."""
    resized: Resized[Data] | None = None
    """Decodes the same images at other sizes."""
    outputs: int = 0
    """Number of outputs of a model; 0 for one for each class."""
    is_classed: bool = True
    """Whether each image is of one class."""

    def at(self, size: Sides) -> Data:
        """The same images in the same splits at another height and width, decoded from the originals on demand."""
        if size == self.preprocessing.input_size[1:]:
            return self
        assert self.resized is not None, "the data was made by load_data"
        return self.resized(size)

    @cached_property
    def fingerprint(self) -> str:
        """Changes with an image's bytes, name, label or split, and with the preprocessing; not with the data's name."""
        return self.compute_fingerprint()

    @property
    def num_classes(self) -> int:
        """Number of outputs of a model, which timm calls so, whether or not they are classes."""
        return self.outputs or len(self.classes)

    @property
    def unbalanced(self) -> bool:
        """Whether the largest class of the training split has several times as many images as the smallest."""
        if not self.is_classed:
            return False
        counts = Counter(self.train.labels.tolist())
        return max(counts.values()) > _UNBALANCED * min(counts.values())

    def describe(self) -> str:
        """Name, sizes of the splits and classes, in one line."""
        counts = f"{len(self.train)} train, {len(self.val)} validation, {len(self.test)} test"
        if not self.classes:
            return f"{self.name}: {counts}, {self.num_classes} output{'s' * (self.num_classes > 1)}"
        return f"{self.name}: {counts}, {self.num_classes} classes: {_listed(self.classes)}"


def load_data(
    spec: str | None,
    preprocessing: Preprocessing,
    seed: int = 0,
    *,
    augment: str | None = None,
    group_by: str | None = None,
    memory_bytes: int = 2 * 2**30,
    workers: int | None = None,
    on_load: OnLoad | None = None,
    decode: bool = True,
    check: bool = True,
    known: dict[str, list[Any]] | None = None,
    find: Find | None = None,
) -> Data:
    """Labelled images in three splits that have none in common.

    A split that the data does not come with is taken out of its training images, a fifth of every class, the same for
    the same seed.

    Args:
        spec: None for the embedded pairs; an image folder; 'pairs' or 'digits'; or a name such as 'hfds/cifar10'.
        preprocessing: size and colours of the model's input.
        seed: of the division into splits.
        augment: how training images are varied: none, shift, light or timm. By default 'light'; 'shift' for the digits
            and where mirrored images turn out to be of another class; 'none' for the pairs.
        group_by: a regular expression on the path of an image relative to the data; images in which its first group, or
            else the whole match, is the same stay in one split.
        memory_bytes: data that fits at its input size, as uint8, is decoded once and stays in memory.
        workers: processes that decode data that does not fit; by default one a core, at most 8.
        on_load: called with the split's name, images decoded, images in all.
        decode: False postpones decoding to the first request for images.
        check: open every image once at the start, look for copies, and test whether mirrored images have the same
            labels. False where another process has done that.
        known: digests of files, for the fingerprint (`attnsurgery.data.contents`); new ones are added.
        find: finds images and targets; by default `labelled_images`.

    Raises:
        UsageError: `spec`, `augment` or `group_by` names nothing.
        SearchError: no classes, too few images of one, or images that cannot be read.
    """
    find = find or labelled_images
    inspection = _inspect(spec, preprocessing, seed, augment, group_by, memory_bytes, on_load, check, find)
    preprocessing = inspection.preprocessing
    processes = min(8, os.cpu_count() or 1) if workers is None else workers

    first_task = None
    if (first := inspection.sources.first) is not None:
        images = MemorySplit(first.train, preprocessing, inspection.rendering)
        first_task = FirstTask(first.name, first.classes, images)

    def parts_at(size: Sides) -> dict[str, Source]:
        """The images of each split; embedded ones are drawn for the size."""
        if size == preprocessing.input_size[1:] or not embedded_name(spec):
            return inspection.parts
        sources = find(spec, size)
        grouping = find_groups(sources.train, group_by)
        return split_sources(sources, seed, grouping.groups if grouping else None)

    def split(name: str, source: Source, prepared: Preprocessing) -> Split:
        rendering = inspection.rendering
        variation: Augment = inspection.augment if name == "train" else "none"
        mask_size = source.masks.size if source.masks and name != "train" else None
        if decoded_bytes(prepared.input_size[1:]) == 0 or variation == "timm":
            return FileSplit(source, prepared, rendering, variation, processes, mask_size)
        return MemorySplit(source, prepared, rendering, variation, _progress(on_load, name), mask_size)

    def resize(size: Sides) -> Preprocessing:
        return replace(preprocessing, input_size=(preprocessing.input_size[0], *size))

    def make(prepared: Preprocessing, resized: Resized[Data] | None) -> Data:
        splits = {name: split(name, part, prepared) for name, part in parts_at(prepared.input_size[1:]).items()}
        return Data(
            name=inspection.sources.name,
            classes=inspection.sources.classes,
            preprocessing=prepared,
            train=splits["train"],
            val=splits["val"],
            test=splits["test"],
            compute_fingerprint=lambda: _fingerprint(inspection, prepared, known, _progress(on_load, "comparing")),
            augment=inspection.augment,
            notes=(*inspection.notes, *(inspection.shared or ())),
            shared=inspection.shared,
            resized=resized,
            first=first_task if resized else None,
            outputs=inspection.sources.outputs,
            is_classed=inspection.sources.train.is_classed,
        )

    def decoded_bytes(size: Sides) -> int:
        needed = _bytes(resize(size), inspection.parts)
        return needed if needed <= memory_bytes else 0

    data = make(preprocessing, Resized(lambda size: make(resize(size), None), decoded_bytes, memory_bytes))
    for part in (data.train, data.val, data.test):
        if decode and isinstance(part, MemorySplit):
            part.decode()
    return data


def _bytes(preprocessing: Preprocessing, parts: Mapping[str, Source]) -> int:
    """Memory of all images and masks, decoded as uint8."""
    total = math.prod(preprocessing.input_size) * sum(len(part.ids) for part in parts.values())
    for name, part in parts.items():
        if part.masks is not None:
            total += math.prod(preprocessing.input_size[1:] if name == "train" else part.masks.size) * len(part.ids)
    return total


@dataclass(frozen=True)
class _Inspection:
    """Labelled images in three splits, and how they are decoded and augmented."""

    sources: Sources
    parts: dict[str, Source]
    rendering: Rendering
    preprocessing: Preprocessing
    """As given; without crops where there are masks."""
    augment: Augment
    notes: tuple[str, ...]
    shared: tuple[str, ...] | None


def count_files(spec: str | None, find: Find | None = None) -> int:
    """Number of images in files on this machine, without opening any; 0 for other data.

    Args:
        spec: as `load_data`.
        find: as `load_data`.

    Raises:
        SearchError: as `load_data`.
    """
    if embedded_name(spec) or not is_local(str(spec)):
        return 0
    sources = (find or labelled_images)(spec, (0, 0))
    return sum(len(source.ids) for source in (sources.train, sources.val, sources.test) if source is not None)


def _inspect(
    spec: str | None,
    preprocessing: Preprocessing,
    seed: int,
    augment: str | None,
    group_by: str | None,
    memory_bytes: int,
    on_load: OnLoad | None,
    check: bool,
    find: Find,
) -> _Inspection:
    """Find the images, divide them into splits, and check them; arguments and errors as `load_data`."""
    if augment is not None and augment not in NAMES:
        raise UsageError(f"--augment {augment}: there is no such augmentation. Known: {', '.join(NAMES)}.")
    image_mode = preprocessing.image_mode
    sources = find(spec, preprocessing.input_size[1:])
    if sources.train.masks is not None:
        preprocessing = preprocessing.whole()
    if augment == "timm" and not sources.train.is_classed:
        raise UsageError(
            "--augment timm crops images, and targets of this task would no longer fit. Use light or shift."
        )
    grouping = find_groups(sources.train, group_by)
    parts = split_sources(sources, seed, grouping.groups if grouping else None)
    fits = _bytes(preprocessing, parts) <= memory_bytes
    scans: dict[str, Scan] = {}
    if check and not embedded_name(spec) and (sources.train.is_encoded or not fits):
        scans = {name: scan(part, _progress(on_load, f"checking {name}")) for name, part in parts.items()}
    if check:
        for name, part in parts.items():
            check_masks(part, _progress(on_load, f"checking masks of {name}"))
    ranges = depths(list(scans.values())) if scans else depths_of(list(parts.values()))
    rendering = Rendering(image_mode, *ranges)
    augmentation: Augment = sources.augment if augment is None else augment
    notes, shared = list(sources.notes), tuple(_shared(scans, parts)) if scans else None
    if check:
        notes += [*conversion_notes(list(scans.values())), *(grouping.notes(sources) if grouping else ())]
        augmentation, flip_notes = _check_augment(augmentation, parts["train"], rendering, augment is not None)
        notes += flip_notes
        notes += _balance_notes(sources.classes, parts) if sources.train.is_classed else []
    return _Inspection(sources, parts, rendering, preprocessing, augmentation, tuple(notes), shared)


def labelled_images(spec: str | None, size: Sides) -> Sources:
    """Images of which each is of one class.

    Args:
        spec: as in `load_data`.
        size: height and width that embedded images are drawn for.

    Raises:
        UsageError, SearchError: as `classed_sources`.
    """
    name = embedded_name(spec)
    return classed_sources(str(spec)) if name is None else embedded_sources(name, size)


def _progress(on_load: OnLoad | None, step: str) -> Callable[[int, int], None] | None:
    return None if on_load is None else lambda done, total: on_load(step, done, total)


def _listed(classes: Sequence[str]) -> str:
    shown = list(classes[:_CLASSES])
    while len(shown) > 2 and sum(map(len, shown)) > _LETTERS:
        shown.pop()
    more = len(classes) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _check_augment(augment: Augment, train: Source, rendering: Rendering, requested: bool) -> tuple[Augment, list[str]]:
    """The augmentation to use, and notes on it; 'shift' where mirroring seems to change labels.

    Args:
        augment: the augmentation, as requested or by default.
        train: the images that mirroring is tested on.
        rendering: how these are decoded.
        requested: True if the user chose it; then it is used in any case.
    """
    notes = [f"training images: {describe(augment)}"]
    if not mirrors(augment) or not train.is_classed:
        return augment, notes
    flips = check_flips(train, rendering)
    if not flips.changes_labels:
        return augment, notes
    if requested:
        return augment, [*notes, f"WARNING mirroring seems to change labels: {flips.describe()}. See --augment none"]
    return "shift", [
        f"training images: {describe('shift')}, and not mirrored, which seems to change labels: {flips.describe()}; "
        "--augment light mirrors them all the same, --augment none leaves them as they are"
    ]


def _balance_notes(classes: Sequence[str], parts: Mapping[str, Source]) -> list[str]:
    """A line on how unbalanced the classes are, if they are."""
    counts = Counter(parts["train"].labels)
    (common, largest), (rare, smallest) = counts.most_common()[0], counts.most_common()[-1]
    if largest <= _UNBALANCED * smallest:
        return []
    share = parts["val"].labels.count(common) / len(parts["val"].labels)
    return [
        f"unbalanced: {largest:,} training images of {classes[common]}, {smallest:,} of {classes[rare]}. Always "
        f"predicting {classes[common]} is right for {100 * share:.1f} % of the validation images, so top-1 says little "
        "by itself; balanced accuracy stands beside it, or judges with --metric balanced"
    ]


def _shared(scans: Mapping[str, Scan], parts: Mapping[str, Source]) -> list[str]:
    """Lines on images that two splits, or two classes, have in common."""
    lines = [line for shared in duplicates.shared(scans) for line in shared.lines()]
    labels = {name: part.labels for name, part in parts.items()}
    if parts["train"].is_classed and (pairs := duplicates.of_two_classes(scans, labels)):
        image, original = pairs[0]
        copies = "image is a byte copy" if len(pairs) == 1 else "images are byte copies"
        lines.append(f"in two classes: {len(pairs):,} {copies} of one of another class ({image} is {original})")
    return lines


def native_size(spec: str, find: Find | None = None) -> int:
    """The median of the shorter sides of some images that are not embedded, in pixels; 224 where none can be read.

    Args:
        spec: as `load_data`.
        find: as `load_data`.

    Raises:
        UsageError, SearchError: as `load_data`.
    """
    source = (find or labelled_images)(spec, (0, 0)).train
    sides = []
    for index in range(0, len(source.ids), max(1, len(source.ids) // 16)):
        try:
            sides.append(min(source.open(index).size))
        except Exception:  # load_data names the unreadable ones, all together
            continue
    return int(np.median(sides)) if sides else 224


def _fingerprint(
    inspection: _Inspection,
    preprocessing: Preprocessing,
    known: dict[str, list[Any]] | None,
    on_progress: Callable[[int, int], None] | None,
) -> str:
    parts = sorted(inspection.parts.items())
    content: dict[str, Any] = {
        "classes": inspection.sources.classes,
        "parts": {name: [part.ids, part.labels, part.content()] for name, part in parts},
        "files": digests_of([path for _, part in parts for path in part.paths], known, on_progress),
        "preprocessing": asdict(preprocessing),
    }
    if targets := {name: part.targets.tolist() for name, part in parts if part.targets is not None}:
        content["targets"] = targets
    if masks := [path for _, part in parts if part.masks for path in part.masks.paths]:
        content["masks"] = digests_of(masks, known)
    if first := inspection.sources.first:
        content["first"] = [first.classes, first.train.ids, first.train.labels, first.train.content()]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
