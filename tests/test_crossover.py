"""The table that the package reads, made by scripts/bench/blocks.py --table from rows measured on a card."""

from __future__ import annotations

import importlib.util
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from attnsurgery.blocks import crossover
from attnsurgery.blocks.cuda_attention import LARGEST_MATRIX

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def bench() -> Any:
    spec = importlib.util.spec_from_file_location("_crossover", ROOT / "scripts" / "bench" / "_crossover.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(pairs: int, product: float, fused: float, one_head: float | None = None, **changes: Any) -> dict[str, Any]:
    times = {"product": product, "fused": fused, **({} if one_head is None else {"one_head": one_head})}
    facts = {"card": "some-card", "capability": [9, 0], "dtype": "bfloat16", "batch": 1, "width": 64}
    ms = {"forward": {"graph": times, "eager": {}}, "both": {"graph": {**times, "product": 9.0}, "eager": {}}}
    return {"key": str(pairs), **facts, "value_width": 512, "positions": pairs, "summed": 1, "ms": ms, **changes}


def test_rule_is_the_measured_crossover(bench: Any) -> None:
    """The rule of a table is the crossover that the rows measured."""
    rules = bench.rules_of([row(100, 1.0, 2.0, 3.0), row(10_000, 5.0, 4.0, 4.5), row(1000, 3.0, 3.2, 4.0)])
    assert rules == (
        ("half", "both", 1, 64, 512, 0, 0, True),
        ("half", "forward", 1, 64, 512, 0, 1000, True),
    )


def test_rule_extends_product_to_large_maps(bench: Any) -> None:
    """The product may win on large maps alone, and then wins beyond the largest measured one too."""
    forward = bench.rules_of([row(100, 2.0, 1.0), row(1000, 3.0, 3.2), row(10_000, 1.0, 9.0)])[1]
    assert forward == ("half", "forward", 1, 64, 512, 100, bench.cuda_attention.LARGEST_MATRIX, True)


def test_rule_needs_win_beyond_noise(bench: Any) -> None:
    """The product has to win by more than noise."""
    assert bench.rules_of([row(100, 1.0, 1.01), row(200, 9.0, 1.0)])[1][5:7] == (0, 0)
    assert bench.rules_of([row(100, 1.0, 1.1), row(200, 9.0, 1.0)])[1][5:7] == (0, 100)


def test_rule_takes_one_head_where_faster(bench: Any) -> None:
    """One head is taken where its kernel is the faster one."""
    forward = bench.rules_of([row(100, 9.0, 2.0, 1.0), row(1000, 9.0, 3.0, 2.0)])[1]
    assert forward[5:] == (0, 0, False)


def test_table_round_trips_through_module(bench: Any, tmp_path: Path) -> None:
    """The table is written into the module and read again, and other cards keep theirs."""
    path = tmp_path / "crossover.py"
    path.write_text(Path(crossover.__file__).read_text())
    failed = {**row(5, 1.0, 1.0), "error": "no kernel"}
    del failed["ms"]
    assert bench.write_table([row(100, 1.0, 2.0), failed], path) == "some-card"
    once = path.read_text()
    module = runpy.run_path(str(path))
    capability, rules = module["CARDS"]["some-card"]
    assert capability == (9, 0)
    assert ("half", "forward", 1, 64, 512, 0, LARGEST_MATRIX, True) in rules
    assert {name: module["CARDS"][name] for name in crossover.CARDS} == crossover.CARDS, "other cards keep theirs"
    assert module["__doc__"] == crossover.__doc__
    bench.write_table([row(100, 1.0, 2.0)], path)
    assert path.read_text() == once


def test_table_written_is_formatted(bench: Any, tmp_path: Path) -> None:
    """The written table passes `ruff format --check`."""
    pytest.importorskip("ruff")
    path = tmp_path / "crossover.py"
    path.write_text(Path(crossover.__file__).read_text())
    bench.write_table([row(100, 1.0, 2.0)], path)
    command = [sys.executable, "-m", "ruff", "format", "--check", "--config", str(ROOT / "pyproject.toml"), str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_table_needs_rows_of_one_card(bench: Any, tmp_path: Path) -> None:
    """Rows of a CPU, or of two cards, make no table."""
    with pytest.raises(SystemExit, match="no row of a CUDA device"):
        bench.write_table([row(1, 1.0, 1.0, card="cpu")], tmp_path / "none.py")
    with pytest.raises(SystemExit, match="rows of some-card and of other-card"):
        bench.write_table([row(1, 1.0, 1.0), row(1, 1.0, 1.0, card="other-card")], tmp_path / "none.py")


def test_row_file_drops_a_torn_row(bench: Any, tmp_path: Path) -> None:
    """Rows are saved as they come, and a torn last row is dropped."""
    path = tmp_path / "rows.jsonl"
    rows = bench.RowFile(path)
    rows.add({"key": "one"})
    assert path.read_text() == '{"key": "one"}\n'
    path.write_text(path.read_text() + '{"key": "tw')
    again = bench.RowFile(path)
    assert "one" in again
    assert "two" not in again
    again.add({"key": "two"})
    assert [one["key"] for one in bench.RowFile(path).rows] == ["one", "two"]


def test_cases_fit_the_largest_matrix(bench: Any) -> None:
    """No case needs a matrix that is larger than the product form may hold."""
    cases = list(bench.cases(False))
    assert len({case.key for case in cases}) == len(cases)
    assert all(case.batch * case.positions * case.summed <= LARGEST_MATRIX for case in cases)
    assert {(case.batch, case.positions, case.width) for case in cases} >= {(1, 196, 512), (64, 784, 64)}
