"""What there is to choose: places, what may go to each, and candidates as tuples of indices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float64]]
Picks = tuple[int, ...]
"""The index of the choice at each place; 0 is no block."""


@dataclass(frozen=True)
class Places:
    """A space of candidates.

    Args:
        choices: by the name of each place what may go there, in words; the first is no block. What stands before a
            bracket is the block, what stands in it its options.
        blocks: how many blocks a place counts as when it has one, where that is not 1.
        most_blocks: most blocks in one candidate.
    """

    choices: Mapping[str, tuple[str, ...]]
    blocks: Mapping[str, int] | None = None
    most_blocks: int | None = None

    @property
    def weights(self) -> tuple[int, ...]:
        """How many blocks each place counts as."""
        return tuple((self.blocks or {}).get(name, 1) for name in self.choices)

    @property
    def limit(self) -> int:
        """The most blocks that a candidate can have."""
        everywhere = sum(self.weights)
        return everywhere if self.most_blocks is None else min(self.most_blocks, everywhere)

    def picks(self, params: Mapping[str, Any]) -> Picks | None:
        """A candidate given by what is at each place; None where a place is missing or has something unknown."""
        try:
            return tuple(choices.index(params[name]) for name, choices in self.choices.items())
        except (KeyError, ValueError):
            return None

    def params(self, picks: Picks) -> dict[str, str]:
        """What is at each place, in words."""
        return {name: choices[pick] for (name, choices), pick in zip(self.choices.items(), picks, strict=True)}

    def count(self, picks: Picks) -> int:
        """How many blocks a candidate has."""
        return sum(blocks for blocks, pick in zip(self.weights, picks, strict=True) if pick)

    def size(self) -> int:
        """Number of candidates that keep to `most_blocks`, the one without any block not counted."""
        by_blocks = {0: 1}
        for choices, blocks in zip(self.choices.values(), self.weights, strict=True):
            after = dict(by_blocks)
            for count, ways in by_blocks.items():
                after[count + blocks] = after.get(count + blocks, 0) + ways * (len(choices) - 1)
            by_blocks = after
        return sum(ways for count, ways in by_blocks.items() if count <= self.limit) - 1

    def drawn(self, rng: np.random.Generator, wanted: Callable[[Picks], bool], tries: int = 2000) -> Picks | None:
        """A candidate with at least one block that is wanted, uniformly; None when there seems to be none."""
        for _ in range(tries):
            picks = tuple(int(rng.integers(len(choices))) for choices in self.choices.values())
            if any(picks) and self.count(picks) <= self.limit and wanted(picks):
                return picks
        return None
