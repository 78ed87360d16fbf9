"""The best candidate within all budgets, exactly: a multiple-choice knapsack over places and the choices at each.

1. Upper bounds, by dynamic programming from the last place to the first: the largest value that the remaining places
   can add, for any cost and number of blocks. A partial candidate that is dominated in both value and cost cannot be
   part of a better one, so only undominated ones are kept (Nemhauser and Ullmann, "Discrete dynamic programming and
   capital allocation", 1969). Of these, only those are kept that can still reach a lower bound, together with the
   linear relaxation of the places before them (Sinha and Zoltners, "The multiple-choice knapsack problem", 1979). The
   lower bound is the value of a greedy solution.
2. Best-first search (A*) from the first place on, which always extends the partial candidate with the largest upper
   bound. With one budget the bound is exact for all that reach the lower bound, so the search goes straight to the best
   candidate, and on to the next best where that one is excluded. With several budgets the smallest of their bounds
   holds, and so does that of their sum (the surrogate relaxation).
3. After a number of steps, beam search with the same bounds, which may fall short of the best value by a little.

An integer program (HiGHS, by scipy.optimize.milp) would be a tenth of this code. On 300 random knapsacks of a search's
kind it gave the same answers in 5.0 times the time (the median of their ratios; half of them 2.3 to 16.9). On 35 hard
ones it took 0.3 (budgets that contradict each other) to 11 times the time. Of the 7 whose values follow their costs it
gave a worse answer for 4 and one over the budget for 1, and in 4 runs it printed to stdout, which no option prevents.
Of 48 places of that kind it found a better candidate. See scripts/bench/knapsack.py.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
import operator
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from attnsurgery.samplers.places import Budget, Floats, Picks, Places

_MAX_STEPS = 1000
"""Number of partial candidates that A* extends before beam search takes over."""
_BEAM_WIDTH = 4000
"""Number of partial candidates that beam search keeps at each place."""
_MAX_STATES = 50_000
"""Number of undominated partial candidates at a place, beyond which neighbouring ones are merged."""

Counts = np.ndarray[Any, np.dtype[np.int64]]
_States = tuple[Counts, Floats, Floats]
"""Partial candidates: their numbers of blocks, costs and values."""


def best(
    places: Places,
    values: Sequence[Floats],
    by_count: Floats | None = None,
    budgets: Sequence[Budget] = (),
    excluded: Collection[Picks] = (),
) -> Picks | None:
    """The untried candidate of the largest value within all limits; None if there is none.

    With several budgets its value may be a little below the largest, where finding that would take too long.

    Args:
        places: the space.
        values: by place, the value of each choice; they add up.
        by_count: the value of having 0, 1, 2, ... blocks, up to the number that all places can hold.
        budgets: costs and their limits.
        excluded: candidates that must not be returned.
    """
    if len(budgets) > 1:
        feasible = _feasible_choices(budgets)
        if any(len(choices) < len(value) for choices, value in zip(feasible, values, strict=True)):
            return _best_of_choices(feasible, places, values, by_count, budgets, excluded)
    excluded_set = set(excluded)
    bonus = np.zeros(places.limit + 1) if by_count is None else by_count[: places.limit + 1]
    binding = all(budget.most > 0 for budget in budgets)
    greedy, lower_bound = (
        _greedy(places, values, bonus, budgets, excluded_set) if budgets and binding else (None, -math.inf)
    )
    budgets = [*budgets] or [Budget([np.zeros(len(value)) for value in values], math.inf)]
    if len(budgets) > 1 and binding:
        budgets.append(_sum_of_budgets(budgets))
    bounds = [_UpperBounds(places, values, bonus, budget, lower_bound) for budget in budgets]
    value_lists = [value.tolist() for value in values]
    cost_lists = [
        list(zip(*(budget.costs[place].tolist() for budget in budgets), strict=True)) for place in range(len(values))
    ]
    age = itertools.count()
    # by upper bound, then the longer one first: picks, their value, number of blocks, what remains of each budget
    heap: list[tuple[float, int, int, Picks, float, int, tuple[float, ...]]] = []

    def push(picks: Picks, value: float, count: int, remaining: tuple[float, ...]) -> None:
        place = len(picks)
        bound = min([b.at(place, count, amount) for b, amount in zip(bounds, remaining, strict=True)])
        if bound > -math.inf:
            heapq.heappush(heap, (-(value + bound), -len(picks), next(age), picks, value, count, remaining))

    push((), 0.0, 0, tuple(budget.most for budget in budgets))
    steps = 0
    while heap:
        steps += 1
        if steps == _MAX_STEPS:
            solution = _beam_search(places, values, bonus, budgets, bounds, lower_bound, excluded_set) or greedy
            if solution:
                return solution
        *_, picks, value, count, remaining = heapq.heappop(heap)
        place = len(picks)
        if place == len(values):
            if picks not in excluded_set:
                return picks
            continue
        for choice, (added, cost) in enumerate(zip(value_lists[place], cost_lists[place], strict=True)):
            new_count = count + (places.weights[place] if choice else 0)
            push((*picks, choice), value + added, new_count, tuple(map(operator.sub, remaining, cost)))
    return None


def random_candidate(
    places: Places, rng: np.random.Generator, budgets: Sequence[Budget], excluded: Collection[Picks]
) -> Picks | None:
    """An untried candidate within all limits, the best by random values of choices; None if there is none.

    In contrast to rejection sampling (`Places.drawn`) it is not uniform, and finds the last candidate within a budget.
    """
    values = [np.append(0.0, rng.standard_normal(len(choices) - 1)) for choices in places.choices.values()]
    return best(places, values, None, budgets, excluded)


def _feasible_choices(budgets: Sequence[Budget]) -> list[Counts]:
    """By place, the choices that are within every budget when all other places take their cheapest choice.

    A choice that exceeds one budget alone may look cheap in the sum of all budgets, and would loosen its bound.
    """
    feasible = [np.ones(len(costs), dtype=bool) for costs in budgets[0].costs]
    for budget in budgets:
        cheapest = [float(costs.min()) for costs in budget.costs]
        spare = budget.most - sum(cheapest) + 1e-9 * abs(budget.most)
        for mask, costs, cheapest_cost in zip(feasible, budget.costs, cheapest, strict=True):
            mask &= costs - cheapest_cost <= spare
    for mask in feasible:
        mask[0] = True  # no block is always a choice
    return [np.flatnonzero(mask) for mask in feasible]


def _best_of_choices(
    feasible: Sequence[Counts],
    places: Places,
    values: Sequence[Floats],
    by_count: Floats | None,
    budgets: Sequence[Budget],
    excluded: Collection[Picks],
) -> Picks | None:
    """`best` with a subset of the choices at each place."""
    indexed_places = zip(feasible, places.choices.items(), strict=True)
    subspace = replace(
        places, choices={name: tuple(labels[index] for index in choices) for choices, (name, labels) in indexed_places}
    )
    sub_budgets = [
        replace(budget, costs=[costs[choices] for choices, costs in zip(feasible, budget.costs, strict=True)])
        for budget in budgets
    ]
    new_index = [{old: new for new, old in enumerate(choices.tolist())} for choices in feasible]
    sub_excluded = [
        tuple([index[pick] for index, pick in zip(new_index, picks, strict=True)])
        for picks in excluded
        if all(pick in index for index, pick in zip(new_index, picks, strict=True))
    ]
    sub_values = [value[choices] for choices, value in zip(feasible, values, strict=True)]
    picks = best(subspace, sub_values, by_count, sub_budgets, sub_excluded)
    if picks is None:
        return None
    return tuple([int(choices[pick]) for choices, pick in zip(feasible, picks, strict=True)])


def _beam_search(
    places: Places,
    values: Sequence[Floats],
    bonus: Floats,
    budgets: Sequence[Budget],
    bounds: Sequence[_UpperBounds],
    lower_bound: float,
    excluded: Collection[Picks],
) -> Picks | None:
    """The best candidate that beam search finds, if any: of each place's extensions those of largest upper bound stay.

    Shape letters: S states in the beam, C choices, N = S * C extensions, B budgets.
    """
    best_bonus: Any = np.maximum.accumulate(bonus[::-1])[::-1]
    picks_SP: Any = np.zeros((1, 0), dtype=np.int16)
    value_S, count_S = np.zeros(1), np.zeros(1, dtype=np.int64)
    remaining_SB = np.array([[budget.most for budget in budgets]])
    for place, value_C in enumerate(values):
        weight_C = np.full(len(value_C), places.weights[place])
        weight_C[0] = 0
        cost_CB = np.stack([budget.costs[place] for budget in budgets], axis=-1)
        value_N, count_N = (value_S[:, None] + value_C).ravel(), (count_S[:, None] + weight_C).ravel()
        remaining_NB = (remaining_SB[:, None] - cost_CB).reshape(-1, len(budgets))
        index_N = np.flatnonzero(count_N < len(bonus))
        bound_N = np.min(
            [upper_bounds.by_cost(place + 1, remaining_NB[index_N, b]) for b, upper_bounds in enumerate(bounds)], axis=0
        )
        bound_N += value_N[index_N] + (best_bonus if place + 1 < len(values) else bonus)[count_N[index_N]]
        within_N = (bound_N >= lower_bound) & (bound_N > -math.inf)
        index_N, bound_N = index_N[within_N], bound_N[within_N]
        if len(index_N) > _BEAM_WIDTH:
            top_S = np.argpartition(-bound_N, _BEAM_WIDTH)[:_BEAM_WIDTH]
            index_N, bound_N = index_N[top_S], bound_N[top_S]
        parent_S, choice_S = np.divmod(index_N, len(value_C))
        picks_SP = np.concatenate([picks_SP[parent_S], choice_S[:, None].astype(np.int16)], axis=1)
        value_S, count_S, remaining_SB = value_N[index_N], count_N[index_N], remaining_NB[index_N]
    for row in np.argsort(-bound_N, kind="stable"):
        picks: Picks = tuple(picks_SP[row].tolist())
        if picks not in excluded:
            return picks
    return None


def _greedy(
    places: Places, values: Sequence[Floats], bonus: Floats, budgets: Sequence[Budget], excluded: Collection[Picks]
) -> tuple[Picks | None, float]:
    """The greedy solution and a lower bound just below its value; None and -inf where there is none.

    From the empty candidate on, choices are taken in the order of value by cost, as far as they fit; the best of the
    candidates on the way that are not excluded is the solution.
    """
    relative = [
        np.sum([budget.costs[place] / budget.most for budget in budgets], axis=0) for place in range(len(values))
    ]
    by_efficiency = sorted(
        (
            ((value - place_values[0]) / max(cost - relative[place][0], 1e-12), place, choice)
            for place, place_values in enumerate(values)
            for choice, (value, cost) in enumerate(zip(place_values.tolist(), relative[place].tolist(), strict=True))
            if choice and value > place_values[0]
        ),
        reverse=True,
    )
    cost_lists = [[cost.tolist() for cost in budget.costs] for budget in budgets]
    picks, count, best_value = [0] * len(values), 0, -math.inf
    solution: Picks | None = None
    value = float(sum(place_values[0] for place_values in values))
    limits = [budget.most * (1 - 1e-9) for budget in budgets]  # sums in another order may come to a little more
    amounts = [limit - sum(cost[0] for cost in costs) for limit, costs in zip(limits, cost_lists, strict=True)]
    for _, place, choice in by_efficiency:
        current = picks[place]
        new_count = count + (places.weights[place] if not current else 0)
        new_amounts = [
            remaining - costs[place][choice] + costs[place][current]
            for remaining, costs in zip(amounts, cost_lists, strict=True)
        ]
        gain = float(values[place][choice] - values[place][current])
        if gain <= 0 or new_count >= len(bonus) or min(new_amounts) < 0:
            continue
        picks[place], count, amounts, value = choice, new_count, new_amounts, value + gain
        if value + bonus[count] > best_value and tuple(picks) not in excluded:
            solution, best_value = tuple(picks), value + float(bonus[count])
    return solution, best_value - 1e-9 * (1.0 + abs(best_value))


def _sum_of_budgets(budgets: Sequence[Budget]) -> Budget:
    """The surrogate relaxation: each budget scaled to a limit of 1, then added up.

    Whatever is within every budget is within the sum, and its upper bound may be lower than that of any one of them.
    """
    places = range(len(budgets[0].costs))
    costs = [np.sum([budget.costs[place] / budget.most for budget in budgets], axis=0) for place in places]
    return Budget(costs, len(budgets) * (1 + 1e-9))


class _UpperBounds:
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
