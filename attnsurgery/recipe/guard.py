"""The memory guard: a recipe's `max_attention_mb`, and how `auto` keeps to it.

The limit is on the sum over the recipe's blocks, since training holds the attention of all of them at once; one
image, fp32, as the naive formula would hold it.

The rule for blocks whose sub-sampling is 'auto': all begin at 1. While the sum is over the limit, the largest attention
among them goes one step further (1, 2, 4, 8 ...); of equally large ones, that which has gone fewer steps. Blocks that
tie in both go together, so equal maps are treated alike, and the order of edits does not count.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import chain
from typing import Any

from attnsurgery.blocks import BLOCKS
from attnsurgery.blocks._base import build_block, check_options, options_model
from attnsurgery.errors import OptionError
from attnsurgery.graph.anatomy import Anatomy
from attnsurgery.graph.site import Site
from attnsurgery.recipe.costs import cost_of
from attnsurgery.recipe.schema import Recipe
from attnsurgery.recipe.text import where
from attnsurgery.surgery.insertion import Insertion

MB = 1_000_000
"""Bytes of a megabyte in `max_attention_mb`."""

Ways = list[Insertion]
"""One block at one place, its 'auto' settled in every way that takes less attention than the one before."""


def within_limit(recipe: Recipe, edits: list[list[Insertion]], anatomy: Anatomy) -> list[list[Insertion]]:
    """The insertions of each edit, with 'auto' settled so that all blocks together keep to the recipe's limit.

    Raises:
        OptionError: they cannot; the message names the largest place and what would fit there.
    """
    if recipe.max_attention_mb is None:
        return edits
    limit = recipe.max_attention_mb * MB
    asked = [edit.options for edit, made in zip(recipe.edits, edits, strict=True) for _ in made]
    plan = [insertion for made in edits for insertion in made]
    rows = [_ways(insertion, options) for insertion, options in zip(plan, asked, strict=True)]
    chosen = settle([[attention(way) for way in ways] for ways in rows], limit)
    if chosen is None:
        raise OptionError(_refusal(recipe, [ways[-1] for ways in rows], limit, anatomy))
    settled = iter(ways[step] for ways, step in zip(rows, chosen, strict=True))
    return [[next(settled) for _ in made] for made in edits]


def settle(rows: Sequence[Sequence[int]], limit: float) -> list[int] | None:
    """For each row of falling sizes, how far to go down it so that the sum is within the limit; None if it never is."""
    steps = [0] * len(rows)
    while sum(row[step] for row, step in zip(rows, steps, strict=True)) > limit:
        free = [index for index, row in enumerate(rows) if steps[index] + 1 < len(row)]
        if not free:
            return None
        rank = {index: (rows[index][steps[index]], -steps[index]) for index in free}
        first = max(rank.values())
        for index in free:
            steps[index] += rank[index] == first
    return steps


def attention(insertion: Insertion) -> int:
    """Bytes, one image, fp32."""
    return cost_of(insertion).attention_bytes


def _ways(insertion: Insertion, asked: Mapping[str, Any]) -> Ways:
    options = check_options(insertion.block, asked)
    ways: Ways = []
    for fitting in BLOCKS[insertion.block].fittings(options, *insertion.site.map_size):
        way = dataclasses.replace(insertion, options=fitting)
        if not ways or attention(way) < attention(ways[-1]):
            ways.append(way)
    return ways


def _cheaper(insertion: Insertion) -> dict[str, Ways]:
    """What 'auto' could come to, by option, in the place of what was asked for: only what takes less than that."""
    found: dict[str, Ways] = {}
    for option in _with_auto(insertion.block):
        ways = _ways(insertion, {**insertion.options, option: "auto"})
        if below := [way for way in ways if attention(way) < attention(insertion)]:
            found[option] = below
    return found


@cache
def _with_auto(block: str) -> tuple[str, ...]:
    """The options of the block that may be 'auto'."""
    return tuple(option for option in options_model(BLOCKS[block]).model_fields if _takes_auto(block, option))


def _takes_auto(block: str, option: str) -> bool:
    try:
        check_options(block, {option: "auto"})
    except OptionError:
        return False
    return True


def _refusal(recipe: Recipe, plan: Sequence[Insertion], limit: float, anatomy: Anatomy) -> str:
    """Says what is too much, where most of it is, and what would do."""
    total = sum(map(attention, plan))
    worst = max(plan, key=attention)  # the first of equals
    options = "".join(f" with {option}: {worst.options[option]}" for option in _with_auto(worst.block))
    tensor = " x ".join(map(str, (worst.site.channels, *worst.site.map_size)))
    return (
        f"{where(recipe, 'max_attention_mb')} = {recipe.max_attention_mb:g}: the attention of the "
        f"{_counted(len(plan), 'block')} comes to {_mb(total)} (one image, fp32, written out), {_mb(attention(worst))} "
        f"of it at {worst.site.address!r} ({worst.block}{options}, on {tensor}). "
        f"{_advice(plan, worst, limit, anatomy)} Or allow it: max_attention_mb: {math.ceil(total / 1e4) / 100:.2f}."
    )


def _advice(plan: Sequence[Insertion], worst: Insertion, limit: float, anatomy: Anatomy) -> str:
    rest = sum(map(attention, plan)) - attention(worst)
    for option, ways in _cheaper(worst).items():
        fits = next((way for way in ways if attention(way) + rest <= limit), None)
        if fits is not None:
            return f"There, {option}: {fits.options[option]} would fit ({_mb(attention(fits))})."
    least = [min(map(attention, [insertion, *chain(*_cheaper(insertion).values())])) for insertion in plan]
    if sum(least) <= limit:
        return "With 'auto' for every block that has it (subsample: auto) all would fit."
    elsewhere = _smaller_place(worst, limit - rest, anatomy)
    if elsewhere is not None:
        return (
            "No sub-sampling there brings it below the limit; it would be at "
            f"{elsewhere.site.address!r}, with a smaller map ({_mb(attention(elsewhere))})."
        )
    return "Neither sub-sampling nor a later place brings it below the limit: use fewer blocks, or smaller images."


def _smaller_place(worst: Insertion, limit: float, anatomy: Anatomy) -> Insertion | None:
    """The first block output behind, with a smaller map, where it would be legal and fit."""
    for site in (site for stage in anatomy.stages for site in anatomy.blocks(stage)):
        if site.depth <= worst.site.depth or math.prod(site.map_size) >= math.prod(worst.site.map_size):
            continue
        asked = {**worst.options, **dict.fromkeys(_with_auto(worst.block), "auto")}
        fitted = BLOCKS[worst.block].fittings(asked, *site.map_size)[0]
        there = dataclasses.replace(worst, site=site, options=fitted)
        if attention(there) <= limit and _is_legal(there, site):
            return there
    return None


def _is_legal(insertion: Insertion, site: Site) -> bool:
    try:
        block = build_block(insertion.block, site.channels, insertion.options, insertion.start, "meta")
        block.check_map(*site.map_size)
    except OptionError:
        return False
    return True


def _mb(size: float) -> str:
    return f"{size / MB:.5g} MB"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"
