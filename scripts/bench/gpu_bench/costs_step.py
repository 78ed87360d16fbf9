"""The cost of each block in a slot, compared with that of a larger input or a larger model of the family."""

from __future__ import annotations

import itertools
from dataclasses import asdict

import timm
from slot_costs import BLOCKS, MODELS, SLOTS

import attnsurgery
from attnsurgery.errors import AttnSurgeryError
from attnsurgery.graph.find import input_size_of
from attnsurgery.latency import Conditions, Effort, backend_for
from gpu_bench.rows import Refused, Row, Rows
from gpu_bench.tiny import EFFORT, MODEL, SIZE

Size = tuple[int, int, int]
_LADDER = ("tf_efficientnet_lite0", "tf_efficientnet_lite1", "tf_efficientnet_lite2")
_SIZES = (64, 96, 128, 160, 224)


def slot(model: str, place: str, block: str, batch: int, effort: Effort, size: Size | None = None) -> Row:
    """The block in every slot of a kind, compared with the model without it, as a CUDA graph."""
    base, surgical = (timm.create_model(model).eval() for _ in range(2))
    size = size or input_size_of(base)
    edits = [{"at": f"stage:* {place}", "block": block}]
    try:
        attnsurgery.operate(surgical, {"version": 1, "name": "slots", "base": model, "edits": edits})
        backend = backend_for(Conditions.on("cuda", batch_size=batch, input_size=size), effort=effort)
        comparison = backend.compare(base, surgical)
    except AttnSurgeryError as error:
        raise Refused(str(error)) from error
    low, high = comparison.ratio_low, comparison.ratio_high
    return {
        "model": model,
        "slot": place,
        "block": block,
        "batch": batch,
        "ratio": comparison.ratio,
        "ratio_95": [low, high],
        "base_p50_ms": comparison.base.p50_ms,
        "measured_under": backend.conditions.describe(),
        "say": f"{comparison.ratio:.3f} x [{low:.3f}, {high:.3f}] of {comparison.base.p50_ms:.3f} ms",
    }


def rung(model: str, side: int, batch: int, effort: Effort) -> Row:
    """One model at one input size, as a CUDA graph."""
    network = timm.create_model(model).eval()
    conditions = Conditions.on("cuda", batch_size=batch, input_size=(3, side, side))
    latency = backend_for(conditions, effort=effort).measure(network)
    fields = {name: value for name, value in asdict(latency).items() if name not in ("versions", "state")}
    say = (
        f"{latency.p50_ms:.3f} ms, {latency.images_per_second:,.0f} images a second, eagerly {latency.eager_ms:.3f} ms"
    )
    return {"model": model, "side": side, "batch": batch, **fields, "card_state": latency.state, "say": say}


def slots(rows: Rows, tiny: bool) -> None:
    if tiny:
        rows.make(f"{MODEL} se branches b1", lambda: slot(MODEL, "branches", "se", 1, EFFORT, SIZE), 1.0)
        return
    for batch, model, block, place in itertools.product((64, 1), MODELS, BLOCKS, SLOTS):
        rows.make(
            f"{model} {block} {place} b{batch}",
            lambda case=(model, place, block, batch): slot(*case, Effort(0.003, 0.8)),  # type: ignore[misc]
            4.0,
        )


def ladder(rows: Rows, tiny: bool) -> None:
    if tiny:
        rows.make(f"{MODEL} {SIZE[1]} b1", lambda: rung(MODEL, SIZE[1], 1, EFFORT), 1.0)
        return
    for batch, model, side in itertools.product((64, 1), _LADDER, _SIZES):
        rows.make(
            f"{model} {side} b{batch}",
            lambda case=(model, side, batch): rung(*case, Effort(0.005, 0.6)),  # type: ignore[misc]
            4.0,
        )
