"""Decides whether a search may still find candidates within its budgets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from attnsurgery.samplers.knapsack import best
from attnsurgery.samplers.places import Picks
from attnsurgery.search.execution.bench import Bench
from attnsurgery.search.result.record import Record, trained

_REQUESTS_PER_TRIAL = 10
"""A search ends after this many candidates for each trial that is to be trained, and 2 * HOPELESS more."""
HOPELESS = 24
"""A search ends after this many measured candidates over the budget, if none is within it."""
_HOPELESS_PREDICTED = 12
"""The same number, if no candidate is predicted to be within the budget."""
_HOPELESS_BASE = 4
"""The same number, if the base alone is over the budget: blocks only add to its latency."""


def any_left(
    bench: Bench,
    base: Record,
    records: Sequence[Record],
    unfinished: Sequence[Mapping[str, str]],
    predicted: Callable[[], bool] = lambda: True,
) -> bool:
    """Whether there may be candidates within the budgets that were not asked for.

    Args:
        bench: what trials are made on.
        base: the base's record.
        records: of all finished trials.
        unfinished: the assignments of all other trials.
        predicted: whether a candidate that was not asked for is predicted to be within the budgets.
    """
    counted = [record for record in records if record.state != "too_many_blocks"]
    if len(counted) + len(unfinished) >= _REQUESTS_PER_TRIAL * bench.config.trials + 2 * HOPELESS:
        return False
    nothing = bench.picks(bench.space.nothing)
    excluded = {bench.picks(assignment) for assignment in [*(record.assignment for record in counted), *unfinished]} - {
        nothing
    }
    if len(excluded) >= bench.space.size() or not _any_within_exact_budgets(bench, {nothing, *excluded}):
        return False
    return bool(trained(records)) or not _hopeless(bench, base, counted, predicted)


def _any_within_exact_budgets(bench: Bench, excluded: set[Picks]) -> bool:
    """Whether any candidate besides the excluded ones keeps to the budgets that are known exactly."""
    places = bench.places
    if not places.budgets:
        return True
    values = [np.zeros(len(choices)) for choices in places.choices.values()]
    return best(places, values, None, list(places.budgets.values()), excluded) is not None


def _hopeless(bench: Bench, base: Record, records: Sequence[Record], predicted: Callable[[], bool]) -> bool:
    """Whether so many candidates were measured to be over the budgets that the next one will be, too."""
    # candidates over an exact budget do not count, as others are known to keep to it; neither do candidates that were
    # trained under a wider budget
    over = [record for record in records if record.state == "over_budget" and record.metric is None]
    measured = sum(record.timing is not None for record in over)
    # at another input size the base may be within the budgets
    base_over = not bench.space.sizes and not bench.budgets.check(base, "low").within
    if base_over and measured:  # then candidates that are predicted to be over the budget count as well
        measured += sum(record.timing is None and record.predicted_ms is not None for record in over)
    if base_over or measured < _HOPELESS_PREDICTED:
        return base_over and measured >= _HOPELESS_BASE
    return measured >= HOPELESS or not predicted()
