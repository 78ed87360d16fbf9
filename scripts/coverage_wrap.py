"""The coverage run on wrapped models: surgery in a larger module does the same as in the model itself.

For each architecture and block, the surgical model is built by its name, and the same recipe is applied to the model in
each of WRAPPERS. Places, outputs and the effect of trained weights must be the same.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

import attnsurgery
from attnsurgery.surgery.operate import grafted_blocks, operated
from attnsurgery.timm_plugin import registry
from scripts.coverage_checks import CheckFailure, base_failure, error_text, expect, is_refusal, move, time_limit
from scripts.coverage_hosts import Base, BaseError, describe, equal, find_base, flat


class Lightning(nn.Module):
    """A module that holds its network as a LightningModule does."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.criterion = nn.CrossEntropyLoss()

    def forward(self, x: torch.Tensor) -> Any:
        return self.network(x)


WRAPPERS: dict[str, tuple[str, Callable[[nn.Module], nn.Module]]] = {
    "bare": ("", lambda model: model),
    "sequential": ("0.", lambda model: nn.Sequential(model, nn.Identity())),
    "lightning": ("network.", Lightning),
}
"""By name, the prefix of the model's paths in the larger module, and the function that wraps the model."""


def rows_of(arch: str, blocks: Iterable[str], max_bytes: float, pair_seconds: float = 600) -> Iterator[dict[str, Any]]:
    """A row for each block, as `coverage.rows_of`."""
    try:
        base = find_base(arch, max_bytes, ())
    except BaseError as error:
        yield from (base_failure(block, error) for block in blocks)
        return
    for block in blocks:
        yield examine(base, block, pair_seconds)


def examine(base: Base, suffix: str, limit: float = 600) -> dict[str, Any]:
    """One row of the results."""
    start = time.perf_counter()
    row: dict[str, Any] = {"block": suffix, "outcome": "passed", **describe(base), "blocks": 0, "checks": {}}
    try:
        with time_limit(limit):
            trained = base.build(f"{base.arch}_{suffix}")
            trained.load_state_dict(base.state, strict=True)
            row["blocks"] = len(grafted_blocks(trained))
            for name in WRAPPERS:
                row["checks"][name] = _result(lambda name=name: compare(base, trained, name))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        row["checks"]["plan"] = error_text(error) if isinstance(error, Exception) else str(error)
        row["outcome"] = "refused" if isinstance(error, Exception) and is_refusal(error) else "failed"
    if row["outcome"] == "passed" and any(result != "passed" for result in row["checks"].values()):
        row["outcome"] = "failed"
    row["seconds"] = round(time.perf_counter() - start, 2)
    return row


def _result(check: Callable[[], None]) -> str:
    try:
        check()
    except Exception as error:
        return error_text(error)
    return "passed"


def compare(base: Base, trained: nn.Module, name: str) -> None:
    """Compare surgery in one of the larger modules with surgery in the model itself.

    Raises:
        CheckFailure: they differ.
    """
    prefix, wrap = WRAPPERS[name]
    size = tuple(base.images.shape[1:])
    recipe = registry.recipe_by_name(str(trained.pretrained_cfg["architecture"]))  # without addresses of single modules
    if recipe is None:
        raise CheckFailure("the name of the surgical model has no recipe")
    model = base.build(base.arch)
    model.load_state_dict(base.state, strict=True)
    wrapped = attnsurgery.operate(wrap(model).eval(), recipe, (size[0], size[1], size[2]))
    expect(list(grafted_blocks(wrapped)) == [prefix + path for path in grafted_blocks(trained)], "blocks are elsewhere")
    expect(_places(wrapped, prefix) == _places(trained, ""), "layouts, tokens or grids differ")
    with torch.no_grad():
        expect(equal(flat(wrapped(base.images)), flat(base.model(base.images))), "outputs differ at the identity start")
        move(wrapped)
        trained.load_state_dict(model.state_dict(), strict=True)
        expect(equal(flat(wrapped(base.images)), flat(trained(base.images))), "trained weights give other numbers")
        attnsurgery.remove(wrapped)
        expect(
            equal(flat(wrapped(base.images)), flat(base.model(base.images))), "outputs differ once blocks are removed"
        )
    expect(list(model.state_dict()) == list(base.state), "the keys, or their order, are not the base's")


def _places(model: nn.Module, prefix: str) -> list[Any]:
    """The record of each place, with paths in the model itself."""
    return [
        dataclasses.replace(
            graft,
            span=tuple(path.removeprefix(prefix) for path in graft.span),
            grid_source=graft.grid_source.removeprefix(prefix),
            options=tuple(sorted(graft.options.items(), key=str)),
        )
        for _, _, grafts in operated(model)
        for graft in grafts
    ]
