"""About: what a search stands on, as plain data in the study, so that its report needs neither model nor data.

It is written when a search begins or goes on. What a later run changes, such as the number of trials, is as of that
run; the versions of the code are those of all runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class Spot:
    """A site of the space."""

    address: str
    stage: int | None
    """None outside the stages."""
    depth: float
    """Position in the order of execution."""
    role: str
    channels: int
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class Place:
    """One choice of the space: a name that assignments use, and the sites that it decides on together."""

    name: str
    spots: tuple[Spot, ...]


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of the model, with the map that its last block returns."""

    number: int
    blocks: int
    channels: int
    height: int
    width: int


@dataclass(frozen=True)
class About:
    """What a search stands on."""

    command: str
    """The command line that does the same; '' where it was run from Python."""
    conditions: str
    """Of the latency, for people."""
    data: str
    images: Mapping[str, int]
    """How many there are of each split."""
    fingerprint: str
    """Of images, labels and splits."""
    weights: str
    """Hash of the base's starting weights."""
    candidates: int
    """How many the space has."""
    training: Mapping[str, Any]
    """How each model is trained, by the fields of TrainSettings."""
    versions: Mapping[str, str]
    """Software and hardware of the latency."""
    code: tuple[str, ...]
    """The versions of the code that worked on it, the first first."""
    noise: float
    """Half the 95 % interval of the base's latency, as a share of it."""
    steady: bool
    """False if the machine did something else while the base was measured."""
    input_size: tuple[int, ...]
    """(C, H, W) of an image."""
    places: tuple[Place, ...]
    """In order of execution."""
    stages: tuple[Stage, ...]
    beside: str = ""
    """Beside the base's latency: its eager time, and the clocks of the card, for people."""
    fresh: str = ""
    """What of the base was trained before the search: all, its head, or nothing."""
    head: str = ""
    """What became of a classifier that came with weights, and whose classes have no names."""
    notes: tuple[str, ...] = ()
    """What of the images is not as one might think, a line each."""
    shared: tuple[str, ...] | None = None
    """What the splits have in common, a line each; None where that was not looked for."""

    def as_dict(self) -> dict[str, Any]:
        """JSON data from which `from_dict` makes an equal one."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> About:
        """Fields that another version has written beside ours are left out."""
        known = {field.name: data[field.name] for field in fields(cls) if field.name in data}
        places = tuple(Place(given["name"], tuple(Spot(**spot) for spot in given["spots"])) for given in data["places"])
        stages = tuple(Stage(**given) for given in data["stages"])
        tuples: dict[str, Any] = {"code": tuple(data["code"]), "input_size": tuple(data["input_size"])}
        tuples |= {name: tuple(data[name]) for name in ("notes", "shared") if data.get(name) is not None}
        return cls(**{**known, **tuples, "places": places, "stages": stages})
