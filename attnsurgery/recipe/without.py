"""A recipe less some of the blocks that it has made."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from attnsurgery.errors import SurgeryError
from attnsurgery.graph.anatomy import Anatomy
from attnsurgery.recipe.build import resolve_edits, settled
from attnsurgery.recipe.schema import Edit, Recipe
from attnsurgery.surgery.select_blocks import Key, key_of_site


def without(recipe: Recipe, anatomy: Anatomy, blocks: Mapping[Key, str], gone: Collection[str]) -> Recipe:
    """The recipe that makes the same model less the blocks `gone`: an edit of which some are gone names its places.

    Args:
        anatomy: of the model that the recipe has made.
        blocks: paths of the model's blocks by their places.
        gone: paths of those that shall go, not all of them.

    Raises:
        SurgeryError: the recipe puts blocks where the model has none.
    """
    if recipe.max_attention_mb is not None:  # what was settled under the limit stays so, whatever else has room now
        recipe = settled(recipe, anatomy)
    edits: list[Edit] = []
    for edit, made in zip(recipe.edits, resolve_edits(recipe, anatomy), strict=True):
        paths = [blocks.get(key_of_site(insertion.site, insertion.block)) for insertion in made]
        if None in paths:
            address = made[paths.index(None)].site.address
            raise SurgeryError(
                f"the recipe {recipe.name!r} of this model puts {edit.block!r} at {address!r}, and there is none: the "
                "model was changed since. Take all blocks out (attnsurgery.remove(model)) and operate anew."
            )
        if not any(path in gone for path in paths):
            edits.append(edit)
            continue
        edits += [
            edit.model_copy(update={"at": insertion.site.address})
            for insertion, path in zip(made, paths, strict=True)
            if path not in gone
        ]
    return recipe.model_copy(update={"edits": edits})
