"""Plan: what a recipe would do to a model, computed before the model is changed.

Nothing is allocated. Blocks are counted without weights, and the operation is tried on a copy of the model without
weights, so whatever `operate` would refuse is refused here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

from torch import nn

from attnsurgery.blocks import Start
from attnsurgery.blocks._base import check_options
from attnsurgery.errors import UsageError
from attnsurgery.graph.anatomy import Anatomy
from attnsurgery.graph.find import survey
from attnsurgery.graph.twin import meta_twin
from attnsurgery.recipe.build import requested_options, resolve, resolve_edits
from attnsurgery.recipe.costs import BlockCost, cost_of
from attnsurgery.recipe.schema import Edit, Recipe
from attnsurgery.surgery.insertion import Insertion
from attnsurgery.surgery.operate import operate
from attnsurgery.surgery.verify import count_macs

Priced = BlockCost | str
"""What a block would cost at a site, or the reason why it cannot stand there."""


@dataclass(frozen=True, slots=True)
class PlannedBlock:
    """One block of a recipe at its site."""

    address: str
    """Address of the site."""
    block: str
    """The block's name in the catalog."""
    start: Start
    """How the block is initialized."""
    shape: tuple[int, ...]
    """Shape of the site's tensor, without the batch."""
    map_size: tuple[int, int]
    """Height and width as the block sees them."""
    options: Mapping[str, Any]
    """All options, with defaults filled in."""
    chosen: Mapping[str, Any]
    """The options that the recipe sets explicitly."""
    settled: Mapping[str, Any]
    """The options that the recipe leaves at 'auto', with the values that they resolve to at this site."""
    cost: BlockCost
    """What the block adds to the model, less what it takes the place of."""
    replaces: str = ""
    """Class of the attention module of the model that it takes the place of; empty if it takes none."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a recipe would do to a model."""

    name: str
    """Name of the recipe."""
    base: str
    """Name of the model."""
    input_size: tuple[int, int, int]
    """(C, H, W) of the images that the plan holds for."""
    blocks: tuple[PlannedBlock, ...]
    """The blocks in the order of the recipe."""
    params_before: int
    """Number of parameters of the model before the recipe is applied."""
    macs_before: int
    """Multiply-accumulates of that model for one image, in convolutions, matrix products and attention."""
    max_attention_mb: float | None
    """The recipe's limit on `attention_bytes`, in megabytes; every plan is within it."""

    @property
    def params_added(self) -> int:
        """Number of parameters of all blocks."""
        return sum(planned.cost.params for planned in self.blocks)

    @property
    def macs_added(self) -> int:
        """Multiply-accumulates of all blocks, for one image."""
        return sum(planned.cost.macs for planned in self.blocks)

    @property
    def attention_bytes(self) -> int:
        """Bytes of attention of all blocks together, since training holds all of them at once."""
        return sum(planned.cost.attention_bytes for planned in self.blocks)

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain JSON data, totals included."""
        totals = ("params_added", "macs_added", "attention_bytes")
        return asdict(self) | {total: getattr(self, total) for total in totals}


def plan_recipe(recipe: Recipe, model: nn.Module, input_size: tuple[int, int, int] | None = None) -> Plan:
    """Plan the recipe for this model, which is not changed.

    Args:
        recipe: the recipe.
        model: a built timm model on any device, also on the meta device.
        input_size: (C, H, W) of one image; by default what the model is built for.

    Raises:
        UsageError: whatever `operate` would refuse.
    """
    anatomy = survey(model, input_size)
    edits = resolve_edits(recipe, anatomy)
    operate(meta_twin(model), tuple(chain.from_iterable(edits)))
    return Plan(
        name=recipe.name,
        base=anatomy.name,
        input_size=anatomy.input_size,
        blocks=tuple(
            _planned(edit, insertion)
            for edit, insertions in zip(recipe.edits, edits, strict=True)
            for insertion in insertions
        ),
        params_before=sum(parameter.numel() for parameter in model.parameters()),
        macs_before=count_macs(model, anatomy.input_size),
        max_attention_mb=recipe.max_attention_mb,
    )


def prices(anatomy: Anatomy, addresses: Iterable[str], block: str, options: Mapping[str, Any]) -> dict[str, Priced]:
    """What the block would add at each of the addresses if it were the only block, by address.

    Raises:
        UnknownNameError, OptionError: there is no such block, or an option is invalid at any site.
    """
    check_options(block, options)
    return {address: _price(anatomy, Edit(at=address, block=block, options=dict(options))) for address in addresses}


def _price(anatomy: Anatomy, edit: Edit) -> Priced:
    try:
        (insertion,) = resolve(Recipe(version=1, name="price", base="any", edits=[edit]), anatomy)
    except UsageError as error:
        return reason(error)
    return cost_of(insertion)


def reason(error: UsageError) -> str:
    """Why the only edit of a recipe was refused, without the location in the message."""
    return re.sub(r"^edits\[0\]\.\w+: (at '[^']*': )?", "", str(error))


def _planned(edit: Edit, insertion: Insertion) -> PlannedBlock:
    site = insertion.site
    requested = requested_options(edit)
    return PlannedBlock(
        address=site.address,
        block=insertion.block,
        start=insertion.start,
        shape=site.shape,
        map_size=site.map_size,
        options=dict(insertion.options),
        chosen={option: value for option, value in insertion.options.items() if option in edit.options},
        settled={option: value for option, value in insertion.options.items() if requested[option] == "auto"},
        cost=cost_of(insertion),
        replaces=insertion.replaced.kind if insertion.replaced else "",
    )
