"""Every architecture of timm with every family of blocks, through the checks of coverage_checks.py.

    scripts/coverage --shard 1/2 & scripts/coverage --shard 2/2   everything; hours, resumable
    scripts/coverage --only 'resnet*' --block se                  some of it
    scripts/coverage --again failed                               what failed, once more
    scripts/coverage --failures                                   what did not pass: family, name, block, check, reason
    scripts/coverage --wrap --small                               in nn.Sequential and a LightningModule
    scripts/coverage --report                                     docs/coverage.md and docs/benchmarks/coverage.json

Results go to runs/coverage/, with --wrap to runs/coverage-wrap/, one line for each architecture and block. Checks run
in child processes: if one is killed, for lack of memory for instance, the pair that it was checking has failed.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import json
import multiprocessing
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import timm
import torch

from scripts import coverage_wrap
from scripts.coverage_checks import SUFFIXES, base_failure, examine
from scripts.coverage_hosts import KINDS, SMALLEST, BaseError, architectures, cached_surveys, find_base

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "runs" / "coverage"
WRAPPED = ROOT / "runs" / "coverage-wrap"
PER_PROCESS = 60
"""Number of architectures for each process, which frees memory that libraries retain."""

Row = dict[str, Any]
Pair = tuple[str, str]


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    families = architectures()
    if options.report or options.failures:
        from scripts.coverage_report import failures, write

        rows = latest(options.results)
        if options.failures:
            print("\n".join(failures(rows.values())))
        else:
            print(write(rows, families))
        return 0
    pending = missing_pairs(options, families)
    print(f"{len(pending)} architectures to do", flush=True)
    deadline = time.monotonic() + options.limit_seconds
    while pending and time.monotonic() < deadline:
        pending = _run_in_process(options, families, pending[:PER_PROCESS], deadline) + pending[PER_PROCESS:]
    return 0 if not pending else 3


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="PATTERN", help="architectures by patterns of names"
    )
    parser.add_argument("--family", help="the architectures of one family, a file of timm.models")
    parser.add_argument("--block", choices=SUFFIXES, help="one family of blocks")
    parser.add_argument("--sample", type=int, metavar="N", help="N architectures, drawn at random by a fixed seed")
    parser.add_argument("--small", action="store_true", help="the smallest architecture of each family alone")
    parser.add_argument("--shard", default="1/1", metavar="K/N", help="the K-th of N parts, one a process")
    parser.add_argument("--again", choices=("failed", "refused", "all"), help="repeat these pairs")
    parser.add_argument(
        "--limit-seconds", type=float, default=float("inf"), help="start no architecture after this time"
    )
    parser.add_argument("--pair-seconds", type=float, default=600, help="a pair that takes longer has failed")
    parser.add_argument(
        "--memory-gb", type=float, default=None, help="of one process; larger models go on meta tensors"
    )
    parser.add_argument("--wrap", action="store_true", help="compare models in a larger module with the model itself")
    parser.add_argument("--results", type=Path, default=None, metavar="DIR", help="folder of the results")
    parser.add_argument("--report", action="store_true", help="write the table from the results")
    parser.add_argument("--failures", action="store_true", help="print what failed or was refused")
    options = parser.parse_args(arguments)
    part, _, parts = options.shard.partition("/")
    options.results = options.results or (WRAPPED if options.wrap else RESULTS)
    options.part, options.parts = int(part), int(parts or 1)
    if not 1 <= options.part <= options.parts:
        parser.error(f"--shard {options.shard}: K is 1 to N")
    if options.memory_gb is None:
        options.memory_gb = 0.7 * available_bytes() / 1e9 / options.parts
    return options


def available_bytes() -> float:
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
        if line.startswith("MemAvailable:"):
            return float(line.split()[1]) * 1024
    return 8e9


def latest(folder: Path) -> dict[Pair, Row]:
    """The last row of each pair, from every file of the folder."""
    rows: dict[Pair, Row] = {}
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # an incomplete line of a killed process
                continue
            pair = row["arch"], row["block"]
            if pair not in rows or rows[pair]["time"] <= row["time"]:
                rows[pair] = row
    return rows


def missing_pairs(options: argparse.Namespace, families: dict[str, str]) -> list[tuple[str, tuple[str, ...]]]:
    """The architectures of this shard with the blocks that are to be checked."""
    names = [
        arch
        for arch, family in families.items()
        if any(fnmatch.fnmatchcase(arch, pattern) for pattern in options.only) and options.family in (None, family)
    ]
    if options.small:
        names = [arch for arch in names if arch in SMALLEST]
    # in random order, since similar and large architectures have similar names, so that all parts take about as long
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).tolist()
    names = [names[index] for index in order][: options.sample]
    existing = latest(options.results)
    repeated = {None: (), "all": ("passed", "refused", "failed")}.get(options.again, (options.again,))
    blocks = (options.block,) if options.block else SUFFIXES
    pending = []
    for arch in names[options.part - 1 :: options.parts]:
        missing = tuple(b for b in blocks if (arch, b) not in existing or existing[arch, b]["outcome"] in repeated)
        if options.again in ("failed", "refused"):
            missing = tuple(b for b in missing if (arch, b) in existing)
        if missing:
            pending.append((arch, missing))
    return pending


def _run_in_process(
    options: argparse.Namespace, families: dict[str, str], pending: list[tuple[str, tuple[str, ...]]], deadline: float
) -> list[tuple[str, tuple[str, ...]]]:
    """Check some architectures in a child process; returns those that were not started.

    If the process dies, the pair that it was checking has failed.
    """
    options.results.mkdir(parents=True, exist_ok=True)
    file = options.results / f"{options.part}-of-{options.parts}.jsonl"
    context = multiprocessing.get_context("spawn")
    settings = {
        "seconds": max(0.0, deadline - time.monotonic()),
        "max_bytes": options.memory_gb * 1e9,
        "pair_seconds": options.pair_seconds,
        "wrap": options.wrap,
    }
    initial_lines = _lines(file)
    process = context.Process(target=work, args=(file, families, pending, settings))
    process.start()
    known_lines, last_change = _lines(file), time.monotonic()
    while process.is_alive():
        process.join(5)
        current_lines = _lines(file)
        if current_lines != known_lines:
            known_lines, last_change = current_lines, time.monotonic()
        elif time.monotonic() - last_change > 3 * options.pair_seconds:
            process.kill()  # blocked in code that no signal interrupts
    finished = [(row["arch"], row["block"]) for row in _rows_after(file, initial_lines)]
    remaining = [
        (arch, unfinished)
        for arch, blocks in pending
        if (unfinished := tuple(b for b in blocks if (arch, b) not in finished))
    ]
    if process.exitcode and remaining:
        (arch, blocks), *following = remaining
        row = {"outcome": "failed", "blocks": 0, "checks": {"process": f"died of exit code {process.exitcode}"}}
        append(file, {"arch": arch, "family": families[arch], "block": blocks[0], **row, "seconds": 0})
        remaining = [(arch, blocks[1:]), *following] if blocks[1:] else following
    return remaining


def work(file: Path, families: dict[str, str], pending: list[tuple[str, tuple[str, ...]]], settings: Row) -> None:
    """Run the checks in the child process: architecture by architecture, with one base for all blocks."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start, seconds = time.monotonic(), settings.pop("seconds")
    rows_for = coverage_wrap.rows_of if settings.pop("wrap", False) else rows_of
    for arch, blocks in pending:
        if time.monotonic() - start > seconds:
            return
        for row in rows_for(arch, blocks, **settings):
            append(file, {"arch": arch, "family": families[arch], **row})
            message = "" if row["outcome"] == "passed" else " ".join(_failed_checks(row))[:150]
            print(f"{arch} {row['block']} {row['outcome']} {row['seconds']} s {message}", flush=True)
        gc.collect()


