"""The exact costs of candidates: parameters and multiply-accumulates, which are sums over blocks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from attnsurgery.catalog import NO_BLOCK
from attnsurgery.errors import NothingFeasibleError
from attnsurgery.graph.anatomy import Anatomy
from attnsurgery.latency.model import Kind
from attnsurgery.recipe.build import resolve
from attnsurgery.recipe.costs import cost_of, own_cost_of
from attnsurgery.samplers.knapsack import best
from attnsurgery.samplers.places import Budget, Floats, Picks, Places
from attnsurgery.search.result.limits import COST_KINDS, EXACT, POSSIBLE, Budgets, amount
from attnsurgery.search.space import BoundSpace
from attnsurgery.surgery.insertion import Insertion
from attnsurgery.surgery.verify import count_macs

Sized = tuple[Anatomy, nn.Module]
"""The sites of a model at an input size, and the model as it is there."""


def _kind(insertion: Insertion) -> str:
    """The key of a kind of block. Its latency depends on the block's options and on the tensor that it gets."""
    options = ", ".join(f"{name}={value}" for name, value in sorted(insertion.options.items()))
    shape = "x".join(map(str, insertion.site.shape))
    return f"{insertion.block}({options}) on {shape} {insertion.site.layout}"


def _kinds(insertion: Insertion) -> Iterator[tuple[str, Kind, int]]:
    """The kinds of blocks whose number an insertion changes, by how much: less of an attention that is taken out."""
    elements, replaced = math.prod(insertion.site.shape), insertion.replaced
    if insertion.block != NO_BLOCK:
        yield _kind(insertion), Kind(own_cost_of(insertion).macs, elements), 1
    if replaced is not None:
        shape = "x".join(map(str, insertion.site.shape))
        key = f"the model's own {replaced.kind} of {replaced.params} parameters on {shape} {insertion.site.layout}"
        yield key, Kind(replaced.macs, elements), -1


def picks_of(places: Places, assignment: Mapping[str, str]) -> Picks:
    """A candidate as samplers see it."""
    picks = places.picks(assignment)
    assert picks is not None, "an assignment has a choice for each place"
    return picks


def with_base(added: Sequence[Floats], base: float) -> list[Floats]:
    """Costs by place that add up to those of whole candidates of one input size: the first place adds the base's."""
    first, *others = added
    return [first + base, *others]


