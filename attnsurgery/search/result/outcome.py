"""The outcome of a search: its records, winner, Pareto front and confirmation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from attnsurgery.errors import NothingFeasibleError
from attnsurgery.search.config import SearchConfig
from attnsurgery.search.result.about import About
from attnsurgery.search.result.confirmation import Confirmation
from attnsurgery.search.result.limits import Budgets
from attnsurgery.search.result.promotion import Trust, trust
from attnsurgery.search.result.record import Record, best, front, trained
from attnsurgery.search.result.reliability import Reliability
from attnsurgery.search.rungs import shares


@dataclass(frozen=True)
class Outcome:
    """The results of a search, finished or not."""

    config: SearchConfig
    """All settings of the search."""
    folder: Path
    """The run directory."""
    about: About
    """The conditions of the search."""
    base: Record
    """The base without blocks."""
    records: list[Record]
    """All finished trials, in order."""
    confirmation: Confirmation | None
    """The comparison of winner and base; None until it was made."""
    interrupted: bool
    """Whether the user ended the search early."""
    seconds: float | None = None
    """Duration over all runs, from the measurement of the base on."""
    unwritten: str = ""
    """Why report, recipe or front could not be written; '' if they were."""

    repeats: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By digest, the candidates that were trained from a second seed: `number`, and the scores `first`, `second`."""

    @cached_property
    def budgets(self) -> Budgets:
        """The limits that candidates had to keep to."""
        return Budgets.of(self.config)

    @cached_property
    def best(self) -> Record | None:
        """The winner of the confirmation; before that, the best trained candidate."""
        if self.confirmation:
            return next(record for record in trained(self.records) if record.digest == self.confirmation.digest)
        return best(self.records, self.config.rank_by)

    @cached_property
    def front(self) -> list[Record]:
        """The Pareto front of score and latency, the fastest first."""
        return front(self.records, self.config.rank_by)

    @property
    def trained(self) -> int:
        """Number of trained candidates within the budget."""
        return len(trained(self.records))

    @property
    def drawn(self) -> list[Record]:
        """The trained candidates that were drawn uniformly at random."""
        return [record for record in trained(self.records) if record.drawn]

    @property
    def top_rung(self) -> int:
        """The highest rung that the best candidate was trained on, 0 being the lowest."""
        return self.best.reached if self.best else 0

    @property
    def trust(self) -> Trust | None:
        """The check of the supernet's ranking; None if there was no supernet, or it was not checked yet."""
        return trust(self.records, self.config.rank_by) if shares(self.config) else None

    @property
    def counts(self) -> Counter[str]:
        """Number of trials by state."""
        return Counter(record.state for record in self.records)

    @property
    def reliability(self) -> Reliability | None:
        """How reliable the ranking of candidates is; None if it was not measured."""
        return Reliability.of(self.repeats, self.config.rank_by, self.about.images["validation"])

    def check_feasible(self) -> None:
        """Raise an error if the search ended without a candidate within the budget.

        Raises:
            NothingFeasibleError: lists the fastest measured candidates.
        """
        if self.trained or self.interrupted:
            return
        budget = self.budgets.describe()
        measured = {record.digest: record for record in self.records if record.timing}
        fastest = sorted(measured.values(), key=lambda record: record.timing.ms if record.timing else 0.0)[:3]
        listed = "; ".join(f"{_costs(record)} {record.describe()}" for record in fastest)
        failed = [record.reason for record in self.records if record.state == "failed" and record.reason]
        raise NothingFeasibleError(
            f"no candidate fits {budget} ({self.about.conditions}). "
            + f"The base alone takes {_costs(self.base)}. "
            + (f"The fastest of {len(measured)} measured: {listed}. " if listed else "None could be measured. ")
            + (f"{len(failed)} failed, the last because: {failed[-1]} " if failed else "")
            + "Raise the budget, choose a smaller or faster MODEL, or a --space with cheaper blocks."
        )


def _costs(record: Record) -> str:
    """The measured costs of a candidate in words."""
    ms = f"{record.timing.ms:.3g} ms" if record.timing else ""
    return ms if record.peak_mb is None else f"{ms} and {record.peak_mb:.4g} MB"
