"""What a search came to, and the files that say so: front.csv, best.yaml, report.html."""

from __future__ import annotations

import csv
import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from attnsurgery.errors import NothingFeasibleError
from attnsurgery.recipe.schema import Recipe
from attnsurgery.recipe.text import dumps
from attnsurgery.search.budget import Budgets
from attnsurgery.search.config import SearchConfig
from attnsurgery.search.confirm import Confirmation
from attnsurgery.search.files import write_whole
from attnsurgery.search.record import Record, best, front, trained
from attnsurgery.search.report import Report, render


@dataclass(frozen=True)
class Outcome:
    """A search, finished or interrupted."""

    config: SearchConfig
    folder: Path
    conditions: str
    data: str
    candidates: int
    base: Record
    records: list[Record]
    confirmation: Confirmation | None
    interrupted: bool
    command: str
    budgets: Budgets
    versions: dict[str, str]

    @property
    def best(self) -> Record | None:
        return best(self.records)

    @property
    def front(self) -> list[Record]:
        return front(self.records)

    @property
    def trained(self) -> int:
        return len(trained(self.records))

    @property
    def counts(self) -> Counter[str]:
        """How many trials ended in which state."""
        return Counter(record.state for record in self.records)

    def write(self) -> None:
        """Write every artefact, each as a whole or not at all.

        Raises:
            SearchError: the disk is full or not writable.
        """
        write_whole(self.folder / "front.csv", _csv(self.front))
        if self.best and self.best.recipe:
            write_whole(self.folder / "best.yaml", dumps(Recipe.model_validate(self.best.recipe)))
        write_whole(self.folder / "report.html", render(self._report()))

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
            f"no candidate fits {budget} ({self.conditions}). "
            + f"The base alone takes {_costs(self.base)}. "
            + (f"The fastest of {len(measured)} measured: {listed}. " if listed else "None could be measured. ")
            + (f"{len(failed)} failed, the last because: {failed[-1]} " if failed else "")
            + "Raise the budget, choose a smaller or faster MODEL, or a --space with cheaper blocks."
        )

    def _report(self) -> Report:
        return Report(
            title=f"{self.config.base}, {self.config.space}, {self.budgets.describe()}",
            budgets=self.budgets.describe(),
            budget_ms=self.config.budget_ms,
            wanted=self.config.trials,
            conditions=self.conditions,
            data=self.data,
            candidates=self.candidates,
            base=self.base,
            records=self.records,
            best=self.best,
            front=self.front,
            verdict=self.confirmation.sentence() if self.confirmation else None,
            confirmed=self.confirmation.timing if self.confirmation else None,
            interrupted=self.interrupted,
            command=self.command,
            versions=self.versions,
        )


def _costs(record: Record) -> str:
    """What was measured of it."""
    ms = f"{record.timing.ms:.3g} ms" if record.timing else ""
    return ms if record.peak_mb is None else f"{ms} and {record.peak_mb:.4g} MB"


def _csv(records: list[Record]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["trial", "recipe", "latency_ms", "latency_low_ms", "latency_high_ms", "val_top1", "parameters", "macs"]
    )
    for record in records:
        assert record.timing is not None
        timing = record.timing
        name = record.recipe["name"] if record.recipe else ""
        numbers = [f"{value:.6g}" for value in (timing.ms, timing.low_ms, timing.high_ms, record.final_top1 or 0.0)]
        writer.writerow([record.number, name, *numbers, record.parameters, record.macs])
    return text.getvalue()
