"""The knapsack of the samplers against an integer program solved by HiGHS (scipy.optimize.milp): answers and times.

Random knapsacks are of the kinds that searches make: up to 30 places, up to 10 blocks at each, a value of the number of
blocks, up to three budgets, candidates that were tried. The hard ones have values and costs that go together, budgets
that contradict each other, or many equal candidates. The two solvers take turns on each knapsack. Whatever HiGHS prints
to stdout, which is where a search prints, is counted.

    python scripts/bench/knapsack.py            # 3,000 random knapsacks and 35 hard ones; 10 minutes on one core
    python scripts/bench/knapsack.py --random 50
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from _common import write
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_array

from attnsurgery.samplers.knapsack import best
from attnsurgery.samplers.places import Budget, Floats, Picks, Places

LIMIT_S = 60.0
"""Time limit of HiGHS for one knapsack."""
WIDE_PLACES = 24
"""Number of places of the hard knapsacks whose values follow costs."""


@dataclass
class Knapsack:
    """The arguments of `best`."""

    places: Places
    values: list[Floats]
    by_count: Floats | None = None
    budgets: list[Budget] = field(default_factory=list)
    tried: set[Picks] = field(default_factory=set)

    def value(self, picks: Picks) -> float:
        """The value of a candidate."""
        value = sum(float(values[pick]) for values, pick in zip(self.values, picks, strict=True))
        return value + (0.0 if self.by_count is None else float(self.by_count[self.places.count(picks)]))

    def feasible(self, picks: Picks) -> bool:
        """True if a candidate is untried and within all limits."""
        within = self.places.count(picks) <= self.places.limit and all(one.holds(picks) for one in self.budgets)
        return within and picks not in self.tried


def by_highs(
    places: Places,
    values: Sequence[Floats],
    by_count: Floats | None = None,
    budgets: Sequence[Budget] = (),
    tried: Collection[Picks] = (),
) -> Picks | None:
    """`best` as an integer program: a binary variable for each choice, and for each number of blocks.

    Raises:
        TimeoutError: HiGHS did not finish within the limit.
    """
    starts = np.cumsum([0, *(len(value) for value in values)])
    choices, counts = int(starts[-1]), places.limit + 1
    bonus = np.zeros(counts) if by_count is None else by_count[:counts]
    rows = lil_array((len(values) + 2 + len(budgets) + len(tried), choices + counts))
    low, high = np.full(rows.shape[0], -np.inf), np.full(rows.shape[0], np.inf)
    for place, start in enumerate(starts[:-1]):
        rows[place, start : starts[place + 1]] = 1.0  # one choice at each place
        rows[len(values), start + 1 : starts[place + 1]] = places.weights[place]
    rows[len(values), choices:] = -np.arange(counts)  # the number of blocks
    rows[len(values) + 1, choices:] = 1.0
    low[: len(values)] = high[: len(values)] = low[len(values) + 1] = high[len(values) + 1] = 1.0
    low[len(values)] = high[len(values)] = 0.0
    for row, budget in enumerate(budgets, start=len(values) + 2):
        rows[row, :choices] = np.concatenate(list(budget.costs))
        high[row] = budget.most
    for row, picks in enumerate(tried, start=len(values) + 2 + len(budgets)):
        rows[row, starts[:-1] + np.array(picks)] = 1.0
        high[row] = len(values) - 1
    solution: Any = milp(
        -np.concatenate([*values, bonus]),
        integrality=np.ones(choices + counts),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(rows.tocsr(), low, high),
        options={"mip_rel_gap": 0.0, "time_limit": LIMIT_S},
    )
    if solution.status == 1:
        raise TimeoutError(solution.message)
    if solution.x is None:
        return None
    return tuple(int(solution.x[start:end].argmax()) for start, end in itertools.pairwise(starts))


def random_knapsack(seed: int) -> Knapsack:
    """A knapsack of a kind that searches make."""
    rng = np.random.default_rng(seed)
    names = [f"p{place}" for place in range(rng.integers(1, 31))]
    places = Places(
        {name: tuple(f"b{block}" for block in range(rng.integers(2, 11))) for name in names},
        blocks={name: int(rng.integers(1, 3)) for name in names if rng.random() < 0.2},
        most_blocks=None if rng.random() < 0.5 else int(rng.integers(1, 9)),
    )
    sizes = [len(choices) for choices in places.choices.values()]
    values = [np.append(0.0, rng.normal(0.0, 0.01, size - 1)) for size in sizes]
    by_count = rng.normal(0.0, 0.003, sum(places.weights) + 1)
    budgets = []
    for _ in range(rng.integers(0, 4)):
        costs = [np.append(0.0, rng.lognormal(-3.0, 1.0, size - 1)) for size in sizes]
        budgets.append(Budget(costs, float(rng.uniform(0.05, 0.6)) * sum(float(cost.mean()) for cost in costs)))
    knapsack = Knapsack(places, values, by_count, budgets)
    for _ in range(rng.integers(0, 6)):  # the best ones are tried first, as in a search
        picks = best(places, values, by_count, budgets, knapsack.tried)
        if picks is not None:
            knapsack.tried.add(picks)
    return knapsack


def hard_knapsacks() -> Iterator[tuple[str, Knapsack]]:
    """35 knapsacks of five kinds, each with its kind."""
    for seed in range(7):
        rng = np.random.default_rng(seed)
        places = Places({f"p{place}": ("none", "a", "b", "c") for place in range(30)})
        for kind, dear in (("a choice over one budget", 1.03), ("two budgets that contradict", 0.4)):
            values = [np.append(0.0, rng.normal((0.0, 0.05, 0.0), 0.012)) for _ in places.choices]
            first = [np.array([0.0, 0.004, dear, 0.0]) for _ in places.choices]
            second = [np.append(0.0, rng.uniform(0.05, 0.28, 3)) for _ in places.choices]
            yield kind, Knapsack(places, values, 1e-4 * np.arange(31.0) ** 2, [Budget(first, 1.0), Budget(second, 1.0)])
        wide = Places({f"p{place}": tuple(f"b{block}" for block in range(11)) for place in range(WIDE_PLACES)})
        costs = [np.append(0.0, rng.uniform(0.1, 1.0, 10)) for _ in wide.choices]
        values = [np.append(0.0, cost[1:] + 0.1) for cost in costs]
        yield "values that follow costs", Knapsack(wide, values, None, [Budget(costs, 0.2 * WIDE_PLACES + 0.1)])
        budgets = []
        for _ in range(3):
            own = [np.append(0.0, cost[1:] * rng.lognormal(0.0, 0.2, 10)) for cost in costs]
            budgets.append(Budget(own, 0.2 * WIDE_PLACES + 0.1))
        noisy = [np.append(0.0, cost[1:] * rng.lognormal(0.0, 0.2, 10)) for cost in costs]
        yield "three budgets that follow values", Knapsack(wide, noisy, None, budgets)
        equal = Places({f"p{place}": ("none", "a", "b", "c") for place in range(16)})
        tried = {tuple(int(pick) for pick in rng.permutation([1] * 8 + [0] * 8)) for _ in range(20)}
        steps = [np.arange(4.0)] * 16
        yield "many equals", Knapsack(equal, steps, None, [Budget([0.1 * step for step in steps], 0.8)], tried)


@contextmanager
def captured_stdout(sizes: list[int]) -> Iterator[None]:
    """Append the number of bytes that anything, C libraries included, writes to stdout."""
    sys.stdout.flush()
    with tempfile.TemporaryFile() as file:
        stdout = os.dup(1)
        os.dup2(file.fileno(), 1)
        try:
            yield
        finally:
            sys.stdout.flush()
            os.dup2(stdout, 1)
            os.close(stdout)
            sizes.append(os.fstat(file.fileno()).st_size)


def timed(solve: Callable[..., Picks | None], knapsack: Knapsack) -> tuple[Picks | None, float]:
    """The answer, and its seconds."""
    start = time.perf_counter()
    picks = solve(knapsack.places, knapsack.values, knapsack.by_count, knapsack.budgets, knapsack.tried)
    return picks, time.perf_counter() - start


def compare(knapsacks: Sequence[Knapsack]) -> dict[str, Any]:
    """Both solvers on each knapsack in turns: which answer is better, and the ratio of the times."""
    outcomes = {"equal": 0, "ours better": 0, "HiGHS better": 0}
    broken = timeouts = 0
    shortfalls: list[float] = []
    printed: list[int] = []
    seconds: dict[str, list[float]] = {"ours": [], "HiGHS": []}
    for turn, knapsack in enumerate(knapsacks):
        first = timed(best, knapsack) if turn % 2 else None  # who goes first alternates
        try:
            with captured_stdout(printed):
                theirs, highs_s = timed(by_highs, knapsack)
        except TimeoutError:
            timeouts += 1
            continue
        ours, own_s = first or timed(best, knapsack)
        seconds["ours"].append(own_s)
        seconds["HiGHS"].append(highs_s)
        assert ours is None or knapsack.feasible(ours)
        if theirs is not None and not knapsack.feasible(theirs):
            broken += 1
            continue
        own_value, highs_value = (-np.inf if picks is None else knapsack.value(picks) for picks in (ours, theirs))
        if own_value == highs_value or abs(own_value - highs_value) <= 1e-9 * (1 + abs(own_value)):
            outcomes["equal"] += 1
        elif own_value > highs_value:
            outcomes["ours better"] += 1
        else:
            outcomes["HiGHS better"] += 1
            shortfalls.append(1 - own_value / highs_value)
    ratios = [highs / ours for ours, highs in zip(seconds["ours"], seconds["HiGHS"], strict=True)]
    return {
        "knapsacks": len(knapsacks),
        "answers": outcomes,
        "largest_shortfall_of_ours": max(shortfalls, default=0.0),
        "answers_of_highs_over_a_budget_or_tried": broken,
        "timeouts_of_highs": timeouts,
        "runs_of_highs_that_printed": sum(size > 0 for size in printed),
        "runs_of_highs": len(printed),
        "median_ms": {name: 1e3 * statistics.median(times) for name, times in seconds.items()},
        "most_ms": {name: 1e3 * max(times) for name, times in seconds.items()},
        "ratio_of_times_highs_to_ours": {
            "median": statistics.median(ratios),
            **{f"{share:.0%}": float(np.quantile(ratios, share)) for share in (0.05, 0.25, 0.75, 0.95)},
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", type=int, default=3000, help="number of random knapsacks")
    parser.add_argument("--dry-run", action="store_true", help="print the figures and write nothing")
    arguments = parser.parse_args()
    results = {"random": compare([random_knapsack(seed) for seed in range(arguments.random)])}
    print(results["random"], flush=True)
    by_kind: dict[str, list[Knapsack]] = {}
    for kind, knapsack in hard_knapsacks():
        by_kind.setdefault(kind, []).append(knapsack)
    results["hard"] = {kind: compare(knapsacks) for kind, knapsacks in by_kind.items()}
    for kind, figures in results["hard"].items():
        print(kind, figures, flush=True)
    if not arguments.dry_run:
        print(write("knapsack", results))


if __name__ == "__main__":
    main()
