"""Reads the structure of an image folder: which folders are splits, which are classes, which files are images.

Whatever is not read is counted and reported, by the kind of file. docs/data.md has the rules as a table.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from PIL import Image

from attnsurgery.data.wording import count, listed
from attnsurgery.errors import SearchError

TRAIN, VAL, TEST = "train", "val", "test"
_SPELLINGS = {
    TRAIN: ("train", "training", "trn"),
    VAL: ("val", "vali", "valid", "validation", "validate", "dev", "devel", "development"),
    TEST: ("test", "testing", "tst", "eval", "evaluation", "holdout", "heldout"),
}
_ROLES = {spelling: role for role, spellings in _SPELLINGS.items() for spelling in spellings}
_FILLERS = ("set", "sets", "split", "data", "dataset", "image", "images", "img", "imgs", "folder", "the")
"""Words beside a split's name in the name of its folder: train_set, Training Set, test-images, valData."""
_NO_PHOTOS = ("BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "WMF")
"""Formats that PIL passes to other programs, or whose files usually hold something else than a photo."""
_PICTURES = (
    *(".heic", ".heif", ".avif", ".jxl", ".svg", ".raw", ".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".rw2"),
    *(".dcm", ".nii", ".exr", ".hdr", ".webp", ".jp2", ".tif", ".tiff"),
)
"""Endings of files that certainly hold an image, whether or not this PIL can read it."""
_RUBBISH_FOLDERS = ("__macosx", "__pycache__", "@eadir", "$recycle.bin", "lost+found")
_RUBBISH_FILES = ("thumbs.db", "desktop.ini", "ehthumbs.db")
_LISTED = 5
"""Number of things that a message lists."""


@dataclass(frozen=True)
class Folder:
    """Splits, classes and images of an image folder."""

    classes: tuple[str, ...]
    parts: Mapping[str, tuple[tuple[Path, int], ...]]
    """By split: the image files with the number of their class, in a fixed order."""
    notes: tuple[str, ...]
    """What was left out or has an unusual name, a line each."""


def read_folder(root: Path) -> Folder:
    """Find splits, classes and images; no file is opened.

    Raises:
        SearchError: there are fewer than two classes, or the structure is ambiguous.
    """
    tree = walk(root)
    parts = _splits(root, tree)
    notes = _Notes()
    if parts:
        _note_other_folders(tree, parts, notes)
        loose = [*tree.files, *(path for part in parts.values() for path in part.files)]
    else:
        _refuse_hidden_splits(root, tree)
        parts, loose = {TRAIN: tree}, tree.files
    parts = {role: _normalise(part, notes) for role, part in parts.items()}
    classes = tuple(_classes_of(parts[TRAIN]))
    notes.loose(root, loose)
    for role, part in parts.items():
        _check_classes(part, classes, role, notes)
    notes.skipped(tree, parts.values())
    images = {
        role: tuple((path, classes.index(name)) for name, paths in _classes_of(part).items() for path in paths)
        for role, part in parts.items()
    }
    return Folder(classes, images, tuple(notes.lines))


@cache
def readable() -> frozenset[str]:
    """The endings of files that this PIL reads, in lower case, those of registered plugins included."""
    Image.init()
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    excluded = {ending for ending, kind in Image.registered_extensions().items() if kind in _NO_PHOTOS}
    return frozenset(endings - excluded | {".mpo"})  # several photos in one JPEG file


@cache
def formats() -> tuple[str, ...]:
    """The formats that Pillow decodes by itself; no file is opened in any other format, whatever its name.

    Pillow recognises formats by content: it would pass an EPS file with the name of a JPEG file to Ghostscript.
    """
    Image.init()
    return tuple(kind for kind in Image.OPEN if kind not in _NO_PHOTOS)


def role_of(name: str) -> str | None:
    """The split that a folder's name stands for: 'Training Set' is train, 'val2017' is val; None for other names."""
    words = re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())
    joined = "".join(word for word in words if word not in _FILLERS)
    if joined not in _ROLES:
        joined = re.sub(rf"({'|'.join(_FILLERS)})$", "", joined)
    return _ROLES.get(joined)


@dataclass
class Tree:
    """A folder with its content."""

    path: Path
    files: list[Path] = field(default_factory=list)
    """Images in the folder itself."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Number of other files in the folder itself, by ending."""
    dangling: list[Path] = field(default_factory=list)
    """Links to missing files: images that were never fetched, or whose cache was moved."""
    hidden: int = 0
    """Number of files and folders that operating systems create."""
    folders: dict[str, Tree] = field(default_factory=dict)
    """Folders in this folder, by name."""

    def all(self) -> Iterator[Tree]:
        yield self
        for folder in self.folders.values():
            yield from folder.all()

    def images(self) -> list[Path]:
        """Images at any depth, in the order of their paths."""
        return sorted(path for tree in self.all() for path in tree.files)

    def has_classes(self) -> bool:
        return any(folder.images() for folder in self.folders.values())


def walk(folder: Path, above: frozenset[str] = frozenset()) -> Tree:
    """The tree under a folder, links followed unless they lead in a circle."""
    tree, kinds = Tree(folder), readable()
    above |= {os.path.realpath(folder)}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        name = entry.name.lower()
        if name.startswith(".") or name in _RUBBISH_FOLDERS or name in _RUBBISH_FILES:
            tree.hidden += 1
        elif entry.is_dir():
            if os.path.realpath(entry.path) not in above:
                tree.folders[entry.name] = walk(folder / entry.name, above)
        elif entry.is_file():
            ending = os.path.splitext(name)[1]
            if ending in kinds:
                tree.files.append(folder / entry.name)
            else:
                tree.skipped[ending] += 1
        elif entry.is_symlink():
            tree.dangling.append(folder / entry.name)
    return tree


def _splits(root: Path, tree: Tree) -> dict[str, Tree]:
    """The folders that are splits, by split; {} where the folders are classes.

    Raises:
        SearchError: two folders are for the same split, or there is no training split.
    """
    folders: dict[str, list[str]] = {}
    for name, folder in tree.folders.items():
        if (role := role_of(name)) and folder.has_classes():
            folders.setdefault(role, []).append(name)
    for role, names in folders.items():
        if len(names) > 1:
            raise SearchError(
                f"{root} has {' and '.join(f'{name}/' for name in names)}, which both read as the {role} split. "
                "Keep one, and move the other out of the folder or put their images together."
            )
    if folders and TRAIN not in folders:
        existing = ", ".join(names[0] for names in folders.values())
        raise SearchError(f"{root} has {existing}/ but no train/. Add it, or give a folder of classes alone.")
    return {role: tree.folders[folders[role][0]] for role in _SPELLINGS if role in folders}


def _note_other_folders(tree: Tree, parts: Mapping[str, Tree], notes: _Notes) -> None:
    """Note folders that are read as splits under another name, and folders with images that are not read."""
    renamed = [f"{part.path.name}/ is the {role} split" for role, part in parts.items() if part.path.name != role]
    if renamed:
        notes.lines.append(f"read as splits: {', '.join(renamed)}")
    part_paths = {folder.path for folder in parts.values()}
    for name, folder in tree.folders.items():
        if folder.path not in part_paths and (images := len(folder.images())):
            labels = "" if folder.has_classes() or not role_of(name) else ", which lie in no class folders"
            notes.lines.append(f"not used: {name}/ with {count(images, 'image')}{labels}")


def _refuse_hidden_splits(root: Path, tree: Tree) -> None:
    """
    Raises:
        SearchError: the folders contain folders of the same names, which is usual for splits and not for classes.
    """
    inner = {name: set(_classes_of(folder)) for name, folder in tree.folders.items() if folder.images()}
    if len(inner) < 2:
        return
    largest = max(inner.values(), key=len)
    if all(len(names) > 1 and names <= largest for names in inner.values()):
        raise SearchError(
            f"the folders of {root} ({listed(inner)}) hold folders of the same names ({listed(sorted(largest))}), as "
            "splits do and classes do not. If they are splits, call them train/, val/ and test/; one without the "
            "others is a data set by itself. If they are classes, put each one's images into one folder."
        )


def _normalise(part: Tree, notes: _Notes) -> Tree:
    """The same part with the names of classes in composed Unicode (NFC), and bytes that are no UTF-8 escaped.

    macOS writes an accented letter as two characters and other systems as one, which would make two classes of one.
    """
    folders: dict[str, Tree] = {}
    for name, folder in part.folders.items():
        spelled = unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "backslashreplace"))
        if spelled in folders:
            notes.lines.append(f"two folders for one class, read as one: {spelled}")
            existing = folders[spelled]
            folders[spelled] = Tree(existing.path, folders={"": existing, " ": folder})
        else:
            folders[spelled] = folder
    return replace(part, folders=folders)


