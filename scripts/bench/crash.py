#!/usr/bin/env python
"""What a search loses when it is killed, again and again: nothing that was finished.

    python scripts/bench/crash.py [--kills 100] [--memory 20] [--hangs 5]

One search by two workers, whose candidates get a made-up score after a dummy training (tests/plugins), is begun by its
command and
begun again whenever it ends, for more trials as long as there are kills left. At random moments its coordinator or one
of its workers gets SIGKILL; some trainings are out of memory, some hang. After every kill the run directory is read.
A piece of work of the confirmation that died too often in one run ends that run with an error that says how to go on;
such ends are counted, and are an error of this script unless so many kills and injected faults had come before.
Then:

* every trial that was ever in the journal is there in the end, as it was; none was trained twice; none is left running
  or waiting; every study could be read; as many are trained as were asked for;
* the journal, cut off at every byte of its last line, reads and goes on, and makes a whole study without the old one;
* on a disk that is full the search ends with a clear error, what was there is kept, and with room it goes on.

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
    words = (
        "search --budget-ms 100 --latency fixed --evaluator dummy --space se --sampler random --finalists 1 --workers 2"
    )
    words += f" --input-size 32 --base-epochs 1 --epochs 1 --confirm-seeds 1 --patience-minutes 0.2 --trials {trials}"
    return [sys.executable, "-m", "attnsurgery", *words.split(), "--output", str(output)]


def environment(injected_faults: Path, training_s: float) -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "tests" / "plugins"), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"PYTHONPATH": os.pathsep.join(paths), "DUMMY_FAULTS": str(injected_faults), "DUMMY_SECONDS": str(training_s)}
    return {**os.environ, "OMP_NUM_THREADS": "1", **own}


def workers_of(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def killed(output: Path, asked: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """The search, killed as often as asked, then let to its end."""
    injected_faults, rng = scratch / "injected_faults", random.Random(asked.seed)
    injected_faults.mkdir()
    planned = ["memory"] * asked.memory + ["hang"] * asked.hangs
    rng.shuffle(planned)
    kills: Counter[str] = Counter()
    seen: dict[int, Record] = {}
    unreadable = runs = given_up = 0
    trials, code = asked.trials, 1
    with (scratch / "log").open("w") as log:
        while code != 0 or kills.total() < asked.kills:
            trials += asked.trials if code == 0 else 0
            run = subprocess.Popen(
                command(output, trials), env=environment(injected_faults, asked.training), stdout=log, stderr=log
            )
            runs += 1
            while run.poll() is None and kills.total() < asked.kills:
                until = time.monotonic() + rng.uniform(0.0, asked.every)
                while run.poll() is None and time.monotonic() < until:
                    if planned and has_trials(output):  # before that, an injected fault would be the base's
                        for index, kind in enumerate(planned):
                            (injected_faults / f"{kind}-{index:03}").touch()
                        planned = []
                    time.sleep(0.1)
                workers = workers_of(run.pid)
                worker = bool(workers) and rng.random() < 0.5
                if run.poll() is not None:
                    break
                os.kill(rng.choice(workers) if worker else run.pid, signal.SIGKILL)
                kills["worker" if worker else "coordinator"] += 1
                if not worker:
                    run.wait()
                written, readable = snapshot(output, scratch)
                unreadable += not readable
                seen |= written
                done = len(trained(seen.values()))
                print(f"kill {kills.total()} of {asked.kills}: {'worker' if worker else 'coordinator'}, {done} trained")
                sys.stdout.flush()
            code = run.wait()
            if code in (0, -signal.SIGKILL):
                continue
            given_up += 1  # one piece of work has had all the bad luck; the user begins the command again
            suffered = kills.total() + (
                0 if planned else asked.memory + asked.hangs - len(list(injected_faults.iterdir()))
            )
            said = (scratch / "log").read_text()
            if RESUME_HINT not in said[-200:] or suffered < given_up * ESSENTIAL:
                raise SystemExit(f"the search ended with {code}: {said[-2000:]}")
    found = with_study(output, of_study)
    records = found["records"]
    lost = [number for number, record in seen.items() if without_rungs(records.get(number)) != without_rungs(record)]
    digests = Counter(record.digest for record in trained(records.values()))
    return {
        "runs": runs,
        "ended_by_an_error": given_up,
        "kills": dict(kills),
        "out_of_memory": asked.memory,
        "hung": asked.hangs,
        "faults_left": len(list(injected_faults.iterdir())),
        "finished_trials_lost": len(lost),
        "trained_twice": sum(count > 1 for count in digests.values()),
        "left_running": found["open"],
        "studies_unreadable": unreadable,
        "workers_left": len(workers_left(output)),
        "trained": len(trained(records.values())),
        "asked_for": trials,
        "failed": sum(record.state == "failed" for record in records.values()),
        "begun_again": sum(record.attempts > 1 for record in records.values()),
    }


def has_trials(output: Path) -> bool:
    return (output / STUDY).exists() and bool(trials_of(Journal(output / TRIALS).read()))


def without_rungs(record: Record | None) -> dict[str, Any] | None:
    return record and {**record.as_dict(), "promotions": (), "halted": None}


def snapshot(output: Path, scratch: Path) -> tuple[dict[int, Record], bool]:
    """The trials in the journal of this moment, and whether the study can be read as `attnsurgery report` does."""
    if not (output / STUDY).exists():
        return {}, True
    written = trials_of(Journal(output / TRIALS).read())
    copy = scratch / "copy"
    copy.mkdir(exist_ok=True)
    (copy / STUDY).unlink(missing_ok=True)
    try:
        copy_study(output / STUDY, copy / STUDY)
        with_study(copy, lambda study: study.get_trials(deepcopy=False))
    except Exception as error:
        print(f"unreadable: {error}", flush=True)
        return written, False
    return written, True


def with_study(folder: Path, what: Any) -> Any:
    storage = optuna.storages.RDBStorage(f"sqlite:///{folder / STUDY}")
    try:
        names = optuna.get_all_study_names(storage)
        return what(optuna.load_study(study_name=names[0], storage=storage)) if names else None
    finally:
        storage.remove_session()
        storage.engine.dispose()


def of_study(study: optuna.Study) -> dict[str, Any]:
    open_ones = [trial.number for trial in study.get_trials(deepcopy=False) if not trial.state.is_finished()]
    return {"records": {record.number: record for record in records_of(study)}, "open": len(open_ones)}


def workers_left(output: Path) -> list[int]:
    """Processes of this run directory that outlived their search."""
    found = []
    for path in Path("/proc").glob("[0-9]*/fd/2"):
        try:
            if os.readlink(path).startswith(f"{output}/worker-"):
                found.append(int(path.parts[2]))
        except OSError:
            continue
    return found


def torn(output: Path, scratch: Path) -> dict[str, int]:
    """Cut the journal off at every byte of the line of its last trial."""
    lines = (output / TRIALS).read_bytes().splitlines(keepends=True)
    last = max(index for index, line in enumerate(lines) if FACT not in json.loads(line))
    whole, begin = b"".join(lines[: last + 1]), len(b"".join(lines[:last]))
    before = [json.loads(line) for line in lines[: last + 1]]
    unread, unmade = 0, 0
    for cut in range(begin, len(whole)):
        journal = Journal(scratch / "torn.jsonl")
        journal.path.write_bytes(whole[:cut])
        unread += journal.read() != before[:-1]
        journal.append(before[-1])
        unread += journal.read() != before
    every = max(1, (len(whole) - begin) // 5)
    for number, cut in enumerate(range(begin, len(whole), every)):
        folder = scratch / f"torn-{number}"
        folder.mkdir()
        (folder / TRIALS).write_bytes(whole[:cut])
        repair(folder)
        lacks_only_its_end = cut == len(whole) - 1  # and is as good as whole to a repair
        unmade += with_study(folder, of_study)["records"] != trials_of(before if lacks_only_its_end else before[:-1])
    return {"bytes": len(whole) - begin, "not_read": unread, "studies_not_made": unmade}


def full(scratch: Path) -> dict[str, Any]:
    """A search on a disk that fills up, then with room."""
    small, output = scratch / "small", scratch / "small" / "run"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        return {"skipped": "no right to mount a tmpfs"}
    try:
        (scratch / "none").mkdir()
        given = environment(scratch / "none", 0.0)
        ballast = small / "ballast"
        first = subprocess.run(command(output, 2), env=given, capture_output=True, text=True)
        room = shutil.disk_usage(small).free
        ballast.write_bytes(b"\0" * max(0, room - 24 * 1024))
        second = subprocess.run(command(output, 30), env=given, capture_output=True, text=True)
        kept = with_study(output, of_study)["records"]
        ballast.unlink()
        third = subprocess.run(command(output, 30), env=given, capture_output=True, text=True)
        after = with_study(output, of_study)
        lost = [number for number, record in kept.items() if after["records"].get(number) != record]
        return {
            "exit_codes": [first.returncode, second.returncode, third.returncode],
            "said": (second.stderr.strip().splitlines() or [""])[-1].replace(str(scratch), "DIR"),
            "kept": len(kept),
            "lost": len(lost),
            "trained": len(trained(after["records"].values())),
        }
    finally:
        subprocess.run(["umount", str(small)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--memory", type=int, default=20, help="trainings that run out of memory")
    parser.add_argument("--hangs", type=int, default=5, help="trainings that hang")
    parser.add_argument("--trials", type=int, default=60, help="at first, and more each time they are done too soon")
    parser.add_argument("--training", type=float, default=4.0, help="seconds of one training")
    parser.add_argument("--every", type=float, default=30.0, help="seconds from one kill to the next, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures there, and not to docs/benchmarks")
    asked = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="attnsurgery-crash-") as folder:
        scratch = Path(folder).resolve()
        os.environ["ATTNSURGERY_CACHE"] = str(scratch / "cache")
        output = scratch / "run"
        figures = {"killed": killed(output, asked, scratch), "torn": torn(output, scratch), "full_disk": full(scratch)}
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=2))
    else:
        print(f"written {write('crash', {'figures': figures})}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
