"""Labelled images before they are split: the embedded digits, a folder of classes, or a data set known to timm by name.

Nothing is decoded before it is opened, and an image that cannot be read fails then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
from PIL import Image

from attnsurgery.errors import SearchError, UsageError

_data: Any = timm.data  # its factories are typed by nothing that a checker sees
_TRAIN = ("train", "training")
_VALIDATION = ("val", "validation", "valid", "dev")
_TEST = ("test", "testing", "eval")
_NAMED = ("hfds/", "torch/")
_STREAMED = ("hfids/", "tfds/", "wds/")


@dataclass(frozen=True)
class Source:
    """Images with labels, in a fixed order."""

    ids: tuple[str, ...]
    """What tells an image from every other: a path relative to the data, or a split and a number."""
    labels: tuple[int, ...]
    open: Callable[[int], Image.Image]

    def take(self, picks: Sequence[int]) -> Source:
        """The images at these positions."""
        picks = list(picks)
        inner = self.open
        return Source(
            ids=tuple(self.ids[i] for i in picks),
            labels=tuple(self.labels[i] for i in picks),
            open=lambda i: inner(picks[i]),
        )


@dataclass(frozen=True)
class Sources:
    """Everything a specification named; `val` and `test` are None where it has no such part."""

    name: str
    classes: tuple[str, ...]
    train: Source
    val: Source | None = None
    test: Source | None = None
    flip: bool = True
    """Whether a mirrored image keeps its label."""


def find_sources(spec: str | None) -> Sources:
    """The labelled images that `spec` names.

    Args:
        spec: None for the embedded digits; a directory; or a name such as 'hfds/cifar10' or 'torch/cifar10'.

    Raises:
        UsageError: nothing of that name, or a kind of data set that cannot be split.
        SearchError: a directory without classes or images, or with classes in one part that training does not have.
    """
    if spec is None:
        return _digits()
    if Path(spec).is_dir():
        return _folder(Path(spec))
    if spec.startswith(_STREAMED):
        raise UsageError(
            f"--data {spec}: a streamed data set has no order to split by. Use its random-access form (hfds/...) "
            "or an image folder."
        )
    if spec.startswith(_NAMED):
        return _named(spec)
    raise UsageError(
        f"--data {spec}: there is no such directory, and it is not the name of a data set "
        f"({', '.join(prefix + '...' for prefix in _NAMED)}). An image folder has one sub-folder a class, or train/ "
        "and test/ with one a class. Without --data the embedded digits are used."
    )


def _digits() -> Sources:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels: np.ndarray[Any, np.dtype[np.uint8]] = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    source = Source(
        ids=tuple(f"digits/{index}" for index in range(len(pixels))),
        labels=tuple(int(label) for label in bunch.target),
        open=lambda index: Image.fromarray(pixels[index]),
    )
    return Sources("digits", tuple(map(str, range(10))), source, flip=False)


def _folder(root: Path) -> Sources:
    parts = {name: _part(root, names) for name, names in (("train", _TRAIN), ("val", _VALIDATION), ("test", _TEST))}
    top = parts["train"]
    if top is None and (found := [part.name for part in parts.values() if part]):
        raise SearchError(f"{root} has {', '.join(found)}/ but no train/. Add it, or give a folder of classes alone.")
    classes, train = _classes(top or root, root, None)
    rest = {name: _classes(part, root, classes)[1] for name, part in parts.items() if part and name != "train"}
    return Sources(root.name or str(root.resolve().name), classes, train, rest.get("val"), rest.get("test"))


def _part(root: Path, names: tuple[str, ...]) -> Path | None:
    there = {entry.name.lower(): entry for entry in root.iterdir() if entry.is_dir()}
    return next((there[name] for name in names if name in there), None)


def _classes(folder: Path, root: Path, known: tuple[str, ...] | None) -> tuple[tuple[str, ...], Source]:
    kinds: set[str] = _data.readers.get_img_extensions(as_set=True)
    folders = sorted((entry for entry in folder.iterdir() if entry.is_dir()), key=lambda entry: entry.name)
    found = {
        entry.name: sorted(path for path in entry.rglob("*") if path.suffix.lower() in kinds and path.is_file())
        for entry in folders
        if not entry.name.startswith(".")
    }
    full = {name: paths for name, paths in found.items() if paths}
    classes = known if known is not None else tuple(full)
    if strange := sorted(set(full) - set(classes)):
        raise SearchError(f"{folder} has classes that training does not have: {', '.join(strange[:5])}.")
    if len(full) < 2:
        raise SearchError(
            f"{folder} holds {len(full)} classes with images ({len(folders)} sub-folders); at least two are needed. "
            "An image folder has one sub-folder a class: DIR/cat/1.jpg, DIR/dog/2.jpg."
        )
    items = [(path, classes.index(name)) for name, paths in full.items() for path in paths]
    paths = tuple(path for path, _ in items)
    return classes, Source(
        ids=tuple(path.relative_to(root).as_posix() for path in paths),
        labels=tuple(label for _, label in items),
        open=lambda index: _open(paths[index]),
    )


def _open(path: Path) -> Image.Image:
    """Decoded: a truncated file fails here and not later in a transform."""
    with Image.open(path) as image:
        image.load()
        return image.copy()


def _named(spec: str) -> Sources:
    """Through timm's own factory, so what it knows is known here."""
    train = _named_split(spec, "train")
    if train is None:
        raise UsageError(f"--data {spec}: it has no training split, or cannot be fetched from here.")
    # torchvision's sets have one held-out part, whatever it is called for
    rest = {
        name: _named_split(spec, name) for name in (("test",) if spec.startswith("torch/") else ("validation", "test"))
    }
    count = max(train.labels) + 1
    return Sources(spec, tuple(map(str, range(count))), train, rest.get("validation"), rest.get("test"))


def _named_split(spec: str, split: str) -> Source | None:
    root = Path.home() / ".cache" / "attnsurgery" / "data" if spec.startswith("torch/") else None
    if root:
        root.mkdir(parents=True, exist_ok=True)
    try:
        dataset: Any = _data.create_dataset(spec, root=root and str(root), split=split, download=root is not None)
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
    return Source(
        ids=tuple(f"{split}/{index}" for index in range(len(dataset))),
        labels=tuple(int(label) for label in _labels(dataset)),
        open=lambda index: dataset[index][0],
    )


def _labels(dataset: Any) -> Sequence[int]:
    """Without decoding the images, where the data set has its labels apart."""
    if hasattr(dataset, "targets"):
        return list(dataset.targets)
    reader: Any = getattr(dataset, "reader", None)
    if hasattr(reader, "label_key"):
        return list(reader.dataset[reader.label_key])
    return [dataset[index][1] for index in range(len(dataset))]
