"""Remove blocks from a recipe."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from attnsurgery.catalog import NO_BLOCK
from attnsurgery.errors import SurgeryError
from attnsurgery.graph.anatomy import Anatomy
from attnsurgery.recipe.build import resolve_edits, settled
from attnsurgery.recipe.schema import Edit, Recipe
from attnsurgery.surgery.select_blocks import Key, key_of_site


def without(recipe: Recipe, anatomy: Anatomy, blocks: Mapping[Key, str], removed: Collection[str]) -> Recipe:
    """The recipe of the same model without the blocks `removed`.

    An edit that has made both removed and remaining blocks is replaced by one edit for each remaining block.

    Args:
        recipe: the recipe of the model.
        anatomy: the anatomy of the model's base.
        blocks: paths of the model's blocks by their keys.
        removed: paths of the removed blocks, which are not all blocks.

    Raises:
        SurgeryError: the recipe puts a block where the model has none.
    """
    if recipe.max_attention_mb is not None:  # options that were resolved under the limit keep their values
        recipe = settled(recipe, anatomy)
    edits: list[Edit] = []
    for edit, insertions in zip(recipe.edits, resolve_edits(recipe, anatomy), strict=True):
        if edit.block == NO_BLOCK:  # what was taken out stays out
            edits.append(edit)
            continue
        paths = [blocks.get(key_of_site(insertion.site, insertion.block)) for insertion in insertions]
        if None in paths:
            address = insertions[paths.index(None)].site.address
            raise SurgeryError(
                f"the recipe {recipe.name!r} of this model puts {edit.block!r} at {address!r}, and there is none: the "
                "model was changed since. Remove all blocks (attnsurgery.remove(model)) and operate again."
            )
        if not any(path in removed for path in paths):
            edits.append(edit)
            continue
        edits += [
            edit.model_copy(update={"at": insertion.site.address})
            for insertion, path in zip(insertions, paths, strict=True)
            if path not in removed
        ]
    return recipe.model_copy(update={"edits": edits})
