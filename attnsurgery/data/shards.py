"""Shards of webdataset: .tar files in which an image and its label share a name, such as `000.jpg` and `000.cls`.

Each file is indexed once, and then images are read at random by their offsets. A .tar file of class folders is read
too.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

from attnsurgery.data.folder import readable, role_of
from attnsurgery.data.listing import LABEL_COLUMNS, Entry, Listing, requested_columns
from attnsurgery.data.wording import count, listed
from attnsurgery.errors import SearchError, UsageError

_CLASS, _JSON = "cls", "json"
"""Endings of members with labels: text, and an object with fields."""
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_MOST_TEXT = 2**20
"""Size in bytes above which a .cls or .json member is no label."""


@dataclass(frozen=True, slots=True)
class _Member:
    """Where a file is in a shard."""

    path: str
    offset: int
    size: int


@dataclass(frozen=True)
class _Sample:
    """An image in a shard, and the text of the files that share its name."""

    image: str
    """Its path in the shard."""
    member: _Member
    texts: Mapping[str, str]
    """By ending: cls and json."""


@dataclass(frozen=True)
class _Shard:
    path: Path
    samples: tuple[_Sample, ...]
    lonely: int
    """Number of labels without an image."""
    other: Mapping[str, int]
    """Number of members that are not read, by ending."""


def holds_shards(folder: Path) -> bool:
    """Whether a folder is one of shards: it, or its folders of splits, hold .tar files, and no folder holds images."""
    if not _shards_in(folder):
        return False
    return not any(
        Path(name).suffix.lower() in readable()
        for entry in folder.iterdir()
        if entry.is_dir() and not entry.name.startswith(".")
        for _, _, names in os.walk(entry)
        for name in names
    )


def shards_listing(path: Path, requested: str) -> Listing:
    """The images of a .tar file, or of all in a folder.

    Args:
        path: of the file or the folder.
        requested: fields of the .json members that hold labels, with commas between them; '' to find them by name.

    Raises:
        UsageError: there is no such file, none that can be read at random, or no such field.
        SearchError: a file is damaged, images have no labels, or the splits are ambiguous.
    """
    files = [path] if path.is_file() else _shards_in(path) if path.is_dir() else []
    if not files:
        raise UsageError(f"--data {path}: {_no_shards(path)}")
    shards = [_index(file, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    root = path if path.is_dir() else path.parent
    roles, notes = _roles(root, files)
    entries, places = [], {}
    labelled = any(sample.texts for shard in shards for sample in shard.samples)
    folders = {} if labelled else _class_folders(path, shards)
    for shard, role in zip(shards, roles, strict=True):
        for sample in shard.samples:
            name = f"{shard.path.relative_to(root).as_posix()}/{sample.image}"
            places[name] = (shard.path, sample.member)
            inner, folder = folders.get((shard.path, sample.image), (None, None))
            cells = _cells(shard, sample) if labelled else {_CLASS: folder}
            entries.append(Entry(name, cells, inner or role))
    if not entries:
        raise SearchError(f"{path} holds no image; its shards hold {_kinds(shards) or 'nothing'}.")
    entries.sort(key=lambda entry: entry.image)
    columns = list(dict.fromkeys(column for entry in entries for column in entry.cells))
    named = requested_columns(str(path), requested, columns)
    if not named and _CLASS in columns:
        named = (_CLASS,)
    if not named and not columns:
        raise SearchError(
            f"{path} holds {count(len(entries), 'image')} without labels. A label has the name of its image: 000.jpg "
            f"and 000.{_CLASS}, with the name or number of its class, or 000.{_JSON} with a field {LABEL_COLUMNS[0]}."
        )
    lonely = sum(shard.lonely for shard in shards)
    listing = Listing(
        path.stem if path.is_file() else path.name or path.resolve().name,
        str(path),
        tuple(entries),
        tuple(columns),
        named,
        read=lambda name: _read(*places[name]),
        content=cache(partial(_digest, [places[entry.image] for entry in entries])),
    )
    return listing.noted(
        *notes,
        *([f"left out: {count(lonely, 'label')} without an image"] if lonely else []),
        *([f"not read in shards: {kinds}"] if (kinds := _kinds(shards)) else []),
    )


def _shards_in(folder: Path) -> list[Path]:
    """The .tar files of a folder and of its folders of splits."""
    folders = [folder, *(entry for entry in sorted(folder.iterdir()) if entry.is_dir() and role_of(entry.name))]
    return sorted(
        entry
        for parent in folders
        for entry in parent.iterdir()
        if entry.suffix.lower() == ".tar" and not entry.name.startswith(".") and entry.is_file()
    )


def _no_shards(path: Path) -> str:
    if not path.exists():
        return "there is no such file or folder of .tar files."
    packed = [entry.name for entry in path.iterdir() if entry.name.lower().endswith(_COMPRESSED)]
    if packed:
        return f"{packed[0]} is compressed, and its images cannot be read at random. Unpack it to a .tar file first."
    return "the folder holds no .tar file."


def _roles(root: Path, files: Sequence[Path]) -> tuple[list[str | None], list[str]]:
    """The split of each shard by its name, or else by that of its folder, and notes on unusual names.

    Raises:
        SearchError: some names say a split, and others do not.
    """
    spelled = [_spelling(root, file) for file in files]
    unknown = [file.name for file, name in zip(files, spelled, strict=True) if name is None]
    if unknown and len(unknown) < len(files):
        known = next(file.name for file in files if file.name not in unknown)
        raise SearchError(
            f"{root} has shards with names of splits, such as {known}, and others without: {listed(unknown)}. Call "
            "them train-0000.tar, val-0000.tar, test-0000.tar ..., or give a folder of those that are to be used."
        )
    roles = [None if name is None else role_of(name) for name in spelled]
    renamed = dict.fromkeys(
        f"{name}* is the {role} split" for name, role in zip(spelled, roles, strict=True) if name and name != role
    )
    return roles, [f"read as splits: {', '.join(renamed)}"] if renamed else []


def _spelling(root: Path, file: Path) -> str | None:
    """The part of a shard's name that names a split: 'train' of 'imagenet-train-0001.tar', or of 'train/0001.tar'."""
    words = re.split(r"[-_.\s]+|(?<=[a-zA-Z])(?=\d)", file.stem)
    if file.parent != root:
        words.append(file.parent.name)
    return next((word for word in words if role_of(word)), None)


