"""The memory guard: a recipe's limit `max_attention_mb`, and the values of 'auto' that are within it.

The limit is on the sum over the recipe's blocks, because training holds the attention of all of them at once. It counts
one image in fp32, as the naive formula would hold it.

Blocks whose sub-sampling is 'auto' all start at 1. While the sum is over the limit, the block with the largest
attention takes the next value (1, 2, 4, 8 ...); of equally large ones, the block that has taken fewer steps. Blocks
that are equal in both take the step together, so equal maps are treated alike and the order of edits makes no
difference.
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
from attnsurgery.catalog import NO_BLOCK
from attnsurgery.errors import OptionError
from attnsurgery.graph.anatomy import Anatomy
from attnsurgery.graph.site import Site
from attnsurgery.recipe.costs import cost_of
from attnsurgery.recipe.schema import Recipe
from attnsurgery.recipe.text import where
from attnsurgery.surgery.insertion import Insertion

MB = 1_000_000
"""Bytes of a megabyte in `max_attention_mb`."""

Variants = list[Insertion]
"""One block at one site, with all values of its 'auto' that need less attention than the value before."""


def within_limit(recipe: Recipe, edits: list[list[Insertion]], anatomy: Anatomy) -> list[list[Insertion]]:
    """The insertions of each edit, with values of 'auto' such that all blocks together are within the recipe's limit.

    Raises:
        OptionError: there are no such values; the message names the block with the largest attention and what would
        fit.
    """
    if recipe.max_attention_mb is None:
        return edits
    limit = recipe.max_attention_mb * MB
    rows = [
        _variants(insertion, edit.options)
        for edit, insertions in zip(recipe.edits, edits, strict=True)
        for insertion in insertions
    ]
    steps = settle([[attention(variant) for variant in variants] for variants in rows], limit)
    if steps is None:
        raise OptionError(_refusal(recipe, [variants[-1] for variants in rows], limit, anatomy))
    settled = iter(variants[step] for variants, step in zip(rows, steps, strict=True))
    return [[next(settled) for _ in insertions] for insertions in edits]


def settle(rows: Sequence[Sequence[int]], limit: float) -> list[int] | None:
    """For each row of falling sizes, the index at which the sum is within the limit; None if there is no solution."""
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
    """Bytes of attention of a block, for one image in fp32."""
    return cost_of(insertion).attention_bytes


def _variants(insertion: Insertion, requested: Mapping[str, Any]) -> Variants:
    """The variants of an insertion with the requested options, in order of falling attention."""
    if insertion.block == NO_BLOCK:
        return [insertion]
    options = check_options(insertion.block, requested)
    variants: Variants = []
    for fitting in BLOCKS[insertion.block].fittings(options, *insertion.site.map_size):
        variant = dataclasses.replace(insertion, options=fitting)
        if not variants or attention(variant) < attention(variants[-1]):
            variants.append(variant)
    return variants


def _cheaper(insertion: Insertion) -> dict[str, Variants]:
    """For each option that may be 'auto', the variants with less attention than the insertion itself."""
    cheaper: dict[str, Variants] = {}
    for option in _with_auto(insertion.block):
        variants = _variants(insertion, {**insertion.options, option: "auto"})
        if smaller := [variant for variant in variants if attention(variant) < attention(insertion)]:
            cheaper[option] = smaller
    return cheaper


@cache
def _with_auto(block: str) -> tuple[str, ...]:
    """The options of the block that may be 'auto'."""
    if block == NO_BLOCK:
        return ()
    return tuple(option for option in options_model(BLOCKS[block]).model_fields if _takes_auto(block, option))


def _takes_auto(block: str, option: str) -> bool:
    try:
        check_options(block, {option: "auto"})
    except OptionError:
        return False
    return True


def _refusal(recipe: Recipe, insertions: Sequence[Insertion], limit: float, anatomy: Anatomy) -> str:
    """The message of the error: the sum, the block with the largest attention, and what would fit."""
    total = sum(map(attention, insertions))
    worst = max(insertions, key=attention)  # the first of equals
    options = "".join(f" with {option}: {worst.options[option]}" for option in _with_auto(worst.block))
    tensor = " x ".join(map(str, (worst.site.channels, *worst.site.map_size)))
    return (
        f"{where(recipe, 'max_attention_mb')} = {recipe.max_attention_mb:g}: the attention of the "
        f"{_counted(len(insertions), 'block')} comes to {_mb(total)} (one image, fp32, written out), "
        f"{_mb(attention(worst))} of it at {worst.site.address!r} ({worst.block}{options}, on {tensor}). "
        f"{_advice(insertions, worst, limit, anatomy)} Or allow it: "
        f"max_attention_mb: {math.ceil(total / 1e4) / 100:.2f}."
    )


def _advice(insertions: Sequence[Insertion], worst: Insertion, limit: float, anatomy: Anatomy) -> str:
    others = sum(map(attention, insertions)) - attention(worst)
    for option, variants in _cheaper(worst).items():
        fits = next((variant for variant in variants if attention(variant) + others <= limit), None)
        if fits is not None:
            return f"There, {option}: {fits.options[option]} would fit ({_mb(attention(fits))})."
    least = [min(map(attention, [insertion, *chain(*_cheaper(insertion).values())])) for insertion in insertions]
    if sum(least) <= limit:
        return "With 'auto' for every block that has it (subsample: auto) all would fit."
    smaller = _smaller_place(worst, limit - others, anatomy)
    if smaller is not None:
        return (
            "No sub-sampling there brings it below the limit; it would be at "
            f"{smaller.site.address!r}, with a smaller map ({_mb(attention(smaller))})."
        )
    return "Neither sub-sampling nor a later place brings it below the limit: use fewer blocks, or smaller images."


def _smaller_place(worst: Insertion, limit: float, anatomy: Anatomy) -> Insertion | None:
    """The block at the first later block output with a smaller map where it is valid and within the limit."""
    for site in (site for stage in anatomy.stages for site in anatomy.blocks(stage)):
        if site.depth <= worst.site.depth or math.prod(site.map_size) >= math.prod(worst.site.map_size):
            continue
        options = {**worst.options, **dict.fromkeys(_with_auto(worst.block), "auto")}
        fitting = BLOCKS[worst.block].fittings(options, *site.map_size)[0]
        moved = dataclasses.replace(worst, site=site, options=fitting)
        if attention(moved) <= limit and _is_valid(moved, site):
            return moved
    return None


def _is_valid(insertion: Insertion, site: Site) -> bool:
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
