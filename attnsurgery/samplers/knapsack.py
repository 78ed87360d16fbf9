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

An integer program (HiGHS, by scipy.optimize.milp) would be a tenth of this code. On 3,000 random knapsacks of a
search's kind it took 4.4 times the time (the median of their ratios; half of them 2.6 to 7.9) and gave the same answer
in 2,997 and a worse one in 3. On 35 hard ones it took 0.3 (budgets that contradict each other) to 13 times the time. Of
the 7 whose values follow their costs it gave a worse answer for 4 and one over the budget for 1, and in 4 runs it
printed to stdout, which no option prevents. Of 48 places of that kind it found a better candidate. See
scripts/bench/knapsack.py.
"""

from __future__ import annotations

import heapq
import itertools
import math
import operator
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from attnsurgery.samplers.knapsack_bounds import Counts, UpperBounds
from attnsurgery.samplers.places import Budget, Floats, Picks, Places

_MAX_STEPS = 1000
"""Number of partial candidates that A* extends before beam search takes over."""
_BEAM_WIDTH = 4000
"""Number of partial candidates that beam search keeps at each place."""


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
    if any(budget.by_first for budget in budgets):
        by_first = [values] * len(values[0])
        return best_by_first(places, by_first, by_count, budgets, excluded)
    budgets = [_from_zero(budget) for budget in budgets]
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
    bounds = [UpperBounds(places, values, bonus, budget, lower_bound) for budget in budgets]
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


def best_by_first(
    places: Places,
    values: Sequence[Sequence[Floats]],
    by_count: Floats | None = None,
    budgets: Sequence[Budget] = (),
    excluded: Collection[Picks] = (),
) -> Picks | None:
    """`best` where values, costs or both depend on the choice at the first place: the best of one knapsack for each.

    Args:
        places: the space.
        values: by the choice at the first place, the value of each choice by place.
        by_count: as in `best`.
        budgets: as in `best`.
        excluded: as in `best`.
    """
    found: tuple[float, Picks] | None = None
    for first, (first_label, given) in enumerate(zip(next(iter(places.choices.values())), values, strict=True)):
        name, *_ = places.choices
        subspace = replace(places, choices={**places.choices, name: (first_label,)})
        sub_budgets = []
        for budget in budgets:
            costs = list(budget.given(first).costs)
            sub_budgets.append(Budget([costs[0][[first]], *costs[1:]], budget.most))
        sub_excluded = [(0, *picks[1:]) for picks in excluded if picks[0] == first]
        picks = best(subspace, [given[0][[first]], *given[1:]], by_count, sub_budgets, sub_excluded)
        if picks is None:
            continue
        picks = (first, *picks[1:])
        value = float(sum(row[pick] for row, pick in zip(given, picks, strict=True)))
        value += 0.0 if by_count is None else float(by_count[places.count(picks)])
        if found is None or value > found[0]:
            found = value, picks
    return None if found is None else found[1]


def random_candidate(
    places: Places, rng: np.random.Generator, budgets: Sequence[Budget], excluded: Collection[Picks]
) -> Picks | None:
    """An untried candidate within all limits, the best by random values of choices; None if there is none.

    In contrast to rejection sampling (`Places.drawn`) it is not uniform, and finds the last candidate within a budget.
    """
    values = [np.append(0.0, rng.standard_normal(len(choices) - 1)) for choices in places.choices.values()]
    return best(places, values, None, budgets, excluded)


def _from_zero(budget: Budget) -> Budget:
    """The budget with costs that are nowhere negative: places where a choice lowers the cost count from the lowest."""
    lowest = [min(0.0, float(costs.min())) for costs in budget.costs]
    if not any(lowest):
        return budget
    return Budget([costs - low for costs, low in zip(budget.costs, lowest, strict=True)], budget.most - sum(lowest))


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
    bounds: Sequence[UpperBounds],
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
