#!/usr/bin/env python
"""What the pairwise sums and the blocks cost beside the forms that people copy: time and peak memory, in one process.

    python scripts/bench/blocks.py [--seconds 2]              # about 8 minutes on two cores
    python scripts/bench/blocks.py --rows FILE.jsonl          # the same, a line for each row as soon as it is there
    python scripts/bench/blocks.py --crossover                # where the product form stops paying, on CPU
    python scripts/bench/blocks.py --crossover --out FILE.jsonl   # the same on a GPU, a line for each row
    python scripts/bench/blocks.py --table FILE.jsonl         # and the table that the package reads, made of it

`sum` rows are the pairwise sums alone, from projections that lie as one convolution leaves them to a map that lies as
the next one wants it; `block` rows have the convolutions, norm and residual around them. Candidates take turns; a
figure is the median of its candidate, a ratio that of two medians. Memory is the most that was allocated on top of
inputs and weights. On a GPU everything is bfloat16 and channels last, and the L2 cache is flushed before each run.
mmcv-lite's NonLocal2d takes part where it is installed. Rows that a FILE has already are not measured again.

Writes docs/benchmarks/blocks-<device>.json, or the FILE alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
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
from timm.layers import NonLocalAttn
from torch import Tensor, nn

from attnsurgery.blocks.cuda_attention import card_name
from attnsurgery.blocks.dual_attention import DualAttention
from attnsurgery.blocks.functional import attend, attend_channels, concatenate, dot_product
from attnsurgery.blocks.non_local import NonLocal

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
CARD = card_name() if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32
BATCH = 8 if CUDA else 1
CHANNELS = 512
WIDTH = CHANNELS // 2
PAIR_WIDTH = 16  # of the [2 D, N, N] form, which would take 20 GB at WIDTH
SIDES = {196: 14, 784: 28, 3136: 56, 9409: 97}
MODES = ["embedded_gaussian", "gaussian", "dot_product", "concatenation"]
# The largest tensor that a candidate may build; above it the row says so instead.
LARGEST_BYTES = torch.cuda.get_device_properties(0).total_memory // 8 if CUDA else 3 << 30

Run = Callable[[], Any]


# ---- what is compared: the textbook forms


def naive_softmax(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.bmm(torch.softmax(torch.bmm(query, key.transpose(1, 2)), dim=-1), value)


def naive_dot_product(theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
    return torch.bmm(torch.bmm(theta, phi.transpose(1, 2)) / phi.shape[1], g)


def naive_concatenation(a: Tensor, b: Tensor, g: Tensor) -> Tensor:
    return torch.bmm(torch.relu(a[:, :, None] + b[:, None, :]) / b.shape[1], g)


def pairs_concatenation(theta: Tensor, phi: Tensor, g: Tensor, w_f: Tensor) -> Tensor:
    """With the pairs (B, 2 D, N, M) written out, as the common implementations have it."""
    theta, phi = theta.transpose(1, 2)[:, :, :, None], phi.transpose(1, 2)[:, :, None, :]
    pairs = torch.cat([theta.expand(-1, -1, -1, phi.shape[3]), phi.expand(-1, -1, theta.shape[2], -1)], dim=1)
    weights = torch.relu(torch.nn.functional.conv2d(pairs, w_f)).squeeze(1) / phi.shape[3]
    return torch.bmm(weights, g)


def our_pairs(theta: Tensor, phi: Tensor, g: Tensor, w_f: Tensor) -> Tensor:
    w_theta, w_phi = w_f.flatten().chunk(2)
    return concatenate(theta @ w_theta, phi @ w_phi, g)


def naive_channel(x: Tensor) -> Tensor:
    energy = torch.bmm(x, x.transpose(1, 2))
    return torch.bmm(torch.softmax(energy.amax(dim=-1, keepdim=True).expand_as(energy) - energy, dim=-1), x)


def our_channel(x: Tensor) -> Tensor:
    return attend_channels(x)


class NaiveNonLocal(nn.Module):
    """A non-local block with its matrix: the modules of ours, the textbook's forward."""

    def __init__(self, ours: NonLocal) -> None:
        super().__init__()
        self.ours = ours

    def forward(self, x: Tensor) -> Tensor:
        ours = self.ours
        theta, phi, g = (t.flatten(2).transpose(1, 2) for t in (ours.theta(x), ours.phi(x), ours.g(x)))
        if ours.mode == "dot_product":
            y = naive_dot_product(theta, phi, g)
        elif ours.mode == "concatenation":
            w_theta, w_phi = ours.w_f.weight.flatten().chunk(2)
            y = naive_concatenation(theta @ w_theta, phi @ w_phi, g)
        else:
            y = naive_softmax(theta, phi, g)
        y = y.transpose(1, 2).reshape(x.shape[0], -1, *x.shape[2:])
        return x + ours.norm(ours.w_z(y))


