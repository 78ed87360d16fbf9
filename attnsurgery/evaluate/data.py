"""Three splits of labelled images: the search trains on one, chooses by the second, and never sees the third."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from attnsurgery.errors import SearchError, UsageError
from attnsurgery.evaluate import doubles
from attnsurgery.evaluate.augment import NAMES, mirrors, words
from attnsurgery.evaluate.batches import FileSplit, MemorySplit, Split
from attnsurgery.evaluate.contents import digests_of
from attnsurgery.evaluate.flips import check_flips
from attnsurgery.evaluate.picture import Rendering
from attnsurgery.evaluate.preprocess import Preprocessing
from attnsurgery.evaluate.scan import Scan, depths, depths_of, scan, told
from attnsurgery.evaluate.source import Source, Sources, find_sources
from attnsurgery.settings import Augment

_HELD_OUT = 0.2
"""Share of each class that goes to a split which the data does not come with."""
_UNBALANCED = 3.0
"""Largest to smallest class: from there on top-1 alone says little."""
_CLASSES = 12
_LETTERS = 160

OnLoad = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Data:
    """What a search trains on (`train`), chooses by (`val`) and is judged on once, at the end (`test`)."""

    name: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    train: Split
    val: Split
    test: Split
    fingerprinted: Callable[[], str]
    """Makes the fingerprint: all image files are read for it."""
    augment: Augment = "light"
    """How training images are varied."""
    notes: tuple[str, ...] = ()
    """What is not as one might think: what was left out, converted, found twice, or is unbalanced; a line each."""
    shared: tuple[str, ...] | None = None
    """What the splits have in common, a line each; None where that was not looked for."""

    @cached_property
    def fingerprint(self) -> str:
        """Changes with an image's bytes, name, label or split, and with the preprocessing; not with the data's name."""
        return self.fingerprinted()

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def unbalanced(self) -> bool:
        """Whether the largest class of the training split has several times as many images as the smallest."""
        counts = Counter(self.train.labels.tolist())
        return max(counts.values()) > _UNBALANCED * min(counts.values())

    def balanced(self, split: Split, correct_N: torch.Tensor) -> float | None:
        """Mean over the classes of their shares of right answers in a split, 0 to 1; None unless they are unbalanced.

        Args:
            correct_N: which of its images were right.
        """
        if not self.unbalanced:
            return None
        shares = [correct_N[split.labels == label].float().mean() for label in set(split.labels.tolist())]
        return float(torch.stack(shares).mean())

    def describe(self) -> str:
        """One line for people."""
        counts = f"{len(self.train)} train, {len(self.val)} validation, {len(self.test)} test"
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
) -> Data:
    """Images with labels in three splits that share none.

    A split that the data does not come with is taken out of its training images, a fifth of every class, the same for
    the same seed.

    Args:
        spec: None for the embedded digits; an image folder; or a name such as 'hfds/cifar10'.
        augment: how training images are varied: none, shift, light or timm; by default what suits the data, which is
            'light' unless mirrored images turn out to be of another class, and 'shift' for the digits.
        group_by: a regular expression on the path of an image relative to the data; images in which its first group, or
            else all that it matches, is the same stay in one split.
        memory_bytes: data that fits at its input size, as uint8, is decoded once and kept.
        workers: processes that decode what does not fit; by default one a core, at most 8.
        on_load: called with the split's name, images decoded, images in all.
        decode: False leaves it to whoever first asks for images; what there is, is known all the same.
        check: open every image once at the start, look for copies, and whether mirrored images keep their labels. False
            where another process has done that.
        known: of the files' digests, for the fingerprint (`attnsurgery.evaluate.contents`); more is added to it.

    Raises:
        UsageError: `spec`, `augment` or `group_by` names nothing.
        SearchError: no classes, too few images of one, or images that cannot be read.
    """
    if augment is not None and augment not in NAMES:
        raise UsageError(f"--augment {augment}: there is no such augmentation. Known: {', '.join(NAMES)}.")
    mode = preprocessing.image_mode
    sources = find_sources(spec)
    grouping, notes = _groups(sources.train, group_by), list(sources.notes)
    parts = split_sources(sources, seed, grouping.of if grouping else None)
    size = int(np.prod(preprocessing.input_size))
    fits = size * sum(len(part.ids) for part in parts.values()) <= memory_bytes
    count = min(8, os.cpu_count() or 1) if workers is None else workers
    scans: dict[str, Scan] = {}
    if check and spec is not None and (sources.train.paths or not fits):
        scans = {name: scan(part, _progress(on_load, f"checking {name}")) for name, part in parts.items()}
    rendering = Rendering(mode, *(depths(list(scans.values())) if scans else depths_of(list(parts.values()))))
    chosen: Augment = sources.augment if augment is None else augment
    shared: tuple[str, ...] | None = None
    if check:
        if scans:
            notes += told(list(scans.values()))
            shared = tuple(_shared(scans, parts))
        if grouping:
            notes += grouping.lines(sources)
        chosen, said = _settled(chosen, parts["train"], rendering, given=augment is not None)
        notes += [*said, *_balance(sources.classes, parts)]

    def split(name: str) -> Split:
        how: Augment = chosen if name == "train" else "none"
        if fits and how != "timm":
            held = MemorySplit(parts[name], preprocessing, rendering, how, _progress(on_load, name))
            if decode:
                held.decode()
            return held
        return FileSplit(parts[name], preprocessing, rendering, how, count)

    return Data(
        name=sources.name,
        classes=sources.classes,
        preprocessing=preprocessing,
        train=split("train"),
        val=split("val"),
        test=split("test"),
        fingerprinted=lambda: _fingerprint(sources, parts, preprocessing, known, _progress(on_load, "comparing")),
        augment=chosen,
        notes=(*notes, *(shared or ())),
        shared=shared,
    )


def _progress(on_load: OnLoad | None, what: str) -> Callable[[int, int], None] | None:
    return None if on_load is None else lambda done, total: on_load(what, done, total)


def _listed(classes: Sequence[str]) -> str:
    shown = list(classes[:_CLASSES])
    while len(shown) > 2 and sum(map(len, shown)) > _LETTERS:
        shown.pop()
    more = len(classes) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _settled(augment: Augment, train: Source, rendering: Rendering, given: bool) -> tuple[Augment, list[str]]:
    """The augmentation that is used, with what is to be said of it.

    Args:
        given: the user has asked for it; then it is used in any case.
    """
    lines = [f"training images: {words(augment)}"]
    if not mirrors(augment):
        return augment, lines
    found = check_flips(train, rendering)
    if not found.changes_labels:
        return augment, lines
    if given:
        return augment, [*lines, f"WARNING mirroring seems to change labels: {found.words()}. See --augment none"]
    return "shift", [
        f"training images: {words('shift')}, and not mirrored, which seems to change labels: {found.words()}; "
        "--augment light mirrors them all the same, --augment none leaves them as they are"
    ]


def _balance(classes: Sequence[str], parts: Mapping[str, Source]) -> list[str]:
    """How unbalanced the classes are, if they are."""
    counts = Counter(parts["train"].labels)
    (most, largest), (least, smallest) = counts.most_common()[0], counts.most_common()[-1]
    if largest <= _UNBALANCED * smallest:
        return []
    share = parts["val"].labels.count(most) / len(parts["val"].labels)
    return [
        f"unbalanced: {largest:,} training images of {classes[most]}, {smallest:,} of {classes[least]}. Whoever always "
        f"says {classes[most]} gets {100 * share:.1f} % of the validation images right, so balanced accuracy stands "
        "beside top-1"
    ]


def _shared(scans: Mapping[str, Scan], parts: Mapping[str, Source]) -> list[str]:
    lines = [line for one in doubles.shared(scans) for line in one.lines()]
    if twice := doubles.of_two_classes(scans, {name: part.labels for name, part in parts.items()}):
        one, other = twice[0]
        are = "image is a byte copy" if len(twice) == 1 else "images are byte copies"
        lines.append(f"in two classes: {len(twice):,} {are} of one of another class ({one} is {other})")
    return lines


def native_size(spec: str | None) -> int:
    """The usual shorter side of the images, in pixels, from a few of them.

    Raises:
        UsageError, SearchError: as `load_data`.
    """
    source = find_sources(spec).train
    few = range(0, len(source.ids), max(1, len(source.ids) // 16))
    sides = []
    for index in few:
        try:
            sides.append(min(source.open(index).size))
        except Exception:  # load_data names the unreadable ones, all together
            continue
    return int(np.median(sides)) if sides else 224


def split_sources(sources: Sources, seed: int, groups: Sequence[str] | None = None) -> dict[str, Source]:
    """The three parts by name; missing ones are taken out of the training part, class by class.

    Args:
        groups: of each training image; those of one group stay together.

    Raises:
        SearchError: a class has too few images, or too few groups, to be in every part.
    """
    parts = {"train": sources.train, "val": sources.val, "test": sources.test}
    missing = [name for name, part in parts.items() if part is None]
    _enough(sources, 1 + len(missing))
    left = list(range(len(sources.train.ids)))
    result: dict[str, Source] = {}
    for name in missing:
        share = _HELD_OUT * len(sources.train.ids) / len(left)
        labels = [sources.train.labels[index] for index in left]
        if groups is None:
            taken = {left[place] for place in stratified(labels, share, seed)}
        else:
            after = len(missing) - len(result)
            places = by_groups(labels, [groups[index] for index in left], share, seed, after, sources.classes)
            taken = {left[place] for place in places}
        result[name] = sources.train.take(sorted(taken))
        left = [index for index in left if index not in taken]
    rest = sources.train.take(left) if missing else sources.train
    return {name: result.get(name) or part or rest for name, part in {**parts, "train": None}.items()}


def stratified(labels: Sequence[int], share: float, seed: int) -> list[int]:
    """Positions of `share` of each class, at least one, in ascending order; the same for the same seed."""
    labels_N = np.asarray(labels)
    picks: list[int] = []
    for label in np.unique(labels_N):
        of_class = np.flatnonzero(labels_N == label)
        count = min(len(of_class) - 1, max(1, round(share * len(of_class))))
        order = np.random.default_rng([seed, int(label)]).permutation(of_class)
        picks.extend(int(index) for index in order[:count])
    return sorted(picks)


def by_groups(
    labels: Sequence[int], groups: Sequence[str], share: float, seed: int, rest: int, classes: Sequence[str]
) -> list[int]:
    """As `stratified`, but whole groups: about `share` of each class, and at least one group of it.

    Args:
        rest: at least so many groups of each class stay.

    Raises:
        SearchError: a class is in too few groups.
    """
    counts: dict[str, Counter[int]] = {}
    for label, group in zip(labels, groups, strict=True):
        counts.setdefault(group, Counter())[label] += 1
    there = Counter(label for of_group in counts.values() for label in of_group)
    for label, number in sorted(there.items()):
        if number <= rest:
            raise SearchError(
                f"--group-by puts the images of class {classes[label]!r} into {number} groups of which each stays in "
                f"one split, and {rest + 1} are needed for every split to have one. Use a pattern that tells more "
                "groups apart, or give the splits as folders of their own."
            )
    total = Counter(labels)
    wanted = {label: max(1, round(share * number)) for label, number in total.items()}
    names = sorted(counts)
    order = [names[index] for index in np.random.default_rng([seed, len(names)]).permutation(len(names))]
    taken: dict[str, None] = {}
    held: Counter[int] = Counter()

    def may_go(group: str) -> bool:
        return group not in taken and all(there[label] > rest for label in counts[group])

    def take(group: str) -> None:
        taken[group] = None
        held.update(counts[group])
        there.subtract(dict.fromkeys(counts[group], 1))

    for group in order:
        before = sum(abs(wanted[label] - held[label]) for label in counts[group])
        after = sum(abs(wanted[label] - held[label] - number) for label, number in counts[group].items())
        if after < before and may_go(group):
            take(group)
    for label in sorted(total):
        if not held[label]:
            fitting = [group for group in order if label in counts[group] and may_go(group)]
            if not fitting:
                raise SearchError(
                    f"--group-by leaves no split of its own for class {classes[label]!r}: its groups are those of "
                    "other classes too. Use a pattern that tells more groups apart, or give the splits as folders."
                )
            take(min(fitting, key=lambda group: counts[group].total()))
    return [place for place, group in enumerate(groups) if group in taken]


@dataclass(frozen=True)
class _Grouping:
    """Which images of the training part stay together."""

    pattern: re.Pattern[str]
    of: tuple[str, ...]
    """The group of each image."""
    alone: int
    """Images in which the pattern finds nothing, each a group by itself."""

    def also_in(self, part: Source) -> set[str]:
        """The groups that another part has images of, too."""
        return {group for image in part.ids if (group := _group(self.pattern, image)) is not None} & set(self.of)

    def lines(self, sources: Sources) -> list[str]:
        """What is to be said of them."""
        said = [f"grouped: {len(self.of):,} images in {len(set(self.of)):,} groups, each in one split"]
        if self.alone:
            said[0] += f"; {self.alone:,} images do not match the pattern, and each is a group by itself"
        for name, part in (("validation", sources.val), ("test", sources.test)):
            if part is not None and (both := self.also_in(part)):
                said.append(
                    f"WARNING groups in two splits: {len(both):,} groups of the {name} split are in the training split "
                    f"too ({sorted(both)[0]})"
                )
        return said


def _groups(source: Source, pattern: str | None) -> _Grouping | None:
    """
    Raises:
        UsageError: the pattern is no regular expression, or no image matches it.
    """
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"--group-by {pattern!r} is no regular expression: {error}.") from None
    found = [_group(compiled, image) for image in source.ids]
    alone = sum(group is None for group in found)
    if alone == len(found):
        raise UsageError(
            f"--group-by {pattern!r} is found in none of the images' paths, such as {source.ids[0]}. A pattern such as "
            "'patient\\d+' names the part of a path that is the same for all images of a group."
        )
    of = tuple(f"={image}" if group is None else group for image, group in zip(source.ids, found, strict=True))
    return _Grouping(compiled, of, alone)


def _group(pattern: re.Pattern[str], image: str) -> str | None:
    found = pattern.search(image)
    if found is None:
        return None
    return found[1] if pattern.groups and found[1] is not None else found[0]


def _enough(sources: Sources, needed: int) -> None:
    counts = Counter(sources.train.labels)
    label, fewest = min(((label, counts[label]) for label in range(len(sources.classes))), key=lambda pair: pair[1])
    if fewest < needed:
        raise SearchError(
            f"the data {sources.name!r} has too few images: class {sources.classes[label]!r} has {fewest} to train on, "
            f"and {needed} are the least with which every split has one. Add images, or leave the class out."
        )


def _fingerprint(
    sources: Sources,
    parts: dict[str, Source],
    preprocessing: Preprocessing,
    known: dict[str, list[Any]] | None,
    on_progress: Callable[[int, int], None] | None,
) -> str:
    content = {
        "classes": sources.classes,
        "parts": {name: [part.ids, part.labels, part.content()] for name, part in sorted(parts.items())},
        "files": digests_of([path for _, part in sorted(parts.items()) for path in part.paths], known, on_progress),
        "preprocessing": asdict(preprocessing),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
