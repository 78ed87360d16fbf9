"""Checks latency measurements: a model compared with itself in every mode, and with Triton's measurements.

do_bench flushes the L2 cache before each call, so it is compared with a measurement with a cold cache;
do_bench_cudagraph does not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import timm
import torch

from attnsurgery.graph.find import input_size_of
from attnsurgery.latency import Conditions, Effort, backend_for
from attnsurgery.latency.self_test import self_test
from gpu_bench.rows import RED, Row, Rows
from gpu_bench.tiny import EFFORT, MODEL, SIZE

MODES = ("cudagraph", "eager", "compile-cudagraph", "compile")


def row(name: str, mode: str, batch: int, tiny: bool) -> Row:
    model = timm.create_model(name).eval()
    compiled, size = mode.startswith("compile"), SIZE if tiny else input_size_of(model)
    conditions = Conditions.on("cuda", batch_size=batch, input_size=size, mode=mode)
    backend = backend_for(conditions, effort=EFFORT if tiny else Effort(tolerance=0.002, max_seconds=1.2))
    result = self_test(backend, model, 1 if tiny else 4 if compiled else 12)
    p50_ms = backend.measure(model).p50_ms
    cold_ms = backend_for(replace(conditions, cold_cache=True), effort=backend.effort).measure(model).p50_ms
    triton = {"do_bench": triton_ms(model, conditions, flushed=True)}
    if conditions.graph:
        triton["do_bench_cudagraph"] = triton_ms(model, conditions, flushed=False)
    figures = result.as_dict()
    ours_ms = {"do_bench": cold_ms, "do_bench_cudagraph": p50_ms}
    ratios = {meter: ours_ms[meter] / ms for meter, ms in triton.items() if isinstance(ms, float)}
    say = f"{result.held} of {len(result.ratios)} intervals contain 1, half width {100 * result.half_width:.2f} %"
    say += "".join(f", {ratio:.3f} of {meter}" for meter, ratio in ratios.items())
    return {
        **{"model": name, "mode": mode, "batch": batch, "measured_under": conditions.describe()},
        **{"p50_ms": p50_ms, "cold_p50_ms": cold_ms, "triton_ms": triton, "ours_to_triton": ratios, **figures},
        **{"say": say, **({} if result.passed or tiny else {"state": RED})},
    }


def triton_ms(model: torch.nn.Module, conditions: Conditions, flushed: bool) -> float | str:
    """Triton's median for a forward pass in bfloat16 and channels last; or the error."""
    try:
        from triton import testing

        torch._dynamo.reset()  # after several models dynamo would silently stop compiling
        with torch.inference_mode():
            subject: Any = copy.deepcopy(model).to("cuda", torch.bfloat16, memory_format=torch.channels_last)
            x = torch.randn(conditions.shape, device="cuda", dtype=torch.bfloat16)
            x = x.contiguous(memory_format=torch.channels_last)
            call: Callable[[], Any] = lambda: forward(x)  # noqa: E731
            forward = torch.compile(subject, dynamic=False) if conditions.compiled else subject
            call()
            if not flushed:
                return float(testing.do_bench_cudagraph(call, rep=200, return_mode="median"))
            if conditions.graph:
                call = captured(call)
            return float(testing.do_bench(call, warmup=25, rep=200, return_mode="median"))
    except Exception as error:  # the comparison is left out of the row
        return f"{type(error).__name__}: {str(error)[:200]}"


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def run(rows: Rows, tiny: bool) -> None:
    name = MODEL if tiny else "resnet50"
    for mode in MODES[:2] if tiny else MODES:
        for batch in (1,) if tiny else (64, 1):
            needs = 1.0 if tiny else 45.0 if mode.startswith("compile") else 25.0
            key = f"{name} {mode} b{batch}"
            rows.make(key, lambda mode=mode, batch=batch: row(name, mode, batch, tiny), needs)  # type: ignore[misc]
