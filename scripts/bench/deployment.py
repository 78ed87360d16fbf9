#!/usr/bin/env python
"""Compares latencies in runtimes with the runtimes' own benchmarks, in one process, and a model with itself.

    python scripts/bench/deployment.py [--seconds 40] [--threads 1] [--self-tests 30] [--only libraries|self-tests]

ONNX Runtime's own benchmark is a plain loop of `session.run`; OpenVINO's is the timing loop of its benchmark_app.
Blocks of equally many calls of this package and of the library alternate. The ratio of the two medians has to be within
3 % of 1. Of the 95 % confidence intervals of a model's ratio to itself, 93 % have to contain 1.

Writes docs/benchmarks/deployment-cpu.json after every row, with the load of the machine during the measurement. Rows of
another --only stay.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import onnxruntime
import openvino
import timm
import torch
from _common import RESULTS, write

import attnsurgery  # noqa: F401  (makes the names known to timm)
from attnsurgery.latency import Conditions, Effort, Mode, backend_for
from attnsurgery.latency.exported import INPUT, Exported
from attnsurgery.latency.protocol import median, ratio_of, sample
from attnsurgery.latency.runtime import RuntimeLatency
from attnsurgery.latency.self_test import self_test

Block = Callable[[int], float]
"""Returns the milliseconds that several calls take."""

MODELS = ("resnet18", "resnet18_se", "resnet18_nonlocal_s3", "mobilenetv3_small_050_se")
SELF_TESTS: tuple[tuple[str, Mode], ...] = (("cpu", "eager"), ("cpu", "compile"), ("onnxruntime", "eager"))
NAME = "deployment-cpu"
EFFORT = Effort(max_seconds=1.5)
TOLERANCE = 0.03
_BLOCK_MS = 30.0


def plain_loop(exported: Exported, threads: int) -> Block:
    """A plain loop of `session.run`, as the documentation of ONNX Runtime shows it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(exported.source, options, providers=["CPUExecutionProvider"])
    x_BCHW = exported.x_BCHW.numpy()

    def block(repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            session.run(None, {INPUT: x_BCHW})
        return (time.perf_counter() - start) * 1000.0

    return block


def benchmark_app(exported: Exported, threads: int) -> Block:
    """The timing loop of OpenVINO's benchmark_app: -hint latency -api sync -inference_only -infer_precision f32."""
    from openvino.tools.benchmark.benchmark import Benchmark

    app = Benchmark("CPU", 1, 1, 0, "sync", True)
    config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = app.core.compile_model(app.core.read_model(exported.source), "CPU", config)
    requests = app.create_infer_requests(compiled)
    requests[0].set_input_tensor(openvino.Tensor(exported.x_BCHW.numpy()))
    queue = SimpleNamespace(get_next_batch_size=lambda: exported.x_BCHW.shape[0])

    def block(repeats: int) -> float:
        app.niter = repeats
        times_ms, _, _ = app.sync_inference(requests[0], queue)
        return float(sum(times_ms))

    return block


def compare_with_library(name: str, architecture: str, threads: int, seconds: float) -> dict[str, Any]:
    """The median latency of one model here and in the library's benchmark, measured alternately on new copies."""
    torch.manual_seed(0)
    model = timm.create_model(architecture)
    backend = backend_for(Conditions(threads=threads), name)
    assert isinstance(backend, RuntimeLatency)
    exported = backend._exported(model)
    library = {"onnxruntime": plain_loop, "openvino": benchmark_app}[name]

    @contextmanager
    def placement(backwards: bool) -> Iterator[list[Block]]:
        first = library(exported, threads) if backwards else None
        with backend._prepared(model) as call:
            library_block = first or library(exported, threads)
            for _ in range(10):
                library_block(1)
            yield [partial(backend.time_block, call), library_block]

    load_before = os.getloadavg()[0]
    effort = Effort(tolerance=0.003, max_seconds=seconds, placements=12, min_rounds=24, rounds=4)
    # many calls a block, since the first call of a block finds the other's weights in the cache
    calls = max(1, round(_BLOCK_MS / library(exported, threads)(5) * 5))
    samples = sample(lambda block, repeats: block(calls * repeats), placement, effort)
    ours_ms, theirs_ms = ([ms / calls for ms in times] for times in samples.times)
    of_rounds = ratio_of(theirs_ms, ours_ms, samples.placement, samples.reverse)
    ratio = median(ours_ms) / median(theirs_ms)
    return {
        "runtime": name,
        "library_benchmark": library.__name__,
        "model": architecture,
        "conditions": backend.conditions.describe(),
        "runs": samples.runs[0] * calls,
        "ours_p50_ms": median(ours_ms),
        "library_p50_ms": median(theirs_ms),
        "ratio": ratio,
        "ratio_of_rounds": of_rounds.value,
        "ratio_of_rounds_95": [of_rounds.low, of_rounds.high],
        "left_out": samples.left_out,
        "passed": abs(ratio - 1) <= TOLERANCE,
        "load_average": [load_before, os.getloadavg()[0]],
    }


def compare_with_itself(name: str, mode: Mode, architecture: str, threads: int, repeats: int) -> dict[str, Any]:
    """The ratio of a model to itself, measured several times."""
    torch.manual_seed(0)
    conditions = Conditions(threads=threads, mode=mode, input_size=(3, 64, 64))
    load_before = os.getloadavg()[0]
    result = self_test(backend_for(conditions, name, EFFORT), timm.create_model(architecture), repeats)
    return {
        "backend": name,
        "model": architecture,
        "conditions": conditions.describe(),
        **result.as_dict(),
        "load_average": [load_before, os.getloadavg()[0]],
    }


def earlier_rows(key: str) -> list[dict[str, Any]]:
    path = RESULTS / f"{NAME}.json"
    return list(json.loads(path.read_text()).get(key, [])) if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=40.0, help="time limit of one row of libraries")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--self-tests", type=int, default=30)
    parser.add_argument("--only", choices=["libraries", "self-tests"])
    options = parser.parse_args()
    results: dict[str, Any] = {
        "versions": {"onnxruntime": onnxruntime.__version__, "openvino": openvino.__version__},
        "processors": os.cpu_count(),
        "libraries": [] if options.only != "self-tests" else earlier_rows("libraries"),
        "self_tests": [] if options.only != "libraries" else earlier_rows("self_tests"),
    }
    if options.only != "self-tests":
        for name in ("onnxruntime", "openvino"):
            for architecture in MODELS:
                row = compare_with_library(name, architecture, options.threads, options.seconds)
                results["libraries"].append(row)
                write(NAME, results)
                print(f"{name:12} {architecture:26} {row['ours_p50_ms']:8.3f} ms  ratio {row['ratio']:.4f}", flush=True)
    if options.only != "libraries":
        for name, mode in SELF_TESTS:
            row = compare_with_itself(name, mode, "resnet18", options.threads, options.self_tests)
            results["self_tests"].append(row)
            write(NAME, results)
            print(
                f"{name:12} {mode:8} {row['held']} of {options.self_tests} contain 1, worst {row['worst']:.4f}",
                flush=True,
            )
    if not all(row["passed"] for row in results["libraries"] + results["self_tests"]):
        raise SystemExit("some rows did not pass")


if __name__ == "__main__":
    main()
