"""Resolve a recipe: its selectors become sites, and its options are checked against shapes.

All errors that follow from recipe and model are raised here, before the model is changed.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch

from attnsurgery.blocks import BLOCKS
from attnsurgery.blocks._base import build_block, check_options
from attnsurgery.catalog import NO_BLOCK
from attnsurgery.errors import OptionError, RecipeError, SiteError, UsageError
from attnsurgery.graph.anatomy import Anatomy
from attnsurgery.graph.select import select
from attnsurgery.graph.site import Site
from attnsurgery.recipe.guard import within_limit
from attnsurgery.recipe.schema import Edit, Recipe
from attnsurgery.recipe.text import where
from attnsurgery.surgery.insertion import Insertion, Insertions


def resolve(recipe: Recipe, anatomy: Anatomy) -> Insertions:
    """The insertions that the recipe makes in a model of this anatomy, in order.

    Raises:
        SiteError: a selector matches nothing, or a site cannot hold the block.
        UnknownNameError, OptionError: a block or option does not exist or is invalid at that site, or the blocks need
            more attention than the recipe's `max_attention_mb`.
        RecipeError: the same block goes to one site twice.
    """
    return tuple(chain.from_iterable(resolve_edits(recipe, anatomy)))


def resolve_edits(recipe: Recipe, anatomy: Anatomy) -> list[list[Insertion]]:
    """The insertions of each edit; raises the errors of `resolve`."""
    edits = [_resolve_edit(recipe, index, edit, anatomy) for index, edit in enumerate(recipe.edits)]
    first_edits: dict[tuple[str, str], int] = {}
    replacing: dict[str, int] = {}
    for index, insertions in enumerate(edits):
        for insertion in insertions:
            taken_out = insertion.site.attention
            if insertion.replaced is not None and replacing.setdefault(taken_out, index) != index:
                raise RecipeError(
                    f"{where(recipe, f'edits[{index}].at')} = {recipe.edits[index].at!r} takes the place of "
                    f"{taken_out!r}, and edits[{replacing[taken_out]}] ({recipe.edits[replacing[taken_out]].at!r}) "
                    "has taken it already. Narrow one of the two selectors."
                )
            key = insertion.site.address, insertion.block
            first = first_edits.setdefault(key, index)
            if first != index:
                at = recipe.edits[index].at
                raise RecipeError(
                    f"{where(recipe, f'edits[{index}].at')} = {at!r} puts {key[1]!r} at {key[0]!r}, where "
                    f"edits[{first}] ({recipe.edits[first].at!r}) has put it already. Narrow one of the two selectors."
                )
    limited = within_limit(recipe, edits, anatomy)
    for index, insertions in enumerate(limited):
        for insertion in insertions:
            _check_order(recipe, index, insertion)
    return limited


def settled(recipe: Recipe, anatomy: Anatomy) -> Recipe:
    """The recipe with a value for each option that it leaves at 'auto', which depends on the size of the map.

    It makes the same blocks at every image size, and on a model of this anatomy the blocks of the original recipe.
    """
    return with_explicit_options(recipe, resolve_edits(recipe, anatomy))


def with_explicit_options(recipe: Recipe, resolved: list[list[Insertion]]) -> Recipe:
    """`settled`, from the result of `resolve_edits`."""
    edits: list[Edit] = []
    for edit, insertions in zip(recipe.edits, resolved, strict=True):
        requested = requested_options(edit)
        if all(insertion.options == requested for insertion in insertions):
            edits.append(edit)
            continue
        for insertion in insertions:
            resolved_options = {
                option: value for option, value in insertion.options.items() if value != requested[option]
            }
            options = {**edit.options, **resolved_options}
            edits.append(edit.model_copy(update={"at": insertion.site.address, "options": options}))
    return recipe.model_copy(update={"edits": edits})


def requested_options(edit: Edit) -> dict[str, Any]:
    """All options of an edit's block, with defaults filled in.

    Raises:
        UnknownNameError, OptionError: there is no such block, or an option is invalid at any site.
    """
    return {} if edit.block == NO_BLOCK else check_options(edit.block, edit.options)


def _resolve_edit(recipe: Recipe, index: int, edit: Edit, anatomy: Anatomy) -> list[Insertion]:
    field = "at"
    try:
        sites = select(edit.at, anatomy)
        if edit.replace:
            _check_attention(edit, sites, anatomy)
        field = "block"
        options = requested_options(edit)
    except OptionError as error:
        raise OptionError(f"{where(recipe, f'edits[{index}].options')}: {error}") from None
    except UsageError as error:
        raise type(error)(f"{where(recipe, f'edits[{index}].{field}')}: {error}") from None
    for site in sites:
        if site.refused:
            place = where(recipe, f"edits[{index}].at")
            raise SiteError(f"{place}: {site.address!r} can hold no block: {site.refused}.")
    if edit.block == NO_BLOCK:
        return [Insertion(site, NO_BLOCK, replaced=anatomy.own_attention(site)) for site in sites]
    block = BLOCKS[edit.block]
    places = [_fitting(recipe, index, edit, site, anatomy) for site in sites]
    insertions = [
        Insertion(
            site,
            edit.block,
            block.fittings(options, *site.map_size)[0],
            edit.start,
            anatomy.own_attention(site) if edit.replace else None,
        )
        for site in places
    ]
    checked: set[tuple[int, tuple[int, int]]] = set()
    for insertion in insertions:
        size = insertion.site.channels, insertion.site.map_size
        if size not in checked:
            checked.add(size)
            _check_fit(recipe, index, insertion, insertion.site)
    return insertions


def _check_attention(edit: Edit, sites: tuple[Site, ...], anatomy: Anatomy) -> None:
    """
    Raises:
        SiteError: one of the sites is not the result of an attention module that can be taken out.
    """
    other = next((site for site in sites if not site.attention), None)
    if other is None:
        return
    listed = [site.address for site in anatomy.sites if site.attention]
    there = f"It has {len(listed)}: {', '.join(listed[:3])}{', ...' * (len(listed) > 3)}" if listed else "It has none"
    raise SiteError(
        f"{edit.at!r} selects {other.address!r}, and 'replace: true' takes the place of an attention module that "
        f"{anatomy.name} has of its own, that takes one tensor and keeps its shape. {there}."
    )


def _fitting(recipe: Recipe, index: int, edit: Edit, site: Site, anatomy: Anatomy) -> Site:
    """The site in the form that the block needs.

    A block that gates a span treats a single module as a span of one, if the module keeps the size of its map. Any
    other site is gated by itself.
    """
    gates = BLOCKS[edit.block].gates
    try:
        if site.span and not gates:
            raise SiteError(
                f"block {edit.block!r} goes to one site and not on a span. The span's output is the site "
                f"{site.span[-1]!r}; blocks for spans: {', '.join(name for name in BLOCKS if BLOCKS[name].gates)}."
            )
        return anatomy.span(site, site) if gates and anatomy.keeps_size(site) and not site.span else site
    except SiteError as error:
        raise SiteError(f"{where(recipe, f'edits[{index}].at')}: {error}") from None


def _check_order(recipe: Recipe, index: int, insertion: Insertion) -> None:
    """Refuse a block that depends on neighbouring positions where positions are not in the order of the image."""
    site = insertion.site
    if insertion.block == NO_BLOCK:
        return
    if not site.ordered and not BLOCKS[insertion.block].order_free(insertion.options):
        free = ", ".join(name for name in BLOCKS if BLOCKS[name].order_free(check_options(name, {})))
        raise SiteError(
            f"{where(recipe, f'edits[{index}].at')}: at {site.address!r}, {'x'.join(map(str, site.shape))} "
            f"{site.layout}, positions do not lie as in the image (windows cut apart, a reordered sequence, or one "
            f"of any length), and block {insertion.block!r} needs to know which positions are neighbours. "
            f"Blocks that work there with their default options: {free}."
        )


def _check_fit(recipe: Recipe, index: int, insertion: Insertion, site: Site) -> None:
    """Build the block without weights and check that it accepts the size of the map."""
    try:
        block = build_block(insertion.block, site.channels, insertion.options, insertion.start, torch.device("meta"))
        block.check_map(*site.map_size)
    except OptionError as error:
        raise OptionError(f"{where(recipe, f'edits[{index}].options')}: at {site.address!r}: {error}") from None
