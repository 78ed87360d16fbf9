#!/usr/bin/env python
"""The cost of a search's coordinator: an ask among 300 trials, four workers' idle time, memory over 200 trials.

    python scripts/bench/coordinator.py [--asks 20] [--trials 200]

* An ask of the additive sampler in a space with 16 places of 10 blocks each, and in an SQLite study with 300 trials
  (target: at most 100 ms, the median of the last asks).
* Four workers whose trainings are dummy jobs of 5 s (tests/plugins): the share of their time, from the first trial to
  the last result, that they spend in these jobs (target: at least 90 %).
* One worker and 200 trials that take no time: the memory that coordinator and worker have gained since the 40th
  (target: at most 50 MB each).

Linux only. Writes docs/benchmarks/coordinator.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _common import write

ROOT = Path(__file__).resolve().parents[2]
PLACES, BLOCKS, KNOWN = 16, 10, 300
JOB_S, WORKERS, JOBS = 5.0, 4, 80


def environment(cache: Path, training_s: float) -> None:
    paths = [str(ROOT), str(ROOT / "tests" / "plugins"), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ |= {"PYTHONPATH": os.pathsep.join(paths), "DUMMY_SECONDS": str(training_s), "OMP_NUM_THREADS": "1"}
    os.environ["ATTNSURGERY_CACHE"] = str(cache)


def time_asks(folder: Path, asks: int) -> list[float]:
    """Seconds of each of the last asks, in a study that has 300 trials at the end."""
    from attnsurgery.recipe.schema import Edit
    from attnsurgery.search.result.limits import Budgets
    from attnsurgery.search.result.record import Record, Timing
    from attnsurgery.search.space import NONE, BoundSpace, Variable
    from attnsurgery.search.storage.store import Store

    labels = {f"se(reduction={2 + index})": {"reduction": 2 + index} for index in range(BLOCKS)}
    variables = tuple(
        Variable(
            name=f"layer{place // 4 + 1}.{place % 4}.bn2",
            sites=(f"layer{place // 4 + 1}.{place % 4}.bn2",),
            choices={NONE: None}
            | {
                label: Edit(at=f"layer{place // 4 + 1}.{place % 4}.bn2", block="se", options=options)
                for label, options in labels.items()
            },
        )
        for place in range(PLACES)
    )
    space = BoundSpace(name="made up", base="resnet34", variables=variables, max_blocks=None)
    store = Store(folder, None, space, Budgets({"latency": 10.0}), seed=0)
    rng = np.random.default_rng(0)
    effect, cost = rng.normal(0, 0.004, (PLACES, BLOCKS + 1)), rng.uniform(0.05, 0.4, (PLACES, BLOCKS + 1))
    effect[:, 0] = cost[:, 0] = 0.0
    records: list[Record] = []
    seconds = []
    for _ in range(KNOWN + 1):
        start = time.perf_counter()
        candidate = store.ask(records, space.places)
        seconds.append(time.perf_counter() - start)
        picks = space.places.picks(candidate.assignment)
        assert picks is not None
        ms = 8.0 + sum(cost[place, pick] for place, pick in enumerate(picks)) + rng.normal(0, 0.02)
        top1 = 0.7 + sum(effect[place, pick] for place, pick in enumerate(picks)) + rng.normal(0, 0.003)
        recipe = space.recipe_for(candidate.assignment)
        record = Record(
            number=candidate.number,
            state="trained" if ms <= 10.0 else "over_budget",
            assignment=candidate.assignment,
            digest=recipe.digest() if recipe else "",
            timing=Timing(ms, ms - 0.02, ms + 0.02, ms / 8.0),
            metric=float(top1) if ms <= 10.0 else None,
            loss=float(1 - top1) if ms <= 10.0 else None,
        )
        finished = store.finish(record)
        assert finished is not None
        records.append(finished)
    store.close()
    return seconds[-asks:]


def run_search(folder: Path, workers: int, trials: int, training_s: float) -> dict[str, Any]:
    """Run a search with made-up scores; returns its duration and, by trial, the memory of its processes."""
    from attnsurgery.evaluate import EVALUATORS
    from attnsurgery.search import Listener, Record, SearchConfig, run
    from tests.plugins.attnsurgery_dummy import Dummy

    environment(folder / "cache", training_s)
    if "dummy" not in EVALUATORS:
        EVALUATORS.register("dummy")(Dummy)
    started: list[float] = []
    ended: list[float] = []
    memory: list[tuple[float, float]] = []

    class Watch(Listener):
        def trial_started(self, number: int, name: str) -> None:
            started.append(time.monotonic())

        def trial_finished(self, record: Record, trained: int, total: int) -> None:
            ended.append(time.monotonic())
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            memory.append((resident_mb("self"), max((resident_mb(pid) for pid in children), default=0.0)))

    outcome = run(
        SearchConfig(
            data="digits",
            budget_ms=100.0,
            latency="fixed",
            evaluator="dummy",
            space="se",
            sampler="random",
            trials=trials,
            workers=workers,
            epochs=1,
            lr=1e-3,
            block_lr_scale=10.0,
            base_epochs=1,
            finalists=1,
            confirm_seeds=1,
            input_size=32,
            output=str(folder / "run"),
        ),
        Watch(),
    )
    assert outcome.trained == trials
    return {"seconds": ended[-1] - started[0], "memory": memory}


def resident_mb(pid: str) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--asks", type=int, default=20)
    parser.add_argument("--trials", type=int, default=200)
    options = parser.parse_args()
    import sys

    sys.path.insert(0, str(ROOT))
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="attnsurgery-") as folder:
        scratch = Path(folder)
        for name in ("asks", "four", "many"):
            (scratch / name).mkdir()
        environment(scratch / "cache", 0.0)
        figures["ask_ms"] = 1000 * statistics.median(time_asks(scratch / "asks", options.asks))
        print(f"an ask among {KNOWN} trials: {figures['ask_ms']:.0f} ms", flush=True)
        four = run_search(scratch / "four", WORKERS, JOBS, JOB_S)
        figures["efficiency"] = JOBS * JOB_S / WORKERS / four["seconds"]
        print(f"{WORKERS} workers spend {figures['efficiency']:.1%} of their time in dummy jobs", flush=True)
        memory = run_search(scratch / "many", 1, options.trials, 0.0)["memory"]
        early = options.trials // 5
        for index, name in enumerate(("coordinator", "worker")):
            figures[f"{name}_gained_mb"] = memory[-1][index] - memory[early][index]
            figures[f"{name}_mb"] = memory[-1][index]
    print(f"written {write('coordinator', {'figures': figures})}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
