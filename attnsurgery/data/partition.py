"""Divides labelled images into train, val and test, class by class, or whole groups of images at a time."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from attnsurgery.data.source import Source, Sources
from attnsurgery.errors import SearchError, UsageError

_HELD_OUT = 0.2
"""Share of each class that goes to a split which the data does not come with."""
_ATTEMPTS = 50
"""Divisions of images with several classes that are tried, until each class is in every split."""


def split_sources(sources: Sources, seed: int, groups: Sequence[str] | None = None) -> dict[str, Source]:
    """The three parts by name; those that the data lacks are taken out of the training part.

    Args:
        sources: the data, with all of its own splits.
        seed: the same seed gives the same parts.
        groups: by training image, its group; images of one group stay in one part. None divides class by class.

    Raises:
        SearchError: a class has too few images, or too few groups, to be in every part.
    """
    parts = {"train": sources.train, "val": sources.val, "test": sources.test}
    missing = [name for name, part in parts.items() if part is None]
    _check_class_sizes(sources, 1 + len(missing))
    if not missing:
        return {name: part for name, part in parts.items() if part is not None}
    lacking = None
    for attempt in range(_ATTEMPTS):
        divided = _divide(sources, missing, seed + attempt * 1_000_003, groups)
        if (lacking := _lacking(sources, {name: divided[name] for name in ("train", *missing)})) is None:
            return divided
    assert lacking is not None, "the last attempt has failed too"
    raise SearchError(
        f"the data {sources.name!r} cannot be divided so that each class is in every split: class {lacking[1]!r} is in "
        f"no image of the {lacking[0]} split. Add images of it, leave the class out, or give splits of your own."
    )


def _divide(sources: Sources, missing: Sequence[str], seed: int, groups: Sequence[str] | None) -> dict[str, Source]:
    """One division; arguments and errors as `split_sources`, and `missing` names the splits that the data lacks."""
    remaining = list(range(len(sources.train.ids)))
    held_out: dict[str, Source] = {}
    for name in missing:
        share = _HELD_OUT * len(sources.train.ids) / len(remaining)
        labels = [sources.train.labels[index] for index in remaining]
        if groups is None:
            positions = stratified(labels, share, seed)
        else:
            reserve = len(missing) - len(held_out)
            group_names = [groups[index] for index in remaining]
            if not sources.train.is_classed:
                labels = _common(labels, group_names, reserve)
            positions = stratified_by_group(labels, group_names, share, seed, reserve, sources.classes)
        selected = {remaining[position] for position in positions}
        held_out[name] = sources.train.take(sorted(selected))
        remaining = [index for index in remaining if index not in selected]
    train = sources.train.take(remaining)
    parts = {"train": train, "val": sources.val, "test": sources.test}
    return {name: held_out.get(name) or part or train for name, part in parts.items()}


def _common(labels: Sequence[int], groups: Sequence[str], reserve: int) -> list[int]:
    """The labels, with that of most groups in the place of those which have too few groups for every split.

    Args:
        labels: by image, a number by which images are divided.
        groups: by image, its group.
        reserve: the number of groups of each label that are needed for other splits.
    """
    counts = Counter(label for label, _ in set(zip(labels, groups, strict=True)))
    (most, _), *_ = counts.most_common(1)
    return [label if counts[label] > reserve else most for label in labels]


def _lacking(sources: Sources, parts: Mapping[str, Source]) -> tuple[str, str] | None:
    """A split of images with several classes that lacks a class, and that class; None if there is none."""
    for name, part in parts.items():
        for label, images in enumerate(_class_sets_in(sources, part)):
            if images == 0:
                return name, sources.classes[label]
    return None


def _class_sets_in(sources: Sources, part: Source) -> list[int]:
    """Number of images of each class in a part of data whose images have several; [] for other data."""
    if part.targets is None or not sources.classes:
        return []
    counts: list[int] = part.targets.sum(0).long().tolist()
    return counts


def stratified(labels: Sequence[int], share: float, seed: int) -> list[int]:
    """Positions of `share` of each class, at least one, in ascending order; the same for the same seed."""
    labels_N = np.asarray(labels)
    positions: list[int] = []
    for label in np.unique(labels_N):
        of_class = np.flatnonzero(labels_N == label)
        count = min(len(of_class) - 1, max(1, round(share * len(of_class))))
        order = np.random.default_rng([seed, int(label)]).permutation(of_class)
        positions.extend(int(index) for index in order[:count])
    return sorted(positions)


def stratified_by_group(
    labels: Sequence[int], groups: Sequence[str], share: float, seed: int, reserve: int, classes: Sequence[str]
) -> list[int]:
    """As `stratified`, but whole groups: about `share` of each class, and at least one group of it.

    Args:
        labels: by image, the number of its class.
        groups: by image, its group.
        share: of each class, between 0 and 1.
        seed: of the order in which groups are considered.
        reserve: the number of groups of each class that must not be selected.
        classes: names of the classes, for messages.

    Raises:
        SearchError: a class is in too few groups.
    """
    counts: dict[str, Counter[int]] = {}
    for label, group in zip(labels, groups, strict=True):
        counts.setdefault(group, Counter())[label] += 1
    groups_left = Counter(label for of_group in counts.values() for label in of_group)
    for label, number in sorted(groups_left.items()):
        if number <= reserve:
            raise SearchError(
                f"--group-by, or the column of groups, puts the images {_of_class(label, classes)} into {number} "
                f"groups of which each stays in one split, and {reserve + 1} are needed for every split to have one. "
                "Tell more groups apart, or give the splits yourself, as folders or in a column."
            )
    class_sizes = Counter(labels)
    targets = {label: max(1, round(share * number)) for label, number in class_sizes.items()}
    names = sorted(counts)
    order = [names[index] for index in np.random.default_rng([seed, len(names)]).permutation(len(names))]
    selected: set[str] = set()
    selected_images: Counter[int] = Counter()

    def is_free(group: str) -> bool:
        return group not in selected and all(groups_left[label] > reserve for label in counts[group])

    def select(group: str) -> None:
        selected.add(group)
        selected_images.update(counts[group])
        groups_left.subtract(dict.fromkeys(counts[group], 1))

    for group in order:
        gaps = {label: targets[label] - selected_images[label] for label in counts[group]}
        before = sum(abs(gap) for gap in gaps.values())
        after = sum(abs(gaps[label] - number) for label, number in counts[group].items())
        if after < before and is_free(group):
            select(group)
    for label in sorted(class_sizes):
        if not selected_images[label]:
            fitting = [group for group in order if label in counts[group] and is_free(group)]
            if not fitting:
                raise SearchError(
                    "--group-by, or the column of groups, leaves no split of its own for the images "
                    f"{_of_class(label, classes)}: their groups are those of others too. Tell more groups apart, or "
                    "give the splits yourself, as folders or in a column."
                )
            select(min(fitting, key=lambda group: counts[group].total()))
    return [position for position, group in enumerate(groups) if group in selected]


def _of_class(label: int, classes: Sequence[str]) -> str:
    return f"of class {classes[label]!r}" if label < len(classes) else "of the data"


@dataclass(frozen=True)
class Grouping:
    """Which images of the training part stay together."""

    pattern: re.Pattern[str] | None
    """On the paths of images; None where the data says the groups."""
    groups: tuple[str, ...]
    """The group of each image."""
    unmatched: int
    """Number of images that the pattern does not match, each a group by itself."""

    def shared_with(self, part: Source) -> set[str]:
        """The groups of which another part has images too."""
        if self.pattern is None:
            return set(part.groups) & set(self.groups)
        return {group for image in part.ids if (group := _group_of(self.pattern, image)) is not None} & set(self.groups)

    def notes(self, sources: Sources) -> list[str]:
        """A line on the groups, and a warning for each split of the data that shares some with the training split."""
        summary = f"grouped: {len(self.groups):,} images in {len(set(self.groups)):,} groups, each in one split"
        if self.unmatched:
            lacks = "have no group" if self.pattern is None else "do not match the pattern"
            summary += f"; {self.unmatched:,} images {lacks}, and each is a group by itself"
        notes = [summary]
        for name, part in (("validation", sources.val), ("test", sources.test)):
            if part is not None and (groups := self.shared_with(part)):
                notes.append(
                    f"WARNING groups in two splits: {len(groups):,} groups of the {name} split are in the training "
                    f"split too ({sorted(groups)[0]})"
                )
        return notes


def find_groups(source: Source, pattern: str | None) -> Grouping | None:
    """The groups of images that a regular expression on their paths defines, or else the data itself; None without.

    Raises:
        UsageError: the pattern is no regular expression, or no image matches it.
    """
    if pattern is None:
        if not source.groups:
            return None
        return Grouping(None, source.groups, sum(group.startswith("=") for group in source.groups))
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"--group-by {pattern!r} is no regular expression: {error}.") from None
    matches = [_group_of(compiled, image) for image in source.ids]
    unmatched = sum(match is None for match in matches)
    if unmatched == len(matches):
        raise UsageError(
            f"--group-by {pattern!r} is found in none of the images' paths, such as {source.ids[0]}. A pattern such as "
            "'patient\\d+' names the part of a path that is the same for all images of a group."
        )
    groups = tuple(f"={image}" if match is None else match for image, match in zip(source.ids, matches, strict=True))
    return Grouping(compiled, groups, unmatched)


def _group_of(pattern: re.Pattern[str], image: str) -> str | None:
    match = pattern.search(image)
    if match is None:
        return None
    return match[1] if pattern.groups and match[1] is not None else match[0]


def _check_class_sizes(sources: Sources, minimum: int) -> None:
    """
    Raises:
        SearchError: a class has fewer training images than `minimum`.
    """
    if not sources.train.is_classed and (images := len(sources.train.ids)) < minimum:
        raise SearchError(
            f"the data {sources.name!r} has {images} images to train on, and every split needs one, {minimum} in "
            "all. Add images."
        )
    if sources.train.is_classed:
        counted = Counter(sources.train.labels)
        counts = [counted[label] for label in range(len(sources.classes))]
    else:
        counts = _class_sets_in(sources, sources.train)
    label, fewest = min(enumerate(counts), key=lambda pair: pair[1], default=(0, minimum))
    if fewest < minimum:
        raise SearchError(
            f"the data {sources.name!r} has too few images: class {sources.classes[label]!r} has {fewest} to train on, "
            f"and every split needs one, {minimum} in all. Add images, or leave the class out."
        )
