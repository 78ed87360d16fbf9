#!/usr/bin/env python
"""Kills a search again and again, and checks that no finished trial is lost.

    python scripts/bench/crash.py [--kills 100] [--memory 20] [--hangs 5]

A search with two workers, whose candidates get a made-up score after a dummy training (tests/plugins), is started by
its command and started again whenever it ends, for more trials as long as kills remain. At random moments its
coordinator or one of its workers gets SIGKILL; some trainings run out of memory, and some hang. The run directory is
read after every kill. A confirmation job that fails too often in one run ends this run with an error that says how to
resume. Such ends are counted; they are an error of this script unless enough kills and injected faults came before.
Afterwards:

* every trial that was ever in the journal still exists unchanged; none was trained twice; none is running or waiting;
  every study could be read; and as many trials are trained as requested;
* the journal, truncated at every byte of its last line, can be read and continued, and a study is rebuilt from it;
* on a full disk the search ends with a clear error and loses nothing, and resumes once there is space.

Linux only. Writes docs/benchmarks/crash.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
from _common import write

from attnsurgery.search.files import Journal
from attnsurgery.search.result.record import Record, trained
from attnsurgery.search.storage.load import copy_study
from attnsurgery.search.storage.repair import repair
from attnsurgery.search.storage.schema import FACT, STUDY, TRIALS, records_of, trials_of
from attnsurgery.search.workers.pool import ESSENTIAL, RESUME_HINT

ROOT = Path(__file__).resolve().parents[2]


def command(output: Path, trials: int) -> list[str]:
    arguments = (
        "search --budget-ms 100 --latency fixed --evaluator dummy --space se --sampler random --finalists 1 --workers 2"
    )
    arguments += (
        f" --input-size 32 --base-epochs 1 --epochs 1 --confirm-seeds 1 --patience-minutes 0.2 --trials {trials}"
        " --lr 1e-3 --block-lr-scale 10"
    )
    return [sys.executable, "-m", "attnsurgery", *arguments.split(), "--output", str(output)]


def environment(injected_faults: Path, training_s: float) -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "tests" / "plugins"), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {
        "PYTHONPATH": os.pathsep.join(paths),
        "DUMMY_FAULTS": str(injected_faults),
        "DUMMY_SECONDS": str(training_s),
    }
    return {**os.environ, "OMP_NUM_THREADS": "1", **variables}


def workers_of(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def kill_repeatedly(output: Path, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Kill the search as often as requested, then let it finish; returns the counts."""
    injected_faults, rng = scratch / "injected_faults", random.Random(options.seed)
    injected_faults.mkdir()
    planned = ["memory"] * options.memory + ["hang"] * options.hangs
    rng.shuffle(planned)
    kills: Counter[str] = Counter()
    earlier_records: dict[int, Record] = {}
    unreadable = runs = error_ends = 0
    trials, code = options.trials, 1
    with (scratch / "log").open("w") as log:
        while code != 0 or kills.total() < options.kills:
            trials += options.trials if code == 0 else 0
            run = subprocess.Popen(
                command(output, trials), env=environment(injected_faults, options.training), stdout=log, stderr=log
            )
            runs += 1
            while run.poll() is None and kills.total() < options.kills:
                until = time.monotonic() + rng.uniform(0.0, options.every)
                while run.poll() is None and time.monotonic() < until:
                    if has_trials(output):  # an earlier fault would hit the base's training
                        planned = inject(injected_faults, planned)
                    time.sleep(0.1)
                workers = workers_of(run.pid)
                victim = "worker" if workers and rng.random() < 0.5 else "coordinator"
                if run.poll() is not None:
                    break
                os.kill(rng.choice(workers) if victim == "worker" else run.pid, signal.SIGKILL)
                kills[victim] += 1
                if victim == "coordinator":
                    run.wait()
                journal_records, readable = snapshot(output, scratch)
                unreadable += not readable
                earlier_records |= journal_records
                trained_count = len(trained(earlier_records.values()))
                print(f"kill {kills.total()} of {options.kills}: {victim}, {trained_count} trained", flush=True)
            code = run.wait()
            if code in (0, -signal.SIGKILL):
                continue
            error_ends += 1  # one job failed too often; the user would repeat the command
            used = 0 if planned else options.memory + options.hangs - len(list(injected_faults.iterdir()))
            faults = kills.total() + used
            log_text = (scratch / "log").read_text()
            if RESUME_HINT not in log_text[-200:] or faults < error_ends * ESSENTIAL:
                raise SystemExit(f"the search ended with {code}: {log_text[-2000:]}")
    final = with_study(output, records_and_open)
    records = final["records"]
    lost_numbers = [
        number
        for number, record in earlier_records.items()
        if without_rungs(records.get(number)) != without_rungs(record)
    ]
    digests = Counter(record.digest for record in trained(records.values()))
    return {
        "runs": runs,
        "ended_by_an_error": error_ends,
        "kills": dict(kills),
        "out_of_memory": options.memory,
        "hung": options.hangs,
        "faults_left": len(list(injected_faults.iterdir())),
        "finished_trials_lost": len(lost_numbers),
        "trained_twice": sum(count > 1 for count in digests.values()),
        "left_running": final["open"],
        "studies_unreadable": unreadable,
        "workers_left": len(workers_left(output)),
        "trained": len(trained(records.values())),
        "asked_for": trials,
        "failed": sum(record.state == "failed" for record in records.values()),
        "begun_again": sum(record.attempts > 1 for record in records.values()),
    }


