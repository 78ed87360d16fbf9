#!/usr/bin/env python
"""The cost of blocks in wide and in narrow slots: at the ends of branches, and behind their spatial convolutions.

    python scripts/bench/slot_costs.py [--device cuda] [--seconds 8] [--only resnet50]

The block goes to every place of the slot in a model, and both models are measured alternately in one process. A
combination that a model does not have is written as refused, with the reason. The conditions are those of a deployment
on the device: one thread, eager and float32 on a CPU; a CUDA graph in bfloat16 on a GPU.

Writes docs/benchmarks/slot-costs-<card>.json, on a CPU slot-costs-cpu.json, and prints the table of
search_spaces/README.md. With --only, the rows of the other models stay. `scripts/bench/gpu` makes the same rows at
batch 1 and 64, at the models' own input sizes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Sequence
from typing import Any

import timm
import torch
from _common import RESULTS, card_or_cpu, write

import attnsurgery
from attnsurgery.errors import AttnSurgeryError
from attnsurgery.latency import Conditions, Effort, LatencyBackend, backend_for
from attnsurgery.surgery.verify import count_macs

MODELS = ("resnet50", "resnet33ts", "convnext_tiny", "efficientnet_b0")
SLOTS = ("branches", "spatial")
BLOCKS = ("se", "timm:eca", "timm:gc")
INPUT_SIZE = (3, 224, 224)


def measure(model: str, slot: str, block: str, backend: LatencyBackend) -> dict[str, Any]:
    """The cost of a block in every place of a slot, as ratios to the model without it; or why there is none."""
    size = backend.conditions.input_size
    edits = [{"at": f"stage:* {slot}", "block": block}]
    recipe = {"version": 1, "name": "slot_costs", "base": model, "edits": edits}
    base, surgical = (timm.create_model(model).eval() for _ in range(2))
    combination = {"model": model, "slot": slot, "block": block}
    load_before = os.getloadavg()[0]
    try:
        plan = attnsurgery.plan(base, recipe, size)
        attnsurgery.operate(surgical, recipe, size)
        comparison = backend.compare(base, surgical)
    except AttnSurgeryError as error:
        return {**combination, "refused": str(error)}
    return {
        **combination,
        "places": len(plan.blocks),
        "ratio": comparison.ratio,
        "ratio_95": [comparison.ratio_low, comparison.ratio_high],
        "base_p50_ms": comparison.base.p50_ms,
        "parameters_ratio": 1 + plan.params_added / sum(parameter.numel() for parameter in base.parameters()),
        "macs_ratio": 1 + plan.macs_added / count_macs(base, size),
        "steady": comparison.base.steady,
        "load_average": [load_before, os.getloadavg()[0]],
        "measured_under": backend.conditions.describe(),
    }


def row_text(row: dict[str, Any]) -> str:
    if "refused" in row:
        return f"refused: {row['refused']}"
    low, high = row["ratio_95"]
    return f"{row['ratio']:.3f} x [{low:.3f}, {high:.3f}] of {row['base_p50_ms']:.3f} ms"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The ratios as a table in Markdown, a line for each model and slot, a column for each block."""
    blocks = list(dict.fromkeys(row["block"] for row in rows))
    lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault((row["model"], row["slot"]), []).append(row)
    text = [
        f"| model | slot | places | {' | '.join(f'`{block}`' for block in blocks)} |",
        "|---|---|---" + "|---" * len(blocks) + "|",
    ]
    for (model, slot), of_slot in lines.items():
        places = next((row["places"] for row in of_slot if "places" in row), 0)
        by_block = {row["block"]: row for row in of_slot}
        cells = [_cell(by_block[block]) if block in by_block else "" for block in blocks]
        text.append(f"| {model} | {slot} | {places} | {' | '.join(cells)} |")
    return "\n".join(text)


def _cell(row: dict[str, Any]) -> str:
    if "refused" in row:
        return "refused"
    low, high = row["ratio_95"]
    return f"x {row['ratio']:.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--seconds", type=float, default=8.0, help="time limit of one comparison")
    parser.add_argument("--only", choices=MODELS, help="measure this model alone")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    conditions = Conditions.on(options.device, input_size=INPUT_SIZE, threads=1 if device.type == "cpu" else None)
    backend = backend_for(
        conditions, effort=Effort(tolerance=0.003, max_seconds=options.seconds, max_warmup_seconds=1.0)
    )
    name = f"slot-costs-{card_or_cpu() if device.type == 'cuda' else 'cpu'}"
    path = RESULTS / f"{name}.json"
    earlier = json.loads(path.read_text())["rows"] if options.only and path.exists() else []
    rows = {(row["model"], row["block"], row["slot"]): row for row in earlier}
    for case in itertools.product([options.only] if options.only else MODELS, BLOCKS, SLOTS):
        model, block, slot = case
        rows[case] = measure(model, slot, block, backend)
        print(f"{model:16} {slot:9} {block:9} {row_text(rows[case])}", flush=True)
    ordered = [rows[case] for case in itertools.product(MODELS, BLOCKS, SLOTS) if case in rows]
    print(f"{table(ordered)}\nwritten {write(name, {'processors': os.cpu_count(), 'rows': ordered})}")


if __name__ == "__main__":
    main()