@dataclass(frozen=True)
class Costs:
    """The exact costs of every candidate of a space.

    Args:
        base: costs of the model without any block, by name.
        added: costs that each choice adds at each place, by name.
        blocks: the kinds of blocks of each choice at each place, for the latency model.
        kinds: the kinds of blocks, by their keys in `blocks`.
        by_size: in a space with several input sizes, the costs of the candidates of each size, the base's own first;
            the size is the first place, which adds nothing itself.
        impossible: by place, 1 for each choice that is not possible at this size, else 0.
    """

    base: Mapping[str, int]
    added: Mapping[str, tuple[Floats, ...]]
    blocks: tuple[tuple[Counter[str], ...], ...]
    kinds: Mapping[str, Kind]
    by_size: tuple[Costs, ...] = ()
    impossible: tuple[Floats, ...] = ()

    @classmethod
    def count(cls, space: BoundSpace, anatomy: Anatomy, base: nn.Module, others: Sequence[Sized] = ()) -> Costs:
        """Compute the costs from the blocks' formulas; no candidate is built.

        Args:
            space: for this model.
            anatomy: the sites of this model.
            base: the model.
            others: the sites and the model at each other input size of the space, in its order.
        """
        if not space.sizes:
            return cls._at_size(space, anatomy, base)
        models = [(anatomy, base), *others]
        by_size = [cls._at_size(space, *sized, label) for label, sized in zip(space.sizes, models, strict=True)]
        kinds = {key: kind for costs in by_size for key, kind in costs.kinds.items()}
        return replace(by_size[0], kinds=kinds, by_size=tuple(by_size))

    @classmethod
    def _at_size(cls, space: BoundSpace, anatomy: Anatomy, base: nn.Module, label: str = "") -> Costs:
        """The costs of candidates of one input size."""
        rows: dict[str, list[Floats]] = {name: [] for name in EXACT}
        blocks: list[tuple[Counter[str], ...]] = []
        kinds: dict[str, Kind] = {}
        impossible: list[Floats] = []
        if space.sizes:
            blocks.append(tuple(Counter() for _ in space.sizes))
            for by_place in (*rows.values(), impossible):
                by_place.append(np.zeros(len(space.sizes)))
        for variable in space.variables:
            added_CL = np.zeros((len(EXACT), len(variable.choices)))
            counts: tuple[Counter[str], ...] = tuple(Counter() for _ in variable.choices)
            illegal = [(label, variable.name, choice) in space.illegal for choice in variable.choices]
            for index, choice in enumerate(variable.choices):
                recipe = None if illegal[index] else space.recipe_for(space.nothing | {variable.name: choice})
                for insertion in resolve(recipe, anatomy) if recipe else ():
                    cost = cost_of(insertion)
                    added_CL[:, index] += (cost.params, cost.macs)
                    for key, kind, count in _kinds(insertion):
                        counts[index][key] += count
                        kinds[key] = kind
            blocks.append(counts)
            impossible.append(np.array(illegal, dtype=float))
            for name, row in zip(EXACT, added_CL, strict=True):
                rows[name].append(row)
        parameters = sum(parameter.numel() for parameter in base.parameters())
        before = {"parameters": parameters, "macs": count_macs(base, anatomy.input_size)}
        added = {name: tuple(values) for name, values in rows.items()}
        return cls(before, added, tuple(blocks), kinds, impossible=tuple(impossible))

    @property
    def sizes(self) -> tuple[Costs, ...]:
        """The costs at each input size, the base's own first."""
        return self.by_size or (self,)

    def at(self, picks: Picks) -> Costs:
        """The costs at the input size of a candidate."""
        return self.by_size[picks[0]] if self.by_size else self

    def counts(self, picks: Picks) -> Counter[str]:
        """The number of blocks of each kind in a candidate; negative for what is taken out of the model."""
        total: Counter[str] = Counter()
        for row, pick in zip(self.at(picks).blocks, picks, strict=True):
            total.update(row[pick])  # a sum would drop negative numbers
        return total

    def of(self, name: str, picks: Picks) -> int:
        """A cost of a candidate, by its name in EXACT."""
        costs = self.at(picks)
        return costs.base[name] + int(sum(row[pick] for row, pick in zip(costs.added[name], picks, strict=True)))

    def block_budgets(self, budgets: Budgets) -> dict[str, Budget]:
        """For each exact budget, the part of it that the blocks may use; of several input sizes, the whole of it."""
        names = [name for name in EXACT if name in budgets.limits]
        if not self.by_size:
            return {name: Budget(self.added[name], budgets.limits[name] - self.base[name]) for name in names}
        limits = {
            name: Budget.of_first([with_base(costs.added[name], costs.base[name]) for costs in self.by_size], limit)
            for name, limit in ((name, budgets.limits[name]) for name in names)
        }
        if any(row.any() for costs in self.by_size for row in costs.impossible):
            limits[POSSIBLE] = Budget.of_first([costs.impossible for costs in self.by_size], 0.5)
        return limits

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
        exact.pop(POSSIBLE, None)
        if self.by_size:
            statements = [
                f"the base alone has {amount(least, COST_KINDS[name].unit)} at the smallest of its input sizes"
                for name, least in ((name, min(costs.base[name] for costs in self.by_size)) for name in exact)
            ]
        else:
            statements = [
                f"the base alone has {amount(self.base[name], COST_KINDS[name].unit)}, and no block of the space adds "
                f"less than {amount(min(row[1:].min() for row in self.added[name]), COST_KINDS[name].unit)}"
                for name in exact
            ]
        raise NothingFeasibleError(
            f"no candidate keeps to {budgets.describe()}: {'; '.join(statements)}. "
            f"Raise {' or '.join('--' + COST_KINDS[name].field.replace('_', '-') for name in exact)}, "
            "choose a smaller MODEL, or a --space with cheaper blocks."
        )