def _check_classes(part: Tree, classes: tuple[str, ...], role: str, notes: _Notes) -> None:
    """
    Raises:
        SearchError: too few classes, one that the training split lacks, or one none of whose images can be read.
    """
    images = _classes_of(part)
    for name, folder in part.folders.items():
        dangling = [path for tree in folder.all() for path in tree.dangling]
        if name not in images and dangling:
            raise SearchError(
                f"{folder.path} holds {count(len(dangling), 'link')} to files that are not there ({dangling[0].name} "
                f"is the first), and no image: without them the class {name!r} would be left out. Fetch the images "
                "(dvc pull, git annex get), or remove the links."
            )
        skipped = sum((tree.skipped for tree in folder.all()), Counter[str]())
        if name not in images and (kinds := sorted(ending for ending in skipped if ending in _PICTURES)):
            raise SearchError(
                f"{folder.path} holds {count(sum(skipped[kind] for kind in kinds), 'image')} of kinds that PIL does "
                f"not read here ({', '.join(kinds)}), and no other: without them the class {name!r} would be left "
                "out. Convert them, to PNG for instance, or install PIL's plugin for them."
            )
    if unexpected := sorted(set(images) - set(classes)):
        raise SearchError(f"{part.path} has classes that training does not have: {listed(unexpected)}.")
    if len(images) < 2:
        raise SearchError(_too_few(part, images))
    if empty := sorted(name for name in part.folders if name not in images):
        notes.lines.append(f"no images in: {listed(f'{part.path.name}/{name}/' for name in empty)}")
    if role != TRAIN and (missing := [name for name in classes if name not in images and name not in empty]):
        notes.lines.append(f"the {role} split has no images of {listed(missing)}")