def inject(folder: Path, planned: list[str]) -> list[str]:
    """Inject the planned faults, for dummy trainings to take; returns those that remain planned: none."""
    for index, kind in enumerate(planned):
        (folder / f"{kind}-{index:03}").touch()
    return []


def has_trials(output: Path) -> bool:
    return (output / STUDY).exists() and bool(trials_of(Journal(output / TRIALS).read()))


def without_rungs(record: Record | None) -> dict[str, Any] | None:
    return record and {**record.as_dict(), "promotions": (), "halted": None}


def snapshot(output: Path, scratch: Path) -> tuple[dict[int, Record], bool]:
    """The trials in the journal at this moment, and whether the study can be read as `attnsurgery report` does."""
    if not (output / STUDY).exists():
        return {}, True
    records = trials_of(Journal(output / TRIALS).read())
    copy = scratch / "copy"
    copy.mkdir(exist_ok=True)
    (copy / STUDY).unlink(missing_ok=True)
    try:
        copy_study(output / STUDY, copy / STUDY)
        with_study(copy, lambda study: study.get_trials(deepcopy=False))
    except Exception as error:
        print(f"unreadable: {error}", flush=True)
        return records, False
    return records, True


def with_study(folder: Path, action: Any) -> Any:
    storage = optuna.storages.RDBStorage(f"sqlite:///{folder / STUDY}")
    try:
        names = optuna.get_all_study_names(storage)
        return action(optuna.load_study(study_name=names[0], storage=storage)) if names else None
    finally:
        storage.remove_session()
        storage.engine.dispose()


def records_and_open(study: optuna.Study) -> dict[str, Any]:
    unfinished = [trial.number for trial in study.get_trials(deepcopy=False) if not trial.state.is_finished()]
    return {"records": {record.number: record for record in records_of(study)}, "open": len(unfinished)}


def workers_left(output: Path) -> list[int]:
    """Processes of this run directory that still exist after their search."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/fd/2"):
        try:
            if os.readlink(path).startswith(f"{output}/worker-"):
                pids.append(int(path.parts[2]))
        except OSError:
            continue
    return pids


def cut_journal(output: Path, scratch: Path) -> dict[str, int]:
    """Truncate the journal at every byte of the line of its last trial; returns the counts of errors."""
    lines = (output / TRIALS).read_bytes().splitlines(keepends=True)
    last = max(index for index, line in enumerate(lines) if FACT not in json.loads(line))
    complete, line_start = b"".join(lines[: last + 1]), len(b"".join(lines[:last]))
    entries = [json.loads(line) for line in lines[: last + 1]]
    misread, not_rebuilt = 0, 0
    for length in range(line_start, len(complete)):
        journal = Journal(scratch / "torn.jsonl")
        journal.path.write_bytes(complete[:length])
        misread += journal.read() != entries[:-1]
        journal.append(entries[-1])
        misread += journal.read() != entries
    step = max(1, (len(complete) - line_start) // 5)
    for number, length in enumerate(range(line_start, len(complete), step)):
        folder = scratch / f"torn-{number}"
        folder.mkdir()
        (folder / TRIALS).write_bytes(complete[:length])
        repair(folder)
        lacks_only_its_end = length == len(complete) - 1  # complete but for the line break, which suffices for a repair
        not_rebuilt += with_study(folder, records_and_open)["records"] != trials_of(
            entries if lacks_only_its_end else entries[:-1]
        )
    return {"bytes": len(complete) - line_start, "not_read": misread, "studies_not_made": not_rebuilt}


def fill_disk(scratch: Path) -> dict[str, Any]:
    """Run a search on a full disk, then with free space; returns the counts."""
    small, output = scratch / "small", scratch / "small" / "run"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        return {"skipped": "no right to mount a tmpfs"}
    try:
        (scratch / "none").mkdir()
        variables = environment(scratch / "none", 0.0)
        ballast = small / "ballast"
        first = subprocess.run(command(output, 2), env=variables, capture_output=True, text=True)
        room = shutil.disk_usage(small).free
        ballast.write_bytes(b"\0" * max(0, room - 24 * 1024))
        second = subprocess.run(command(output, 30), env=variables, capture_output=True, text=True)
        earlier = with_study(output, records_and_open)["records"]
        ballast.unlink()
        third = subprocess.run(command(output, 30), env=variables, capture_output=True, text=True)
        final = with_study(output, records_and_open)
        lost_numbers = [number for number, record in earlier.items() if final["records"].get(number) != record]
        return {
            "exit_codes": [first.returncode, second.returncode, third.returncode],
            "said": (second.stderr.strip().splitlines() or [""])[-1].replace(str(scratch), "DIR"),
            "kept": len(earlier),
            "lost": len(lost_numbers),
            "trained": len(trained(final["records"].values())),
        }
    finally:
        subprocess.run(["umount", str(small)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--memory", type=int, default=20, help="trainings that run out of memory")
    parser.add_argument("--hangs", type=int, default=5, help="trainings that hang")
    parser.add_argument(
        "--trials", type=int, default=60, help="in the first run, and in addition whenever a run finishes"
    )
    parser.add_argument("--training", type=float, default=4.0, help="seconds of one training")
    parser.add_argument("--every", type=float, default=30.0, help="maximum seconds between kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file of the figures, instead of docs/benchmarks")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="attnsurgery-crash-") as folder:
        scratch = Path(folder).resolve()
        os.environ["ATTNSURGERY_CACHE"] = str(scratch / "cache")
        output = scratch / "run"
        figures = {
            "killed": kill_repeatedly(output, options, scratch),
            "torn": cut_journal(output, scratch),
            "full_disk": fill_disk(scratch),
        }
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))
    else:
        print(f"written {write('crash', {'figures': figures})}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
