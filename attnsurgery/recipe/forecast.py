"""Forecast: what a recipe would do to a model, before anything is cut.

Nothing is allocated: blocks are counted without weights, and the cut is tried on a weightless copy of the model, so
that whatever `operate` would refuse is refused here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from attnsurgery.blocks import Start
from attnsurgery.blocks._base import check_options
from attnsurgery.errors import UsageError
from attnsurgery.graph.anatomy import Anatomy
from attnsurgery.graph.find import survey
from attnsurgery.graph.twin import meta_twin
from attnsurgery.recipe.build import resolve, resolve_edits
from attnsurgery.recipe.costs import BlockCost, cost_of
from attnsurgery.recipe.schema import Edit, Recipe
from attnsurgery.surgery.operate import operate
from attnsurgery.surgery.plan import Insertion
from attnsurgery.surgery.verify import count_macs

Priced = BlockCost | str
"""What a block would cost at a place; or why it cannot stand there."""


@dataclass(frozen=True, slots=True)
class PlannedBlock:
    """One block of a recipe at the place where it would stand."""

    address: str
    block: str
    start: Start
    shape: tuple[int, ...]
    """Of the tensor there, without the batch."""
    map_size: tuple[int, int]
    """Height and width as the block sees them."""
    options: Mapping[str, Any]
    """Every option, defaults filled in."""
    chosen: Mapping[str, Any]
    """Those of the options that the recipe gives itself."""
    settled: Mapping[str, Any]
    """Those of the options that the recipe leaves to 'auto', and what they come to here."""
    cost: BlockCost


@dataclass(frozen=True, slots=True)
class Forecast:
    """A recipe on a model, before anything is cut."""

    name: str
    base: str
    input_size: tuple[int, int, int]
    """(C, H, W) of the images that it holds for."""
    blocks: tuple[PlannedBlock, ...]
    """In the order of the recipe."""
    params_before: int
    macs_before: int
    """Multiply-accumulates of one image through convolutions, matrix products and attention."""
    max_attention_mb: float | None
    """The limit that the recipe sets on `attention_bytes`; a forecast is within it."""

    @property
    def params_added(self) -> int:
        return sum(planned.cost.params for planned in self.blocks)

    @property
    def macs_added(self) -> int:
        return sum(planned.cost.macs for planned in self.blocks)

    @property
    def attention_bytes(self) -> int:
        """Summed over the blocks: training holds all of them at once."""
        return sum(planned.cost.attention_bytes for planned in self.blocks)

    def as_dict(self) -> dict[str, Any]:
        totals = ("params_added", "macs_added", "attention_bytes")
        return asdict(self) | {total: getattr(self, total) for total in totals}


def forecast(recipe: Recipe, model: nn.Module, input_size: tuple[int, int, int] | None = None) -> Forecast:
    """The recipe on this model, which is left as it is.

    Args:
        model: a built timm model on any device, the meta device too.
        input_size: (C, H, W) of one image; by default what the model is built for.

    Raises:
        UsageError: whatever `operate` would refuse.
    """
    anatomy = survey(model, input_size)
    edits = resolve_edits(recipe, anatomy)
    operate(meta_twin(model), tuple(insertion for made in edits for insertion in made))
    return Forecast(
        name=recipe.name,
        base=anatomy.name,
        input_size=anatomy.input_size,
        blocks=tuple(
            _planned(edit, insertion) for edit, made in zip(recipe.edits, edits, strict=True) for insertion in made
        ),
        params_before=sum(parameter.numel() for parameter in model.parameters()),
        macs_before=count_macs(model, anatomy.input_size),
        max_attention_mb=recipe.max_attention_mb,
    )


def prices(anatomy: Anatomy, addresses: Iterable[str], block: str, options: Mapping[str, Any]) -> dict[str, Priced]:
    """What the block would add at each of the addresses, if it stood there alone.

    Raises:
        UnknownNameError, OptionError: no such block, or an option that it has nowhere.
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
    """Why an edit that stands alone was refused, without where it stood."""
    return re.sub(r"^edits\[0\]\.\w+: (at '[^']*': )?", "", str(error))


def _planned(edit: Edit, insertion: Insertion) -> PlannedBlock:
    site = insertion.site
    asked = check_options(edit.block, edit.options)
    return PlannedBlock(
        address=site.address,
        block=insertion.block,
        start=insertion.start,
        shape=site.shape,
        map_size=site.map_size,
        options=dict(insertion.options),
        chosen={option: value for option, value in insertion.options.items() if option in edit.options},
        settled={option: value for option, value in insertion.options.items() if asked[option] == "auto"},
        cost=cost_of(insertion),
    )
