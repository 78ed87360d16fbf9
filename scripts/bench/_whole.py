"""Benchmarks that consist of whole searches: one row a search, kept as soon as it has finished."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from _common import RESULTS, conditions, write

from attnsurgery.latency import LatencyBackend
from attnsurgery.search import Outcome, SearchConfig, run
from attnsurgery.search.result.options import best_of

Row = dict[str, Any]


def parser_of(description: str | None, name: str, seeds: int) -> argparse.ArgumentParser:
    """The options of every such benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=seeds, help="searches of each kind, from seeds 0, 1, 2 ...")
    parser.add_argument("--minutes", type=float, default=600.0, help="begin no search after this time")
    parser.add_argument("--results", type=Path, default=Path("runs") / name, help="folder for the run directories")
    return parser


class Searches:
    """The searches of a benchmark in docs/benchmarks/NAME.json; the same call adds those that are missing.

    Args:
        name: of the file.
        settings: of the searches. Results of other settings are refused.
        figures_of: computes what is stated about all searches so far.
    """

    def __init__(self, name: str, settings: Row, figures_of: Callable[[list[Row]], Row]) -> None:
        self.name, self.figures_of = name, figures_of
        path = RESULTS / f"{name}.json"
        stored: Row = json.loads(path.read_text()) if path.exists() else {}
        settings = json.loads(json.dumps(settings))
        if stored.get("settings", settings) != settings:
            raise SystemExit(f"{path} has results of other settings; move it away.")
        self.rows: list[Row] = stored.pop("searches", [])
        for recomputed in ("conditions", "figures"):
            stored.pop(recomputed, None)
        self.header: Row = {**stored, "settings": settings}

    def save(self) -> None:
        write(self.name, {**self.header, "figures": self.figures_of(self.rows), "searches": self.rows})

    def has(self, key: Row) -> bool:
        """Whether a search has finished."""
        return any(all(row.get(name) == value for name, value in key.items()) for row in self.rows)

    def add(
        self,
        keys: Iterable[Row],
        config_of: Callable[[Row, Path], SearchConfig],
        folder: Path,
        minutes: float,
        backend: LatencyBackend | None = None,
        more: Callable[[Outcome], Row] = lambda outcome: {},
    ) -> None:
        """Run the searches that are missing, in the order of their keys, until the time is over.

        Args:
            keys: what tells the searches apart; `config_of` makes the settings of a search from its key.
            folder: for the run directories. A search that was interrupted resumes there.
            minutes: no search begins after this time.
            backend: measures latency; by default each search makes its own.
            more: further results of a search.
        """
        deadline = time.monotonic() + 60 * minutes
        folder.mkdir(parents=True, exist_ok=True)
        for key in keys:
            if self.has(key):
                continue
            if time.monotonic() > deadline:
                break
            start = time.process_time()
            outcome = run(config_of(key, folder / "-".join(map(str, key.values()))), backend=backend)
            self.rows.append({**row_of(key, outcome, time.process_time() - start), **more(outcome)})
            print(json.dumps(self.rows[-1]), flush=True)
            self.save()
        self.save()
        print(json.dumps(self.figures_of(self.rows), indent=2))


def row_of(key: Row, outcome: Outcome, cpu_seconds: float) -> Row:
    """The results of a search: the gain of its winner with its interval, how all trained, what else was compared."""
    confirmation, base, winner = outcome.confirmation, outcome.base, outcome.best
    row = {**key, "cpu_seconds": round(cpu_seconds), "conditions": conditions(), "counts": dict(outcome.counts)}
    if confirmation is None or winner is None:
        return {**row, "verdict": "no winner"}
    assert base.timing is not None
    return {
        **row,
        "verdict": confirmation.verdict,
        "winner": winner.describe(),
        "ratio": confirmation.timing.ms / base.timing.ms,
        "base_top1": confirmation.base_metric,
        "winner_top1": confirmation.winner_metric,
        "gain": confirmation.winner_metric - confirmation.base_metric,
        "gain_95": [confirmation.low, confirmation.high],
        "seeds_of_verdict": confirmation.seeds,
        "options": [option.as_dict() for option in confirmation.options],
        "best_use_of_budget": best_of(confirmation.options).name if confirmation.options else "",
        "tuned": (outcome.about.tuning or {}).get("tuned"),
    }
