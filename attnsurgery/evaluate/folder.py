"""An image folder as its owner means it: which folders are splits, which are classes, which files are images.

What is not read is never passed over in silence: it is counted, by the kind of file, and told. docs/data.md has the
rules as a table.
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

from attnsurgery.errors import SearchError

TRAIN, VAL, TEST = "train", "val", "test"
_SPELLINGS = {
    TRAIN: ("train", "training", "trn"),
    VAL: ("val", "vali", "valid", "validation", "validate", "dev", "devel", "development"),
    TEST: ("test", "testing", "tst", "eval", "evaluation", "holdout", "heldout"),
}
_ROLES = {spelling: role for role, spellings in _SPELLINGS.items() for spelling in spellings}
_FILLERS = ("set", "sets", "split", "data", "dataset", "image", "images", "img", "imgs", "folder", "the")
"""What stands beside a split's name in a folder's: train_set, Training Set, test-images, valData."""
_NO_PHOTOS = ("BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "WMF")
"""Formats that PIL knows by name and hands to other programs, or whose files hold something else as a rule."""
_PICTURES = (
    *(".heic", ".heif", ".avif", ".jxl", ".svg", ".raw", ".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".rw2"),
    *(".dcm", ".nii", ".exr", ".hdr", ".webp", ".jp2", ".tif", ".tiff"),
)
"""Files that hold an image for certain, whether or not PIL reads them here."""
_RUBBISH_FOLDERS = ("__macosx", "__pycache__", "@eadir", "$recycle.bin", "lost+found")
_RUBBISH_FILES = ("thumbs.db", "desktop.ini", "ehthumbs.db")
_NAMED = 5
"""So many things a message lists."""


@dataclass(frozen=True)
class Folder:
    """What an image folder holds."""

    classes: tuple[str, ...]
    parts: Mapping[str, tuple[tuple[Path, int], ...]]
    """Of each split that is there: the image files with the number of their class, in a fixed order."""
    notes: tuple[str, ...]
    """What was left out or is named otherwise, a line each."""


def read_folder(root: Path) -> Folder:
    """Find splits, classes and images; no file is opened.

    Raises:
        SearchError: there are no two classes, or it cannot be told what is meant.
    """
    found = _walk(root)
    parts = _splits(root, found)
    told = _Told()
    if parts:
        listed, rest = _read_parts(root, found, parts, told)
    else:
        _refuse_hidden_splits(root, found)
        listed, rest = {TRAIN: found}, found.files
    listed = {role: _in_one_spelling(part, told) for role, part in listed.items()}
    classes = tuple(_full(listed[TRAIN]))
    told.beside(root, rest)
    for role, part in listed.items():
        _check_classes(part, classes, role, told)
    told.skipped(found, listed.values())
    held = {
        role: tuple((path, classes.index(name)) for name, paths in _full(part).items() for path in paths)
        for role, part in listed.items()
    }
    return Folder(classes, held, tuple(told.lines))


@cache
def readable() -> frozenset[str]:
    """The endings of files that PIL reads here, in lower case, with those of plugins that registered themselves."""
    Image.init()
    ways = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    others = {ending for ending, kind in Image.registered_extensions().items() if kind in _NO_PHOTOS}
    return frozenset(ways - others | {".mpo"})  # several photos in one JPEG file


@cache
def formats() -> tuple[str, ...]:
    """The formats that Pillow decodes by itself. A file is opened as one of these, whatever its name says.

    Pillow recognises a format by content: EPS under the name of a JPEG would go to Ghostscript.
    """
    Image.init()
    return tuple(kind for kind in Image.OPEN if kind not in _NO_PHOTOS)


def role_of(name: str) -> str | None:
    """The split that a folder's name means: 'Training Set' is train, 'val2017' is val; None of any other name."""
    words = re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())
    joined = "".join(word for word in words if word not in _FILLERS)
    if joined not in _ROLES:
        joined = re.sub(rf"({'|'.join(_FILLERS)})$", "", joined)
    return _ROLES.get(joined)


@dataclass
class _Tree:
    """A folder with what lies in it."""

    path: Path
    files: list[Path] = field(default_factory=list)
    """Images that lie in the folder itself."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Other files there, by their endings."""
    dangling: list[Path] = field(default_factory=list)
    """Links to nothing: images that were never fetched, or whose cache was moved."""
    hidden: int = 0
    """Files that a system has put there, and whole folders of them."""
    folders: dict[str, _Tree] = field(default_factory=dict)

    def all(self) -> Iterator[_Tree]:
        yield self
        for folder in self.folders.values():
            yield from folder.all()

    def images(self) -> list[Path]:
        """At any depth, in the order of their paths."""
        return sorted(path for tree in self.all() for path in tree.files)

    def holds_classes(self) -> bool:
        return any(folder.images() for folder in self.folders.values())


