"""Whole searches on the card: as started by a user, with too little memory, with a killed worker; winners' budgets."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import budget as budget_bench
import timm
import torch

from attnsurgery.data import Data, load_data
from attnsurgery.data.preprocess import Preprocessing
from attnsurgery.errors import AttnSurgeryError
from attnsurgery.evaluate import TrainSettings, Watch, train
from attnsurgery.search import Listener, SearchConfig
from attnsurgery.search import run as run_search
from attnsurgery.search.storage.load import load_search
from attnsurgery.search.storage.schema import TRIALS
from gpu_bench.rows import RED, Refused, Row, Rows
from gpu_bench.tiny import MODEL, SECONDS, SIZE, images, search_options


def command(workers: int, trials: int, output: Path, tiny: bool) -> list[str]:
    arguments = f"search --data digits --budget-ms 100 --trials {trials} --epochs 1 --device cuda --workers {workers}"
    arguments += " --space tiny --lr 1e-3 --block-lr-scale 10"
    tiny_arguments = search_options(output.parent) if tiny else []
    return [sys.executable, "-m", "attnsurgery", *arguments.split(), *tiny_arguments, "--output", str(output)]


def outcome_of(folder: Path, code: int, trials: int, seconds: float) -> Row:
    """The row of a search from its run directory; red without a confirmed winner."""
    try:
        outcome = load_search(folder).outcome
    except AttnSurgeryError as error:
        return {"exit": code, "state": RED, "say": f"the search ended with {code}, and left nothing to read: {error}"}
    states = Counter(record.state for record in outcome.records)
    winner, base = outcome.best, outcome.base.timing
    timing = winner.timing if winner else None
    succeeded = code == 0 and states["trained"] >= trials and outcome.confirmation is not None and timing is not None
    row = {
        "exit": code,
        "search_seconds": round(seconds, 1),
        "records": dict(states),
        "reasons": [record.reason for record in outcome.records if record.state == "failed"],
        "base_ms": base.ms if base else None,
        "winner_ms": timing.ms if timing else None,
        "measured_under": outcome.about.conditions,
    }
    say = f"exit {code}, {dict(states)}, winner {row['winner_ms']} ms, base {row['base_ms']} ms"
    return {**row, "say": say, **({} if succeeded else {"state": RED})}


def search_row(workers: int, trials: int, tiny: bool) -> Row:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        folder, start = Path(scratch) / "run", time.monotonic()
        code = subprocess.run(command(workers, trials, folder, tiny), stdin=subprocess.DEVNULL, check=False).returncode
        return outcome_of(folder, code, trials, time.monotonic() - start)


def search(rows: Rows, tiny: bool) -> None:
    trials = 1 if tiny else 3
    rows.make(f"{trials} trials", lambda: search_row(0, trials, tiny))


def search_workers(rows: Rows, tiny: bool) -> None:
    trials = 2 if tiny else 3
    rows.make(f"{trials} trials, 2 workers", lambda: search_row(2, trials, tiny))


# ---- a worker that is killed


def workers_of(pid: int) -> list[int]:
    """The worker processes of a search."""
    pids: list[int] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            pids += [int(child) for child in children.read_text().split()]
    with suppress(OSError):
        return [child for child in pids if b"attnsurgery" in Path(f"/proc/{child}/cmdline").read_bytes()]
    return []


def killed_worker_row(trials: int, tiny: bool) -> Row:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        folder, start = Path(scratch) / "run", time.monotonic()
        search = subprocess.Popen(command(1, trials, folder, tiny), stdin=subprocess.DEVNULL)
        journal, victim = folder / TRIALS, 0
        while search.poll() is None and not victim:
            time.sleep(0.02)
            if journal.exists() and b'"number"' in journal.read_bytes():  # there is a trial
                victim = next(iter(workers_of(search.pid)), 0)
        if victim:
            os.kill(victim, signal.SIGKILL)
        row = outcome_of(folder, search.wait(), trials, time.monotonic() - start)
        killed = {"killed": victim != 0}
        if not victim:
            return {**row, **killed, "state": RED, "say": f"no worker could be killed; {row['say']}"}
        return {**row, **killed, "say": f"after SIGKILL: {row['say']}"}


def killed_worker(rows: Rows, tiny: bool) -> None:
    rows.make("one of its workers killed", lambda: killed_worker_row(2 if tiny else 8, tiny))


# ---- a training that does not fit into memory


class _StopTraining(Exception):
    """Ends a training after its first steps."""


class _TwoSteps(Watch):
    def __init__(self) -> None:
        self.steps = 0

    def step(self) -> None:
        self.steps += 1
        if self.steps > 2:
            raise _StopTraining


class PhaseRecorder(Listener):
    def __init__(self) -> None:
        self.phases: list[str] = []

    def lane(self, worker: int) -> Listener:
        return self

    def phase(self, text: str) -> None:
        self.phases.append(text)


def peak_of(data: Data, base: str, batch: int) -> int:
    """The peak memory of a training at a batch size, with the settings of searches on this device."""
    settings = TrainSettings(epochs=1, batch_size=batch, device="cuda", amp=True, channels_last=True)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with suppress(_StopTraining):
        train(timm.create_model(base, num_classes=data.num_classes), data.train, settings, 0, _TwoSteps())
    return torch.cuda.max_memory_reserved()


def limited_memory_row(base: str, batch: int, size: int, tiny: bool) -> Row:
    data = load_data("digits", Preprocessing((3, size, size)))
    full_bytes, quarter_bytes = peak_of(data, base, batch), peak_of(data, base, batch // 4)
    limit = quarter_bytes + (full_bytes - quarter_bytes) // 3
    try:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    except (RuntimeError, AssertionError) as error:
        raise Refused(f"memory cannot be limited here: {error}") from error
    recorder = PhaseRecorder()
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
            start, folder = time.monotonic(), Path(scratch) / "run"
            settings = {
                "data": "digits",
                "trials": 2,
                "epochs": 1,
                "lr": 1e-3,
                "block_lr_scale": 10.0,
                "base_epochs": 1,
                "finalists": 1,
                "confirm_seeds": 1,
                "workers": 0,
            }
            basics = {"budget_ms": 1000.0, "base": base, "space": "se", "device": "cuda", "output": str(folder)}
            overrides = {"latency_seconds": SECONDS} if tiny else {}
            config = SearchConfig(**basics, **settings, **overrides, train_batch_size=batch, input_size=size)
            run_search(config, recorder)
            row = outcome_of(folder, 0, 2, time.monotonic() - start)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    memory_phases = [text for text in recorder.phases if "memory" in text]
    figures = {"needs_mib": full_bytes >> 20, "has_mib": limit >> 20, "said": memory_phases}
    say = f"needs {full_bytes >> 20} MiB, has {limit >> 20}: {memory_phases[:1]}; {row['say']}"
    return {**row, **figures, "say": say, **({} if memory_phases else {"state": RED})}


def out_of_memory(rows: Rows, tiny: bool) -> None:
    base, batch, size = (MODEL, 32, SIZE[1]) if tiny else ("resnet50", 256, 128)
    rows.make("training at half the memory", lambda: limited_memory_row(base, batch, size, tiny))


# ---- winners and their budgets


def _shrink_budget_searches(folder: Path) -> None:
    """Make the searches of budget.py as small as possible in this process."""
    full = budget_bench.config_of
    smallest = {
        "data": str(images(folder / "images")),
        "train_batch_size": 8,
        "input_size": SIZE[1],
        "latency": "fixed",
    }

    def config_of(number: int, budget_ms: float, options: argparse.Namespace) -> SearchConfig:
        return full(number, budget_ms, options).model_copy(update=smallest)

    budget_bench.config_of = config_of


def budget(rows: Rows, tiny: bool) -> None:
    """A row for each search, then the figures; red if a winner is over its budget by more than the interval."""
    count, trials = (1, 1) if tiny else (4, 4)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        options = argparse.Namespace(trials=trials, device="cuda", mode=None, results=Path(scratch))
        if tiny:
            _shrink_budget_searches(Path(scratch))

        def make_row(number: int) -> Row:
            row = budget_bench.run_search(number, options)
            if row["feasible"]:
                row["held"] = budget_bench.budget_shares(row)
            return {**row, "say": budget_bench.row_text(row)}

        keys = [f"search {number}" for number in range(count)]
        for number, key in enumerate(keys):
            rows.make(key, lambda number=number: make_row(number), 1.0 if tiny else 35.0)  # type: ignore[misc]
    search_rows = [row for key, row in rows.all().items() if key in keys and row["state"] != RED]
    if len(search_rows) == count:
        figures = budget_bench.figures_of(search_rows)
        over = figures["ratio"]["over_by_more_than_the_interval"]
        say = f"{over} of {figures['winners']} winners are over their budget by more than the interval"
        rows.make("figures", lambda: {**figures, "say": say, **({"state": RED} if over and not tiny else {})})
