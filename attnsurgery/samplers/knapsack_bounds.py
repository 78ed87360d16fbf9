"""Upper bounds of the knapsack's partial candidates: what the places that are not decided can still add.

By dynamic programming over the undominated partial candidates of the later places, with the linear relaxation of the
earlier ones; `attnsurgery.samplers.knapsack` says how they are used and gives the sources.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from attnsurgery.samplers.places import Budget, Floats, Places

_MAX_STATES = 50_000
"""Number of undominated partial candidates at a place, beyond which neighbouring ones are merged."""

Counts = np.ndarray[Any, np.dtype[np.int64]]
_States = tuple[Counts, Floats, Floats]
"""Partial candidates: their numbers of blocks, costs and values."""


class UpperBounds:
    """The largest value that the places from each one on can add, within one budget.

    Args:
        lower_bound: candidates of a lower value are ignored, so their bounds may be too low.
    """

    def __init__(
        self, places: Places, values: Sequence[Floats], bonus: Floats, budget: Budget, lower_bound: float = -math.inf
    ) -> None:
        self._bonus = bonus.tolist()
        self._merged: dict[int, tuple[Floats, Floats]] = {}
        remaining = _remaining_budget(budget)
        relaxation = _linear_relaxation(budget.costs, values) if lower_bound > -math.inf else []
        best_bonus: Any = np.maximum.accumulate(bonus[::-1])[::-1]
        # undominated states of the places from one on: number of blocks, cost, value; by number, then by cost
        front: _States = (np.zeros(1, dtype=np.int64), np.zeros(1), np.zeros(1))
        # by place: number of blocks with their costs and values, both ascending. They are lists, for they are read one
        # number at a time, which takes numpy ten times as long
        self._fronts = [_by_count(front)]
        for place in reversed(range(len(values))):
            weight_C, cost_C, value_C = _undominated_choices(budget.costs[place], values[place], places.weights[place])
            count_S = (front[0][:, None] + weight_C).ravel()
            cost_S, value_S = (front[1][:, None] + cost_C).ravel(), (front[2][:, None] + value_C).ravel()
            fits_S = (count_S < len(bonus)) & (cost_S <= remaining[place])
            if relaxation:
                bonus_S = best_bonus[np.minimum(count_S, len(bonus) - 1)]
                before_S = np.interp(remaining[0] - cost_S, *relaxation[place], left=-math.inf)
                fits_S &= value_S + before_S + bonus_S >= lower_bound
            front = _merged(_undominated(count_S[fits_S], cost_S[fits_S], value_S[fits_S]))
            self._fronts.append(_by_count(front))
        self._fronts.reverse()

    def at(self, place: int, count: int, remaining: float) -> float:
        """The upper bound from a place on, which includes the value of the total number of blocks; -inf: infeasible.

        Args:
            place: the first place that is not decided.
            count: the number of blocks before it.
            remaining: what remains of the budget.
        """
        bound, bonus = -math.inf, self._bonus
        for added_blocks, costs, values in self._fronts[place]:
            if count + added_blocks < len(bonus) and values[-1] + bonus[count + added_blocks] > bound:
                within = bisect.bisect_right(costs, remaining)
                if within:
                    bound = max(bound, values[within - 1] + bonus[count + added_blocks])
        return bound

    def by_cost(self, place: int, remaining_N: Floats) -> Floats:
        """Upper bounds for many remaining budgets, regardless of the value and limit of the number of blocks."""
        if place not in self._merged:
            fronts = self._fronts[place]
            costs = np.array(list(itertools.chain.from_iterable(costs for _, costs, _ in fronts)))
            values = np.array(list(itertools.chain.from_iterable(values for *_, values in fronts)))
            _, costs, values = _undominated(np.zeros(len(costs), dtype=np.int64), costs, values)
            self._merged[place] = costs, np.append(-math.inf, values)
        costs, values = self._merged[place]
        bound_N: Floats = values[np.searchsorted(costs, remaining_N, side="right")]
        return bound_N


def _remaining_budget(budget: Budget) -> list[float]:
    """By place, what remains of the budget for it and later ones, when all places before take their cheapest choice."""
    cheapest = itertools.accumulate((float(costs.min()) for costs in budget.costs), initial=0.0)
    return [budget.most - cost + 1e-9 * abs(budget.most) for cost in cheapest]


def _linear_relaxation(costs: Sequence[Floats], values: Sequence[Floats]) -> list[tuple[Floats, Floats]]:
    """By place, the largest value that the places before it can add for any cost, when choices may be fractional.

    Returns:
        By place the costs and values, both ascending, at the corners of that piecewise linear function.
    """
    base_costs, base_values = [0.0], [0.0]
    segments: list[tuple[float, float, float, int]] = []
    for place, (cost_C, value_C) in enumerate(zip(costs, values, strict=True)):
        _, front_costs, front_values = _undominated(np.zeros(len(cost_C), dtype=np.int64), cost_C, value_C)
        hull: list[tuple[float, float]] = []
        for point in zip(front_costs.tolist(), front_values.tolist(), strict=True):
            while hull and (hull[-1][0] == point[0] or (len(hull) > 1 and _below(hull[-2], hull[-1], point))):
                hull.pop()
            hull.append(point)
        base_costs.append(base_costs[-1] + hull[0][0])
        base_values.append(base_values[-1] + hull[0][1])
        for (low_cost, low), (high_cost, high) in itertools.pairwise(hull):
            segments.append(((high - low) / (high_cost - low_cost), high_cost - low_cost, high - low, place))
    segments.sort(reverse=True)
    segment_costs, segment_values, place_R = (np.array([segment[index] for segment in segments]) for index in (1, 2, 3))
    corners = []
    for place in range(len(values)):
        before_R = place_R < place
        corners.append(
            (
                base_costs[place] + np.append(0.0, np.cumsum(segment_costs[before_R])),
                base_values[place] + np.append(0.0, np.cumsum(segment_values[before_R])),
            )
        )
    return corners


def _below(left: tuple[float, float], middle: tuple[float, float], right: tuple[float, float]) -> bool:
    """Whether a point is not above the line between its neighbours."""
    rise = (right[1] - left[1]) * (middle[0] - left[0])
    return (middle[1] - left[1]) * (right[0] - left[0]) <= rise


def _undominated_choices(costs: Floats, values: Floats, weight: int) -> _States:
    """The choices at a place that a best candidate may take."""
    counts = np.full(len(costs), weight, dtype=np.int64)
    counts[0] = 0
    return _undominated(counts, costs, values)


def _undominated(counts: Counts, costs: Floats, values: Floats) -> _States:
    """The states that no other with as many blocks equals or beats in both cost and value; one of equal ones."""
    if len(values) < 2:
        return counts, costs, values
    # by number of blocks, then by cost: each number has a range of its own, and a sort by one key is faster than by two
    order = (costs + counts * (costs.max() - costs.min() + 1.0)).argsort()
    counts, costs, values = counts[order], costs[order], values[order]
    shifted = values + counts * (values.max() - values.min() + 1.0)  # so that more blocks are always above
    better = np.ones(len(values), dtype=bool)
    np.greater(shifted[1:], np.maximum.accumulate(shifted)[:-1], out=better[1:])
    counts, costs, values = counts[better], costs[better], values[better]
    repeats = costs[1:] == costs[:-1]
    if repeats.any():  # the values rise, so the last one is the best
        last = np.append(~(repeats & (counts[1:] == counts[:-1])), True)
        counts, costs, values = counts[last], costs[last], values[last]
    return counts, costs, values


def _merged(states: _States) -> _States:
    """The states, or if they are too many, groups of neighbours, each with its least cost and its largest value.

    Bounds from groups are still upper bounds, and memory stays limited where values nearly follow costs.
    """
    counts, costs, values = states
    if len(values) <= _MAX_STATES:
        return states
    first = np.zeros(len(values), dtype=bool)
    first[:: -(-len(values) // _MAX_STATES)] = True
    first[1:] |= counts[1:] != counts[:-1]  # a group has one number of blocks
    starts = np.flatnonzero(first)
    return counts[starts], costs[starts], values[np.append(starts[1:], len(values)) - 1]  # both ascend within a group


def _by_count(states: _States) -> list[tuple[int, list[float], list[float]]]:
    """States that are sorted by number of blocks, in groups: the number, the costs, the values."""
    counts, costs, values = (column.tolist() for column in states)
    starts = [index for index, count in enumerate(counts) if not index or count != counts[index - 1]]
    return [
        (counts[start], costs[start:end], values[start:end])
        for start, end in itertools.pairwise([*starts, len(counts)])
    ]
