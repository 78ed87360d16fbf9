"""Every check and benchmark that needs a GPU, in steps, for a card that is available for minutes.

    scripts/bench/gpu --list                            the steps, and their time limits
    scripts/bench/gpu --minutes 9 --out DIR --call 1    the steps of the first call of nine minutes
    scripts/bench/gpu --minutes 9 --out DIR --only meter latency
    scripts/bench/gpu --wheels DIR                      download packages that a PyTorch image lacks; needs no GPU
    scripts/bench/gpu --keep DIR                        merge the rows of DIR into docs/benchmarks/
    scripts/bench/gpu --table docs/benchmarks           the tables of README, from these rows

DIR gets rows-<card>.jsonl, a line for every figure as it is measured, log.txt and summary.json. The same call resumes:
existing rows are not made again, unless they were red. Exits with 1 if anything was red or ran out of time. The project
need not be installed; without that, run it with the Python that has torch:

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
"""Time that remains at the end for storing the results."""
_PROBE = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '', flush=True)"
BENCHMARKS = ROOT / "docs" / "benchmarks"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench/gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="in all; steps without enough time are skipped")
    parser.add_argument("--out", type=Path, help="folder of rows, log and summary")
    parser.add_argument("--call", type=int, choices=(1, 2, 3), help="only the steps of this call; by default all")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=sorted(plan.NAMES), help="only these steps")
    parser.add_argument("--list", action="store_true", help="show the steps")
    parser.add_argument("--tiny", action="store_true", help="smallest models and efforts, to check that it runs")
    for name, action in (("wheels", "fetch"), ("keep", "keep"), ("table", "print")):
        parser.add_argument(f"--{name}", type=Path, metavar="DIR", help=f"{action} instead of running anything")
    options = parser.parse_args()
    if not (options.list or options.wheels or options.keep or options.table or options.out):
        parser.error("--out DIR is needed: where the rows go")
    return options


def card_name() -> str:
    """The card's name in torch, from a process that ends before the first step begins.

    Raises:
        SystemExit: there is no card.
    """
    probe = subprocess.run([sys.executable, "-c", _PROBE], stdout=subprocess.PIPE, text=True, check=False)
    name = probe.stdout.strip().rpartition("\n")[2]
    if probe.returncode or not name:
        raise SystemExit("torch sees no CUDA device, and every step of this benchmark needs one.")
    return name


def merge_rows(folder: Path) -> None:
    """Merge rows into docs/benchmarks/: those of the steps into gpu-<card>.jsonl; other files are copied."""
    for source in sorted(folder.glob("*-*.jsonl")):
        kind, _, card = source.stem.partition("-")
        if kind != "rows":
            (BENCHMARKS / source.name).write_bytes(source.read_bytes())
            print(f"copied {BENCHMARKS / source.name}")
            continue
        target = BENCHMARKS / f"gpu-{card}.jsonl"
        existing = {(row["step"], row["key"]): row for row in read(target)}
        new = [row for row in read(source) if existing.get((row["step"], row["key"])) != row]
        merged = existing | {(row["step"], row["key"]): row for row in new}
        target.write_text("")
        for row in merged.values():
            append(target, row)
        print(f"{len(new)} new rows, {len(merged)} in all: {target}")


def main() -> int:
    options = parse_arguments()
    steps = [step for step in plan.STEPS if options.call in (None, step.call)]
    steps = [step for step in steps if not options.only or step.name in options.only]
    if options.wheels:
        from gpu_bench.wheels import fetch

        fetch(options.wheels.resolve())
    elif options.keep:
        merge_rows(options.keep)
    elif options.table:
        print(table.of(options.table))
    elif options.list:
        for step in steps:
            print(f"{step.call}  {step.name:16} at most {step.limit_s:3.0f} s   {step.description}")
    else:
        card = card_name()
        print(
            f"{card}; {options.minutes:g} minutes; rows go to {options.out / f'rows-{short(card)}.jsonl'}", flush=True
        )
        runner = Runner(options.out.resolve(), short(card), options.minutes - _RESERVE_MINUTES, options.tiny)
        return runner.run(steps)
    return 0