def rows_of(arch: str, blocks: Iterable[str], max_bytes: float, pair_seconds: float = 600) -> Iterator[Row]:
    """A row for each block; feature classes other than the default are tried in one architecture of each family."""
    start = time.process_time()
    try:
        base = find_base(arch, max_bytes, KINDS if arch in SMALLEST else ())
    except BaseError as error:
        yield from ({**base_failure(block, error), "cpu_seconds": 0} for block in blocks)
        return
    base_seconds = time.process_time() - start
    with cached_surveys():
        for block in blocks:
            yield examine(base, block, pair_seconds) | {"base_cpu_seconds": round(base_seconds, 2)}
            base_seconds = 0.0


def append(file: Path, row: Row) -> None:
    """Append a row with time and versions."""
    line = json.dumps({**row, "versions": versions(), "time": datetime.now(UTC).isoformat(timespec="milliseconds")})
    with file.open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")


def versions(_known: dict[str, str] = {}) -> dict[str, str]:  # noqa: B006 (asked for once)
    if not _known:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*", "--abbrev=10"]
        result = subprocess.run(command, capture_output=True, text=True)
        _known.update(timm=timm.__version__, torch=torch.__version__, attnsurgery=result.stdout.strip() or "unknown")
    return _known


def _failed_checks(row: Row) -> list[str]:
    return [f"{check}: {result}" for check, result in row["checks"].items() if result != "passed"]


def _lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def _rows_after(file: Path, count: int) -> list[Row]:
    lines = file.read_text(encoding="utf-8").splitlines()[count:] if file.exists() else []
    return [json.loads(line) for line in lines]


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