def _walk(folder: Path, above: frozenset[str] = frozenset()) -> _Tree:
    """The tree under a folder, links followed unless they lead in a circle."""
    tree, kinds = _Tree(folder), readable()
    above |= {os.path.realpath(folder)}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        name = entry.name.lower()
        if name.startswith(".") or name in _RUBBISH_FOLDERS or name in _RUBBISH_FILES:
            tree.hidden += 1
        elif entry.is_dir():
            if os.path.realpath(entry.path) not in above:
                tree.folders[entry.name] = _walk(folder / entry.name, above)
        elif entry.is_file():
            ending = os.path.splitext(name)[1]
            if ending in kinds:
                tree.files.append(folder / entry.name)
            else:
                tree.skipped[ending] += 1
        elif entry.is_symlink():
            tree.dangling.append(folder / entry.name)
    return tree


def _splits(root: Path, found: _Tree) -> dict[str, _Tree]:
    """The folders that are splits, by what they are for; none where the folders are classes.

    Raises:
        SearchError: two of them are for the same, or there is nothing to train on.
    """
    named: dict[str, list[str]] = {}
    for name, folder in found.folders.items():
        if (role := role_of(name)) and folder.holds_classes():
            named.setdefault(role, []).append(name)
    for role, names in named.items():
        if len(names) > 1:
            raise SearchError(
                f"{root} has {' and '.join(f'{name}/' for name in names)}, which both read as the {role} split. "
                "Keep one, and move the other out of the folder or put their images together."
            )
    if named and TRAIN not in named:
        there = ", ".join(names[0] for names in named.values())
        raise SearchError(f"{root} has {there}/ but no train/. Add it, or give a folder of classes alone.")
    return {role: found.folders[named[role][0]] for role in _SPELLINGS if role in named}


def _read_parts(root: Path, found: _Tree, parts: dict[str, _Tree], told: _Told) -> tuple[dict[str, _Tree], list[Path]]:
    """The splits, and images that lie in none of their classes; what else is there is told."""
    renamed = [f"{part.path.name}/ is the {role} split" for role, part in parts.items() if part.path.name != role]
    if renamed:
        told.lines.append(f"read as splits: {', '.join(renamed)}")
    known = {folder.path for folder in parts.values()}
    for name, folder in found.folders.items():
        if folder.path not in known and (count := len(folder.images())):
            labels = "" if folder.holds_classes() or not role_of(name) else ", which lie in no class folders"
            told.lines.append(f"not used: {name}/ with {_count(count, 'image')}{labels}")
    return parts, [*found.files, *(path for part in parts.values() for path in part.files)]


def _refuse_hidden_splits(root: Path, found: _Tree) -> None:
    """
    Raises:
        SearchError: the folders have the same folders in them, as splits have and classes have not.
    """
    inner = {name: set(_full(folder)) for name, folder in found.folders.items() if folder.images()}
    if len(inner) < 2:
        return
    most = max(inner.values(), key=len)
    if all(len(names) > 1 and names <= most for names in inner.values()):
        raise SearchError(
            f"the folders of {root} ({_listed(inner)}) hold folders of the same names ({_listed(sorted(most))}), as "
            "splits do and classes do not. If they are splits, call them train/, val/ and test/; one without the "
            "others is a data set by itself. If they are classes, put each one's images into one folder."
        )


def _in_one_spelling(part: _Tree, told: _Told) -> _Tree:
    """The same with classes by names that can be written and compared: composed Unicode, and nothing that is no UTF-8.

    macOS writes an accented letter as two characters and other systems as one, so that one class came to be two.
    """
    folders: dict[str, _Tree] = {}
    for name, folder in part.folders.items():
        spelled = unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "backslashreplace"))
        if spelled in folders:
            told.lines.append(f"two folders for one class, read as one: {spelled}")
            both = folders[spelled]
            folders[spelled] = _Tree(both.path, folders={"": both, " ": folder})
        else:
            folders[spelled] = folder
    return replace(part, folders=folders)


