"""Markdown for README, made of the rows that are kept in docs/benchmarks/; "not yet" where there are none."""

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
    """Tables of every card that rows are kept of; of no card in particular where there are none."""
    files = sorted([*folder.glob("gpu-*.jsonl"), *folder.glob("rows-*.jsonl")])
    cards = {path.stem.partition("-")[2]: read(path) for path in files}
    return "\n\n".join(_card(card, rows) for card, rows in (cards or {"a GPU": []}).items())


def _card(card: str, rows: list[Row]) -> str:
    title = f"{card}: {_conditions(rows)}" if rows else f"{card}: {NOT_YET}; `scripts/bench/gpu` makes these tables."
    return "\n\n".join([title, _latencies(rows), _others(rows)])


def _conditions(rows: list[Row]) -> str:
    found = next((row["conditions"] for row in reversed(rows) if row.get("conditions", {}).get("torch")), {})
    days = sorted({row["conditions"]["date"][:10] for row in rows if row.get("conditions", {}).get("date")})
    names = (("gpu", ""), ("driver", "driver "), ("torch", "torch "), ("cuda", "CUDA "), ("timm", "timm "))
    told = [f"{word}{found[name]}" for name, word in names if name in found]
    return ", ".join([*told, " to ".join(sorted({*days[:1], *days[-1:]}))])


def _latencies(rows: list[Row]) -> str:
    """The ratio of each surgical model to its base, and half its 95 % interval in percent."""
    there = {(row.get("surgical"), row.get("mode"), row.get("batch")): row for row in rows if row["step"] == "latency"}
    lines = [_line(["model, as a ratio to its base", *(f"{mode}, batch {batch}" for mode, batch in COLUMNS)])]
    lines.append(_line(["---"] * (1 + len(COLUMNS))))
    for base in BASES:
        of_base = [next((row for row in rows if _is(row, base, *column)), None) for column in COLUMNS]
        lines.append(_line([base, *(f"{row['base_p50_ms']:.3f} ms" if row else NOT_YET for row in of_base)]))
        for block in BLOCKS:
            name = f"{base}_{block}"
            cells = [there.get((name, *column)) or _refused(rows, name, *column) for column in COLUMNS]
            lines.append(_line([name, *map(_ratio, cells)]))
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


def _others(rows: list[Row]) -> str:
    lines = [_line(["what", "figure"]), _line(["---", "---"])]
    for title, (step, key) in _SUMMARY.items():
        found = [row for row in rows if row["step"] == step and key in (None, row["key"])]
        lines.append(_line([title, _said(found, counted=step == "tests")]))
    return "\n".join(lines)


def _said(rows: list[Row], counted: bool) -> str:
    if not rows:
        return NOT_YET
    if counted:
        states = [row["state"] for row in rows if "::" in row["key"]]
        return f"{states.count(DONE)} passed, {states.count(REFUSED)} skipped, {states.count('red')} failed"
    return "; ".join(f"{row['key']}: {row.get('say', '')}" for row in rows)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
