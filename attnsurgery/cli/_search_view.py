"""Shows a running search on stderr: at most ten live lines on a terminal, otherwise one plain line for each event.

The result of the search goes to stdout.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from attnsurgery.cli._console import building, print_lines, print_table, stderr
from attnsurgery.evaluate import Epoch
from attnsurgery.search import Listener, Outcome, Record, SearchConfig, Timing
from attnsurgery.search.execution.preview import Preview
from attnsurgery.search.report.words import loss
from attnsurgery.search.result.limits import Budgets
from attnsurgery.search.result.record import State, best

_SILENCE_S = 20.0
_HIDDEN = {"too_many_blocks"}
_STATE_LABELS: dict[State, str] = {
    "trained": "trained",
    "over_budget": "over budget",
    "duplicate": "duplicate",
    "failed": "failed",
}


@contextmanager
def view(config: SearchConfig) -> Iterator[Listener]:
    """A listener that shows the search within the context, and then restores the terminal."""
    console = stderr()
    if not console.is_terminal:
        yield PlainView(console)
        return
    shown = LiveView(config, console)
    with Live(get_renderable=shown.lines, console=console, refresh_per_second=4, transient=True):
        yield shown


class PlainView(Listener):
    """One line for each event, and a sign of life if there is no event for a while: for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._printed_at = time.monotonic()

    def phase(self, text: str) -> None:
        self._print(text)

    def data(self, description: str, notes: Sequence[str]) -> None:
        self._print("\n".join(_data_lines(description, notes)))

    def loading(self, split: str, count: int, total: int) -> None:
        if time.monotonic() - self._printed_at > _SILENCE_S:
            self._print(f"         {split} {count:,} of {total:,}")

    def ready(self, conditions: str, data: str, candidates: int, base: Record, power: str) -> None:
        self._print(f"latency  {conditions}")
        self._print(f"space    {candidates:,} candidates")
        self._print(f"base     {_ms(base.timing)}  {_scores(base, 0)}")
        if power:
            self._print(f"power    {power}")

    def trial_finished(self, record: Record, trained: int, total: int) -> None:
        if record.state in _HIDDEN:
            return
        outcome = _STATE_LABELS.get(record.state, record.state) + (f": {record.reason}" if record.reason else "")
        numbers = f"{_ms(record.timing)}  {_scores(record, 0)}"
        self._print(f"[{trained}/{total}] trial {record.number}  {numbers}  {outcome}  {record.describe()}")

    def promoted(self, record: Record, rungs: int) -> None:
        outcome = f"not promoted: {record.halted}" if record.halted else f"rung {record.reached + 1} of {rungs}"
        self._print(f"trial {record.number}  {_ms(record.timing)}  {_scores(record, record.reached)}  {outcome}")

    def epoch(self, epoch: Epoch) -> None:
        if time.monotonic() - self._printed_at > _SILENCE_S:
            self._print(f"         epoch {epoch.index} of {epoch.of}, loss {epoch.loss:.3f}")

    def lane(self, worker: int) -> Listener:
        return _PlainLane(self, worker)

    def _print(self, text: str) -> None:
        self._console.print(Text(text))
        self._printed_at = time.monotonic()


class _PlainLane(Listener):
    """Prints the events of one of several workers."""

    def __init__(self, view: PlainView, worker: int) -> None:
        self._view, self._worker = view, worker

    def phase(self, text: str) -> None:
        self._view.phase(f"worker {self._worker}: {text}")

    def epoch(self, epoch: Epoch) -> None:
        self._view.epoch(epoch)


class _Activity(Listener):
    """The present step and its progress."""

    def __init__(self, now: str) -> None:
        self._now, self._detail = now, ""

    def phase(self, text: str) -> None:
        self._now, self._detail = text, ""

    def loading(self, split: str, count: int, total: int) -> None:
        self._detail = f"{split} {count:,} of {total:,}"

    def epoch(self, epoch: Epoch) -> None:
        self._detail = f"epoch {epoch.index} of {epoch.of}, loss {epoch.loss:.3f}"