class NaiveDual(nn.Module):
    """Position and channel attention as released: both matrices, residuals and gammas in passes of their own."""

    def __init__(self, ours: DualAttention) -> None:
        super().__init__()
        self.ours = ours

    def forward(self, x: Tensor) -> Tensor:
        position = self.ours.sa
        rows = (conv(x).flatten(2).transpose(1, 2) for conv in (position.query_conv, position.key_conv))
        attended = naive_softmax(*rows, position.value_conv(x).flatten(2).transpose(1, 2))
        attended = attended.transpose(1, 2).reshape(x.shape)
        return x + position.gamma * attended + self.ours.sc.gamma * naive_channel(x.flatten(2)).reshape(x.shape)


# ---- inputs


def rows(positions: int, width: int) -> Tensor:
    """(B, N, E) as a 1x1 convolution leaves it: channels first on CPU, channels last on a GPU."""
    made = torch.randn(BATCH, width, positions, device=DEVICE, dtype=DTYPE).mul_(0.3).transpose(1, 2)
    return (made.contiguous() if CUDA else made).requires_grad_()


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


def clock(run: Run) -> float:
    """Seconds of one run; on a GPU by events, behind a write that empties the L2 cache."""
    if not CUDA:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    _flush().zero_()
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    run()
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended) / 1000


_flushed: list[Tensor] = []


def _flush() -> Tensor:
    if not _flushed:
        _flushed.append(torch.empty(256 * 2**20, dtype=torch.int8, device="cuda"))
    return _flushed[0]


def medians(candidates: dict[str, Run], seconds: float) -> dict[str, float]:
    """Median milliseconds of each; they take turns for about so many seconds, 3 turns at least and 200 at most."""
    for run in candidates.values():
        run()
    once = sum(clock(run) for run in candidates.values())
    turns = int(min(max(seconds / once, 3), 200))
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(turns):
        for name, run in candidates.items():
            taken[name].append(clock(run))
    return {name: 1000 * statistics.median(values) for name, values in taken.items()}


def peak_mib(run: Run) -> float:
    """Most memory allocated at a time by one run, beside what was there before."""
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak / 2**20