def _too_few(part: Tree, images: Mapping[str, Sequence[Path]]) -> str:
    message = (
        f"{part.path} holds {count(len(images), 'class')} with images ({len(part.folders)} sub-folders); at least two "
        "are needed. An image folder has one sub-folder a class: DIR/cat/1.jpg, DIR/dog/2.jpg."
    )
    if loose := len(part.files):
        message += f" {count(loose, 'image')} lie in the folder itself, in no class."
    skipped = sum((tree.skipped for tree in part.all()), Counter[str]())
    if skipped:
        message += f" Not read as images: {_by_kind(skipped)}."
    with_images = [folder for folder in part.folders.values() if folder.images()]
    if len(with_images) == 1 and len(_classes_of(with_images[0])) > 1:
        message += f" Did you mean {with_images[0].path}?"
    return message


class _Notes:
    """Collects lines about whatever is left out or has an unusual name."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def loose(self, root: Path, loose: Sequence[Path]) -> None:
        """Images that lie in no class folder."""
        if loose:
            first = loose[0].relative_to(root).as_posix()
            self.lines.append(f"not used: {count(len(loose), 'image')} in no class folder ({first} is the first)")

    def skipped(self, root: Tree, parts: Iterable[Tree]) -> None:
        """Files that are not read: all in the parts that are read, and elsewhere those that certainly hold an image."""
        trees = [tree for top in parts for tree in top.all()]
        skipped, hidden = sum((tree.skipped for tree in trees), Counter[str]()), sum(tree.hidden for tree in trees)
        tree_paths = {tree.path for tree in trees}
        for tree in root.all():
            if tree.path not in tree_paths:
                skipped += Counter({ending: n for ending, n in tree.skipped.items() if ending in _PICTURES})
        if skipped:
            self.lines.append(f"not read as images: {_by_kind(skipped)}")
        if dangling := [path for tree in root.all() for path in tree.dangling]:
            first = dangling[0].relative_to(root.path).as_posix()
            self.lines.append(
                f"left out: {count(len(dangling), 'link')} to files that are not there ({first} is the first)"
            )
        if hidden:
            self.lines.append(f"left out: {count(hidden, 'hidden file or folder')} such as .DS_Store and __MACOSX")


def _classes_of(part: Tree) -> dict[str, list[Path]]:
    """By the name of each class that has images, these images."""
    images = {name: folder.images() for name, folder in part.folders.items()}
    return {name: paths for name, paths in images.items() if paths}


def _by_kind(skipped: Counter[str]) -> str:
    kinds = sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count:,} {ending or 'without an ending'}" for ending, count in kinds[: 2 * _LISTED])
