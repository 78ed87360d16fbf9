"""Small images, and tables and shards of them."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from attnsurgery.data import Data, Preprocessing, load_data
from attnsurgery.tasks import task_of

SMALL = Preprocessing((3, 16, 16), mean=(0.0,) * 3, std=(1.0,) * 3)
LEVELS = {"dark": 0, "light": 160, "grey": 80}


def picture(index: int, level: int) -> Image.Image:
    pixels = np.random.default_rng([index, level]).integers(0, 90, (24, 24, 3)) + level
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(index: int, level: int) -> bytes:
    file = io.BytesIO()
    picture(index, level).save(file, "PNG")
    return file.getvalue()


def write_pictures(folder: Path, labels: Sequence[str], first: int = 0) -> list[str]:
    """An image for each label, as bright as the class is; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{first + index:02}.png" for index in range(len(labels))]
    for index, (name, label) in enumerate(zip(names, labels, strict=True)):
        picture(first + index, LEVELS.get(label, 40)).save(folder / name)
    return names


def write_table(path: Path, rows: Sequence[Mapping[str, Any]], delimiter: str = ",", encoding: str = "utf-8") -> Path:
    """A table as the ending of its name says."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def rows_of(folder: Path, labels: Sequence[str], image: str = "image", label: str = "label") -> list[dict[str, Any]]:
    """The rows of a table in the folder above the images."""
    names = write_pictures(folder, labels)
    return [{image: f"{folder.name}/{name}", label: text} for name, text in zip(names, labels, strict=True)]


def two_classes(folder: Path, count: int = 12) -> list[dict[str, Any]]:
    return rows_of(folder / "images", ["dark", "light"] * (count // 2))


def write_shard(path: Path, members: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def samples(labels: Sequence[str], first: int = 0, ending: str = "cls") -> dict[str, bytes]:
    """The members of a shard with a file for the label of each image."""
    members = {}
    for index, label in enumerate(labels, start=first):
        members[f"{index:03}.png"] = encoded(index, LEVELS.get(label, 40))
        members[f"{index:03}.{ending}"] = (json.dumps({"label": label}) if ending == "json" else label).encode()
    return members


def load(spec: Path | str, task: str = "classification", **how: Any) -> Data:
    return load_data(str(spec), SMALL, find=task_of(task).sources, **how)


def parts(data: Data) -> dict[str, list[str]]:
    return {"train": list(data.train.ids), "val": list(data.val.ids), "test": list(data.test.ids)}


def labels_by_image(data: Data) -> dict[str, str]:
    """The class of each image, by its name."""
    return {
        image: data.classes[label]
        for part in (data.train, data.val, data.test)
        for image, label in zip(part.ids, part.labels.tolist(), strict=True)
    }