def forward(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Run:
    def run() -> None:
        with torch.no_grad():
            function(*inputs)

    return run


def forward_backward(function: Callable[..., Tensor], inputs: Sequence[Tensor], learnt: Sequence[Tensor]) -> Run:
    with torch.no_grad():
        gradient = torch.randn_like(function(*inputs))

    def run() -> None:
        torch.autograd.grad(function(*inputs), [*inputs, *learnt], gradient, allow_unused=True)

    return run


class Rows(Protocol):
    """Where rows go, one at a time."""

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
    **more: Any,
) -> None:
    """One row for each direction in `runs`; "ours" and "naive" are among the candidates."""
    for direction, candidates in runs.items():
        key = key_of(kind, name, positions, direction)
        if key in rows_:
            continue
        times = medians(candidates, seconds)
        peaks = {candidate: peak_mib(run) for candidate, run in candidates.items()}
        row = {"kind": kind, "name": name, "n": positions, "direction": direction, "ms": times, "mib": peaks, **more}
        rows_.add({"key": key, "card": CARD, **row})
        others = "  ".join(
            f"{other} {times[other]:.2f} ms {peaks[other]:.1f} MiB = {times[other] / times['ours']:.2f} x, "
            f"1/{peaks[other] / max(peaks['ours'], 1e-9):.1f}"
            for other in times
            if other != "ours"
        )
        own = f"ours {times['ours']:.2f} ms {peaks['ours']:.1f} MiB"
        print(f"{kind:5} {name:22} N={positions:<5} {direction:8} {own}  {others}")
        sys.stdout.flush()


