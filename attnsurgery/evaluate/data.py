"""Three splits of labelled images: the search trains on one, chooses by the second, and never sees the third."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from attnsurgery.errors import SearchError
from attnsurgery.evaluate.batches import FileSplit, MemorySplit, Split
from attnsurgery.evaluate.preprocess import Preprocessing
from attnsurgery.evaluate.source import Source, Sources, find_sources

_HELD_OUT = 0.2
"""Share of each class that goes to a split which the data does not come with."""

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
    fingerprint: str
    """Changes with any image's name, label or split, and with the preprocessing."""

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def describe(self) -> str:
        """One line for people."""
        counts = f"{len(self.train)} train, {len(self.val)} validation, {len(self.test)} test"
        return f"{self.name}: {counts}, {self.num_classes} classes"


def load_data(
    spec: str | None,
    preprocessing: Preprocessing,
    seed: int = 0,
    *,
    memory_bytes: int = 2 * 2**30,
    workers: int | None = None,
    on_load: OnLoad | None = None,
    decode: bool = True,
) -> Data:
    """Images with labels in three splits that share none.

    A split that the data does not come with is taken out of its training images, a fifth of every class, the same for
    the same seed.

    Args:
        spec: None for the embedded digits; an image folder; or a name such as 'hfds/cifar10'.
        memory_bytes: data that fits at its input size, as uint8, is decoded once and kept.
        workers: processes that decode what does not fit; by default one a core, at most 8.
        on_load: called with the split's name, images decoded, images in all.
        decode: False leaves it to whoever first asks for images; what there is, is known all the same.

    Raises:
        UsageError: `spec` names nothing.
        SearchError: no classes, too few images of one, or images that cannot be read.
    """
    sources = find_sources(spec)
    parts = split_sources(sources, seed)
    size = int(np.prod(preprocessing.input_size))
    fits = size * sum(len(part.ids) for part in parts.values()) <= memory_bytes
    count = min(8, os.cpu_count() or 1) if workers is None else workers

    def split(name: str) -> Split:
        if fits:
            progress = (lambda done, total: on_load(name, done, total)) if on_load else None
            held = MemorySplit(parts[name], preprocessing, sources.flip, progress)
            if decode:
                held.decode()
            return held
        return FileSplit(parts[name], preprocessing, sources.flip, count)

    return Data(
        name=sources.name,
        classes=sources.classes,
        preprocessing=preprocessing,
        train=split("train"),
        val=split("val"),
        test=split("test"),
        fingerprint=_fingerprint(sources, parts, preprocessing),
    )


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


def split_sources(sources: Sources, seed: int) -> dict[str, Source]:
    """The three parts by name; missing ones are taken out of the training part, class by class.

    Raises:
        SearchError: a class has too few images to be in every part.
    """
    parts = {"train": sources.train, "val": sources.val, "test": sources.test}
    missing = [name for name, part in parts.items() if part is None]
    _enough(sources, 1 + len(missing))
    rest: Source = sources.train
    result: dict[str, Source] = {}
    for name in missing:
        share = _HELD_OUT * len(sources.train.ids) / len(rest.ids)
        taken = stratified(rest.labels, share, seed)
        result[name] = rest.take(taken)
        left = set(taken)
        rest = rest.take([index for index in range(len(rest.ids)) if index not in left])
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


def _enough(sources: Sources, needed: int) -> None:
    counts = Counter(sources.train.labels)
    label, fewest = min(((label, counts[label]) for label in range(len(sources.classes))), key=lambda pair: pair[1])
    if fewest < needed:
        raise SearchError(
            f"the data {sources.name!r} has too few images: class {sources.classes[label]!r} has {fewest} to train on, "
            f"and {needed} are the least with which every split has one. Add images, or leave the class out."
        )


def _fingerprint(sources: Sources, parts: dict[str, Source], preprocessing: Preprocessing) -> str:
    content = {
        "classes": sources.classes,
        "parts": {name: [part.ids, part.labels] for name, part in sorted(parts.items())},
        "preprocessing": asdict(preprocessing),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