@lru_cache(maxsize=4096)
def _index(path: Path, size: int, changed: int) -> _Shard:
    """The samples of a shard; a file is read again only when its size in bytes or its modification time has changed.

    Raises:
        SearchError: it is no .tar file, is compressed or truncated, or has two images of one name.
    """
    members: dict[str, dict[str, _Member]] = {}
    texts: dict[str, dict[str, str]] = {}
    other: Counter[str] = Counter()
    try:
        with tarfile.open(path, "r:") as tar, path.open("rb") as file:
            for info in tar:
                folder, _, name = info.name.rpartition("/")
                stem, _, ending = name.partition(".")
                if not info.isreg() or not stem:  # folders, links, and hidden files such as ._1.jpg
                    continue
                key, ending = f"{folder}/{stem}".lstrip("/").removeprefix("./"), ending.lower()
                member = _Member(info.name.removeprefix("./"), info.offset_data, info.size)
                if info.offset_data + info.size > size:
                    raise tarfile.ReadError("unexpected end of data")
                if ending in (_CLASS, _JSON) and info.size <= _MOST_TEXT:
                    file.seek(info.offset_data)
                    texts.setdefault(key, {})[ending] = file.read(info.size).decode("utf-8-sig", "replace").strip()
                elif f".{ending.rpartition('.')[2]}" in readable() and not info.issparse():
                    members.setdefault(key, {})[ending] = member
                else:
                    other[f".{ending}" if ending else "without an ending"] += 1
    except (tarfile.TarError, EOFError) as error:
        packed = " It is compressed: unpack it to a plain .tar file." if _is_compressed(path) else ""
        raise SearchError(f"cannot read {path} as a .tar file: {str(error) or 'it is damaged'}.{packed}") from None
    except OSError as error:
        raise SearchError(f"cannot read {path}: {error.strerror or error}.") from None
    samples = _samples(path, members, texts, other)
    return _Shard(path, tuple(samples), len(texts.keys() - members.keys()), other)


