"""About: the conditions of a search as plain data in the study, so that its report needs neither model nor data.

It is written when a search begins or is resumed. Values that a later run changes, such as the number of trials, are
those of that run; the versions of the code are those of all runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class Spot:
    """A site of the space, with the shape of its tensor."""

    address: str
    """The site's address, as recipes have it."""
    stage: int | None
    """The stage of the model; None outside the stages."""
    depth: float
    """Position in the order of execution."""
    role: str
    """What the site is in its block."""
    channels: int
    """C of its tensor."""
    height: int
    """H of its tensor."""
    width: int
    """W of its tensor."""


@dataclass(frozen=True, slots=True)
class Place:
    """A place of the space: one or several sites that get the same block."""

    name: str
    """The key of the place in assignments."""
    spots: tuple[Spot, ...]
    """Its sites."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of the model."""

    number: int
    """The stage's number, as its sites have it."""
    blocks: int
    """Number of blocks of the stage."""
    channels: int
    """C of the map that its last block returns."""
    height: int
    """H of that map."""
    width: int
    """W of that map."""


@dataclass(frozen=True)
class About:
    """The conditions of a search."""

    command: str
    """The equivalent command line; '' if the search was run from Python."""
    conditions: str
    """The conditions of the latency in words."""
    data: str
    """The data in words."""
    images: Mapping[str, int]
    """Number of images in each split."""
    fingerprint: str
    """Digest of images, labels and splits."""
    weights: str
    """Hash of the base's starting weights."""
    candidates: int
    """Number of candidates in the space."""
    training: Mapping[str, Any]
    """How each model is trained, by the fields of TrainSettings."""
    versions: Mapping[str, str]
    """Software and hardware of the latency."""
    code: tuple[str, ...]
    """The versions of the code of all runs, the earliest first."""
    noise: float
    """Half the 95 % interval of the base's latency, relative to it."""
    steady: bool
    """False if the machine was disturbed while the base was measured."""
    input_size: tuple[int, ...]
    """(C, H, W) of an image."""
    places: tuple[Place, ...]
    """The places of the space in order of execution."""
    stages: tuple[Stage, ...]
    """The stages of the model."""
    beside: str = ""
    """Additions to the base's latency in words: its eager latency, and the clocks of the GPU."""
    fresh: str = ""
    """Which part of the base was trained before the search: all, head or nothing."""
    head: str = ""
    """The result of the check of a pretrained classifier without class names, in words."""
    notes: tuple[str, ...] = ()
    """What is unusual about the images, one sentence each."""
    shared: tuple[str, ...] | None = None
    """What the splits have in common, one sentence each; None if that was not checked."""

    tuning: Mapping[str, Any] | None = None
    """How the settings of the trainings were chosen: `tuned`, as `Tuned.as_dict` gives it, and the results of the
    attempts by their keys, as `tuning`; None if they were given."""

    metric: str = "top-1"
    """Title of the metric by which models are judged."""
    base_ms: Mapping[str, float] = field(default_factory=dict)
    """By label of each input size of the space, its own first, the base's latency in ms; {} if there is one size."""

    def as_dict(self) -> dict[str, Any]:
        """JSON data from which `from_dict` makes an equal description."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> About:
        """The description in JSON data; fields that another version has added are ignored."""
        values = {entry.name: data[entry.name] for entry in fields(cls) if entry.name in data}
        places = tuple(Place(place["name"], tuple(Spot(**spot) for spot in place["spots"])) for place in data["places"])
        stages = tuple(Stage(**stage) for stage in data["stages"])
        tuples: dict[str, Any] = {"code": tuple(data["code"]), "input_size": tuple(data["input_size"])}
        tuples |= {name: tuple(data[name]) for name in ("notes", "shared") if data.get(name) is not None}
        return cls(**{**values, **tuples, "places": places, "stages": stages})