class LiveView(_Activity):
    """The state of the search in at most ten lines, and one for each of several workers."""

    def __init__(self, config: SearchConfig, console: Console) -> None:
        super().__init__("starting")
        self._config = config
        self._console = console
        self._facts: list[str] = []
        self._base: Record | None = None
        self._records: list[Record] = []
        self._trained = 0
        self._lanes: list[_LiveLane] = []

    def lane(self, worker: int) -> Listener:
        self._lanes.append(_LiveLane(worker))
        return self._lanes[-1]

    def note(self, text: str) -> None:
        self._console.print(Text(text))  # above the live lines, where it stays

    def data(self, description: str, notes: Sequence[str]) -> None:
        for line in _data_lines(description, notes):  # above the live lines too
            self._console.print(Text(line))

    def ready(self, conditions: str, data: str, candidates: int, base: Record, power: str) -> None:
        self._facts = [f"data     {data}", f"latency  {conditions}; {candidates:,} candidates"]
        self._facts += [f"power    {power}"] if power else []
        self._base = base

    def trial_started(self, number: int, name: str) -> None:
        self._now, self._detail = f"trial {number}: {name}", "building and measuring"

    def timed(self, number: int, timing: Timing) -> None:
        self._detail = f"{_ms(timing)}, training"

    def trial_finished(self, record: Record, trained: int, total: int) -> None:
        self._records.append(record)
        self._trained = trained

    def promoted(self, record: Record, rungs: int) -> None:
        self._records = [record if earlier.number == record.number else earlier for earlier in self._records]

    def lines(self) -> RenderableType:
        """The lines to show now."""
        config = self._config
        parts: list[RenderableType] = [
            _line(f"{config.base}, space {config.space}, budget {Budgets.of(config).describe()}", "bold"),
            *(_line(fact, "dim") for fact in self._facts),
        ]
        if self._base:
            parts.append(_line(f"base     {_ms(self._base.timing)}  {_scores(self._base, 0)}"))
            parts.append(self._bar())
        best_record = best(self._records, config.rank_by)
        if best_record:
            scores = _scores(best_record, best_record.reached)
            parts.append(_line(f"best     {_ms(best_record.timing)}  {scores}  {best_record.describe()}", "green"))
        if self._base is None or not self._lanes:
            parts.append(_line(f"now      {self._now}"))
            parts.append(_line(f"         {self._detail}", "dim"))
        parts += [_line(lane.line(), "dim") for lane in self._lanes]
        return Group(*parts)

    def _bar(self) -> RenderableType:
        counts = Counter(record.state for record in self._records)
        parts = [
            f"{counts[state]} {_STATE_LABELS[state]}" for state in _STATE_LABELS if state != "trained" and counts[state]
        ]
        row = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=self._config.trials, completed=self._trained, width=24)
        row.add_row("trained ", bar, f"{self._trained}/{self._config.trials}", Text(", ".join(parts), style="dim"))
        return row


class _LiveLane(_Activity):
    """The live line of one of several workers."""

    def __init__(self, worker: int) -> None:
        super().__init__("idle")
        self._worker = worker

    def timed(self, number: int, timing: Timing) -> None:
        self._now, self._detail = f"trial {number}", f"{_ms(timing)}, training"

    def line(self) -> str:
        return f"worker {self._worker:<2}{self._now}  {self._detail}"


def print_outcome(outcome: Outcome) -> None:
    """Print the result: winner and base, the verdict, and the files."""
    winner = outcome.best
    if winner is None:
        return
    rows = [_row("base", outcome.base), _row("winner", winner)]
    print_table(["", "latency", f"val {outcome.about.metric}", "val loss", "parameters"], rows)
    lines = [f"winner     {winner.describe()}"]
    if outcome.trust:
        lines.append(f"supernet   {outcome.trust.sentence()}")
    if outcome.confirmation and (choice := outcome.confirmation.choice()):
        lines.append(f"chosen     among {choice}")
    if outcome.confirmation:
        again = outcome.confirmation.timing
        budget = outcome.config.latency_budget_ms
        over = "" if budget is None or again.ms <= budget else f": over the budget of {budget:g} ms"
        lines += [
            f"verdict    {outcome.confirmation.sentence()}",
            *([f"advice     {advice}"] if (advice := outcome.confirmation.advice()) else []),
            f"again      {_ms(again)}{over}, measured after the search ({outcome.about.conditions})",
        ]
    print_lines([*lines, *files_of(outcome)])


def files_of(outcome: Outcome) -> list[str]:
    """The files of a search, one line each."""
    folder = outcome.folder
    lines = [f"recipe     {folder / 'best.yaml'}"] if outcome.best and not outcome.unwritten else []
    if outcome.unwritten:
        lines.append(
            f"report     not written: {outcome.unwritten} All trials are safe; attnsurgery report {folder} writes "
            "report.html, best.yaml and front.csv as soon as that can be."
        )
    else:
        lines.append(f"report     {folder / 'report.html'}")
    if outcome.confirmation and (folder / "best").is_dir():
        lines.append(f"build it   {building(folder / 'best')}")
    return lines


