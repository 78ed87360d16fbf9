"""Where two matrix products beat the fused attention kernel: measured row by row, and made into the package's table.

Each row times the forms of `attnsurgery/blocks/cuda_attention.py` for one batch, N, M, E, D and dtype, forward alone
and with backward, replayed as a CUDA graph (the cost of launches is out) and eagerly. The table goes by the graphs.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnsurgery.blocks import cuda_attention
from attnsurgery.blocks.crossover import CARDS, Rule
from attnsurgery.faults import Fault, fault_of

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
TABLE = Path(__file__).resolve().parents[2] / "attnsurgery" / "blocks" / "crossover.py"
POSITIONS = [(196, 196), (784, 784), (784, 196), (49, 49), (3136, 784), (3136, 3136), (196, 49), (49, 9)]
WIDTHS = [(512, 512), (256, 256), (64, 512), (64, 64), (128, 128), (32, 256)]
PRODUCT_WINS_BY = 1.03
"""The product form has to be so much faster, for the matrix that it holds."""
TRIAL_RUN_SECONDS = 0.1
"""With less than that for a row, only a few small rows are measured."""
_GRAPH_MS = 0.3
"""One replay takes about so long, of as many calls as that needs."""

Run = Callable[[], Any]


class Case(NamedTuple):
    dtype: torch.dtype
    batch: int
    positions: int
    summed: int
    width: int
    value_width: int

    @property
    def key(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype} b{self.batch} {self.positions}x{self.summed} {self.width}:{self.value_width}"


def cases(trial_run: bool) -> Iterator[Case]:
    """Those that matter most come first; none whose matrix the product form may not hold."""
    if trial_run:
        yield from (Case(torch.bfloat16, 2, 49, 9, *widths) for widths in ((32, 256), (64, 64)))
        return
    for dtype, batch in ((torch.bfloat16, 1), (torch.bfloat16, 64), (torch.float32, 1)):
        for sizes, widths in itertools.product(POSITIONS, WIDTHS):
            if dtype == torch.float32 and (widths not in WIDTHS[:4:2] or sizes not in POSITIONS[:5]):
                continue
            if batch * math.prod(sizes) <= cuda_attention.LARGEST_MATRIX:
                yield Case(dtype, batch, *sizes, *widths)


def forms(case: Case) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """The product, the fused kernel in heads where it can, and in one head where that is another kernel."""
    scale = case.width**-0.5
    found: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "product": lambda *given: cuda_attention.product(*given, scale),
        "fused": lambda *given: cuda_attention.fused(*given, scale, True),
    }
    splits = case.dtype != torch.float32 and case.width <= 256 and case.value_width % case.width == 0
    if splits and case.value_width > case.width:
        found["one_head"] = lambda *given: cuda_attention.fused(*given, scale, False)
    return found


def measure(case: Case, seconds: float) -> dict[str, Any]:
    """Milliseconds by direction ("forward", "both"), way ("graph", "eager") and form."""
    query, key, value = (
        torch.randn(case.batch, rows, width, device=DEVICE, dtype=case.dtype).requires_grad_()
        for rows, width in (
            (case.positions, case.width),
            (case.summed, case.width),
            (case.summed, case.value_width),
        )
    )
    gradient = torch.randn(case.batch, case.positions, case.value_width, device=DEVICE, dtype=case.dtype)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for direction in ("forward", "both"):
        runs = {name: _run(form, (query, key, value), gradient, direction) for name, form in forms(case).items()}
        found[direction] = _timed(runs, seconds / 2)
    return found


def _run(form: Callable[..., Tensor], inputs: tuple[Tensor, ...], gradient: Tensor, direction: str) -> Run:
    def forward() -> None:
        with torch.no_grad():
            form(*inputs)

    def both() -> None:
        torch.autograd.grad(form(*inputs), inputs, gradient)

    return forward if direction == "forward" else both


def _timed(runs: dict[str, Run], seconds: float) -> dict[str, dict[str, float]]:
    """Median milliseconds of one call in each way; the forms take turns."""
    eager = {name: _eager_ms(run) for name, run in runs.items()}
    if not CUDA:
        return {"eager": eager}
    graphs: dict[str, tuple[Any, int]] = {}
    for name, run in runs.items():
        repeats = max(1, min(64, round(_GRAPH_MS / max(eager[name], 1e-3))))
        graphs[name] = _captured(run, repeats), repeats
    taken: dict[str, list[float]] = {name: [] for name in runs}
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or min(map(len, taken.values())) < 5:
        for name, (graph, repeats) in graphs.items():
            taken[name].append(_between_events(graph.replay, 1) / repeats)
    for graph, _ in graphs.values():
        graph.reset()
    return {"graph": {name: statistics.median(times) for name, times in taken.items()}, "eager": eager}


def _eager_ms(run: Run) -> float:
    for _ in range(3):
        run()
    repeats = 5
    if not CUDA:
        began = time.perf_counter()
        for _ in range(repeats):
            run()
        return 1000 * (time.perf_counter() - began) / repeats
    torch.cuda.synchronize()
    return min(_between_events(run, repeats) / repeats for _ in range(3))


def _between_events(run: Run, repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def _captured(run: Run, repeats: int) -> Any:
    """So many calls as one graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            run()
    graph.replay()
    return graph


