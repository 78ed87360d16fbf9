"""The space of a sampler: places, the choices at each of them, and candidates as tuples of indices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float64]]
Picks = tuple[int, ...]
"""The index of the choice at each place; 0 is no block."""


@dataclass(frozen=True)
class Budget:
    """A limit on a cost that is a sum over places.

    Args:
        costs: by place, the cost of each choice.
        most: the limit; the cost of a candidate may equal it.
        by_first: where costs depend on the choice at the first place, which holds no blocks: by that choice, `costs`.
    """

    costs: Sequence[Floats]
    most: float
    by_first: Sequence[Sequence[Floats]] = ()

    @classmethod
    def of_first(cls, by_first: Sequence[Sequence[Floats]], most: float) -> Budget:
        """A budget whose costs depend on the choice at the first place."""
        return cls(by_first[0], most, by_first)

    def given(self, first: int) -> Budget:
        """The budget of candidates with this choice at the first place: a sum over places."""
        return Budget(self.by_first[first], self.most) if self.by_first else self

    def spent(self, candidates: Sequence[Picks]) -> Floats:
        """The cost of each candidate, (M,)."""
        total: Floats = np.zeros(len(candidates))
        picks_MP = np.asarray(candidates, dtype=np.int64)
        if self.by_first:
            for first in range(len(self.by_first) if len(candidates) else 0):
                rows_M = np.flatnonzero(picks_MP[:, 0] == first)
                total[rows_M] = self.given(first).spent(picks_MP[rows_M])  # type: ignore[arg-type]
            return total
        for costs, picks in zip(self.costs, picks_MP.T, strict=False):
            total += costs[picks]
        return total

    def holds(self, picks: Picks) -> bool:
        """True if the cost of a candidate is within the limit."""
        costs_by_place = self.by_first[picks[0]] if self.by_first else self.costs
        return sum(float(costs[pick]) for costs, pick in zip(costs_by_place, picks, strict=True)) <= self.most


@dataclass(frozen=True)
class Places:
    """A space of candidates: one choice at each place.

    Args:
        choices: by the name of each place, the labels of its choices; the first means no block. A label is the name
            of a block, then its options in brackets, if it has any. A place whose blocks count as 0 holds no blocks,
            but another choice, such as the input size; its first label is that of the base.
        blocks: by place, the number of blocks that one block there counts as, where that is not 1.
        most_blocks: the largest number of blocks in one candidate; None for no limit.
        budgets: by the name of a constraint of the study, the budget where costs are known before measuring; a sampler
            does not have to learn these constraints.
    """

    choices: Mapping[str, tuple[str, ...]]
    blocks: Mapping[str, int] | None = None
    most_blocks: int | None = None
    budgets: Mapping[str, Budget] = field(default_factory=dict)

    @cached_property
    def weights(self) -> tuple[int, ...]:
        """By place, the number of blocks that one block there counts as."""
        return tuple((self.blocks or {}).get(name, 1) for name in self.choices)

    @cached_property
    def nothing(self) -> Picks:
        """The candidate without any block, which is the base."""
        return (0,) * len(self.choices)

    @cached_property
    def limit(self) -> int:
        """The largest number of blocks that a candidate can have."""
        total = sum(self.weights)
        return total if self.most_blocks is None else min(self.most_blocks, total)

    @cached_property
    def _indices(self) -> dict[str, dict[str, int]]:
        return {name: {choice: index for index, choice in enumerate(choices)} for name, choices in self.choices.items()}

    def picks(self, params: Mapping[str, Any]) -> Picks | None:
        """The candidate with these labels by place; None where a place is missing or a label is unknown."""
        try:
            return tuple([index[params[name]] for name, index in self._indices.items()])
        except KeyError:
            return None

    def params(self, picks: Picks) -> dict[str, str]:
        """The label at each place."""
        return {name: choices[pick] for (name, choices), pick in zip(self.choices.items(), picks, strict=True)}

    def count(self, picks: Picks) -> int:
        """The number of blocks of a candidate."""
        return sum(blocks for blocks, pick in zip(self.weights, picks, strict=True) if pick)

    def size(self) -> int:
        """Number of candidates with at most `most_blocks` blocks, without the base."""
        return self._candidate_counts[0][self.limit] - 1

    @cached_property
    def _candidate_counts(self) -> list[list[int]]:
        """By place and limit, the number of candidates for this place and later ones with at most so many blocks."""
        counts = [[1] * (self.limit + 1)]
        for choices, blocks in reversed(list(zip(self.choices.values(), self.weights, strict=True))):
            following = counts[-1]
            with_block = [0] * blocks + [(len(choices) - 1) * count for count in following]
            counts.append([without + added for without, added in zip(following, with_block, strict=False)])
        return counts[::-1]

    def holds(self, picks: Picks) -> bool:
        """True if a candidate is within the limit on blocks and within every known budget."""
        return self.count(picks) <= self.limit and all(budget.holds(picks) for budget in self.budgets.values())

    def within(self, candidates: Sequence[Picks], budgets: Sequence[Budget]) -> list[Picks]:
        """Those of many candidates that are within the limit on blocks and within these budgets."""
        allowed = [picks for picks in candidates if self.count(picks) <= self.limit]
        within_M = np.ones(len(allowed), dtype=bool)
        for budget in budgets:
            within_M &= budget.spent(allowed) <= budget.most
        return [picks for picks, within in zip(allowed, within_M.tolist(), strict=True) if within]

    def neighbours(self, picks: Picks) -> Iterator[Picks]:
        """All candidates that differ from this one at exactly one place."""
        for place, choices in enumerate(self.choices.values()):
            for choice in range(len(choices)):
                if choice != picks[place]:
                    yield (*picks[:place], choice, *picks[place + 1 :])

    def drawn(self, rng: np.random.Generator, accept: Callable[[Picks], bool], tries: int = 2000) -> Picks | None:
        """An accepted candidate within all limits, other than the base, drawn uniformly by rejection sampling.

        Args:
            rng: random numbers.
            accept: whether a candidate within all limits is accepted.
            tries: number of draws after which None is returned, also where such a candidate exists.
        """
        for _ in range(tries):
            picks = self.at_random(rng)
            if any(picks) and self.holds(picks) and accept(picks):
                return picks
        return None

    def at_random(self, rng: np.random.Generator) -> Picks:
        """A candidate within the limit on blocks, drawn uniformly from all of them, the empty one included."""
        picks: list[int] = []
        remaining = self.limit
        for place, (choices, blocks) in enumerate(zip(self.choices.values(), self.weights, strict=True)):
            empty = (
                self._candidate_counts[place + 1][remaining] / self._candidate_counts[place][remaining]
            )  # a ratio fits a float
            picks.append(0 if rng.random() < empty else int(rng.integers(1, len(choices))))
            remaining -= blocks if picks[-1] else 0
        return tuple(picks)