def print_preview(preview: Preview, config: SearchConfig) -> None:
    """Print what is known of a search before it begins."""
    limit = f", at most {preview.most_blocks} blocks in one" if preview.most_blocks else ""
    exact = f"{_percent(preview.exact_share)} by parameters and MACs, of these " if preview.exact_share < 1 else ""
    fit = f"{exact}{preview.fitting} of {preview.drawn} drawn at random fit, so {100 * preview.low:.0f} to "
    fit += f"{100 * preview.high:.0f} % of the space"
    if not preview.drawn:
        fit = "fewer fit by parameters and MACs than chance would find; the search makes no others"
    beside = ["base", *preview.rivals]
    length = f"{_duration(preview.seconds)} for {config.trials} trained trials, {', '.join(beside)} and confirmation"
    if preview.none_fits:
        limit_ms = config.latency_budget_ms
        over = f", and the base alone takes {preview.base_ms:.3f} ms" if limit_ms and preview.base_ms > limit_ms else ""
        length = (
            f"none of the {preview.drawn} drawn fits{over}: perhaps no candidate does, and then it ends without a "
            f"result after {_duration(preview.seconds)}. Raise the budget, or choose a faster MODEL or cheaper blocks"
        )
    print_lines(
        [
            f"space      {preview.space}: {preview.candidates:,} candidates, {preview.places} places{limit}",
            *(f"left out   {choice}" for choice in preview.left_out),
            f"data       {preview.data}",
            f"base       {preview.base_ms:.3f} ms  {preview.base_parameters:,} parameters  {preview.base_macs:,} MACs",
            *(f"           {ms:.3f} ms at {size} pixels" for size, ms in preview.sizes[1:]),
            f"           {preview.conditions}",
            f"budget     {preview.budgets}: {fit}",
            f"a trial    {_rungs(preview)}",
            f"the search {length}",
        ]
    )


def _rungs(preview: Preview) -> str:
    durations = [f"{_duration(seconds)} ({description})" for description, _, seconds in preview.rungs]
    above = [
        f"{count} of them again, {text}" for (_, count, _), text in zip(preview.rungs[1:], durations[1:], strict=True)
    ]
    return "; the best ".join([durations[0], *above])


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"about {seconds:.0f} s"
    if seconds < 5400:
        return f"about {seconds / 60:.0f} min"
    return f"about {seconds / 3600:.1f} h"


def as_data(outcome: Outcome) -> dict[str, Any]:
    """The result as JSON data."""
    folder = outcome.folder
    return {
        "best": outcome.best.as_dict() if outcome.best else None,
        "base": outcome.base.as_dict(),
        "front": [record.as_dict() for record in outcome.front],
        "confirmation": outcome.confirmation.as_dict() if outcome.confirmation else None,
        "supernet": asdict(outcome.trust) if outcome.trust else None,
        "trained": outcome.trained,
        "counts": dict(outcome.counts),
        "candidates": outcome.about.candidates,
        "data": outcome.about.data,
        "about_data": list(outcome.about.notes),
        "interrupted": outcome.interrupted,
        "unwritten": outcome.unwritten,
        "conditions": outcome.about.conditions,
        "versions": dict(outcome.about.versions),
        "config": outcome.config.model_dump(exclude={"storage"}),
        "files": {
            name: str(folder / name) for name in ("best.yaml", "front.csv", "report.html", "trials.jsonl", "best")
        },
    }


def _row(name: str, record: Record) -> tuple[str, ...]:
    scores = _metric(record, record.reached), _loss(record, record.reached)
    return name, _ms(record.timing), *scores, f"{record.parameters or 0:,}"


def _data_lines(description: str, notes: Sequence[str]) -> list[str]:
    """The description of the images, and the notes on them, one line each."""
    return [f"data     {description}", *(f"         {note}" for note in notes)]


def _line(text: str, style: str = "") -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _ms(timing: Timing | None) -> str:
    return f"{timing.ms:.3f} ms" if timing else "-"


def _scores(record: Record, rung: int) -> str:
    """Both scores on one rung; '-' if the candidate was not trained."""
    return f"{_metric(record, rung)}  loss {_loss(record, rung)}" if record.metric is not None else "-"


def _metric(record: Record, rung: int) -> str:
    """The metric, and balanced accuracy beside top-1 if classes are of different sizes."""
    balanced = record.balanced_on(rung)
    return _percent(record.metric_on(rung)) + ("" if balanced is None else f" (balanced {_percent(balanced)})")


def _loss(record: Record, rung: int) -> str:
    return loss(record, rung) or "-"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"
