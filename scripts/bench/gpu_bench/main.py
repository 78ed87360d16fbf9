"""Every check and benchmark that needs a GPU, in steps, for a card that is at hand for minutes.

    scripts/bench/gpu --list                            what there is, and about how long it takes
    scripts/bench/gpu --minutes 9 --out DIR --call 1    the steps of the first call of nine minutes
    scripts/bench/gpu --minutes 9 --out DIR --only meter latency
    scripts/bench/gpu --wheels DIR                      fetch what a bare image for PyTorch does not have; no GPU needed
    scripts/bench/gpu --keep DIR                        take the rows of DIR over into docs/benchmarks/
    scripts/bench/gpu --table docs/benchmarks           the tables of README, made of the rows that are kept

DIR gets rows-<card>.jsonl, a line for every figure the moment it is there, log.txt and summary.json. The same call goes
on where it was stopped: what is there is not made again, unless it was red. Exits with 1 if anything was red or ran out
of time. The project need not be installed; without that, run it with the Python that has torch:

    python3 -m pip install --no-index --no-deps --target SITE WHEELS/*.whl
    PYTHONPATH=SITE python3 scripts/bench/gpu --minutes 9 --out DIR
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from gpu_bench import plan, table
from gpu_bench.rows import append, read, short
from gpu_bench.runner import ROOT, Runner

_RESERVE_MINUTES = 0.15
"""Left over at the end, for whatever the machine does with the results."""
_PROBE = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '', flush=True)"
BENCHMARKS = ROOT / "docs" / "benchmarks"


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench/gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="in all; a step that no time is left for is skipped")
    parser.add_argument("--out", type=Path, help="folder of rows, log and summary")
    parser.add_argument("--call", type=int, choices=(1, 2, 3), help="only the steps of this call; by default all")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=sorted(plan.NAMES), help="only these steps")
    parser.add_argument("--list", action="store_true", help="show the steps")
    parser.add_argument("--tiny", action="store_true", help="smallest models and efforts, to see that it runs")
    for name, what in (("wheels", "fetch"), ("keep", "keep"), ("table", "print")):
        parser.add_argument(f"--{name}", type=Path, metavar="DIR", help=f"{what} instead of running anything")
    asked = parser.parse_args()
    if not (asked.list or asked.wheels or asked.keep or asked.table or asked.out):
        parser.error("--out DIR is needed: where the rows go")
    return asked


def card_name() -> str:
    """What torch calls the card; the process that asks is gone when the first step begins.

    Raises:
        SystemExit: there is none.
    """
    told = subprocess.run([sys.executable, "-c", _PROBE], stdout=subprocess.PIPE, text=True, check=False)
    name = told.stdout.strip().rpartition("\n")[2]
    if told.returncode or not name:
        raise SystemExit("torch sees no CUDA device here, and everything in this benchmark needs one.")
    return name


def keep(folder: Path) -> None:
    """Take rows over into docs/benchmarks/: into gpu-<card>.jsonl where they are the bench's own."""
    for source in sorted(folder.glob("*-*.jsonl")):
        kind, _, card = source.stem.partition("-")
        if kind != "rows":
            (BENCHMARKS / source.name).write_bytes(source.read_bytes())
            print(f"copied {BENCHMARKS / source.name}")
            continue
        target = BENCHMARKS / f"gpu-{card}.jsonl"
        before = {(row["step"], row["key"]): row for row in read(target)}
        new = [row for row in read(source) if before.get((row["step"], row["key"])) != row]
        merged = before | {(row["step"], row["key"]): row for row in new}
        target.write_text("")
        for row in merged.values():
            append(target, row)
        print(f"{len(new)} new rows, {len(merged)} in all: {target}")


def main() -> int:
    asked = parsed()
    steps = [step for step in plan.STEPS if asked.call in (None, step.call)]
    steps = [step for step in steps if not asked.only or step.name in asked.only]
    if asked.wheels:
        from gpu_bench.wheels import fetch

        fetch(asked.wheels.resolve())
    elif asked.keep:
        keep(asked.keep)
    elif asked.table:
        print(table.of(asked.table))
    elif asked.list:
        for step in steps:
            print(f"{step.call}  {step.name:16} at most {step.limit_s:3.0f} s   {step.what}")
    else:
        card = card_name()
        print(f"{card}; {asked.minutes:g} minutes; rows go to {asked.out / f'rows-{short(card)}.jsonl'}", flush=True)
        runner = Runner(asked.out.resolve(), short(card), asked.minutes - _RESERVE_MINUTES, asked.tiny)
        return runner.run(steps)
    return 0
