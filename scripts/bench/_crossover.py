"""Measures where two matrix products beat the fused attention kernel, and writes the package's table of it.

Each row times the forms of `attnsurgery/blocks/cuda_attention.py` for one batch, N, M, E, D and dtype, forward alone
and with backward, as a CUDA graph (without the cost of launches) and eagerly. The table is based on the graphs.
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
PRODUCT_MARGIN = 1.03
"""Factor by which the product form has to be faster, since it needs memory for its matrix."""
TRIAL_RUN_SECONDS = 0.1
"""With less time for each row, only a few small rows are measured."""
_GRAPH_MS = 0.3
"""Approximate duration of one replay, which consists of as many calls as necessary."""

Run = Callable[[], Any]


class Case(NamedTuple):
    """One shape of attention: M is `summed`, E `width` and D `value_width`."""

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
    """All cases, the most important first, without those whose matrix is too large for the product form."""
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
    """The product, the fused kernel in heads if possible, and in one head if that is another kernel."""
    scale = case.width**-0.5
    functions: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "product": lambda *tensors: cuda_attention.product(*tensors, scale),
        "fused": lambda *tensors: cuda_attention.fused(*tensors, scale, True),
    }
    splits = case.dtype != torch.float32 and case.width <= 256 and case.value_width % case.width == 0
    if splits and case.value_width > case.width:
        functions["one_head"] = lambda *tensors: cuda_attention.fused(*tensors, scale, False)
    return functions


def measure(case: Case, seconds: float) -> dict[str, Any]:
    """Milliseconds by direction ("forward", "both"), mode ("graph", "eager") and form."""
    query, key, value = (
        torch.randn(case.batch, rows, width, device=DEVICE, dtype=case.dtype).requires_grad_()
        for rows, width in (
            (case.positions, case.width),
            (case.summed, case.width),
            (case.summed, case.value_width),
        )
    )
    gradient = torch.randn(case.batch, case.positions, case.value_width, device=DEVICE, dtype=case.dtype)
    times: dict[str, dict[str, dict[str, float]]] = {}
    for direction in ("forward", "both"):
        runs = {name: _run(form, (query, key, value), gradient, direction) for name, form in forms(case).items()}
        times[direction] = _timed(runs, seconds / 2)
    return times


def _run(form: Callable[..., Tensor], inputs: tuple[Tensor, ...], gradient: Tensor, direction: str) -> Run:
    def forward() -> None:
        with torch.no_grad():
            form(*inputs)

    def forward_backward() -> None:
        torch.autograd.grad(form(*inputs), inputs, gradient)

    return forward if direction == "forward" else forward_backward


def _timed(runs: dict[str, Run], seconds: float) -> dict[str, dict[str, float]]:
    """Median milliseconds of one call by mode and form; the forms run alternately."""
    eager = {name: _eager_ms(run) for name, run in runs.items()}
    if not CUDA:
        return {"eager": eager}
    graphs: dict[str, tuple[Any, int]] = {}
    for name, run in runs.items():
        repeats = max(1, min(64, round(_GRAPH_MS / max(eager[name], 1e-3))))
        graphs[name] = _captured(run, repeats), repeats
    times_ms: dict[str, list[float]] = {name: [] for name in runs}
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or min(map(len, times_ms.values())) < 5:
        for name, (graph, repeats) in graphs.items():
            times_ms[name].append(_between_events(graph.replay, 1) / repeats)
    for graph, _ in graphs.values():
        graph.reset()
    return {"graph": {name: statistics.median(times) for name, times in times_ms.items()}, "eager": eager}


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
    """A graph of several calls."""
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
    """Measure all cases without a row, for about so many seconds each, without the capture of graphs."""
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
                raise  # this process cannot use the device any longer
            rows.add({**row, "error": str(error)})
            print(f"{case.key:38} {type(error).__name__}: {error}", flush=True)
            continue
        rows.add({**row, "ms": ms})
        mode = "graph" if CUDA else "eager"
        text = "   ".join(
            f"{direction} {' '.join(f'{name} {1000 * ms_per_call:.1f}' for name, ms_per_call in times[mode].items())}"
            for direction, times in ms.items()
        )
        print(f"{case.key:38} us  {text}", flush=True)


# ---- the table


def rules_of(rows: list[dict[str, Any]]) -> tuple[Rule, ...]:
    """One rule for each precision, direction, batch and pair of widths: the one that loses the least time."""
    rules: list[Rule] = []
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
        (above, up_to), in_heads = min(choices, key=lambda choice: _lost_time(measured, *choice))
        rules.append((*group, above, cuda_attention.LARGEST_MATRIX if up_to == ends[-1] else up_to, in_heads))
    return tuple(rules)


def _lost_time(measured: list[tuple[int, dict[str, float]]], sizes: tuple[int, int], in_heads: bool) -> float:
    """How much slower than the best form a choice is, as a sum of logarithms."""
    total = 0.0
    for pairs, times in measured:
        times = {**times, "product": times["product"] * PRODUCT_MARGIN}
        fused = times["fused"] if in_heads else times.get("one_head", times["fused"])
        chosen_ms = times["product"] if sizes[0] < pairs <= sizes[1] else fused
        total += math.log(chosen_ms / min(times.values()))
    return total


def write_table(rows: list[dict[str, Any]], path: Path = TABLE) -> str:
    """Write the rules of the rows' card to the table; returns the card's name."""
    rows = [row for row in rows if "ms" in row]
    if not rows or rows[0]["card"] == "cpu":
        raise SystemExit("there is no row of a CUDA device: measure with --crossover --out FILE on one first")
    card = rows[0]["card"]
    if other_cards := {row["card"] for row in rows} - {card}:
        raise SystemExit(f"rows of {card} and of {', '.join(sorted(other_cards))}: give the file of one card")
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
    """JSON lines that are written one by one; an incomplete last line of a killed process is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        for line in lines:
            if line.endswith("\n"):
                self.rows.append(json.loads(line))
        if lines and not lines[-1].endswith("\n"):
            path.write_text("".join(lines[:-1]))
        path.parent.mkdir(parents=True, exist_ok=True)

    def __contains__(self, key: object) -> bool:
        return any(row["key"] == key for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)
