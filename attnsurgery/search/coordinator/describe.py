"""Describes what a search stands on, for its study and its report."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import optuna
import timm
import torch

from attnsurgery import __version__
from attnsurgery.latency import Latency
from attnsurgery.recipe.build import resolve
from attnsurgery.search.execution.bench import Bench
from attnsurgery.search.result.about import About, Place, Spot, Stage
from attnsurgery.search.storage.store import Store

_PACKAGE = Path(__file__).resolve().parents[2]


def about_of(
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
    return About(
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


def remember(store: Store, bench: Bench, reference: Latency, command: str, others: Sequence[str] = ()) -> About:
    """Write into the study what its report needs besides results, and that the search has not ended.

    Args:
        others: in what this run differs from the one before.
    """
    about = about_of(bench, reference, command, store.fixed("about"), others)
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
