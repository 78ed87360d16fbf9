"""The best candidate within all budgets, exactly: a multiple-choice knapsack over places and what goes there.

First, from the last place to the first, what the rest can still be worth for any cost and number of blocks: of partial
candidates that another one beats in both value and cost nothing better can come, so only the undominated are kept
(Nemhauser and Ullmann, "Discrete dynamic programming and capital allocation", 1969). Then candidates are grown from the
first place on, always the one that promises most (A*). With one budget a promise is exact, so the search walks straight
to the best candidate, and on to the next best where that one was tried before; with several budgets the smallest of
their promises holds, and of that of their sum, which is never too low.

An integer programme (HiGHS, by scipy.optimize.milp) gives the same answers, faster for many places, but it prints on
stdout now and then, which no option keeps it from.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
import operator
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from attnsurgery.samplers.places import Budget, Floats, Picks, Places


def best(
    places: Places,
    values: Sequence[Floats],
    by_count: Floats | None = None,
    budgets: Sequence[Budget] = (),
    tried: Collection[Picks] = (),
) -> Picks | None:
    """The candidate of the highest value that fits and was not tried; None if there is none.

    Args:
        values: of each choice at each place; they add up.
        by_count: worth of having 0, 1, 2, ... blocks, as many as all places can hold.
        tried: candidates that do not count.
    """
    known = set(tried)
    budgets = [*budgets] or [Budget([np.zeros(len(worth)) for worth in values], math.inf)]
    if len(budgets) > 1 and all(budget.most > 0 for budget in budgets):
        budgets.append(_together(budgets))
    bonus = np.zeros(places.limit + 1) if by_count is None else by_count[: places.limit + 1]
    promises = [_Promises(places, values, bonus, budget) for budget in budgets]
    worths = [worth.tolist() for worth in values]
    costs = [
        list(zip(*(budget.costs[place].tolist() for budget in budgets), strict=True)) for place in range(len(values))
    ]
    age = itertools.count()
    # by promise, then the longer one first: picks, their value, number of blocks, what is left of each budget
    heap: list[tuple[float, int, int, Picks, float, int, tuple[float, ...]]] = []

    def consider(picks: Picks, value: float, count: int, left: tuple[float, ...]) -> None:
        place = len(picks)
        promise = min([p.at(place, count, rest) for p, rest in zip(promises, left, strict=True)])
        if promise > -math.inf:
            heapq.heappush(heap, (-(value + promise), -len(picks), next(age), picks, value, count, left))

    consider((), 0.0, 0, tuple(budget.most for budget in budgets))
    while heap:
        *_, picks, value, count, left = heapq.heappop(heap)
        place = len(picks)
        if place == len(values):
            if picks not in known:
                return picks
            continue
        for choice, (worth, spent) in enumerate(zip(worths[place], costs[place], strict=True)):
            after = count + (places.weights[place] if choice else 0)
            consider((*picks, choice), value + worth, after, tuple(map(operator.sub, left, spent)))
    return None


def _together(budgets: Sequence[Budget]) -> Budget:
    """All of them in one: what keeps to each keeps to their sum, and the sum promises less than any of them alone."""
    places = range(len(budgets[0].costs))
    costs = [np.sum([budget.costs[place] / budget.most for budget in budgets], axis=0) for place in places]
    return Budget(costs, len(budgets) * (1 + 1e-9))


class _Promises:
    """The most that the places from each one on can add, within one budget."""

    def __init__(self, places: Places, values: Sequence[Floats], bonus: Floats, budget: Budget) -> None:
        self._bonus = bonus.tolist()
        # by place and number of blocks from there on: costs and values, both ascending
        fronts: list[dict[int, tuple[Floats, Floats]]] = [{0: (np.zeros(1), np.zeros(1))}]
        spare = _slack(budget)
        for place in reversed(range(len(values))):
            parts: dict[int, list[tuple[Floats, Floats]]] = {}
            steps = _steps(budget.costs[place], values[place], places.weights[place])
            for count, (spent, worth) in fronts[-1].items():
                for weight, cost, value in steps:
                    more = count + weight
                    if more < len(bonus):
                        costs = spent + cost
                        if within := int(costs.searchsorted(spare[place], side="right")):
                            parts.setdefault(more, []).append((costs[:within], worth[:within] + value))
            fronts.append({count: _undominated(part) for count, part in parts.items()})
        # lists, for one number at a time is looked up in them, which takes numpy ten times as long
        self._fronts = [
            [(count, costs.tolist(), values.tolist()) for count, (costs, values) in front.items()] for front in fronts
        ]
        self._fronts.reverse()

    def at(self, place: int, count: int, left: float) -> float:
        """What the places from this one on can add with so much left and so many blocks in place; -inf: nothing fits.

        The worth of the number of blocks is part of it.
        """
        most, bonus = -math.inf, self._bonus
        for more, costs, values in self._fronts[place]:
            if count + more < len(bonus) and values[-1] + bonus[count + more] > most:
                within = bisect.bisect_right(costs, left)
                if within:
                    most = max(most, values[within - 1] + bonus[count + more])
        return most


def _slack(budget: Budget) -> list[float]:
    """What may be spent from each place on, when all before it take their cheapest choice."""
    least = itertools.accumulate((float(costs.min()) for costs in budget.costs), initial=0.0)
    return [budget.most - spent + 1e-9 * abs(budget.most) for spent in least]


def _steps(costs: Floats, values: Floats, weight: int) -> list[tuple[int, float, float]]:
    """The choices at a place that a best candidate may take: how many blocks they are, what they cost and add."""
    kept_costs, kept_values = _undominated([(costs[1:], values[1:])])
    some = zip(kept_costs.tolist(), kept_values.tolist(), strict=True)
    return [(0, float(costs[0]), float(values[0])), *((weight, cost, value) for cost, value in some)]


def _undominated(parts: list[tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
    """Of costs and values those that no other beats in both, by ascending cost; and of equals perhaps more than one."""
    costs: Any = np.concatenate([part[0] for part in parts])
    values: Any = np.concatenate([part[1] for part in parts])
    order = costs.argsort(kind="stable")  # which merges what is in order by parts
    costs, values = costs[order], values[order]
    kept = np.ones(len(values), dtype=bool)
    np.greater(values[1:], np.maximum.accumulate(values)[:-1], out=kept[1:])
    return costs[kept], values[kept]
