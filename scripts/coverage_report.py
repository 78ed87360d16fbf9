"""Reports of the coverage run: docs/coverage.md, and the list of failures."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from scripts.coverage_checks import CHECKS, SUFFIXES

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "coverage.md"
FIGURES = ROOT / "docs" / "benchmarks" / "coverage.json"

Row = dict[str, Any]

HEAD = """# Coverage: every timm architecture, every family of blocks

Written by `scripts/coverage --report` from a run of `scripts/coverage{shards}` that ended on {date}: timm {timm}, torch
{torch}, attnsurgery {attnsurgery}. {hours:.1f} hours of processor time, from first to last line {wall:.1f} hours.

For each architecture and each block, the model `<architecture>_<block>` (all stages) goes through these checks, with
the smallest images that the architecture supports, in eval mode, with random nonzero weights. Feature classes other
than that of `features_only=True` are tried in a small architecture of each family.

{checks}

*real* models have values. *meta* models have none: {copies} copies of their weights did not fit into the memory of a
process. Of these, blocks, keys, shapes, gradients and structure are checked, and no values. *refused* is an error that
says rightly why there can be no such model; it is not counted as passed.

| block | passed, real | passed, meta | refused | failed | not run | of |
|---|---:|---:|---:|---:|---:|---:|
"""


def failures(rows: Iterable[Row]) -> Iterator[str]:
    """One line for each check that did not pass."""
    for row in sorted(rows, key=lambda row: (row["family"], row["arch"], row["block"])):
        for check, result in row["checks"].items():
            if result != "passed":
                mark = "refused" if row["outcome"] == "refused" else "FAILED"
                yield f"{row['family']} {row['arch']} {row['block']} {check} {mark} {result}"


def write(rows: dict[tuple[str, str], Row], families: dict[str, str]) -> str:
    """Write docs/coverage.md and docs/benchmarks/coverage.json; returns a summary."""
    rows = {pair: row for pair, row in rows.items() if pair[0] in families}
    TABLE.write_text(in_markdown(rows, families), encoding="utf-8")
    FIGURES.write_text(in_json(rows, families), encoding="utf-8")
    counts = Counter(row["outcome"] for row in rows.values())
    total = len(families) * len(SUFFIXES)
    return (
        f"{TABLE}: of {total} pairs {counts['passed']} passed, {counts['refused']} refused, {counts['failed']} failed."
    )


def in_markdown(rows: dict[tuple[str, str], Row], families: dict[str, str]) -> str:
    from scripts.coverage_hosts import COPIES

    times = sorted(row["time"] for row in rows.values())
    ends = [datetime.fromisoformat(time) for time in (times[0], times[-1])]
    versions = {
        package: ", ".join(sorted({row["versions"][package] for row in rows.values()}))
        for package in ("timm", "torch", "attnsurgery")
    }
    head = HEAD.format(
        shards=" --shard K/2",
        date=ends[1].date().isoformat(),
        hours=sum(row.get("cpu_seconds", 0) + row.get("base_cpu_seconds", 0) for row in rows.values()) / 3600,
        wall=(ends[1] - ends[0]).total_seconds() / 3600,
        checks="\n".join(f"* **{name}** {check.__doc__}" for name, check in CHECKS.items()),
        copies=COPIES,
        **versions,
    )
    parts = [head, *_totals(rows, len(families)), "\n## Families\n\n", *_by_family(rows, families)]
    for outcome, title in (("refused", "Refusals"), ("failed", "Failures")):
        parts += [f"\n## {title}\n\n", *_by_reason(row for row in rows.values() if row["outcome"] == outcome)]
    return "".join(parts)


def _totals(rows: dict[tuple[str, str], Row], architectures: int) -> Iterator[str]:
    for suffix in SUFFIXES:
        block_rows = [row for (_, block), row in rows.items() if block == suffix]
        counts = Counter((row["outcome"], row.get("tensors")) for row in block_rows)
        by_outcome = Counter(row["outcome"] for row in block_rows)
        cells = (
            counts["passed", "real"],
            counts["passed", "meta"],
            by_outcome["refused"],
            by_outcome["failed"],
            architectures - len(block_rows),
            architectures,
        )
        yield f"| {suffix} | {' | '.join(f'{cell:,}' for cell in cells)} |\n"


def _by_family(rows: dict[tuple[str, str], Row], families: dict[str, str]) -> Iterator[str]:
    members: dict[str, list[str]] = defaultdict(list)
    for arch, family in families.items():
        members[family].append(arch)
    yield f"Passed of all architectures of the family.\n\n| family | {' | '.join(SUFFIXES)} | real | meta |\n"
    yield f"|---|{'---:|' * (len(SUFFIXES) + 2)}\n"
    for family, archs in sorted(members.items()):
        cells = [f"{_passed(rows, archs, suffix)}/{len(archs)}" for suffix in SUFFIXES]
        kinds = Counter(_kind(rows, arch) for arch in archs)
        yield f"| {family} | {' | '.join(cells)} | {kinds['real']} | {kinds['meta']} |\n"


def _passed(rows: dict[tuple[str, str], Row], archs: Collection[str], suffix: str) -> int:
    return sum(rows.get((arch, suffix), {}).get("outcome") == "passed" for arch in archs)


def _kind(rows: dict[tuple[str, str], Row], arch: str) -> str | None:
    return next((rows[arch, suffix].get("tensors") for suffix in SUFFIXES if (arch, suffix) in rows), None)


def _by_reason(rows: Iterable[Row]) -> Iterator[str]:
    """Reasons without names and numbers of single models, each with the pairs that have it."""
    groups: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    examples: dict[str, str] = {}
    for row in sorted(rows, key=lambda row: (row["arch"], row["block"])):
        for check, result in row["checks"].items():
            if result == "passed":
                continue
            general = re.sub(r"'[^']*'|\b[\w.]*\d[\w.]*\b", "…", f"{check}: {result}".replace(row["arch"], "…"))
            groups[general][row["block"]].append(row["arch"])
            examples.setdefault(general, f"{check}: {result}")
    if not groups:
        yield "None.\n"
    for general, by_block in sorted(groups.items(), key=lambda item: -sum(map(len, item[1].values()))):
        yield f"* {sum(map(len, by_block.values()))}: `{examples[general].replace('`', chr(39))}`\n"
        for block, archs in sorted(by_block.items()):
            yield f"  * {block}, {len(archs)}: {', '.join(archs)}\n"


def in_json(rows: dict[tuple[str, str], Row], families: dict[str, str]) -> str:
    """One line for each architecture: size of images, real or meta, and by block the outcome and number of blocks."""
    lines = []
    for arch, family in families.items():
        arch_rows = {suffix: rows[arch, suffix] for suffix in SUFFIXES if (arch, suffix) in rows}
        if not arch_rows:
            continue
        first = next(iter(arch_rows.values()))
        record = {
            "family": family,
            "tensors": first.get("tensors"),
            "size": first.get("size"),
            "parameters": first.get("parameters"),
            **{suffix: [row["outcome"], row["blocks"]] for suffix, row in arch_rows.items()},
        }
        lines.append(f"{json.dumps(arch)}: {json.dumps(record)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"
