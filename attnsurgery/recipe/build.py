"""Recipe to Plan: selectors become sites, options are checked against shapes. Every error is raised here."""

from __future__ import annotations

from itertools import chain

import torch

from attnsurgery.blocks import BLOCKS
from attnsurgery.blocks._base import build_block, check_options
from attnsurgery.errors import OptionError, RecipeError, SiteError, UsageError
from attnsurgery.graph.anatomy import Anatomy
from attnsurgery.graph.select import select
from attnsurgery.graph.site import Site
from attnsurgery.recipe.guard import within_limit
from attnsurgery.recipe.schema import Edit, Recipe
from attnsurgery.recipe.text import where
from attnsurgery.surgery.plan import Insertion, Plan


def resolve(recipe: Recipe, anatomy: Anatomy) -> Plan:
    """The plan that the recipe means in a model of this anatomy.

    Raises:
        SiteError: a selector that matches nothing.
        UnknownNameError, OptionError: a block or option that does not exist, or has no meaning at that site; or more
            attention than the recipe's `max_attention_mb`.
        RecipeError: the same block twice at one site.
    """
    return tuple(chain.from_iterable(resolve_edits(recipe, anatomy)))


def resolve_edits(recipe: Recipe, anatomy: Anatomy) -> list[list[Insertion]]:
    """The same plan, edit by edit; raises as `resolve`."""
    edits = [_resolve_edit(recipe, index, edit, anatomy) for index, edit in enumerate(recipe.edits)]
    taken: dict[tuple[str, str], int] = {}
    for index, made in enumerate(edits):
        for insertion in made:
            key = insertion.site.address, insertion.block
            first = taken.setdefault(key, index)
            if first != index:
                at = recipe.edits[index].at
                raise RecipeError(
                    f"{where(recipe, f'edits[{index}].at')} = {at!r} puts {key[1]!r} at {key[0]!r}, where "
                    f"edits[{first}] ({recipe.edits[first].at!r}) has put it already. Narrow one of the two selectors."
                )
    limited = within_limit(recipe, edits, anatomy)
    for index, made in enumerate(limited):
        for insertion in made:
            _check_order(recipe, index, insertion)
    return limited


def settled(recipe: Recipe, anatomy: Anatomy) -> Recipe:
    """The recipe with every option written out that a block has taken from the size of its map.

    It makes the same model whatever image size that is built for; what it makes of a model of this anatomy is the same.
    """
    return written_out(recipe, resolve_edits(recipe, anatomy))


def written_out(recipe: Recipe, resolved: list[list[Insertion]]) -> Recipe:
    """`settled`, from what `resolve_edits` gave."""
    edits: list[Edit] = []
    for edit, plan in zip(recipe.edits, resolved, strict=True):
        asked = check_options(edit.block, edit.options)
        if all(insertion.options == asked for insertion in plan):
            edits.append(edit)
            continue
        for insertion in plan:
            taken = {option: value for option, value in insertion.options.items() if value != asked[option]}
            options = {**edit.options, **taken}
            edits.append(edit.model_copy(update={"at": insertion.site.address, "options": options}))
    return recipe.model_copy(update={"edits": edits})


def _resolve_edit(recipe: Recipe, index: int, edit: Edit, anatomy: Anatomy) -> list[Insertion]:
    field = "at"
    try:
        sites = select(edit.at, anatomy)
        field = "block"
        options = check_options(edit.block, edit.options)
    except OptionError as error:
        raise OptionError(f"{where(recipe, f'edits[{index}].options')}: {error}") from None
    except UsageError as error:
        raise type(error)(f"{where(recipe, f'edits[{index}].{field}')}: {error}") from None
    for site in sites:
        if site.refused:
            place = where(recipe, f"edits[{index}].at")
            raise SiteError(f"{place}: {site.address!r} can hold no block: {site.refused}.")
    block = BLOCKS[edit.block]
    places = [_fitting(recipe, index, edit, site, anatomy) for site in sites]
    plan = [Insertion(site, edit.block, block.fittings(options, *site.map_size)[0], edit.start) for site in places]
    checked: set[tuple[int, tuple[int, int]]] = set()
    for insertion in plan:
        size = insertion.site.channels, insertion.site.map_size
        if size not in checked:
            checked.add(size)
            _check_fit(recipe, index, insertion, insertion.site)
    return plan


def _fitting(recipe: Recipe, index: int, edit: Edit, site: Site, anatomy: Anatomy) -> Site:
    """The place as the block takes it: one that gates a span takes a single module as a span of one, if the module
    keeps the size of its map; any other place it gates by itself."""
    gates = BLOCKS[edit.block].gates
    try:
        if site.span and not gates:
            raise SiteError(
                f"block {edit.block!r} goes to one place and not on a span. What the span returns is "
                f"{site.span[-1]!r}; blocks for spans: {', '.join(name for name in BLOCKS if BLOCKS[name].gates)}."
            )
        return anatomy.span(site, site) if gates and anatomy.keeps_size(site) and not site.span else site
    except SiteError as error:
        raise SiteError(f"{where(recipe, f'edits[{index}].at')}: {error}") from None


def _check_order(recipe: Recipe, index: int, insertion: Insertion) -> None:
    """Refuse a block that asks who is next to whom where the positions do not say."""
    site = insertion.site
    if not site.ordered and not BLOCKS[insertion.block].order_free(insertion.options):
        free = ", ".join(name for name in BLOCKS if BLOCKS[name].order_free(check_options(name, {})))
        raise SiteError(
            f"{where(recipe, f'edits[{index}].at')}: at {site.address!r}, {'x'.join(map(str, site.shape))} "
            f"{site.layout}, positions do not lie as in the image (windows cut apart, a reordered sequence, or one "
            f"of any length), and block {insertion.block!r} needs to know who is next to whom. "
            f"Blocks that work there, as they are by default: {free}."
        )


def _check_fit(recipe: Recipe, index: int, insertion: Insertion, site: Site) -> None:
    """Build the block without weights and ask it about the map it would see."""
    try:
        block = build_block(insertion.block, site.channels, insertion.options, insertion.start, torch.device("meta"))
        block.check_map(*site.map_size)
    except OptionError as error:
        raise OptionError(f"{where(recipe, f'edits[{index}].options')}: at {site.address!r}: {error}") from None
