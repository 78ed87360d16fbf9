"""Predicts the latency of candidates from the measurements of earlier searches and of the search's own trials."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from attnsurgery.errors import SearchError
from attnsurgery.latency import Latency
from attnsurgery.latency.model import Kind, LatencyModel, Measured, Prediction
from attnsurgery.samplers.knapsack import best
from attnsurgery.samplers.places import Budget, Picks, Places
from attnsurgery.samplers.threads import on_one_thread
from attnsurgery.search.budgets.calibrate import Z_INTERVAL, LatencyCache
from attnsurgery.search.budgets.costs import Costs, picks_of
from attnsurgery.search.result.limits import Budgets
from attnsurgery.search.result.record import Record

_SURE = 2.326
"""Standard deviations of a one-sided 99 % bound: a candidate that is over the budget beyond it is not built."""


class LatencyPredictor:
    """The latency model of one search; it learns from every measured trial.

    Args:
        costs: of the space's candidates.
        places: the space as samplers see it, with the budgets that are known exactly.
        budgets: limits of the search.
        reference: the base's latency.
        known: what was measured before the search, as `kept` gives it.
    """

    def __init__(
        self, costs: Costs, places: Places, budgets: Budgets, reference: Latency, measured_before: Mapping[str, Any]
    ) -> None:
        self._costs, self._places, self._budgets = costs, places, budgets
        self._reference_ms = reference.p50_ms
        self._earlier = [Measured(**entry) for entry in measured_before["measured"]]
        self._kinds = {key: Kind(**kind) for key, kind in measured_before["kinds"].items()} | dict(costs.kinds)
        self._own: dict[str, Measured] = {}
        self._model: LatencyModel | None = None

    @staticmethod
    def measured_before(cache: LatencyCache) -> dict[str, Any]:
        """The earlier measurements of this machine as JSON data; a resumed search has to begin with the same ones."""
        measurements, kinds = cache.read()
        return {
            "measured": [asdict(measurement) for measurement in measurements],
            "kinds": {key: asdict(kind) for key, kind in kinds.items()},
        }

    def learn(self, records: Sequence[Record]) -> None:
        """Take in the measurements of new records."""
        for record in records:
            if record.digest and record.timing and record.state != "duplicate" and record.digest not in self._own:
                self._own[record.digest] = measurement_of(self._costs, self._places, record, self._reference_ms)
                self._model = None

    def keep(self, record: Record, cache: LatencyCache) -> None:
        """Save the measurement of a trial for later searches; a full disk does not end this search."""
        if record.timing is not None and record.state != "duplicate":
            with suppress(SearchError):
                cache.add(measurement_of(self._costs, self._places, record, self._reference_ms), self._costs.kinds)

    @on_one_thread
    def predict(self, assignment: Mapping[str, str]) -> Prediction | None:
        """The predicted ratio to the base's latency; None while there are no measurements."""
        model = self._fitted()
        return None if model is None else model.predict(self._costs.counts(picks_of(self._places, assignment)))

    def surely_over_ms(self, assignment: Mapping[str, str]) -> float | None:
        """The predicted latency in ms if it is over the budget with 99 % certainty, else None."""
        budget_ms, prediction = self._budgets.limits.get("latency"), self.predict(assignment)
        if budget_ms is None or prediction is None or prediction.bound(-_SURE) * self._reference_ms <= budget_ms:
            return None
        return prediction.ratio * self._reference_ms

    @on_one_thread
    def any_within(self, excluded: Collection[Picks]) -> bool:
        """Whether any candidate besides the excluded ones is predicted to be within the budgets."""
        places = self.places()
        if "latency" not in places.budgets:
            return True
        same = [np.zeros(len(choices)) for choices in places.choices.values()]
        return best(places, same, None, list(places.budgets.values()), excluded) is not None

    @on_one_thread
    def places(self) -> Places:
        """The space with a budget for latency beside the exact ones, once there are measurements.

        This budget is wider by the usual error of a prediction: to measure one candidate that is over the budget costs
        seconds, but never to consider the best candidate costs the search its result.
        """
        places, budget_ms, model = self._places, self._budgets.limits.get("latency"), self._fitted()
        if budget_ms is None or model is None:
            return places
        costs = [np.array([model.added(counts) for counts in row]) for row in self._costs.blocks]
        allowance = budget_ms / self._reference_ms - 1.0
        latency = Budget(costs, allowance + model.misfit * abs(allowance))
        return replace(places, budgets={**places.budgets, "latency": latency})

    @on_one_thread
    def _fitted(self) -> LatencyModel | None:
        if self._model is None and (self._earlier or self._own):
            measurements = [*self._earlier, *self._own.values()]
            self._model = LatencyModel(self._costs.base["macs"], self._kinds, measurements)
        return self._model


def measurement_of(costs: Costs, places: Places, record: Record, reference_ms: float) -> Measured:
    """The measurement of a trial as data for a latency model.

    Args:
        costs: of the space's candidates.
        places: the space as samplers see it.
        record: of a trial that was measured.
        reference_ms: the base's latency, in ms, which the trial's latency is relative to.
    """
    timing = record.timing
    assert timing is not None
    counts = dict(costs.counts(picks_of(places, record.assignment)))
    return Measured(counts, timing.ratio, (timing.high_ms - timing.low_ms) / reference_ms / Z_INTERVAL)
