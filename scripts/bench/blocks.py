#!/usr/bin/env python
"""Time and peak memory of pairwise sums and blocks, compared with common implementations, in one process.

    python scripts/bench/blocks.py [--seconds 2]              # about 8 minutes on two cores
    python scripts/bench/blocks.py --rows FILE.jsonl          # the same, a line for each row as it is measured
    python scripts/bench/blocks.py --crossover                # where the product form becomes slower, on CPU
    python scripts/bench/blocks.py --crossover --out FILE.jsonl   # the same on a GPU, a line for each row
    python scripts/bench/blocks.py --table FILE.jsonl         # write the package's table from these rows

`sum` rows are the pairwise sums alone, from projections in the memory format of a convolution's output to a map in the
format of the next one's input; `block` rows include the convolutions, norm and residual. Candidates run alternately; a
figure is the median of its candidate, and a ratio that of two medians. Memory is the peak beyond inputs and weights. On
a GPU everything is bfloat16 and channels last, and the L2 cache is flushed before each run. mmcv-lite's NonLocal2d is
included where it is installed. Rows that a FILE has already are not measured again.

Writes docs/benchmarks/blocks-<device>.json, or the FILE alone.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

os.environ.setdefault("KINETO_LOG_LEVEL", "5")

import _crossover
import torch
from _common import write
from _crossover import TRIAL_RUN_SECONDS
from _naive_blocks import (
    NaiveDual,
    NaiveNonLocal,
    naive_channel,
    naive_concatenation,
    naive_dot_product,
    naive_softmax,
    our_channel,
    our_pairs,
    pairs_concatenation,
)
from _timing import CUDA, Run, forward, forward_backward, medians, peak_mib
from timm.layers import NonLocalAttn
from torch import Tensor, nn

from attnsurgery.blocks.cuda_attention import card_name
from attnsurgery.blocks.dual_attention import DualAttention
from attnsurgery.blocks.functional import attend, concatenate, dot_product
from attnsurgery.blocks.non_local import NonLocal

DEVICE = "cuda" if CUDA else "cpu"
CARD = card_name() if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32
BATCH = 8 if CUDA else 1
CHANNELS = 512
WIDTH = CHANNELS // 2
PAIR_WIDTH = 16  # of the [2 D, N, N] form, which would take 20 GB at WIDTH
SIDES = {196: 14, 784: 28, 3136: 56, 9409: 97}
MODES = ["embedded_gaussian", "gaussian", "dot_product", "concatenation"]
# The largest tensor that a candidate may allocate; larger cases are skipped with the reason.
LARGEST_BYTES = torch.cuda.get_device_properties(0).total_memory // 8 if CUDA else 3 << 30


# ---- inputs


def rows(positions: int, width: int) -> Tensor:
    """(B, N, E) in the memory format of a 1x1 convolution's output: channels first on CPU, channels last on a GPU."""
    tensor = torch.randn(BATCH, width, positions, device=DEVICE, dtype=DTYPE).mul_(0.3).transpose(1, 2)
    return (tensor.contiguous() if CUDA else tensor).requires_grad_()


def scores(positions: int) -> Tensor:
    return torch.randn(BATCH, positions, device=DEVICE, dtype=DTYPE).requires_grad_()


def channels_first(positions: int) -> Tensor:
    return rows(positions, CHANNELS).transpose(1, 2).detach().mul_(0.1).requires_grad_()


Sum = tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[[int], list[Tensor]], Sequence[int]]

