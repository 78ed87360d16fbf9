"""What there is to choose: places, what may go to each, and candidates as tuples of indices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float64]]
Picks = tuple[int, ...]
"""The index of the choice at each place; 0 is no block."""


@dataclass(frozen=True)
class Budget:
    """What choices cost, and how much there is.

    Args:
        costs: of each choice at each place; they add up.
        most: what they may add up to.
    """

    costs: Sequence[Floats]
    most: float

    def spent(self, candidates: Sequence[Picks]) -> Floats:
        """What each candidate costs."""
        total: Floats = np.zeros(len(candidates))
        for costs, picked in zip(self.costs, np.asarray(candidates, dtype=np.int64).T, strict=False):
            total += costs[picked]
        return total

    def holds(self, picks: Picks) -> bool:
        """True if a candidate keeps to it."""
        return sum(float(costs[pick]) for costs, pick in zip(self.costs, picks, strict=True)) <= self.most


@dataclass(frozen=True)
class Places:
    """A space of candidates.

    Args:
        choices: by the name of each place what may go there, in words; the first is no block. What stands before a
            bracket is the block, what stands in it its options.
        blocks: how many blocks a place counts as when it has one, where that is not 1.
        most_blocks: most blocks in one candidate.
        budgets: by the name of a constraint of the study, what is known of it beforehand: nobody need learn that.
    """

    choices: Mapping[str, tuple[str, ...]]
    blocks: Mapping[str, int] | None = None
    most_blocks: int | None = None
    budgets: Mapping[str, Budget] = field(default_factory=dict)

    @cached_property
    def weights(self) -> tuple[int, ...]:
        """How many blocks each place counts as."""
        return tuple((self.blocks or {}).get(name, 1) for name in self.choices)

    @cached_property
    def limit(self) -> int:
        """The most blocks that a candidate can have."""
        everywhere = sum(self.weights)
        return everywhere if self.most_blocks is None else min(self.most_blocks, everywhere)

    @cached_property
    def _indices(self) -> dict[str, dict[str, int]]:
        return {name: {choice: at for at, choice in enumerate(choices)} for name, choices in self.choices.items()}

    def picks(self, params: Mapping[str, Any]) -> Picks | None:
        """A candidate given by what is at each place; None where a place is missing or has something unknown."""
        try:
            return tuple([index[params[name]] for name, index in self._indices.items()])
        except KeyError:
            return None

    def params(self, picks: Picks) -> dict[str, str]:
        """What is at each place, in words."""
        return {name: choices[pick] for (name, choices), pick in zip(self.choices.items(), picks, strict=True)}

    def count(self, picks: Picks) -> int:
        """How many blocks a candidate has."""
        return sum(blocks for blocks, pick in zip(self.weights, picks, strict=True) if pick)

    def size(self) -> int:
        """Number of candidates that keep to `most_blocks`, the one without any block not counted."""
        return self._ways[0][self.limit] - 1

    @cached_property
    def _ways(self) -> list[list[int]]:
        """How many ways there are to fill the places from each one on, with at most so many blocks."""
        ways = [[1] * (self.limit + 1)]
        for choices, blocks in reversed(list(zip(self.choices.values(), self.weights, strict=True))):
            behind = ways[-1]
            with_one = [0] * blocks + [(len(choices) - 1) * count for count in behind]
            ways.append([none + one for none, one in zip(behind, with_one, strict=False)])
        return ways[::-1]

    def holds(self, picks: Picks) -> bool:
        """True if a candidate keeps to the number of blocks, and to every budget that is known."""
        return self.count(picks) <= self.limit and all(budget.holds(picks) for budget in self.budgets.values())

    def drawn(self, rng: np.random.Generator, wanted: Callable[[Picks], bool], tries: int = 2000) -> Picks | None:
        """A candidate with at least one block that holds and is wanted, uniformly; None if there seems to be none."""
        for _ in range(tries):
            picks = self.at_random(rng)
            if any(picks) and self.holds(picks) and wanted(picks):
                return picks
        return None

    def at_random(self, rng: np.random.Generator) -> Picks:
        """One of all candidates that keep to the number of blocks, each as likely as any other."""
        picks: list[int] = []
        left = self.limit
        for place, (choices, blocks) in enumerate(zip(self.choices.values(), self.weights, strict=True)):
            empty = self._ways[place + 1][left] / self._ways[place][left]  # integers may be beyond a float, ratios not
            picks.append(0 if rng.random() < empty else int(rng.integers(1, len(choices))))
            left -= blocks if picks[-1] else 0
        return tuple(picks)
