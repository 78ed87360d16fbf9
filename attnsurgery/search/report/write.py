"""Writes the results of a search: front.csv, best.yaml, report.html."""

from __future__ import annotations

import csv
import io
import math
import textwrap
import time
from pathlib import Path

from attnsurgery.recipe.schema import Recipe
from attnsurgery.recipe.text import dumps
from attnsurgery.search.report import render
from attnsurgery.search.report.control import Control
from attnsurgery.search.result.outcome import Outcome
from attnsurgery.search.result.record import Record
from attnsurgery.search.storage.run_directory import write_own

REPORT = "report.html"
_SELDOM_S = 10.0
"""A running search does not rewrite a report that is younger; making one takes about 0.4 s."""


def write_outcome(outcome: Outcome, control: Control | None = None, *, seldom: bool = False) -> list[str]:
    """Write all files, each one atomically.

    Args:
        control: the random search that the report compares the search with.
        seldom: do not rewrite a report that is only seconds old, because trials may be shorter than making a report.

    Returns:
        The new names of files that had these names and were not written by a search.

    Raises:
        SearchError: the disk is full or not writable.
    """
    new_names = [write_own(outcome.folder, "front.csv", _csv(outcome.front))]
    if outcome.best and outcome.best.recipe:
        new_names.append(
            write_own(outcome.folder, "best.yaml", _recipe(outcome, Recipe.model_validate(outcome.best.recipe)))
        )
    if not (seldom and _age(outcome.folder / REPORT) < _SELDOM_S):
        new_names.append(write_own(outcome.folder, REPORT, render(outcome, control)))
    return [name for name in new_names if name]


def _recipe(outcome: Outcome, recipe: Recipe) -> str:
    """The winner as YAML, with the verdict as a comment above."""
    verdict = (
        outcome.confirmation.sentence() if outcome.confirmation else "Chosen by validation images, not confirmed yet."
    )
    comment = textwrap.fill(verdict, 118, initial_indent="# ", subsequent_indent="# ", break_long_words=False)
    return f"{comment}\n{dumps(recipe)}"


def _age(path: Path) -> float:
    """Seconds since the file was written; infinite if there is none, or if its time is in the future."""
    try:
        age = time.time() - path.stat().st_mtime
    except OSError:
        return math.inf
    return age if age >= 0 else math.inf


def _csv(records: list[Record]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    latencies, scores = ("latency_ms", "latency_low_ms", "latency_high_ms"), ("val_metric", "val_loss")
    writer.writerow(["trial", "recipe", *latencies, *scores, "parameters", "macs", "rung"])
    for record in records:
        assert record.timing is not None
        timing = record.timing
        name = record.recipe["name"] if record.recipe else ""
        numbers = [f"{value:.6g}" for value in (timing.ms, timing.low_ms, timing.high_ms)]
        numbers += ["" if value is None else f"{value:.6g}" for value in (record.final_metric, record.final_loss)]
        writer.writerow([record.number, name, *numbers, record.parameters, record.macs, record.reached + 1])
    return text.getvalue()
