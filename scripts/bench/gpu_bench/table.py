"""Markdown tables for README from the rows in docs/benchmarks/; "not yet" where there are none."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from gpu_bench.rows import DONE, REFUSED, Row, read

COLUMNS = (("cudagraph", 1), ("cudagraph", 64), ("compile-cudagraph", 1), ("compile-cudagraph", 64), ("eager", 1))
BASES = ("resnet50", "convnext_tiny", "efficientnet_b0", "vit_small_patch16_224")
BLOCKS = ("se", "nonlocal_s3", "dual_s4", "resattn_s3")
NOT_YET = "not yet"
_SUMMARY = {
    "tests marked gpu": ("tests", None),
    "the meter against itself": ("meter", None),
    "targets": ("targets", None),
    "winners and their budgets": ("budget", "figures"),
    "predicted latencies": ("latency-model", None),
    "a training that memory does not hold": ("out-of-memory", None),
    "a worker killed": ("killed-worker", None),
    "training": ("training", None),
}


def of(folder: Path) -> str:
    """Tables of every card with rows; empty tables if there are none."""
    files = sorted([*folder.glob("gpu-*.jsonl"), *folder.glob("rows-*.jsonl")])
    cards = {path.stem.partition("-")[2]: read(path) for path in files}
    return "\n\n".join(_card(card, rows) for card, rows in (cards or {"a GPU": []}).items())


def _card(card: str, rows: list[Row]) -> str:
    title = f"{card}: {_conditions(rows)}" if rows else f"{card}: {NOT_YET}; `scripts/bench/gpu` makes these tables."
    return "\n\n".join([title, _latencies(rows), _summary_table(rows)])


def _conditions(rows: list[Row]) -> str:
    latest = next((row["conditions"] for row in reversed(rows) if row.get("conditions", {}).get("torch")), {})
    days = sorted({row["conditions"]["date"][:10] for row in rows if row.get("conditions", {}).get("date")})
    names = (("gpu", ""), ("driver", "driver "), ("torch", "torch "), ("cuda", "CUDA "), ("timm", "timm "))
    parts = [f"{prefix}{latest[name]}" for name, prefix in names if name in latest]
    return ", ".join([*parts, " to ".join(sorted({*days[:1], *days[-1:]}))])


def _latencies(rows: list[Row]) -> str:
    """A table of the ratio of each surgical model to its base, and half the width of its 95 % interval."""
    by_case = {
        (row.get("surgical"), row.get("mode"), row.get("batch")): row for row in rows if row["step"] == "latency"
    }
    lines = [_table_row(["model, as a ratio to its base", *(f"{mode}, batch {batch}" for mode, batch in COLUMNS)])]
    lines.append(_table_row(["---"] * (1 + len(COLUMNS))))
    for base in BASES:
        of_base = [next((row for row in rows if _is(row, base, *column)), None) for column in COLUMNS]
        lines.append(_table_row([base, *(f"{row['base_p50_ms']:.3f} ms" if row else NOT_YET for row in of_base)]))
        for block in BLOCKS:
            name = f"{base}_{block}"
            cells = [by_case.get((name, *column)) or _refused(rows, name, *column) for column in COLUMNS]
            lines.append(_table_row([name, *map(_ratio, cells)]))
    return "\n".join(lines)


def _is(row: Row, base: str, mode: str, batch: int) -> bool:
    return row["step"] == "latency" and row.get("base") == base and (row["mode"], row["batch"]) == (mode, batch)


def _refused(rows: list[Row], name: str, mode: str, batch: int) -> Row | None:
    key = f"{name} {mode} b{batch}"
    return next((row for row in rows if row["step"] == "latency" and row["key"] == key), None)


def _ratio(row: Row | None) -> str:
    if row is None:
        return NOT_YET
    if row["state"] != DONE:
        return "refused" if row["state"] == REFUSED else "failed"
    low, high = row["ratio_95"]
    return f"{row['ratio']:.3f} ± {(high - low) / 2:.3f}"


def _summary_table(rows: list[Row]) -> str:
    lines = [_table_row(["what", "figure"]), _table_row(["---", "---"])]
    for title, (step, key) in _SUMMARY.items():
        step_rows = [row for row in rows if row["step"] == step and key in (None, row["key"])]
        lines.append(_table_row([title, _summary_cell(step_rows, counted=step == "tests")]))
    return "\n".join(lines)


def _summary_cell(rows: list[Row], counted: bool) -> str:
    if not rows:
        return NOT_YET
    if counted:
        states = [row["state"] for row in rows if "::" in row["key"]]
        return f"{states.count(DONE)} passed, {states.count(REFUSED)} skipped, {states.count('red')} failed"
    return "; ".join(f"{row['key']}: {row.get('say', '')}" for row in rows)


def _table_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
