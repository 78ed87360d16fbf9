"""The best candidate within all budgets, exactly: a multiple-choice knapsack over places and what goes there.

First, from the last place to the first, what the rest can still be worth for any cost and number of blocks: of partial
candidates that another one beats in both value and cost nothing better can come, so only the undominated are kept
(Nemhauser and Ullmann, "Discrete dynamic programming and capital allocation", 1969); and of those only what can still
come to a floor, with the most that the places before them may add when blocks may be taken in part (the relaxation of
Sinha and Zoltners, "The multiple-choice knapsack problem", 1979). The floor is what a greedy climb comes to. Then
candidates are grown from the first place on, always the one that promises most (A*). With one budget a promise is exact
for all that reach the floor, so the search walks straight to the best candidate, and on to the next best where that one
was tried before; with several budgets the smallest of their promises holds, and of that of their sum, which is never
too low for them.

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
from dataclasses import replace
from typing import Any

import numpy as np

from attnsurgery.samplers.places import Budget, Floats, Picks, Places

_STEPS = 1000
"""Partial candidates that are grown one by one before that."""
_WIDTH = 4000
"""Partial candidates that go on to the next place then."""

Counts = np.ndarray[Any, np.dtype[np.int64]]
_States = tuple[Counts, Floats, Floats]


def best(
    places: Places,
    values: Sequence[Floats],
    by_count: Floats | None = None,
    budgets: Sequence[Budget] = (),
    tried: Collection[Picks] = (),
) -> Picks | None:
    """The candidate of the highest value that fits and was not tried; None if there is none.

    With several budgets it may fall short of the highest value by a little, where that would take too long to find.

    Args:
        values: of each choice at each place; they add up.
        by_count: worth of having 0, 1, 2, ... blocks, as many as all places can hold.
        tried: candidates that do not count.
    """
    if len(budgets) > 1:
        kept = _possible(budgets)
        if any(len(some) < len(worth) for some, worth in zip(kept, values, strict=True)):
            return _best_of(kept, places, values, by_count, budgets, tried)
    known = set(tried)
    bonus = np.zeros(places.limit + 1) if by_count is None else by_count[: places.limit + 1]
    binding = all(budget.most > 0 for budget in budgets)
    climbed, floor = _climb(places, values, bonus, budgets, known) if budgets and binding else (None, -math.inf)
    budgets = [*budgets] or [Budget([np.zeros(len(worth)) for worth in values], math.inf)]
    if len(budgets) > 1 and binding:
        budgets.append(_together(budgets))
    promises = [_Promises(places, values, bonus, budget, floor) for budget in budgets]
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
    steps = 0
    while heap:
        steps += 1
        if steps == _STEPS:
            found = _most_promising(places, values, bonus, budgets, promises, floor, known) or climbed
            if found:
                return found
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


def _possible(budgets: Sequence[Budget]) -> list[Counts]:
    """By place, the choices that keep to every budget when all other places take their cheapest.

    One that is over a budget by itself looks cheap in the sum of all budgets, and promises what never comes.
    """
    fits = [np.ones(len(costs), dtype=bool) for costs in budgets[0].costs]
    for budget in budgets:
        least = [float(costs.min()) for costs in budget.costs]
        spare = budget.most - sum(least) + 1e-9 * abs(budget.most)
        for fit, costs, cheapest in zip(fits, budget.costs, least, strict=True):
            fit &= costs - cheapest <= spare
    for fit in fits:
        fit[0] = True  # no block is always a choice
    return [np.flatnonzero(fit) for fit in fits]


def _best_of(
    kept: Sequence[Counts],
    places: Places,
    values: Sequence[Floats],
    by_count: Floats | None,
    budgets: Sequence[Budget],
    tried: Collection[Picks],
) -> Picks | None:
    """`best` of some of the choices at each place."""
    named = zip(kept, places.choices.items(), strict=True)
    fewer = replace(places, choices={name: tuple(choices[at] for at in some) for some, (name, choices) in named})
    less = [
        replace(budget, costs=[costs[some] for some, costs in zip(kept, budget.costs, strict=True)])
        for budget in budgets
    ]
    now = [{before: at for at, before in enumerate(some.tolist())} for some in kept]
    known = [
        tuple([index[pick] for index, pick in zip(now, picks, strict=True)])
        for picks in tried
        if all(pick in index for index, pick in zip(now, picks, strict=True))
    ]
    worth = [value[some] for some, value in zip(kept, values, strict=True)]
    found = best(fewer, worth, by_count, less, known)
    return None if found is None else tuple([int(some[pick]) for some, pick in zip(kept, found, strict=True)])


def _most_promising(
    places: Places,
    values: Sequence[Floats],
    bonus: Floats,
    budgets: Sequence[Budget],
    promises: Sequence[_Promises],
    floor: float,
    known: Collection[Picks],
) -> Picks | None:
    """The best candidate that the `_WIDTH` most promising partial ones of every place lead to, if any."""
    highest: Any = np.maximum.accumulate(bonus[::-1])[::-1]
    picks_SP: Any = np.zeros((1, 0), dtype=np.int16)
    value_S, count_S = np.zeros(1), np.zeros(1, dtype=np.int64)
    left_SB = np.array([[budget.most for budget in budgets]])
    for place, worth_C in enumerate(values):
        weight_C = np.full(len(worth_C), places.weights[place])
        weight_C[0] = 0
        cost_CB = np.stack([budget.costs[place] for budget in budgets], axis=-1)
        value_N, count_N = (value_S[:, None] + worth_C).ravel(), (count_S[:, None] + weight_C).ravel()
        left_NB = (left_SB[:, None] - cost_CB).reshape(-1, len(budgets))
        here_N = np.flatnonzero(count_N < len(bonus))
        promise_N = np.min([one.by_cost(place + 1, left_NB[here_N, at]) for at, one in enumerate(promises)], axis=0)
        promise_N += value_N[here_N] + (highest if place + 1 < len(values) else bonus)[count_N[here_N]]
        holds_N = (promise_N >= floor) & (promise_N > -math.inf)
        here_N, promise_N = here_N[holds_N], promise_N[holds_N]
        if len(here_N) > _WIDTH:
            top_S = np.argpartition(-promise_N, _WIDTH)[:_WIDTH]
            here_N, promise_N = here_N[top_S], promise_N[top_S]
        before_S, choice_S = np.divmod(here_N, len(worth_C))
        picks_SP = np.concatenate([picks_SP[before_S], choice_S[:, None].astype(np.int16)], axis=1)
        value_S, count_S, left_SB = value_N[here_N], count_N[here_N], left_NB[here_N]
    for at in np.argsort(-promise_N, kind="stable"):
        picks: Picks = tuple(picks_SP[at].tolist())
        if picks not in known:
            return picks
    return None


def _climb(
    places: Places, values: Sequence[Floats], bonus: Floats, budgets: Sequence[Budget], known: Collection[Picks]
) -> tuple[Picks | None, float]:
    """The best of some candidates that fit and were not tried, and a little less than its worth; -inf without any.

    They are those on the way of a greedy climb: at first nothing anywhere, then one choice after another that adds the
    most for its share of the budgets.
    """
    share = [np.sum([budget.costs[place] / budget.most for budget in budgets], axis=0) for place in range(len(values))]
    climbs = sorted(
        (
            ((value - worth[0]) / max(cost - share[place][0], 1e-12), place, choice)
            for place, worth in enumerate(values)
            for choice, (value, cost) in enumerate(zip(worth.tolist(), share[place].tolist(), strict=True))
            if choice and value > worth[0]
        ),
        reverse=True,
    )
    costs = [[cost.tolist() for cost in budget.costs] for budget in budgets]
    picks, count, floor = [0] * len(values), 0, -math.inf
    found: Picks | None = None
    worth = float(sum(worth[0] for worth in values))
    surely = [budget.most * (1 - 1e-9) for budget in budgets]  # sums in another order may come to a little more
    left = [most - sum(cost[0] for cost in spent) for most, spent in zip(surely, costs, strict=True)]
    for _, place, choice in climbs:
        now = picks[place]
        after = count + (places.weights[place] if not now else 0)
        rest = [r - spent[place][choice] + spent[place][now] for r, spent in zip(left, costs, strict=True)]
        gain = float(values[place][choice] - values[place][now])
        if gain <= 0 or after >= len(bonus) or min(rest) < 0:
            continue
        picks[place], count, left, worth = choice, after, rest, worth + gain
        if worth + bonus[count] > floor and tuple(picks) not in known:
            found, floor = tuple(picks), worth + float(bonus[count])
    return found, floor - 1e-9 * (1.0 + abs(floor))


def _together(budgets: Sequence[Budget]) -> Budget:
    """All of them in one: what keeps to each keeps to their sum, and the sum promises less than any of them alone."""
    places = range(len(budgets[0].costs))
    costs = [np.sum([budget.costs[place] / budget.most for budget in budgets], axis=0) for place in places]
    return Budget(costs, len(budgets) * (1 + 1e-9))


class _Promises:
    """The most that the places from each one on can add, within one budget.

    Args:
        floor: candidates worth less do not matter; what they are promised may be too little.
    """

    def __init__(
        self, places: Places, values: Sequence[Floats], bonus: Floats, budget: Budget, floor: float = -math.inf
    ) -> None:
        self._bonus = bonus.tolist()
        self._merged: dict[int, tuple[Floats, Floats]] = {}
        spare = _slack(budget)
        before = _in_part(budget.costs, values) if floor > -math.inf else []
        highest: Any = np.maximum.accumulate(bonus[::-1])[::-1]
        # what the places from one on can be: number of blocks, cost, value; by number, then by cost, both ascending
        front: _States = (np.zeros(1, dtype=np.int64), np.zeros(1), np.zeros(1))
        # by place: number of blocks with their costs and values, both ascending. Lists, for one number at a time is
        # looked up in them, which takes numpy ten times as long
        self._fronts = [_by_count(front)]
        for place in reversed(range(len(values))):
            weight_C, cost_C, value_C = _steps(budget.costs[place], values[place], places.weights[place])
            counts = (front[0][:, None] + weight_C).ravel()
            costs, worths = (front[1][:, None] + cost_C).ravel(), (front[2][:, None] + value_C).ravel()
            fits = (counts < len(bonus)) & (costs <= spare[place])
            if before:
                highest_S = highest[np.minimum(counts, len(bonus) - 1)]
                prior_S = np.interp(spare[0] - costs, *before[place], left=-math.inf)
                fits &= worths + prior_S + highest_S >= floor
            front = _undominated(counts[fits], costs[fits], worths[fits])
            self._fronts.append(_by_count(front))
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

    def by_cost(self, place: int, left_N: Floats) -> Floats:
        """The same at once for many, without the worth of the number of blocks, and as if that were not limited."""
        if place not in self._merged:
            fronts = self._fronts[place]
            costs = np.array(list(itertools.chain.from_iterable(costs for _, costs, _ in fronts)))
            values = np.array(list(itertools.chain.from_iterable(values for *_, values in fronts)))
            _, costs, values = _undominated(np.zeros(len(costs), dtype=np.int64), costs, values)
            self._merged[place] = costs, np.append(-math.inf, values)
        costs, values = self._merged[place]
        promised: Floats = values[np.searchsorted(costs, left_N, side="right")]
        return promised


def _slack(budget: Budget) -> list[float]:
    """What may be spent from each place on, when all before it take their cheapest choice."""
    least = itertools.accumulate((float(costs.min()) for costs in budget.costs), initial=0.0)
    return [budget.most - spent + 1e-9 * abs(budget.most) for spent in least]


def _in_part(costs: Sequence[Floats], values: Sequence[Floats]) -> list[tuple[Floats, Floats]]:
    """By place, what those before it can add at most for any cost, when choices may be mixed: costs and values, both
    ascending, to be joined by straight lines."""
    spent, worth = [0.0], [0.0]
    risers: list[tuple[float, float, float, int]] = []
    for place, (cost, value) in enumerate(zip(costs, values, strict=True)):
        _, kept_costs, kept_values = _undominated(np.zeros(len(cost), dtype=np.int64), cost, value)
        hull: list[tuple[float, float]] = []
        for point in zip(kept_costs.tolist(), kept_values.tolist(), strict=True):
            while hull and (hull[-1][0] == point[0] or (len(hull) > 1 and _below(hull[-2], hull[-1], point))):
                hull.pop()
            hull.append(point)
        spent.append(spent[-1] + hull[0][0])
        worth.append(worth[-1] + hull[0][1])
        for (low_cost, low), (high_cost, high) in itertools.pairwise(hull):
            risers.append(((high - low) / (high_cost - low_cost), high_cost - low_cost, high - low, place))
    risers.sort(reverse=True)
    step_costs, step_values, of_R = (np.array([riser[at] for riser in risers]) for at in (1, 2, 3))
    found = []
    for place in range(len(values)):
        earlier_R = of_R < place
        found.append(
            (
                spent[place] + np.append(0.0, np.cumsum(step_costs[earlier_R])),
                worth[place] + np.append(0.0, np.cumsum(step_values[earlier_R])),
            )
        )
    return found


def _below(left: tuple[float, float], middle: tuple[float, float], right: tuple[float, float]) -> bool:
    """Whether a point is not above the line between its neighbours."""
    rise = (right[1] - left[1]) * (middle[0] - left[0])
    return (middle[1] - left[1]) * (right[0] - left[0]) <= rise


def _steps(costs: Floats, values: Floats, weight: int) -> _States:
    """The choices at a place that a best candidate may take: how many blocks they are, what they cost and add."""
    counts = np.full(len(costs), weight, dtype=np.int64)
    counts[0] = 0
    return _undominated(counts, costs, values)


def _undominated(counts: Counts, costs: Floats, values: Floats) -> _States:
    """What no other with as many blocks beats or equals in both cost and value; of equals one."""
    if len(values) < 2:
        return counts, costs, values
    # by the number of blocks, then by cost: each number has a range of its own, and one sort is faster than one for two
    order = (costs + counts * (costs.max() - costs.min() + 1.0)).argsort()
    counts, costs, values = counts[order], costs[order], values[order]
    lifted = values + counts * (values.max() - values.min() + 1.0)  # so that more blocks are always above
    kept = np.ones(len(values), dtype=bool)
    np.greater(lifted[1:], np.maximum.accumulate(lifted)[:-1], out=kept[1:])
    counts, costs, values = counts[kept], costs[kept], values[kept]
    repeats = costs[1:] == costs[:-1]
    if repeats.any():  # the values rise, so the last one is the best
        last = np.append(~(repeats & (counts[1:] == counts[:-1])), True)
        counts, costs, values = counts[last], costs[last], values[last]
    return counts, costs, values


def _by_count(states: _States) -> list[tuple[int, list[float], list[float]]]:
    counts, costs, values = (one.tolist() for one in states)
    begins = [at for at, count in enumerate(counts) if not at or count != counts[at - 1]]
    return [
        (counts[begin], costs[begin:end], values[begin:end])
        for begin, end in itertools.pairwise([*begins, len(counts)])
    ]