def to_map(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The sum, (B, N, D), as the next convolution wants it: (B, D, N) contiguous on CPU, channels last on a GPU."""
    return lambda *inputs: function(*inputs) if CUDA else function(*inputs).transpose(1, 2).contiguous()


def measure_sums(rows_: Rows, seconds: float) -> None:
    for name, (ours, naive, make, sizes) in SUMS.items():
        for n in sizes if seconds >= TRIAL_RUN_SECONDS or name == "embedded_gaussian" else sizes[:1]:
            largest = 4 * BATCH * n * n * (2 * PAIR_WIDTH if "pairs" in name else 1)
            if largest > LARGEST_BYTES:
                if (key := key_of("sum", name, n, "skipped")) not in rows_:
                    why = f"the naive form needs {largest >> 20} MiB"
                    rows_.add({"key": key, "card": CARD, "kind": "sum", "name": name, "n": n, "skipped": why})
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
    """Other people's blocks of this mode, and why those that are missing are."""
    found: dict[str, nn.Module] = {}
    missing: dict[str, str] = {}
    if mode == "embedded_gaussian":
        found["timm"] = NonLocalAttn(CHANNELS, use_scale=False, rd_ratio=0.5)
    else:
        missing["timm"] = "NonLocalAttn has the embedded Gaussian mode only"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from mmcv.cnn import NonLocal2d
    except ImportError as error:
        missing["mmcv"] = f"not installed: {error}"
    else:
        found["mmcv"] = NonLocal2d(CHANNELS, reduction=2, use_scale=False, mode=mode)
    return found, missing


def measure_blocks(rows_: Rows, seconds: float) -> None:
    for mode in [*MODES, "dual"]:
        ours: nn.Module = DualAttention(CHANNELS) if mode == "dual" else NonLocal(CHANNELS, mode=mode)  # type: ignore[arg-type]
        naive = NaiveDual(ours) if mode == "dual" else NaiveNonLocal(ours)  # type: ignore[arg-type]
        others, missing = ({}, {}) if mode == "dual" else rivals(mode)
        for n in (196, 784, 3136) if seconds >= TRIAL_RUN_SECONDS else (196,):
            if all(key_of("block", mode, n, direction) in rows_ for direction in ("forward", "both")):
                continue
            left_out = dict(missing)
            blocks = {"ours": ours, "naive": naive, **others}
            pairs = 4 * BATCH * CHANNELS * n * n
            if mode == "concatenation" and "mmcv" in blocks and pairs > LARGEST_BYTES:
                del blocks["mmcv"]
                left_out["mmcv"] = f"its tensor of pairs needs {pairs >> 20} MiB"
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
            compare(rows_, "block", mode, n, runs, seconds, left_out=left_out)


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


def targets(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each target with what was measured: how many times faster than naive, or which part of its memory."""

    def row(kind: str, name: str, n: int, direction: str = "forward") -> dict[str, Any] | None:
        asked = {"kind": kind, "name": name, "n": n, "direction": direction}
        return next((entry for entry in found if "ms" in entry and asked.items() <= entry.items()), None)

    checked: list[dict[str, Any]] = []

    def faster(target: str, entry: dict[str, Any] | None, at_least: float) -> None:
        ratio = entry["ms"]["naive"] / entry["ms"]["ours"] if entry else None
        met = None if ratio is None else ratio >= at_least
        checked.append({"target": f"{target}: >= {at_least:.3g} x naive's speed", "measured": ratio, "met": met})

    def leaner(target: str, entry: dict[str, Any] | None, one_in: float) -> None:
        ratio = entry["mib"]["naive"] / entry["mib"]["ours"] if entry else None
        met = None if ratio is None else ratio >= one_in
        checked.append({"target": f"{target}: memory <= 1/{one_in:g} of naive's", "measured": ratio, "met": met})

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


# ---- where the product form stops paying


def crossover(seconds: float) -> None:
    never = 0
    for n, m in [(49, 49), (196, 49), (196, 196), (784, 196), (784, 784), (3136, 784), (3136, 3136)]:
        for width, value_width in [(64, 64), (128, 128), (256, 256), (512, 512), (64, 512), (512, 256)]:
            made = [rows(n, width), rows(m, width), rows(m, value_width)]
            candidates = {
                "ours": forward(lambda *t: attend(*t, 1.0, never), made),
                "product": forward(naive_softmax, made),
            }
            times = medians(candidates, seconds)
            print(f"softmax        {n:5} x {m:<5} {width:3} {value_width:3}  {times['ours'] / times['product']:.2f}")
        for value_width in (64, 256):
            made = [scores(n), scores(m), rows(m, value_width)]
            candidates = {
                "ours": forward(lambda *t: concatenate(*t, never), made),
                "product": forward(naive_concatenation, made),
            }
            times = medians(candidates, seconds)
            print(f"concatenation  {n:5} x {m:<5}     {value_width:3}  {times['ours'] / times['product']:.2f}")
    print("\nTime of the form without a matrix over that of the product; above 1 the product is the faster one.")


def say(checked: list[dict[str, Any]]) -> None:
    print()
    for entry in checked:
        word = {True: "met", False: "MISSED", None: "not measured"}[entry["met"]]
        measured = "-" if entry["measured"] is None else f"{entry['measured']:.2f}"
        print(f"{entry['target']:75} {measured:>8}  {word}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each comparison, roughly")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--crossover", action="store_true", help="only measure where the product form stops paying")
    parser.add_argument("--out", type=Path, help="JSON lines of --crossover, as the GPU's table wants them")
    parser.add_argument("--rows", type=Path, help="JSON lines instead of docs/benchmarks/blocks-<device>.json")
    parser.add_argument("--table", type=Path, help="make the package's table of such a file of --crossover --out")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    if asked.table:
        card = _crossover.write_table(_crossover.RowFile(asked.table).rows)
        print(f"{_crossover.TABLE} has the rules of {card} now")
        return
    if asked.crossover and asked.out:
        _crossover.measure_all(_crossover.RowFile(asked.out), asked.seconds / 2)
        return
    if asked.crossover:
        crossover(asked.seconds / 8)
        return
    began = time.perf_counter()
    rows_: Rows = _crossover.RowFile(asked.rows) if asked.rows else RowList()
    measure_sums(rows_, asked.seconds)
    measure_subsampling(rows_, asked.seconds)
    measure_blocks(rows_, asked.seconds)
    checked = targets(rows_.rows)
    say(checked)
    if asked.rows:
        print(f"\n{asked.rows} has {len(rows_.rows)} rows after {time.perf_counter() - began:.0f} s")
        return
    setting = {"batch": BATCH, "channels": CHANNELS, "width": WIDTH, "pair_width": PAIR_WIDTH, "dtype": str(DTYPE)}
    path = write(f"blocks-{CARD}", {"setting": setting, "targets": checked, "rows": rows_.rows})
    print(f"\nwritten {path} after {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
