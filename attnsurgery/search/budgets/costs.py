"""The exact costs of candidates: parameters and multiply-accumulates, which are sums over blocks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import nn

from attnsurgery.errors import NothingFeasibleError
from attnsurgery.graph.anatomy import Anatomy
from attnsurgery.latency.model import Kind
from attnsurgery.recipe.build import resolve
from attnsurgery.recipe.costs import cost_of
from attnsurgery.samplers.knapsack import best
from attnsurgery.samplers.places import Budget, Floats, Picks, Places
from attnsurgery.search.result.limits import COST_KINDS, EXACT, Budgets, amount
from attnsurgery.search.space import BoundSpace
from attnsurgery.surgery.insertion import Insertion
from attnsurgery.surgery.verify import count_macs


def _kind(insertion: Insertion) -> str:
    """The key of a kind of block. Its latency depends on the block's options and on the tensor that it gets."""
    options = ", ".join(f"{name}={value}" for name, value in sorted(insertion.options.items()))
    shape = "x".join(map(str, insertion.site.shape))
    return f"{insertion.block}({options}) on {shape} {insertion.site.layout}"


def picks_of(places: Places, assignment: Mapping[str, str]) -> Picks:
    """A candidate as samplers see it."""
    picks = places.picks(assignment)
    assert picks is not None, "an assignment has a choice for each place"
    return picks


@dataclass(frozen=True)
class Costs:
    """The exact costs of every candidate of a space.

    Args:
        base: costs of the model without any block, by name.
        added: costs that each choice adds at each place, by name.
        blocks: the kinds of blocks of each choice at each place, for the latency model.
        kinds: the kinds of blocks, by their keys in `blocks`.
    """

    base: Mapping[str, int]
    added: Mapping[str, tuple[Floats, ...]]
    blocks: tuple[tuple[Counter[str], ...], ...]
    kinds: Mapping[str, Kind]

    @classmethod
    def count(cls, space: BoundSpace, anatomy: Anatomy, base: nn.Module) -> Costs:
        """Compute the costs from the blocks' formulas; no candidate is built.

        Args:
            space: for this model.
            anatomy: the sites of this model.
            base: the model.
        """
        rows: dict[str, list[Floats]] = {name: [] for name in EXACT}
        blocks: list[tuple[Counter[str], ...]] = []
        kinds: dict[str, Kind] = {}
        for variable in space.variables:
            added_CL = np.zeros((len(EXACT), len(variable.choices)))
            counts: tuple[Counter[str], ...] = tuple(Counter() for _ in variable.choices)
            for index, label in enumerate(variable.choices):
                recipe = space.recipe_for(space.nothing | {variable.name: label})
                for insertion in resolve(recipe, anatomy) if recipe else ():
                    cost = cost_of(insertion)
                    added_CL[:, index] += (cost.params, cost.macs)
                    key = _kind(insertion)
                    counts[index][key] += 1
                    kinds[key] = Kind(cost.macs, math.prod(insertion.site.shape))
            blocks.append(counts)
            for name, row in zip(EXACT, added_CL, strict=True):
                rows[name].append(row)
        parameters = sum(parameter.numel() for parameter in base.parameters())
        before = {"parameters": parameters, "macs": count_macs(base, anatomy.input_size)}
        return cls(before, {name: tuple(values) for name, values in rows.items()}, tuple(blocks), kinds)

    def counts(self, picks: Picks) -> Counter[str]:
        """The number of blocks of each kind in a candidate."""
        return sum((row[pick] for row, pick in zip(self.blocks, picks, strict=True)), Counter())

    def of(self, name: str, picks: Picks) -> int:
        """A cost of a candidate, by its name in EXACT."""
        return self.base[name] + int(sum(row[pick] for row, pick in zip(self.added[name], picks, strict=True)))

    def block_budgets(self, budgets: Budgets) -> dict[str, Budget]:
        """For each exact budget, the part of it that the blocks may use."""
        return {
            name: Budget(self.added[name], budgets.limits[name] - self.base[name])
            for name in EXACT
            if name in budgets.limits
        }

    def check_feasible(self, places: Places, budgets: Budgets) -> None:
        """Refuse a search in which no candidate can keep to the exact budgets.

        Args:
            places: the space as samplers see it.
            budgets: limits of the search.

        Raises:
            NothingFeasibleError: the message has the costs of the base and the least that any block adds.
        """
        exact = self.block_budgets(budgets)
        values = [np.zeros(len(choices)) for choices in places.choices.values()]
        nothing = (0,) * len(values)
        if best(places, values, None, list(exact.values()), {nothing}) is not None:
            return
        statements = [
            f"the base alone has {amount(self.base[name], COST_KINDS[name].unit)}, and no block of the space adds less "
            f"than {amount(min(row[1:].min() for row in self.added[name]), COST_KINDS[name].unit)}"
            for name in exact
        ]
        raise NothingFeasibleError(
            f"no candidate keeps to {budgets.describe()}: {'; '.join(statements)}. "
            f"Raise {' or '.join('--' + COST_KINDS[name].field.replace('_', '-') for name in exact)}, "
            "choose a smaller MODEL, or a --space with cheaper blocks."
        )
