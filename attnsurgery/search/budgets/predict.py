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
from attnsurgery.samplers.places import Budget, Floats, Picks, Places
from attnsurgery.samplers.threads import on_one_thread
from attnsurgery.search.budgets.calibrate import Z_INTERVAL, LatencyCache
from attnsurgery.search.budgets.costs import Costs, picks_of, with_base
from attnsurgery.search.result.limits import Budgets
from attnsurgery.search.result.record import Record

_SURE = 2.326
"""Standard deviations of a one-sided 99 % bound: a candidate that is over the budget beyond it is not built."""
_LARGEST_TOLERANCE = 0.5
"""Largest share of the base's latency at another input size by which the budget for blocks is wider."""


class LatencyPredictor:
    """The latency models of one search, one for each input size; they learn from every measured trial.

    What is measured at one size says nothing of another: a block that is cheap on a small map may be dear on a large
    one. So each size has the base's own latency there, which is measured, and a model of what blocks add to it.

    Args:
        costs: of the space's candidates.
        places: the space as samplers see it, with the budgets that are known exactly.
        budgets: limits of the search.
        references: the base's latency at each input size of the space, its own first.
        measured_before: what was measured before the search at each of these sizes, as `measured_before` gives it.
    """

    def __init__(
        self,
        costs: Costs,
        places: Places,
        budgets: Budgets,
        references: Sequence[Latency],
        measured_before: Sequence[Mapping[str, Any]],
    ) -> None:
        self._places, self._budgets, self._costs = places, budgets, costs
        self._at_size = [
            _AtSize(sized, reference.p50_ms, before, always=bool(costs.by_size))
            for sized, reference, before in zip(costs.sizes, references, measured_before, strict=True)
        ]

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
            if record.digest and record.timing and record.state != "duplicate":
                sized = self._of(picks_of(self._places, record.assignment))
                if not sized.knows(record.digest):
                    sized.learn(record.digest, self._measurement(record))

    def keep(self, record: Record, cache: LatencyCache) -> None:
        """Save the measurement of a trial for later searches; a full disk does not end this search.

        Args:
            record: of the trial.
            cache: of the trial's input size.
        """
        if record.timing is not None and record.state != "duplicate":
            with suppress(SearchError):
                cache.add(self._measurement(record), self._costs.kinds)

    @on_one_thread
    def predict(self, assignment: Mapping[str, str]) -> Prediction | None:
        """The predicted ratio to the base's latency at the same input size; None while there are no measurements."""
        picks = picks_of(self._places, assignment)
        model = self._of(picks).fitted()
        return None if model is None else model.predict(self._costs.counts(picks))

    def surely_over_ms(self, assignment: Mapping[str, str]) -> float | None:
        """The predicted latency in ms if it is over the budget with 99 % certainty, else None."""
        budget_ms, prediction = self._budgets.limits.get("latency"), self.predict(assignment)
        base_ms = self._of(picks_of(self._places, assignment)).base_ms
        if budget_ms is None or prediction is None or prediction.bound(-_SURE) * base_ms <= budget_ms:
            return None
        return prediction.ratio * base_ms

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
        places, budget_ms = self._places, self._budgets.limits.get("latency")
        own = self._at_size[0]
        if budget_ms is None or own.fitted() is None:
            return places
        if not self._costs.by_size:
            latency = Budget(own.added(), own.allowance(budget_ms))
        else:  # shares of the budget: what exceeds it by no more than the tolerance costs as much less
            tables = []
            for sized in self._at_size:
                share = sized.base_ms / budget_ms
                tolerance = min(_LARGEST_TOLERANCE, sized.allowance(budget_ms) - (1.0 / share - 1.0))
                tables.append(with_base([share * costs for costs in sized.added()], share * (1.0 - tolerance)))
            latency = Budget.of_first(tables, 1.0)
        return replace(places, budgets={**places.budgets, "latency": latency})

    def _of(self, picks: Picks) -> _AtSize:
        """What is known of the candidates of an input size."""
        return self._at_size[picks[0] if self._costs.by_size else 0]

    def _measurement(self, record: Record) -> Measured:
        base_ms = self._of(picks_of(self._places, record.assignment)).base_ms
        return measurement_of(self._costs, self._places, record, base_ms)


class _AtSize:
    """The latency model of the candidates of one input size.

    Args:
        costs: of these candidates.
        base_ms: the base's latency at this size.
        measured_before: as in `LatencyPredictor`, of this size.
        always: predict also before anything was measured, from the prior.
    """

    def __init__(self, costs: Costs, base_ms: float, measured_before: Mapping[str, Any], *, always: bool) -> None:
        self.base_ms = base_ms
        self._costs, self._always = costs, always
        self._earlier = [Measured(**entry) for entry in measured_before["measured"]]
        self._kinds = {key: Kind(**kind) for key, kind in measured_before["kinds"].items()} | dict(costs.kinds)
        self._own: dict[str, Measured] = {}
        self._model: LatencyModel | None = None

    def knows(self, digest: str) -> bool:
        """Whether it has learned from the measurement of a candidate."""
        return digest in self._own

    def learn(self, digest: str, measurement: Measured) -> None:
        """Take in the measurement of a candidate."""
        self._own[digest] = measurement
        self._model = None

    def fitted(self) -> LatencyModel | None:
        """The model given all measurements; None while there are none."""
        if self._model is None and (self._earlier or self._own or self._always):
            measurements = [*self._earlier, *self._own.values()]
            self._model = LatencyModel(self._costs.base["macs"], self._kinds, measurements)
        return self._model

    def added(self) -> list[Floats]:
        """By place, what each choice adds to the latency, as a share of the base's."""
        model = self.fitted()
        assert model is not None, "there are measurements"
        return [np.array([model.added(counts) for counts in row]) for row in self._costs.blocks]

    def allowance(self, budget_ms: float) -> float:
        """What blocks may add, as a share of the base's latency, wider by the usual error of a prediction."""
        model = self.fitted()
        assert model is not None, "there are measurements"
        allowance = budget_ms / self.base_ms - 1.0
        return allowance + model.misfit * abs(allowance)


def measurement_of(costs: Costs, places: Places, record: Record, reference_ms: float) -> Measured:
    """The measurement of a trial as data for a latency model.

    Args:
        costs: of the space's candidates.
        places: the space as samplers see it.
        record: of a trial that was measured.
        reference_ms: the base's latency at the same input size, in ms, which the trial's latency is relative to.
    """
    timing = record.timing
    assert timing is not None
    counts = dict(costs.counts(picks_of(places, record.assignment)))
    return Measured(counts, timing.ratio, (timing.high_ms - timing.low_ms) / reference_ms / Z_INTERVAL)
