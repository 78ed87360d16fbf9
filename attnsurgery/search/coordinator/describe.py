"""Describes the conditions of a search for its study and its report: data, model, latency, versions."""

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
    references: Sequence[Latency],
    command: str,
    previous: Mapping[str, Any] | None,
    changes: Sequence[str] = (),
    tuning: Mapping[str, Any] | None = None,
) -> About:
    """Describe what trials are made on.

    Args:
        bench: what trials are made on.
        references: the base's latency at each input size of the space, its own first.
        command: the equivalent command line; '' for that of an earlier run.
        previous: the description that an earlier run of this search wrote, if there was one.
        changes: how this run differs from the one before.
        tuning: how the settings of the trainings were chosen, as `About` has it.
    """
    previous, reference = previous or {}, references[0]
    code, data = tuple(previous.get("code", ())), bench.data
    if changes:
        code = (*code, f"extended, {'; '.join(changes)}")
    return About(
        command=command or previous.get("command", ""),
        conditions=bench.backend.describe(),
        data=data.describe(),
        images={"train": len(data.train), "validation": len(data.val), "test": len(data.test)},
        fingerprint=data.fingerprint,
        weights=bench.weights,
        candidates=bench.space.size(),
        training=asdict(bench.changed(1, bench.training()).evaluator.settings),
        versions=reference.versions,
        code=code if code_version() in code else (*code, code_version()),
        noise=reference.noise,
        steady=reference.steady,
        beside=reference.details(),
        input_size=bench.anatomy.input_size,
        places=_places(bench),
        stages=_stages(bench),
        fresh=previous.get("fresh") or bench.fresh,
        head=bench.head or previous.get("head", ""),
        notes=data.notes,
        shared=data.shared,
        tuning=tuning,
        metric=bench.task.metric.title,
        base_ms={label: latency.p50_ms for label, latency in zip(bench.space.sizes, references, strict=False)},
    )


def remember(
    store: Store, bench: Bench, references: Sequence[Latency], command: str, changes: Sequence[str] = ()
) -> About:
    """Write into the study what its report needs besides results, and that the search has not ended.

    Args:
        store: of the study.
        bench: what trials are made on.
        references: the base's latency at each input size of the space, its own first.
        command: the equivalent command line; '' for that of an earlier run.
        changes: how this run differs from the one before.
    """
    about = about_of(bench, references, command, store.fixed("about"), changes, _tuning(store))
    store.fix("about", about.as_dict())
    store.fix("asked", bench.config.model_dump(exclude={"storage"}))  # it may hold a password
    store.fix("ended", None)
    return about


def _tuning(store: Store) -> dict[str, Any] | None:
    facts = store.fixed("base") or {}
    return {name: facts[name] for name in ("tuned", "tuning")} if "tuned" in facts else None


def _places(bench: Bench) -> tuple[Place, ...]:
    """The places of the space. The sites of a place do not depend on which block goes there."""
    places: list[Place] = []
    for variable in bench.space.variables:
        label = next(label for label, edit in variable.choices.items() if edit is not None)
        recipe = bench.space.recipe_for(bench.space.nothing | {variable.name: label})
        assert recipe is not None, "there is a block in it"
        sites = [insertion.site for insertion in resolve(recipe, bench.anatomy)]
        spots = tuple(
            Spot(site.address, site.stage, site.depth, site.role, site.channels, *site.map_size) for site in sites
        )
        places.append(Place(variable.name, spots))
    return tuple(sorted(places, key=lambda place: place.spots[0].depth))


def _stages(bench: Bench) -> tuple[Stage, ...]:
    blocks_by_stage = {number: bench.anatomy.blocks(number) for number in bench.anatomy.stages}
    return tuple(
        Stage(number, len(blocks), blocks[-1].channels, *blocks[-1].map_size)
        for number, blocks in blocks_by_stage.items()
    )


@cache
def code_version() -> str:
    """The code that runs: this package's version with a hash of its files, and the versions of timm, torch, optuna."""
    digest = hashlib.sha256()
    for file in sorted(_PACKAGE.rglob("*.py")):
        digest.update(file.relative_to(_PACKAGE).as_posix().encode() + b"\0" + file.read_bytes())
    libraries = ", ".join(f"{package.__name__} {package.__version__}" for package in (timm, torch, optuna))
    return f"attnsurgery {__version__} (source {digest.hexdigest()[:8]}), {libraries}"
