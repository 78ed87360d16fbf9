"""Latency before it is measured: what the search knows of it, from earlier searches and from its own trials."""

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
from attnsurgery.search.budgets.calibrate import Z_INTERVAL, Shelf
from attnsurgery.search.budgets.costs import Costs, picks_of
from attnsurgery.search.result.limits import Budgets
from attnsurgery.search.result.record import Record

_SURE = 2.326
"""Standard deviations: what is over the budget with 99 % certainty need not be built."""


class LatencyPredictor:
    """The latency model of one search; it learns from every trial that was measured.

    Args:
        costs: of the space's candidates.
        places: the space as samplers see it, with the budgets that are known exactly.
        reference: the base's own latency.
        known: what was measured before the search, as `kept` gives it.
    """

    def __init__(
        self, costs: Costs, places: Places, budgets: Budgets, reference: Latency, known: Mapping[str, Any]
    ) -> None:
        self._costs, self._places, self._budgets = costs, places, budgets
        self._reference_ms = reference.p50_ms
        self._known = [Measured(**entry) for entry in known["measured"]]
        self._kinds = {key: Kind(**kind) for key, kind in known["kinds"].items()} | dict(costs.kinds)
        self._told: dict[str, Measured] = {}
        self._model: LatencyModel | None = None

    @staticmethod
    def kept(shelf: Shelf) -> dict[str, Any]:
        """What this machine knows already, as JSON data: a search that goes on has to begin with the same."""
        measured, kinds = shelf.read()
        return {
            "measured": [asdict(one) for one in measured],
            "kinds": {key: asdict(kind) for key, kind in kinds.items()},
        }

    def learn(self, records: Sequence[Record]) -> None:
        """Take in what was measured since."""
        for record in records:
            if record.digest and record.timing and record.state != "duplicate" and record.digest not in self._told:
                self._told[record.digest] = measured(self._costs, self._places, record, self._reference_ms)
                self._model = None

    def keep(self, record: Record, shelf: Shelf) -> None:
        """Put a measured trial on the shelf, for the next search; one that is full is no reason to end this one."""
        if record.timing is not None and record.state != "duplicate":
            with suppress(SearchError):
                shelf.add(measured(self._costs, self._places, record, self._reference_ms), self._costs.kinds)

    @on_one_thread
    def predict(self, assignment: Mapping[str, str]) -> Prediction | None:
        """The ratio to the base's time; None while nothing is known."""
        model = self._fitted()
        return None if model is None else model.predict(self._costs.counts(picks_of(self._places, assignment)))

    def surely_over_ms(self, assignment: Mapping[str, str]) -> float | None:
        """The milliseconds predicted, if these are over the budget with 99 % certainty."""
        most, predicted = self._budgets.most.get("latency"), self.predict(assignment)
        if most is None or predicted is None or predicted.bound(-_SURE) * self._reference_ms <= most:
            return None
        return predicted.ratio * self._reference_ms

    @on_one_thread
    def any_within(self, tried: Collection[Picks]) -> bool:
        """Whether a candidate that was not tried may be within the budgets by what is known."""
        places = self.places()
        if "latency" not in places.budgets:
            return True
        same = [np.zeros(len(choices)) for choices in places.choices.values()]
        return best(places, same, None, list(places.budgets.values()), tried) is not None

    @on_one_thread
    def places(self) -> Places:
        """The space with a budget for latency beside the exact ones, once anything is known.

        It is wider by what such a sum is usually off: to measure one candidate that is over costs seconds, never to
        look at the best one costs the search.
        """
        places, most, model = self._places, self._budgets.most.get("latency"), self._fitted()
        if most is None or model is None:
            return places
        costs = [np.array([model.added(counts) for counts in row]) for row in self._costs.blocks]
        spare = most / self._reference_ms - 1.0
        latency = Budget(costs, spare + model.misfit * abs(spare))
        return replace(places, budgets={**places.budgets, "latency": latency})

    @on_one_thread
    def _fitted(self) -> LatencyModel | None:
        if self._model is None and (self._known or self._told):
            measured = [*self._known, *self._told.values()]
            self._model = LatencyModel(self._costs.base["macs"], self._kinds, measured)
        return self._model


def measured(costs: Costs, places: Places, record: Record, reference_ms: float) -> Measured:
    """What a trial that was measured tells a latency model.

    Args:
        reference_ms: the base's time, on whose scale the trial's is.
    """
    timing = record.timing
    assert timing is not None
    counts = dict(costs.counts(picks_of(places, record.assignment)))
    return Measured(counts, timing.ratio, (timing.high_ms - timing.low_ms) / reference_ms / Z_INTERVAL)
