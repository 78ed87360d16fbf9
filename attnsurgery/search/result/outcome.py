"""What a search came to."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from attnsurgery.errors import NothingFeasibleError
from attnsurgery.search.config import SearchConfig
from attnsurgery.search.result.about import About
from attnsurgery.search.result.confirmation import Confirmation
from attnsurgery.search.result.limits import Budgets
from attnsurgery.search.result.promotion import Trust, trust
from attnsurgery.search.result.record import Record, best, front, trained
from attnsurgery.search.rungs import shares


@dataclass(frozen=True)
class Outcome:
    """A search, finished or not."""

    config: SearchConfig
    folder: Path
    about: About
    base: Record
    records: list[Record]
    confirmation: Confirmation | None
    """The last word; None before it was said."""
    interrupted: bool
    seconds: float | None = None
    """On the clock, over all runs, from measuring the base on."""
    unwritten: str = ""
    """Why report, recipe or front could not be written; '' if they are there."""

    @cached_property
    def budgets(self) -> Budgets:
        return Budgets.of(self.config)

    @cached_property
    def best(self) -> Record | None:
        """Whom the confirmation chose; before there is one, whom the trials put first."""
        if self.confirmation:
            return next(record for record in trained(self.records) if record.digest == self.confirmation.digest)
        return best(self.records, self.config.rank_by)

    @cached_property
    def front(self) -> list[Record]:
        return front(self.records, self.config.rank_by)

    @property
    def trained(self) -> int:
        return len(trained(self.records))

    @property
    def drawn(self) -> list[Record]:
        """The trained candidates that were drawn uniformly at random."""
        return [record for record in trained(self.records) if record.drawn]

    @property
    def top_rung(self) -> int:
        """The highest rung of fidelity that any candidate was on."""
        return self.best.reached if self.best else 0

    @property
    def trust(self) -> Trust | None:
        """How well a supernet ranks candidates; None if there was none, or that is not known yet."""
        return trust(self.records, self.config.rank_by) if shares(self.config) else None

    @property
    def counts(self) -> Counter[str]:
        """How many trials ended in which state."""
        return Counter(record.state for record in self.records)

    def check_feasible(self) -> None:
        """Refuse to call a search done that found nothing.

        Raises:
            NothingFeasibleError: lists the fastest candidates that were measured.
        """
        if self.trained or self.interrupted:
            return
        budget = self.budgets.describe()
        measured = {record.digest: record for record in self.records if record.timing}
        fastest = sorted(measured.values(), key=lambda record: record.timing.ms if record.timing else 0.0)[:3]
        listed = "; ".join(f"{_costs(record)} {record.what()}" for record in fastest)
        failed = [record.reason for record in self.records if record.state == "failed" and record.reason]
        raise NothingFeasibleError(
            f"no candidate fits {budget} ({self.about.conditions}). "
            + f"The base alone takes {_costs(self.base)}. "
            + (f"The fastest of {len(measured)} measured: {listed}. " if listed else "None could be measured. ")
            + (f"{len(failed)} failed, the last because: {failed[-1]} " if failed else "")
            + "Raise the budget, choose a smaller or faster MODEL, or a --space with cheaper blocks."
        )


def _costs(record: Record) -> str:
    """What was measured of it."""
    ms = f"{record.timing.ms:.3g} ms" if record.timing else ""
    return ms if record.peak_mb is None else f"{ms} and {record.peak_mb:.4g} MB"
