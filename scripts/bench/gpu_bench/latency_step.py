"""The table of latencies, row by row, and how well latencies are predicted."""

from __future__ import annotations

import latency_model
from latency import Case, cases, measure, row_text

from attnsurgery.errors import AttnSurgeryError
from attnsurgery.latency import Effort
from gpu_bench.rows import RED, Refused, Row, Rows
from gpu_bench.tiny import EFFORT, MODEL, SECONDS

_TINY = [Case(MODEL, "se", mode, 1) for mode in ("cudagraph", "eager")]
_NEEDED_S = {"eager": 10.0, "cudagraph": 10.0, "compile-cudagraph": 45.0}


def row(case: Case, effort: Effort) -> Row:
    try:
        fields = measure(case, "cuda", effort)
    except AttnSurgeryError as error:
        raise Refused(str(error)) from error
    return {**fields, "say": row_text(fields)}


def run(rows: Rows, tiny: bool) -> None:
    effort = EFFORT if tiny else Effort(tolerance=0.004, max_seconds=1.5)
    for case in _TINY if tiny else cases():
        rows.make(case.key, lambda case=case: row(case, effort), 1.0 if tiny else _NEEDED_S[case.mode])  # type: ignore[misc]


def prediction_row(
    name: str, space: str, seconds: float, candidates: int, check_seconds: float, tiny: bool = False
) -> Row:
    fields = latency_model.check_predictions(name, space, seconds, candidates, "candidates", check_seconds)
    is_met = fields["mean_error"] <= latency_model.TARGETS["cuda"]
    say = f"mean error {100 * fields['mean_error']:.2f} %, worst {100 * fields['worst_error']:.2f} %, rank correlation "
    say += f"{fields['spearman']:.2f}"
    return {**fields, "met": is_met, "say": say, **({} if is_met or tiny else {"state": RED})}


def model(rows: Rows, tiny: bool) -> None:
    if tiny:
        rows.make(f"{MODEL} tiny", lambda: prediction_row(MODEL, "tiny", SECONDS, 2, SECONDS, True))
        return
    for name, space in list(latency_model.MODELS.items())[:2]:
        rows.make(f"{name} {space}", lambda name=name, space=space: prediction_row(name, space, 40.0, 12, 1.5), 70.0)  # type: ignore[misc]