def measure_all(rows: Any, seconds: float) -> None:
    """All cases whose rows are not there yet, for about so many seconds each, graphs' captures not counted."""
    facts = {
        "card": cuda_attention.card_name() if CUDA else "cpu",
        "capability": list(torch.cuda.get_device_capability()) if CUDA else [0, 0],
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }
    for case in cases(seconds < TRIAL_RUN_SECONDS):
        if case.key in rows:
            continue
        row = {"key": case.key, **facts, **case._asdict(), "dtype": str(case.dtype).removeprefix("torch.")}
        try:
            ms = measure(case, seconds)
        except Exception as error:
            if fault_of(error) is Fault.DEVICE:
                raise  # nothing can be measured in this process any more
            rows.add({**row, "error": str(error)})
            print(f"{case.key:38} {type(error).__name__}: {error}", flush=True)
            continue
        rows.add({**row, "ms": ms})
        way = "graph" if CUDA else "eager"
        said = "   ".join(
            f"{direction} {' '.join(f'{name} {1000 * one:.1f}' for name, one in times[way].items())}"
            for direction, times in ms.items()
        )
        print(f"{case.key:38} us  {said}", flush=True)


# ---- the table


def rules_of(rows: list[dict[str, Any]]) -> tuple[Rule, ...]:
    """One rule for each precision, direction, batch and pair of widths: the one that would have lost least time."""
    found: list[Rule] = []
    groups: dict[tuple[Any, ...], list[tuple[int, dict[str, float]]]] = {}
    for row, direction in itertools.product(rows, ("forward", "both")):
        precision = "full" if row["dtype"] == "float32" else "half"
        group = (precision, direction, row["batch"], row["width"], row["value_width"])
        times = row["ms"][direction].get("graph") or row["ms"][direction]["eager"]
        groups.setdefault(group, []).append((row["positions"] * row["summed"], times))
    for group, measured in sorted(groups.items()):
        ends = (0, *sorted({pairs for pairs, _ in measured}))
        ranges = [(0, 0), *itertools.combinations(ends, 2)]
        choices = itertools.product(ranges, (True, False))
        (above, up_to), in_heads = min(choices, key=lambda choice: _lost(measured, *choice))
        found.append((*group, above, cuda_attention.LARGEST_MATRIX if up_to == ends[-1] else up_to, in_heads))
    return tuple(found)


def _lost(measured: list[tuple[int, dict[str, float]]], sizes: tuple[int, int], in_heads: bool) -> float:
    """How much slower than the best form this choice is, as a sum of logarithms; of equal ones fused in heads wins."""
    lost = 0.0
    for pairs, times in measured:
        times = {**times, "product": times["product"] * PRODUCT_WINS_BY}
        fused = times["fused"] if in_heads else times.get("one_head", times["fused"])
        taken = times["product"] if sizes[0] < pairs <= sizes[1] else fused
        lost += math.log(taken / min(times.values()))
    return lost


def write_table(rows: list[dict[str, Any]], path: Path = TABLE) -> str:
    """Put the rules of the rows' card in the table; the card's name."""
    rows = [row for row in rows if "ms" in row]
    if not rows or rows[0]["card"] == "cpu":
        raise SystemExit("there is no row of a CUDA device: measure with --crossover --out FILE on one first")
    card = rows[0]["card"]
    if others := {row["card"] for row in rows} - {card}:
        raise SystemExit(f"rows of {card} and of {', '.join(sorted(others))}: give the file of one card")
    cards = {**CARDS, card: (tuple(rows[0]["capability"]), rules_of(rows))}
    text = path.read_text()
    head, _, _ = text.partition("CARDS: ")
    _, _, tail = text.rpartition('\n"""Compute capability and rules')
    path.write_text(f'{head}CARDS: {_TYPE} = {_literal(cards)}\n"""Compute capability and rules{tail}')
    return str(card)


_TYPE = "dict[str, tuple[tuple[int, int], tuple[Rule, ...]]]"


def _literal(cards: dict[str, Any]) -> str:
    if not cards:
        return "{}"
    lines = ["{"]
    for card, (capability, rules) in sorted(cards.items()):
        lines += [f'    "{card}": (', f"        ({capability[0]}, {capability[1]}),", "        ("]
        for precision, direction, *numbers in rules:
            lines.append(f'            ("{precision}", "{direction}", {", ".join(map(str, numbers))}),')
        lines += ["        ),", "    ),"]
    return "\n".join([*lines, "}"])


class RowFile:
    """JSON lines that are there for good once they are written; those that a killed process has torn are dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        whole = path.read_text().splitlines(keepends=True) if path.exists() else []
        for line in whole:
            if line.endswith("\n"):
                self.rows.append(json.loads(line))
        if whole and not whole[-1].endswith("\n"):
            path.write_text("".join(whole[:-1]))
        path.parent.mkdir(parents=True, exist_ok=True)

    def __contains__(self, key: object) -> bool:
        return any(row["key"] == key for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)