def _check_classes(part: _Tree, classes: tuple[str, ...], role: str, told: _Told) -> None:
    """
    Raises:
        SearchError: too few classes, one that training lacks, or one whose images cannot be read here at all.
    """
    full = _full(part)
    for name, folder in part.folders.items():
        dangling = [path for tree in folder.all() for path in tree.dangling]
        if name not in full and dangling:
            raise SearchError(
                f"{folder.path} holds {_count(len(dangling), 'link')} to files that are not there ({dangling[0].name} "
                f"is the first), and no image: without them the class {name!r} would be left out. Fetch the images "
                "(dvc pull, git annex get), or remove the links."
            )
        skipped = sum((tree.skipped for tree in folder.all()), Counter[str]())
        if name not in full and (kinds := sorted(ending for ending in skipped if ending in _PICTURES)):
            raise SearchError(
                f"{folder.path} holds {_count(sum(skipped[kind] for kind in kinds), 'image')} of kinds that PIL does "
                f"not read here ({', '.join(kinds)}), and no other: without them the class {name!r} would be left "
                "out. Convert them, to PNG for instance, or install PIL's plugin for them."
            )
    if strange := sorted(set(full) - set(classes)):
        raise SearchError(f"{part.path} has classes that training does not have: {_listed(strange)}.")
    if len(full) < 2:
        raise SearchError(_too_few(part, full))
    if empty := sorted(name for name in part.folders if name not in full):
        told.lines.append(f"no images in: {_listed(f'{part.path.name}/{name}/' for name in empty)}")
    if role != TRAIN and (missing := [name for name in classes if name not in full and name not in empty]):
        told.lines.append(f"the {role} split has no images of {_listed(missing)}")


def _too_few(part: _Tree, full: Mapping[str, Sequence[Path]]) -> str:
    said = (
        f"{part.path} holds {_count(len(full), 'class')} with images ({len(part.folders)} sub-folders); at least two "
        "are needed. An image folder has one sub-folder a class: DIR/cat/1.jpg, DIR/dog/2.jpg."
    )
    if loose := len(part.files):
        said += f" {_count(loose, 'image')} lie in the folder itself, in no class."
    skipped = sum((tree.skipped for tree in part.all()), Counter[str]())
    if skipped:
        said += f" Not read as images: {_by_kind(skipped)}."
    with_images = [folder for folder in part.folders.values() if folder.images()]
    if len(with_images) == 1 and len(_full(with_images[0])) > 1:
        said += f" Is {with_images[0].path} meant?"
    return said


class _Told:
    """The lines about what is not as one might think."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def beside(self, root: Path, loose: Sequence[Path]) -> None:
        if loose:
            first = loose[0].relative_to(root).as_posix()
            self.lines.append(f"not used: {_count(len(loose), 'image')} in no class folder ({first} is the first)")

    def skipped(self, found: _Tree, read: Iterable[_Tree]) -> None:
        """Files in what is read; beside that, such as hold an image for certain."""
        every = [tree for top in read for tree in top.all()]
        skipped, hidden = sum((tree.skipped for tree in every), Counter[str]()), sum(tree.hidden for tree in every)
        known = {tree.path for tree in every}
        for tree in found.all():
            if tree.path not in known:
                skipped += Counter({ending: n for ending, n in tree.skipped.items() if ending in _PICTURES})
        if skipped:
            self.lines.append(f"not read as images: {_by_kind(skipped)}")
        if dangling := [path for tree in found.all() for path in tree.dangling]:
            first = dangling[0].relative_to(found.path).as_posix()
            self.lines.append(
                f"left out: {_count(len(dangling), 'link')} to files that are not there ({first} is the first)"
            )
        if hidden:
            self.lines.append(f"left out: {_count(hidden, 'hidden file or folder')} such as .DS_Store and __MACOSX")


def _full(part: _Tree) -> dict[str, list[Path]]:
    """The classes that have images, with these."""
    found = {name: folder.images() for name, folder in part.folders.items()}
    return {name: paths for name, paths in found.items() if paths}


def _by_kind(skipped: Counter[str]) -> str:
    kinds = sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count:,} {ending or 'without an ending'}" for ending, count in kinds[: 2 * _NAMED])


def _count(count: int, what: str) -> str:
    plural = {"class": "classes", "hidden file or folder": "hidden files or folders"}.get(what, f"{what}s")
    return f"{count:,} {what if count == 1 else plural}"


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    more = len(every) - _NAMED
    return ", ".join(every[:_NAMED]) + (f" and {more} more" if more > 0 else "")
