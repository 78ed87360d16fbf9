"""Whether a search has anything left to ask for within its budgets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from attnsurgery.samplers.knapsack import best
from attnsurgery.samplers.places import Picks
from attnsurgery.search.execution.bench import Bench
from attnsurgery.search.result.record import Record, trained

_ASKS_A_TRIAL = 10
"""So many asks for each trained trial that is wanted, and then some, are enough."""
HOPELESS = 24
"""After so many measured candidates over the budget and none within it, there is none."""
_HOPELESS_PREDICTED = 12
"""The same where none is predicted to be within it."""
_HOPELESS_BASE = 4
"""The same where the base alone is over the budget: blocks only add to it."""


def any_left(
    bench: Bench,
    base: Record,
    records: Sequence[Record],
    going: Sequence[Mapping[str, str]],
    predicted: Callable[[], bool] = lambda: True,
) -> bool:
    """True while there may be candidates within the budgets that were not asked for.

    Args:
        records: of all trials that are finished.
        going: the assignments of those that are not.
        predicted: whether one that was not asked for may be within the budgets by what is known of latencies.
    """
    asked = [record for record in records if record.state != "too_many_blocks"]
    if len(asked) + len(going) >= _ASKS_A_TRIAL * bench.config.trials + 2 * HOPELESS:
        return False
    nothing = bench.picks(bench.space.nothing)
    known = {bench.picks(assignment) for assignment in [*(record.assignment for record in asked), *going]} - {nothing}
    if len(known) >= bench.space.size() or not _any_within_exact_budgets(bench, {nothing, *known}):
        return False
    return bool(trained(records)) or not _hopeless(bench, base, asked, predicted)


def _any_within_exact_budgets(bench: Bench, tried: set[Picks]) -> bool:
    """False if every candidate that keeps to the budgets which are known exactly was tried."""
    places = bench.places
    if not places.budgets:
        return True
    same = [np.zeros(len(choices)) for choices in places.choices.values()]
    return best(places, same, None, list(places.budgets.values()), tried) is not None


def _hopeless(bench: Bench, base: Record, asked: Sequence[Record], predicted: Callable[[], bool]) -> bool:
    """True after so many candidates over the budgets that are measured that the next one will be over them too."""
    # those over an exact budget are no measure: others are known to keep to it; nor those that a wider one let in
    over = [record for record in asked if record.state == "over_budget" and record.top1 is None]
    measured = sum(record.timing is not None for record in over)
    base_over = not bench.budgets.check(base, "low").within
    if base_over and measured:  # what is predicted to be over is no surprise then
        measured += sum(record.timing is None and record.predicted_ms is not None for record in over)
    if base_over or measured < _HOPELESS_PREDICTED:
        return base_over and measured >= _HOPELESS_BASE
    return measured >= HOPELESS or not predicted()
