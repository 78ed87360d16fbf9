"""Every architecture of timm with every family of blocks, through the checks of coverage_checks.py.

    scripts/coverage --shard 1/2 & scripts/coverage --shard 2/2   everything; hours. What is done is not done again
    scripts/coverage --only 'resnet*' --block se                  some of it
    scripts/coverage --again failed                               what failed, once more
    scripts/coverage --failures                                   what did not pass: family, name, block, check, reason
    scripts/coverage --wrap --small                               in nn.Sequential and a LightningModule, against bare
    scripts/coverage --report                                     docs/coverage.md and docs/benchmarks/coverage.json

Results go to runs/coverage/, with --wrap to runs/coverage-wrap/, line by line, one for each architecture and block, as
they come. Checks run in a process of their own: one that is killed, for memory say, costs a mark on the pair it was at.
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
from scripts.coverage_checks import SUFFIXES, examine, in_words
from scripts.coverage_hosts import KINDS, SMALLEST, BaseError, architectures, find_base, surveyed_once

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "runs" / "coverage"
WRAPPED = ROOT / "runs" / "coverage-wrap"
PER_PROCESS = 60
"""Architectures that one process sees before the next takes over: what a library holds on to is given back then."""

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
    todo = wanted(options, families)
    print(f"{len(todo)} architectures to do", flush=True)
    deadline = time.monotonic() + options.limit_seconds
    while todo and time.monotonic() < deadline:
        todo = _in_a_process(options, families, todo[:PER_PROCESS], deadline) + todo[PER_PROCESS:]
    return 0 if not todo else 3


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
    parser.add_argument("--again", choices=("failed", "refused", "all"), help="make these once more")
    parser.add_argument("--limit-seconds", type=float, default=float("inf"), help="begin no architecture after that")
    parser.add_argument("--pair-seconds", type=float, default=600, help="a pair that takes longer has failed")
    parser.add_argument(
        "--memory-gb", type=float, default=None, help="of one process; larger models go on meta tensors"
    )
    parser.add_argument("--wrap", action="store_true", help="models in a larger whole, against the model itself")
    parser.add_argument("--results", type=Path, default=None, metavar="DIR", help="where the lines are kept")
    parser.add_argument("--report", action="store_true", help="write the table from what is there")
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
            except json.JSONDecodeError:  # a line that a kill has cut
                continue
            pair = row["arch"], row["block"]
            if pair not in rows or rows[pair]["time"] <= row["time"]:
                rows[pair] = row
    return rows


def wanted(options: argparse.Namespace, families: dict[str, str]) -> list[tuple[str, tuple[str, ...]]]:
    """The architectures of this shard with the blocks that are to be done in them."""
    names = [
        arch
        for arch, family in families.items()
        if any(fnmatch.fnmatchcase(arch, only) for only in options.only) and options.family in (None, family)
    ]
    if options.small:
        names = [arch for arch in names if arch in SMALLEST]
    # neighbours are alike and large ones stand together: mixed, every part and every stretch takes about as long
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).tolist()
    names = [names[index] for index in order][: options.sample]
    done = latest(options.results)
    again = {None: (), "all": ("passed", "refused", "failed")}.get(options.again, (options.again,))
    blocks = (options.block,) if options.block else SUFFIXES
    todo = []
    for arch in names[options.part - 1 :: options.parts]:
        rest = tuple(b for b in blocks if (arch, b) not in done or done[arch, b]["outcome"] in again)
        if options.again in ("failed", "refused"):
            rest = tuple(b for b in rest if (arch, b) in done)
        if rest:
            todo.append((arch, rest))
    return todo


def _in_a_process(
    options: argparse.Namespace, families: dict[str, str], todo: list[tuple[str, tuple[str, ...]]], deadline: float
) -> list[tuple[str, tuple[str, ...]]]:
    """Do some, in a process of their own; gives back what was not begun. One that it dies at is marked as failed."""
    options.results.mkdir(parents=True, exist_ok=True)
    file = options.results / f"{options.part}-of-{options.parts}.jsonl"
    context = multiprocessing.get_context("spawn")
    settings = {
        "seconds": max(0.0, deadline - time.monotonic()),
        "max_bytes": options.memory_gb * 1e9,
        "pair_seconds": options.pair_seconds,
        "wrap": options.wrap,
    }
    began = _lines(file)
    process = context.Process(target=work, args=(file, families, todo, settings))
    process.start()
    seen, since = _lines(file), time.monotonic()
    while process.is_alive():
        process.join(5)
        now = _lines(file)
        if now != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > 3 * options.pair_seconds:
            process.kill()  # stuck where no signal reaches
    done = [(row["arch"], row["block"]) for row in _rows_after(file, began)]
    rest = [(arch, left) for arch, blocks in todo if (left := tuple(b for b in blocks if (arch, b) not in done))]
    if process.exitcode and rest:
        (arch, blocks), *others = rest
        row = {"outcome": "failed", "blocks": 0, "checks": {"process": f"died of exit code {process.exitcode}"}}
        append(file, {"arch": arch, "family": families[arch], "block": blocks[0], **row, "seconds": 0})
        rest = [(arch, blocks[1:]), *others] if blocks[1:] else others
    return rest


def work(file: Path, families: dict[str, str], todo: list[tuple[str, tuple[str, ...]]], settings: Row) -> None:
    """What the process does: architecture by architecture, the base once for all blocks."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    began, seconds = time.monotonic(), settings.pop("seconds")
    examined = coverage_wrap.rows_of if settings.pop("wrap", False) else rows_of
    for arch, blocks in todo:
        if time.monotonic() - began > seconds:
            return
        for row in examined(arch, blocks, **settings):
            append(file, {"arch": arch, "family": families[arch], **row})
            said = "" if row["outcome"] == "passed" else " ".join(_complaints(row))[:150]
            print(f"{arch} {row['block']} {row['outcome']} {row['seconds']} s {said}", flush=True)
        gc.collect()


def rows_of(arch: str, blocks: Iterable[str], max_bytes: float, pair_seconds: float = 600) -> Iterator[Row]:
    """The result of each block in turn. Feature classes other than the default are tried in one of each family."""
    began = time.process_time()
    try:
        base = find_base(arch, max_bytes, KINDS if arch in SMALLEST else ())
    except BaseError as error:
        for block in blocks:
            yield {
                "block": block,
                "outcome": "failed",
                "blocks": 0,
                "checks": {"base": in_words(error)},
                "seconds": 0,
                "cpu_seconds": 0,
            }
        return
    spent = time.process_time() - began
    with surveyed_once():
        for block in blocks:
            yield examine(base, block, pair_seconds) | {"base_cpu_seconds": round(spent, 2)}
            spent = 0.0


def append(file: Path, row: Row) -> None:
    """One line, written at once, with when and of what."""
    line = json.dumps({**row, "versions": versions(), "time": datetime.now(UTC).isoformat(timespec="milliseconds")})
    with file.open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")


def versions(_known: dict[str, str] = {}) -> dict[str, str]:  # noqa: B006 (asked for once)
    if not _known:
        asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*", "--abbrev=10"]
        said = subprocess.run(asked, capture_output=True, text=True)
        _known.update(timm=timm.__version__, torch=torch.__version__, attnsurgery=said.stdout.strip() or "unknown")
    return _known


def _complaints(row: Row) -> list[str]:
    return [f"{check}: {said}" for check, said in row["checks"].items() if said != "passed"]


def _lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def _rows_after(file: Path, count: int) -> list[Row]:
    lines = file.read_text(encoding="utf-8").splitlines()[count:] if file.exists() else []
    return [json.loads(line) for line in lines]


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
