"""Labelled images before they are split: an image folder, or a data set that timm knows by name.

Images are decoded when they are opened, and one that cannot be read fails then.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import timm.data
import torch
from PIL import Image

from attnsurgery.data.contents import content_of
from attnsurgery.data.folder import TEST, TRAIN, VAL, formats, read_folder
from attnsurgery.data.picture import upright
from attnsurgery.errors import SearchError, UsageError
from attnsurgery.settings import Augment

_data: Any = timm.data  # its factories are typed by nothing that a checker sees
_HUB = "hfds/"
_PREFIXES = (_HUB, "torch/")
_STREAMED = ("hfids/", "tfds/")
_SHOWN = 5
IGNORED = 255
"""In a mask: this pixel does not count."""


@dataclass(frozen=True)
class Masks:
    """For each image, a picture with the number of the class of every pixel."""

    open: Callable[[int], Image.Image]
    """Decodes the mask at an index: one channel of 8 bits, with `IGNORED` where a pixel does not count."""
    paths: tuple[Path, ...]
    """The files."""
    size: tuple[int, int]
    """Height and width at which predictions are compared with masks, in pixels."""

    def take(self, picks: Sequence[int]) -> Masks:
        """The masks at these positions."""
        picks, inner = list(picks), self.open
        return replace(self, open=lambda i: inner(picks[i]), paths=tuple(self.paths[i] for i in picks))


@dataclass(frozen=True)
class Source:
    """Images with labels, in a fixed order."""

    ids: tuple[str, ...]
    """A unique name of each image: its path relative to the data, or a split and a number."""
    labels: tuple[int, ...]
    """The number of the class of each image. Images without one class have a number by which they are divided into
    splits, or 0."""
    open: Callable[[int], Image.Image]
    """Decodes the image at an index, upright."""
    paths: tuple[Path, ...] = ()
    """The image files; () where the data is no files."""
    content: Callable[[], str] = str
    """Computes a digest of data that is no files; '' where there are files."""
    targets: torch.Tensor | None = None
    """(N, ...) what a model should return for each image, where that is not one class: numbers, or 0 and 1 for each
    class. None where `labels` or masks say it."""
    masks: Masks | None = None
    """The class of every pixel; None where a target belongs to the image as a whole."""
    read: Callable[[int], bytes] | None = None
    """Reads the encoded image at an index, where several images are in one file; None otherwise."""
    groups: tuple[str, ...] = ()
    """The group of each image, if the data says it; images of one group stay in one split."""

    @property
    def is_classed(self) -> bool:
        """Whether each image is of one class, whose number is its label."""
        return self.targets is None and self.masks is None

    @property
    def is_encoded(self) -> bool:
        """Whether images are decoded from the bytes of a file."""
        return bool(self.paths) or self.read is not None

    def file(self, index: int) -> BinaryIO:
        """The encoded image at an index, as an open file.

        Raises:
            OSError: it cannot be opened.
        """
        return self.paths[index].open("rb") if self.read is None else io.BytesIO(self.read(index))

    def take(self, picks: Sequence[int]) -> Source:
        """The images at these positions."""
        picks = list(picks)
        inner, read = self.open, self.read
        return Source(
            ids=tuple(self.ids[i] for i in picks),
            labels=tuple(self.labels[i] for i in picks),
            open=lambda i: inner(picks[i]),
            paths=tuple(self.paths[i] for i in picks) if self.paths else (),
            content=self.content,
            targets=None if self.targets is None else self.targets[picks],
            masks=self.masks and self.masks.take(picks),
            read=read and (lambda i: read(picks[i])),
            groups=tuple(self.groups[i] for i in picks) if self.groups else (),
        )


@dataclass(frozen=True)
class Sources:
    """The data that a specification names, in its own splits; `val` and `test` are None where it has none."""

    name: str
    classes: tuple[str, ...]
    train: Source
    val: Source | None = None
    test: Source | None = None
    augment: Augment = "light"
    """How training images are varied by default."""
    notes: tuple[str, ...] = ()
    """What was left out or has an unusual name, a line each."""
    first: Sources | None = None
    """What a base without weights is trained on first; its `name` describes the images."""
    outputs: int = 0
    """Number of outputs of a model; 0 for one for each class."""


def find_sources(spec: str) -> Sources:
    """The labelled images that `spec` names.

    Args:
        spec: a directory, or a name such as 'hfds/cifar10' or 'torch/cifar10'. Columns of a data set of Hugging Face
            may stand behind a colon: 'hfds/cifar100:fine_label'.

    Raises:
        UsageError: nothing of that name, or a kind of data set that cannot be split.
        SearchError: a directory without classes or images or with an ambiguous structure, or a split with classes that
            the training split does not have.
    """
    if Path(spec).is_dir():
        return _folder(Path(spec))
    if spec.startswith(_STREAMED):
        raise UsageError(
            f"--data {spec}: a streamed data set has no order to split by. Use its random-access form (hfds/...) "
            "or an image folder."
        )
    if spec.startswith(_PREFIXES):
        return _timm_sources(spec)
    raise UsageError(
        f"--data {spec}: there is no such directory, and it is not the name of a data set "
        f"({', '.join(prefix + '...' for prefix in _PREFIXES)}). An image folder has one sub-folder a class, or train/ "
        "and test/ with one a class; a table such as labels.csv names images and labels. Embedded data: pairs, the "
        "default, and digits."
    )


def _folder(root: Path) -> Sources:
    folder = read_folder(root)
    parts = {role: _of_files(root, images) for role, images in folder.parts.items()}
    name = root.name or str(root.resolve().name)
    return Sources(name, folder.classes, parts[TRAIN], parts.get(VAL), parts.get(TEST), notes=folder.notes)


def _of_files(root: Path, images: Sequence[tuple[Path, int]]) -> Source:
    paths = tuple(path for path, _ in images)
    return Source(
        ids=tuple(path.relative_to(root).as_posix() for path in paths),
        labels=tuple(label for _, label in images),
        open=lambda index: decode(paths[index]),
        paths=paths,
    )


def decode(file: Any) -> Image.Image:
    """The image in a file, upright. A truncated file fails here and not later in a transform.

    Args:
        file: a path, or a binary file.
    """
    with Image.open(file, formats=formats()) as image:
        image.load()
        return upright(image.copy())


def _timm_sources(spec: str) -> Sources:
    """A data set that timm's own factory makes.

    Raises:
        UsageError, SearchError: as `find_sources`; also for labels that are not classes.
    """
    name, columns = _with_columns(spec) if spec.startswith(_HUB) else (spec, {})
    train = _timm_split(name, "train", columns)
    if train is None:
        raise UsageError(f"--data {spec}: it has no training split, or cannot be fetched from here.")
    # torchvision's data sets have one held-out split, and return it under any of the names
    held_out_names = ("test",) if spec.startswith("torch/") else ("validation", "test")
    held_out = {split: _timm_split(name, split, columns) for split in held_out_names}
    notes = []
    for split, part in held_out.items():
        if part is not None and all(label < 0 for label in part[0].labels):
            notes.append(f"not used: the {split} split, whose {len(part[0].ids):,} images have no labels")
            held_out[split] = None
    parts = {split: part[0] for split, part in {"train": train, **held_out}.items() if part is not None}
    classes = _class_names(spec, train[1], parts)
    return Sources(name, classes, parts["train"], parts.get("validation"), parts.get("test"), notes=tuple(notes))


def _class_names(spec: str, names: Sequence[str], parts: Mapping[str, Source]) -> tuple[str, ...]:
    """The names of the classes, or else their numbers.

    Raises:
        SearchError: a split has labels that the training split does not have, or that are no class.
    """
    known = set(parts["train"].labels)
    count = max(len(names), max(known) + 1)
    for split, part in parts.items():
        unexpected = sorted(label for label in set(part.labels) if label < 0 or label >= count or label not in known)
        if unexpected:
            listed = ", ".join(map(str, unexpected[:_SHOWN])) + (" ..." if len(unexpected) > _SHOWN else "")
            images = sum(label in unexpected for label in part.labels)
            lacks = "has no class" if split == "train" else "the training split does not have"
            raise SearchError(
                f"--data {spec}: {images:,} images of the {split} split are labelled {listed}, which {lacks}. "
                "Use data whose images all have one of the labels of training, for instance an image folder made of it."
            )
    return tuple(map(str, names)) if len(names) == count else tuple(map(str, range(count)))


def _with_columns(spec: str) -> tuple[str, dict[str, str]]:
    """The name before the colon, and timm's arguments for the columns of images and labels.

    Raises:
        UsageError: the data set has no such columns, or several; or the package `datasets` is missing.
        SearchError: it cannot be loaded.
    """
    name, _, listing = spec.partition(":")
    try:
        import datasets  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise UsageError(f"--data {spec} needs a package that is not installed: {error}.") from None
    try:
        features: Mapping[str, Any] = datasets.load_dataset(name.removeprefix(_HUB), split="train").features
    except Exception as error:  # hub, network and builder errors have no common root
        raise SearchError(f"--data {spec} could not be loaded: {str(error).splitlines()[0]}") from error
    requested = [column for column in listing.split(",") if column]
    if missing := [column for column in requested if column not in features]:
        raise UsageError(f"--data {spec}: there is no column {missing[0]!r}, but {', '.join(features)}.")
    kinds = {column: type(feature).__name__ for column, feature in features.items()}
    images = [column for column, kind in kinds.items() if kind == "Image"]
    labels = [column for column, kind in kinds.items() if kind == "ClassLabel"]
    if not labels:  # labels that are numbers without names
        labels = [column for column, feature in features.items() if "int" in str(getattr(feature, "dtype", ""))]
    return name, {
        "input_key": _only_column(spec, "images", images, requested, features),
        "target_key": _only_column(spec, "labels", labels, requested, features),
    }


def _only_column(
    spec: str, content: str, fitting: Sequence[str], requested: Sequence[str], columns: Mapping[str, Any]
) -> str:
    candidates = [column for column in fitting if column in requested] or list(fitting)
    if len(candidates) == 1:
        return candidates[0]
    if not fitting:
        raise UsageError(f"--data {spec}: none of its columns holds {content}; it has {', '.join(columns)}.")
    raise UsageError(
        f"--data {spec}: {len(candidates)} of its columns hold {content}: {', '.join(candidates)}. Name one of them "
        f"behind a colon, such as {spec.partition(':')[0]}:{candidates[0]}."
    )


def _timm_split(spec: str, split: str, columns: Mapping[str, str]) -> tuple[Source, Sequence[str]] | None:
    """A split of a data set, and the names of its classes; None where there is no such split.

    Raises:
        UsageError: a package is missing, or timm does not know the data set.
        SearchError: the training split could not be loaded.
    """
    root = Path.home() / ".cache" / "attnsurgery" / "data" if spec.startswith("torch/") else None
    if root:
        root.mkdir(parents=True, exist_ok=True)
    try:
        dataset: Any = _data.create_dataset(
            spec, root=root and str(root), split=split, download=root is not None, **columns
        )
    except ImportError as error:
        raise UsageError(f"--data {spec} needs a package that is not installed: {error}.") from None
    except AssertionError as error:
        raise UsageError(f"--data {spec}: {error}.") from None
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        if split == "train":
            raise SearchError(f"--data {spec} could not be loaded: {str(error).splitlines()[0]}") from error
        return None
    if not len(dataset):
        return None
    reader: Any = getattr(dataset, "reader", None)

    def opened(index: int) -> Image.Image:
        if reader is not None:  # past timm's data set, which puts another image in the place of one it cannot read
            return decode(reader[index][0])
        return upright(dataset[index][0])

    source = Source(
        ids=tuple(f"{split}/{index}" for index in range(len(dataset))),
        labels=tuple(-1 if label is None else int(label) for label in _labels(dataset)),
        open=opened,
        content=lambda: content_of(dataset),
    )
    names = getattr(dataset, "classes", None) or list(getattr(reader, "class_to_idx", None) or ())
    return source, names


def _labels(dataset: Any) -> Sequence[int]:
    """The labels of a data set; images are decoded only where these are not stored separately."""
    if hasattr(dataset, "targets"):
        return list(dataset.targets)
    reader: Any = getattr(dataset, "reader", None)
    if hasattr(reader, "label_key"):
        return list(reader.dataset[reader.label_key])
    return [dataset[index][1] for index in range(len(dataset))]
