"""The benchmark of slots: what a model lacks is a refused row, and the table shown to users is the measured one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from attnsurgery.latency import Conditions, backend_for

ROOT = Path(__file__).parents[1]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "bench"))
    import slot_costs  # type: ignore[import-not-found, unused-ignore]

    return slot_costs


def measured(bench: Any, model: str, slot: str) -> dict[str, Any]:
    row = bench.measure(model, slot, "timm:eca", backend_for(Conditions(input_size=(3, 64, 64)), "fixed"))
    assert isinstance(row, dict)
    return row


def test_slot_cost_is_ratio_to_the_base(bench: Any) -> None:
    """A row has the number of places, and the ratios of latency, parameters and MACs to the model without blocks."""
    row = measured(bench, "test_resnet", "branches")
    assert row["places"] == 4
    assert row["ratio_95"][0] <= row["ratio"] <= row["ratio_95"][1]
    assert row["ratio"] > 1
    assert 1 < row["parameters_ratio"] < 1.001, "a kernel of a few weights in each place"
    assert 1 < row["macs_ratio"] < 1.001
    assert "refused" not in row


def test_slot_without_places_is_refused(bench: Any) -> None:
    """A model without such a place gives a row with the reason, which the table shows."""
    row = measured(bench, "test_vit", "spatial")
    assert "no convolution larger than 1x1" in row["refused"]
    assert set(row) == {"model", "slot", "block", "refused"}
    assert bench.table([row]).splitlines()[-1] == "| test_vit | spatial | 0 | refused |"


def test_slot_table_has_column_per_block(bench: Any) -> None:
    """A line for each model and slot, a column for each block."""
    row = {"model": "m", "slot": "spatial", "block": "se", "places": 3, "ratio": 1.25, "ratio_95": [1.125, 1.5]}
    other = {**row, "block": "timm:gc", "ratio": 2.0, "ratio_95": [1.9, 2.1]}
    assert bench.table([row, other, {**row, "slot": "branches", "block": "timm:gc"}]).splitlines() == [
        "| model | slot | places | `se` | `timm:gc` |",
        "|---|---|---|---|---|",
        "| m | spatial | 3 | x 1.250 (1.125 to 1.500) | x 2.000 (1.900 to 2.100) |",
        "| m | branches | 3 |  | x 1.250 (1.125 to 1.500) |",
    ]


def test_slot_table_in_readme_is_measured(bench: Any) -> None:
    """search_spaces/README.md has the table of the measured rows, all combinations of them."""
    rows = json.loads((ROOT / "docs" / "benchmarks" / "slot-costs-cpu.json").read_text())["rows"]
    assert len(rows) == len(bench.MODELS) * len(bench.SLOTS) * len(bench.BLOCKS)
    assert bench.table(rows) in (ROOT / "search_spaces" / "README.md").read_text()