SUMS: dict[str, Sum] = {
    "embedded_gaussian": (attend, naive_softmax, lambda n: [rows(n, WIDTH) for _ in range(3)], (196, 784, 3136)),
    "gaussian": (
        attend,
        naive_softmax,
        lambda n: [rows(n, CHANNELS), rows(n, CHANNELS), rows(n, WIDTH)],
        (196, 784, 3136),
    ),
    "dot_product": (dot_product, naive_dot_product, lambda n: [rows(n, WIDTH) for _ in range(3)], (196, 784, 3136)),
    "concatenation": (
        concatenate,
        naive_concatenation,
        lambda n: [scores(n), scores(n), rows(n, WIDTH)],
        (196, 784, 3136),
    ),
    "concatenation of pairs": (
        our_pairs,
        pairs_concatenation,
        lambda n: [
            *(rows(n, PAIR_WIDTH) for _ in range(3)),
            torch.randn(1, 2 * PAIR_WIDTH, 1, 1, device=DEVICE, dtype=DTYPE).requires_grad_(),
        ],
        (196, 784, 3136),
    ),
    "position": (
        attend,
        naive_softmax,
        lambda n: [rows(n, CHANNELS // 8), rows(n, CHANNELS // 8), rows(n, CHANNELS)],
        (196, 784, 3136, 9409),
    ),
    "channel": (our_channel, naive_channel, lambda n: [channels_first(n)], (196, 784, 3136)),
}


# ---- measuring


class Rows(Protocol):
    """A collection of rows that grows one by one."""

    rows: list[dict[str, Any]]

    def __contains__(self, key: object) -> bool: ...

    def add(self, row: dict[str, Any]) -> None: ...


class RowList:
    """Rows for one file that is written at the end."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def __contains__(self, key: object) -> bool:
        return False

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append({name: value for name, value in row.items() if name not in ("key", "card")})


def key_of(kind: str, name: str, positions: int, direction: str) -> str:
    return f"{kind} {name} {positions} {direction}"


def compare(
    rows_: Rows,
    kind: str,
    name: str,
    positions: int,
    runs: dict[str, dict[str, Run]],
    seconds: float,
    **fields: Any,
) -> None:
    """Add one row for each direction in `runs`; "ours" and "naive" are among the candidates."""
    for direction, candidates in runs.items():
        key = key_of(kind, name, positions, direction)
        if key in rows_:
            continue
        times = medians(candidates, seconds)
        peaks = {candidate: peak_mib(run) for candidate, run in candidates.items()}
        row = {"kind": kind, "name": name, "n": positions, "direction": direction, "ms": times, "mib": peaks, **fields}
        rows_.add({"key": key, "card": CARD, **row})
        comparisons = "  ".join(
            f"{rival} {times[rival]:.2f} ms {peaks[rival]:.1f} MiB = {times[rival] / times['ours']:.2f} x, "
            f"1/{peaks[rival] / max(peaks['ours'], 1e-9):.1f}"
            for rival in times
            if rival != "ours"
        )
        ours_text = f"ours {times['ours']:.2f} ms {peaks['ours']:.1f} MiB"
        print(f"{kind:5} {name:22} N={positions:<5} {direction:8} {ours_text}  {comparisons}")
        sys.stdout.flush()


def to_map(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The sum, (B, N, D), in the format of a convolution's input: (B, D, N) contiguous on CPU, channels last on GPU."""
    return lambda *inputs: function(*inputs) if CUDA else function(*inputs).transpose(1, 2).contiguous()


def measure_sums(rows_: Rows, seconds: float) -> None:
    for name, (ours, naive, make, sizes) in SUMS.items():
        for n in sizes if seconds >= TRIAL_RUN_SECONDS or name == "embedded_gaussian" else sizes[:1]:
            largest = 4 * BATCH * n * n * (2 * PAIR_WIDTH if "pairs" in name else 1)
            if largest > LARGEST_BYTES:
                if (key := key_of("sum", name, n, "skipped")) not in rows_:
                    reason = f"the naive form needs {largest >> 20} MiB"
                    rows_.add({"key": key, "card": CARD, "kind": "sum", "name": name, "n": n, "skipped": reason})
                continue
            if all(key_of("sum", name, n, direction) in rows_ for direction in ("forward", "both")):
                continue
            inputs = make(n)
            functions = {"ours": ours, "naive": naive}
            if name != "channel":
                functions = {key: to_map(function) for key, function in functions.items()}
            runs = {
                "forward": {key: forward(f, inputs) for key, f in functions.items()},
                "both": {key: forward_backward(f, inputs, ()) for key, f in functions.items()},
            }
            if "pairs" in name and not CUDA:
                del runs["both"]  # minutes
            compare(rows_, "sum", name, n, runs, seconds)


def rivals(mode: str) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Blocks of this mode in other libraries, and by library the reason why a block is missing."""
    blocks: dict[str, nn.Module] = {}
    missing: dict[str, str] = {}
    if mode == "embedded_gaussian":
        blocks["timm"] = NonLocalAttn(CHANNELS, use_scale=False, rd_ratio=0.5)
    else:
        missing["timm"] = "NonLocalAttn has the embedded Gaussian mode only"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from mmcv.cnn import NonLocal2d
    except ImportError as error:
        missing["mmcv"] = f"not installed: {error}"
    else:
        blocks["mmcv"] = NonLocal2d(CHANNELS, reduction=2, use_scale=False, mode=mode)
    return blocks, missing


def measure_blocks(rows_: Rows, seconds: float) -> None:
    for mode in [*MODES, "dual"]:
        ours: nn.Module = DualAttention(CHANNELS) if mode == "dual" else NonLocal(CHANNELS, mode=mode)  # type: ignore[arg-type]
        naive = NaiveDual(ours) if mode == "dual" else NaiveNonLocal(ours)  # type: ignore[arg-type]
        rival_blocks, missing = ({}, {}) if mode == "dual" else rivals(mode)
        for n in (196, 784, 3136) if seconds >= TRIAL_RUN_SECONDS else (196,):
            if all(key_of("block", mode, n, direction) in rows_ for direction in ("forward", "both")):
                continue
            omitted = dict(missing)
            blocks = {"ours": ours, "naive": naive, **rival_blocks}
            pairs = 4 * BATCH * CHANNELS * n * n
            if mode == "concatenation" and "mmcv" in blocks and pairs > LARGEST_BYTES:
                del blocks["mmcv"]
                omitted["mmcv"] = f"its tensor of pairs needs {pairs >> 20} MiB"
            x = torch.randn(BATCH, CHANNELS, SIDES[n], SIDES[n])
            x = x.to(DEVICE, DTYPE, memory_format=torch.channels_last if CUDA else torch.contiguous_format)
            x.requires_grad_()
            runs: dict[str, dict[str, Run]] = {"forward": {}, "both": {}}
            for block in blocks.values():
                block.to(DEVICE, DTYPE, memory_format=torch.channels_last if CUDA else torch.contiguous_format)
            for key, block in blocks.items():
                runs["forward"][key] = forward(block.eval(), [x])
                runs["both"][key] = forward_backward(block, [x], list(block.parameters()))
            if mode == "concatenation" and not CUDA:
                runs["both"].pop("mmcv", None)  # minutes
            compare(rows_, "block", mode, n, runs, seconds, left_out=omitted)


def measure_subsampling(rows_: Rows, seconds: float) -> None:
    x = torch.randn(BATCH, CHANNELS, 56, 56).to(DEVICE, DTYPE)
    if CUDA:
        x = x.contiguous(memory_format=torch.channels_last)
    for order in ("project_first", "pool_first"):
        blocks = {
            "ours": NonLocal(CHANNELS, subsample=2, subsample_order=order),  # type: ignore[arg-type]
            "naive": NonLocal(CHANNELS),
        }
        runs = {"forward": {key: forward(block.to(DEVICE, DTYPE).eval(), [x]) for key, block in blocks.items()}}
        compare(rows_, "block", f"subsample 2 {order}", 3136, runs, seconds)


# ---- targets


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each target with the measured ratio of naive's time, or memory, to ours."""

    def row(kind: str, name: str, n: int, direction: str = "forward") -> dict[str, Any] | None:
        criteria = {"kind": kind, "name": name, "n": n, "direction": direction}
        return next((entry for entry in rows if "ms" in entry and criteria.items() <= entry.items()), None)

    checked: list[dict[str, Any]] = []

    def faster(target: str, entry: dict[str, Any] | None, minimum: float) -> None:
        ratio = entry["ms"]["naive"] / entry["ms"]["ours"] if entry else None
        is_met = None if ratio is None else ratio >= minimum
        checked.append({"target": f"{target}: >= {minimum:.3g} x naive's speed", "measured": ratio, "met": is_met})

    def leaner(target: str, entry: dict[str, Any] | None, minimum: float) -> None:
        ratio = entry["mib"]["naive"] / entry["mib"]["ours"] if entry else None
        is_met = None if ratio is None else ratio >= minimum
        checked.append({"target": f"{target}: memory <= 1/{minimum:g} of naive's", "measured": ratio, "met": is_met})

    if CUDA:
        faster("embedded_gaussian, N = 3136, forward + backward", row("sum", "embedded_gaussian", 3136, "both"), 3)
        return checked
    for name, at_least, one_in in [
        ("dot_product", 8, 8),
        ("concatenation", 5, 4),
        ("embedded_gaussian", 1.2, 6),
        ("position", 1.2, 6),
    ]:
        faster(f"{name}, N = 3136", row("sum", name, 3136), at_least)
        leaner(f"{name}, N = 3136", row("sum", name, 3136), one_in)
    faster("concatenation of pairs, N = 3136", row("sum", "concatenation of pairs", 3136), 100)
    faster("channel, N = 3136, no slower but for 2 % of noise", row("sum", "channel", 3136), 1 / 1.02)
    for name in ("embedded_gaussian", "gaussian", "dot_product", "concatenation", "position", "channel"):
        faster(f"{name}, N = 196", row("sum", name, 196), 1 / 1.1)
    faster("block sub-sampled by 2, N = 3136, against whole", row("block", "subsample 2 project_first", 3136), 1.5)
    return checked


# ---- where the product form becomes slower


def crossover(seconds: float) -> None:
    never = 0
    for n, m in [(49, 49), (196, 49), (196, 196), (784, 196), (784, 784), (3136, 784), (3136, 3136)]:
        for width, value_width in [(64, 64), (128, 128), (256, 256), (512, 512), (64, 512), (512, 256)]:
            inputs = [rows(n, width), rows(m, width), rows(m, value_width)]
            candidates = {
                "ours": forward(lambda *t: attend(*t, 1.0, never), inputs),
                "product": forward(naive_softmax, inputs),
            }
            times = medians(candidates, seconds)
            print(f"softmax        {n:5} x {m:<5} {width:3} {value_width:3}  {times['ours'] / times['product']:.2f}")
        for value_width in (64, 256):
            inputs = [scores(n), scores(m), rows(m, value_width)]
            candidates = {
                "ours": forward(lambda *t: concatenate(*t, never), inputs),
                "product": forward(naive_concatenation, inputs),
            }
            times = medians(candidates, seconds)
            print(f"concatenation  {n:5} x {m:<5}     {value_width:3}  {times['ours'] / times['product']:.2f}")
    print("\nTime of the form without a matrix divided by that of the product; above 1 the product is faster.")


def print_targets(checked: list[dict[str, Any]]) -> None:
    print()
    for entry in checked:
        result = {True: "met", False: "MISSED", None: "not measured"}[entry["met"]]
        measured = "-" if entry["measured"] is None else f"{entry['measured']:.2f}"
        print(f"{entry['target']:75} {measured:>8}  {result}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each comparison, roughly")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--crossover", action="store_true", help="only measure where the product form becomes slower")
    parser.add_argument("--out", type=Path, help="JSON lines of --crossover, for the GPU's table")
    parser.add_argument("--rows", type=Path, help="JSON lines instead of docs/benchmarks/blocks-<device>.json")
    parser.add_argument("--table", type=Path, help="write the package's table from a file of --crossover --out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.table:
        card = _crossover.write_table(_crossover.RowFile(options.table).rows)
        print(f"{_crossover.TABLE} has the rules of {card} now")
        return
    if options.crossover and options.out:
        _crossover.measure_all(_crossover.RowFile(options.out), options.seconds / 2)
        return
    if options.crossover:
        crossover(options.seconds / 8)
        return
    began = time.perf_counter()
    rows_: Rows = _crossover.RowFile(options.rows) if options.rows else RowList()
    measure_sums(rows_, options.seconds)
    measure_subsampling(rows_, options.seconds)
    measure_blocks(rows_, options.seconds)
    checked = targets(rows_.rows)
    print_targets(checked)
    if options.rows:
        print(f"\n{options.rows} has {len(rows_.rows)} rows after {time.perf_counter() - began:.0f} s")
        return
    setting = {"batch": BATCH, "channels": CHANNELS, "width": WIDTH, "pair_width": PAIR_WIDTH, "dtype": str(DTYPE)}
    path = write(f"blocks-{CARD}", {"setting": setting, "targets": checked, "rows": rows_.rows})
    print(f"\nwritten {path} after {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
