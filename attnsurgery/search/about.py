"""About: what a search stands on, as plain data in the study, so that its report needs neither model nor data.

It is written when a search begins or goes on. What a later run changes, such as the number of trials, is as of that
run; the versions of the code are those of all runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import optuna
import timm
import torch

from attnsurgery import __version__
from attnsurgery.latency import Latency
from attnsurgery.recipe.build import resolve
from attnsurgery.search.prepare import Bench
from attnsurgery.search.store import Store

_PACKAGE = Path(__file__).resolve().parents[1]


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

    @classmethod
    def of(
        cls,
        bench: Bench,
        reference: Latency,
        command: str,
        before: Mapping[str, Any] | None,
        others: Sequence[str] = (),
    ) -> About:
        """Read off what trials are made on.

        Args:
            before: what an earlier run of this search has written, if there was one.
            others: in what this run differs from the one before.
        """
        before = before or {}
        code, data = tuple(before.get("code", ())), bench.data
        if others:
            code = (*code, f"extended, {'; '.join(others)}")
        return cls(
            command=command or before.get("command", ""),
            conditions=bench.backend.describe(),
            data=data.describe(),
            images={"train": len(data.train), "validation": len(data.val), "test": len(data.test)},
            fingerprint=data.fingerprint,
            weights=bench.weights,
            candidates=bench.space.size(),
            training=asdict(bench.evaluator.settings),
            versions=reference.versions,
            code=code if code_version() in code else (*code, code_version()),
            noise=reference.noise,
            steady=reference.steady,
            beside=reference.beside(),
            input_size=bench.anatomy.input_size,
            places=_places(bench),
            stages=_stages(bench),
            fresh=before.get("fresh") or bench.fresh,
            head=bench.head or before.get("head", ""),
            notes=data.notes,
            shared=data.shared,
        )

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


def remember(store: Store, bench: Bench, reference: Latency, command: str, others: Sequence[str] = ()) -> About:
    """Write into the study what its report needs besides results, and that the search has not ended.

    Args:
        others: in what this run differs from the one before.
    """
    about = About.of(bench, reference, command, store.fixed("about"), others)
    store.fix("about", about.as_dict())
    store.fix("asked", bench.config.model_dump(exclude={"storage"}))  # it may hold a password
    store.fix("ended", None)
    return about


def _places(bench: Bench) -> tuple[Place, ...]:
    """The places of the space; where a block goes does not depend on which one it is."""
    places: list[Place] = []
    for variable in bench.space.variables:
        label = next(label for label, edit in variable.choices.items() if edit is not None)
        recipe = bench.space.recipe_of(bench.space.nothing | {variable.name: label})
        assert recipe is not None, "there is a block in it"
        sites = [insertion.site for insertion in resolve(recipe, bench.anatomy)]
        spots = tuple(
            Spot(site.address, site.stage, site.depth, site.role, site.channels, *site.map_size) for site in sites
        )
        places.append(Place(variable.name, spots))
    return tuple(sorted(places, key=lambda place: place.spots[0].depth))


def _stages(bench: Bench) -> tuple[Stage, ...]:
    found = {number: bench.anatomy.blocks(number) for number in bench.anatomy.stages}
    return tuple(
        Stage(number, len(blocks), blocks[-1].channels, *blocks[-1].map_size) for number, blocks in found.items()
    )


@cache
def code_version() -> str:
    """Everything that says what code ran: this package's version with a hash of its files, and what it stands on."""
    digest = hashlib.sha256()
    for file in sorted(_PACKAGE.rglob("*.py")):
        digest.update(file.relative_to(_PACKAGE).as_posix().encode() + b"\0" + file.read_bytes())
    others = ", ".join(f"{package.__name__} {package.__version__}" for package in (timm, torch, optuna))
    return f"attnsurgery {__version__} (source {digest.hexdigest()[:8]}), {others}"