def _samples(
    path: Path, members: Mapping[str, dict[str, _Member]], texts: Mapping[str, dict[str, str]], other: Counter[str]
) -> list[_Sample]:
    """One image of each name, with its labels; all images if there are no labels.

    Args:
        path: of the shard, for messages.
        members: the images by name and ending.
        texts: the labels, likewise.
        other: images that are not chosen are added to these numbers of members that are not read, by ending.

    Raises:
        SearchError: it is ambiguous which image a label belongs to.
    """
    if not texts:
        return [_Sample(image.path, image, {}) for images in members.values() for image in images.values()]
    samples = []
    for key, images in members.items():
        plain = [ending for ending in images if "." not in ending] or list(images)
        if len(plain) > 1:
            raise SearchError(
                f"{path} has {listed(f'{key}.{ending}' for ending in plain)}, and one image should belong to a label. "
                "Give the others another name."
            )
        other.update(f".{ending}" for ending in images if ending != plain[0])
        samples.append(_Sample(images[plain[0]].path, images[plain[0]], texts.get(key, {})))
    return samples


def _is_compressed(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))


def _cells(shard: _Shard, sample: _Sample) -> dict[str, Any]:
    """What the files beside an image say of it: the fields of its .json, and its .cls.

    Raises:
        SearchError: a .json is no object.
    """
    cells: dict[str, Any] = {}
    if _JSON in sample.texts:
        try:
            cells = json.loads(sample.texts[_JSON])
        except ValueError as error:
            raise SearchError(f"{shard.path}: the .json of {sample.image} is no JSON ({error}).") from None
        if not isinstance(cells, dict):  # a bare label
            cells = {LABEL_COLUMNS[0]: cells}
    return cells | ({_CLASS: sample.texts[_CLASS]} if _CLASS in sample.texts else {})


def _class_folders(path: Path, shards: Sequence[_Shard]) -> dict[tuple[Path, str], tuple[str | None, str]]:
    """By shard and image, the split and the class that the folders in the .tar files name.

    Raises:
        SearchError: images are in no folders.
    """
    parts = {(s.path, one.image): PurePosixPath(one.image).parts[:-1] for s in shards for one in s.samples}
    if not parts or not all(parts.values()):
        if parts:
            raise SearchError(
                f"{path} holds images without labels and outside of class folders. A label has the name of its image: "
                f"000.jpg and 000.{_CLASS}, or 000.{_JSON} with a field {LABEL_COLUMNS[0]}."
            )
        return {}
    while len({folders[0] for folders in parts.values()}) == 1 and all(len(folders) > 1 for folders in parts.values()):
        parts = {image: folders[1:] for image, folders in parts.items()}
    if all(len(folders) > 1 and role_of(folders[0]) for folders in parts.values()):
        return {image: (role_of(folders[0]), folders[1]) for image, folders in parts.items()}
    return {image: (None, folders[0]) for image, folders in parts.items()}


def _read(path: Path, member: _Member) -> bytes:
    with path.open("rb") as file:
        file.seek(member.offset)
        return file.read(member.size)


def _digest(places: Iterable[tuple[Path, _Member]]) -> str:
    """A digest of the bytes of images, in their order.

    Raises:
        SearchError: a shard cannot be read.
    """
    sha256 = hashlib.sha256()
    try:
        for path, member in places:
            sha256.update(f"{member.size}:".encode() + _read(path, member))
    except OSError as error:
        raise SearchError(f"cannot read {error.filename}: {error.strerror}.") from None
    return sha256.hexdigest()[:32]


def _kinds(shards: Sequence[_Shard]) -> str:
    kinds = sum((Counter(shard.other) for shard in shards), Counter[str]())
    return ", ".join(f"{number:,} {kind}" for kind, number in kinds.most_common(5))
