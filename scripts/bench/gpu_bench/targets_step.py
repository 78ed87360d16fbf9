"""The targets of this project on a GPU, each with the measurement and whether it is met."""

from __future__ import annotations

import json
from collections.abc import Callable

import timm
from latency import Case, measure

from attnsurgery.graph.find import input_size_of
from attnsurgery.latency import Conditions, Effort, backend_for
from attnsurgery.latency.self_test import self_test
from gpu_bench.blocks_step import row_file
from gpu_bench.rows import RED, Refused, Row, Rows
from gpu_bench.tiny import EFFORT, MODEL, SIZE


def verdict(target: str, value: float, is_met: bool, tiny: bool) -> Row:
    """The row of a target; a missed one is red, except in a tiny run, whose figures mean nothing."""
    say = f"{target}: {value:.4g}, {'met' if is_met else 'MISSED'}"
    return {
        "target": target,
        "measured": value,
        "met": is_met,
        "say": say,
        **({} if is_met or tiny else {"state": RED}),
    }


def se_compiled(rows: Rows, tiny: bool) -> Row:
    case = Case(MODEL, "se", "cudagraph", 1) if tiny else Case("resnet50", "se", "compile-cudagraph", 64)
    known = rows.all("latency").get(case.key, {})
    effort = EFFORT if tiny else Effort(0.003, 5.0)
    ratio = known["ratio"] if "ratio" in known else measure(case, "cuda", effort)["ratio"]
    return verdict(f"{case.key} as a ratio to its base, at most 1.05", ratio, ratio <= 1.05, tiny)


def trained_non_local(rows: Rows, tiny: bool) -> Row:
    path = row_file(rows, "blocks")
    lines = path.read_text().splitlines() if path.exists() else []
    criteria = {"kind": "sum", "name": "embedded_gaussian", "n": 3136, "direction": "both"}
    matches = [row for row in map(json.loads, lines) if criteria.items() <= row.items() and "ms" in row]
    if not matches and tiny:
        raise Refused(f"{path.name} has no such row yet, and needs none in a tiny run: {criteria}")
    if not matches:
        raise LookupError(f"{path.name} has no such row: {criteria}")
    ratio = matches[-1]["ms"]["naive"] / matches[-1]["ms"]["ours"]
    return verdict(
        "embedded Gaussian, N = 3136, forward + backward, times as fast as naive, 3 or more", ratio, ratio >= 3, tiny
    )


def interval(rows: Rows, tiny: bool) -> Row:
    model = timm.create_model(MODEL if tiny else "resnet50").eval()
    size = SIZE if tiny else input_size_of(model)
    conditions = Conditions.on("cuda", batch_size=1 if tiny else 64, input_size=size)
    effort = EFFORT if tiny else Effort(tolerance=0.0015, max_seconds=4.0)
    half = self_test(backend_for(conditions, effort=effort), model, 1 if tiny else 5).half_width
    return verdict("half the interval of a model against itself, at most 0.003", half, half <= 0.003, tiny)


TARGETS: dict[str, Callable[[Rows, bool], Row]] = {
    "SE compiled": se_compiled,
    "non-local trained": trained_non_local,
    "A/A interval": interval,
}


def run(rows: Rows, tiny: bool) -> None:
    for key, maker in TARGETS.items():
        if maker is trained_non_local and not row_file(rows, "blocks").exists():
            rows.left_out.append(key)  # the step `blocks` has to run first
            continue
        rows.make(key, lambda maker=maker: maker(rows, tiny))  # type: ignore[misc]
