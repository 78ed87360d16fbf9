"""What a search came to, and the files that say so: front.csv, best.yaml, report.html."""

from __future__ import annotations

import csv
import io
import math
import textwrap
import time
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from attnsurgery.errors import NothingFeasibleError
from attnsurgery.recipe.schema import Recipe
from attnsurgery.recipe.text import dumps
from attnsurgery.search.about import About
from attnsurgery.search.budget import Budgets
from attnsurgery.search.config import SearchConfig
from attnsurgery.search.confirm import Confirmation
from attnsurgery.search.control import Control
from attnsurgery.search.record import Record, best, front, trained
from attnsurgery.search.report import render
from attnsurgery.search.run_directory import write_own
from attnsurgery.search.rungs import Trust, shares, trust

REPORT = "report.html"
_SELDOM_S = 10.0
"""A report takes some 0.4 s to make, pictures and all."""


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
        """How far a supernet could be believed; None if there was none, or that is not known yet."""
        return trust(self.records, self.config.rank_by) if shares(self.config) else None

    @property
    def counts(self) -> Counter[str]:
        """How many trials ended in which state."""
        return Counter(record.state for record in self.records)

    def write(self, control: Control | None = None, *, seldom: bool = False) -> list[str]:
        """Write every artefact, each as a whole or not at all.

        Args:
            control: a random search, for the report.
            seldom: leave a report that is only seconds old; for a search whose trials take no longer than its report.

        Returns:
            The new names of files that stood in their places and that no search had written.

        Raises:
            SearchError: the disk is full or not writable.
        """
        kept = [write_own(self.folder, "front.csv", _csv(self.front))]
        if self.best and self.best.recipe:
            kept.append(write_own(self.folder, "best.yaml", self._recipe(Recipe.model_validate(self.best.recipe))))
        if not (seldom and _age(self.folder / REPORT) < _SELDOM_S):
            kept.append(write_own(self.folder, REPORT, render(self, control)))
        return [name for name in kept if name]

    def _recipe(self, recipe: Recipe) -> str:
        """The winner as YAML, with what is known of it by now above."""
        said = self.confirmation.sentence() if self.confirmation else "Chosen by validation images, not confirmed yet."
        above = textwrap.fill(said, 118, initial_indent="# ", subsequent_indent="# ", break_long_words=False)
        return f"{above}\n{dumps(recipe)}"

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


def _age(path: Path) -> float:
    """Seconds since it was written; infinite if it never was, or by another clock."""
    try:
        age = time.time() - path.stat().st_mtime
    except OSError:
        return math.inf
    return age if age >= 0 else math.inf


def _costs(record: Record) -> str:
    """What was measured of it."""
    ms = f"{record.timing.ms:.3g} ms" if record.timing else ""
    return ms if record.peak_mb is None else f"{ms} and {record.peak_mb:.4g} MB"


def _csv(records: list[Record]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    timed, scored = ("latency_ms", "latency_low_ms", "latency_high_ms"), ("val_top1", "val_loss")
    writer.writerow(["trial", "recipe", *timed, *scored, "parameters", "macs", "rung"])
    for record in records:
        assert record.timing is not None
        timing = record.timing
        name = record.recipe["name"] if record.recipe else ""
        numbers = [f"{value:.6g}" for value in (timing.ms, timing.low_ms, timing.high_ms)]
        numbers += ["" if value is None else f"{value:.6g}" for value in (record.final_top1, record.final_loss)]
        writer.writerow([record.number, name, *numbers, record.parameters, record.macs, record.reached + 1])
    return text.getvalue()
