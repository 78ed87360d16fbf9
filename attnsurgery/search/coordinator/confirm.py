"""The confirmation: winner and base, trained equally long from the same weights, on images that the search never saw.

Picking the best of many noisy measurements is biased (the winner's curse), in latency as in accuracy. So the best few
candidates are measured again, and a candidate whose interval is not wholly within the budget is replaced by the next
one. These finalists are trained again, from seeds that the search did not use, and the best of them on the validation
images, averaged over the seeds, is the winner. This choice favours lucky trainings once more. So the winner and the
base are then trained from seeds that nothing was chosen by, and only these trainings see the test images. A single
finalist needs no choice and is trained from these last seeds only.

The verdict counts both the chance of images and the chance of training
(`attnsurgery.search.result.statistics.gain_of`): the same model trained again may do half a point better, and a test of
images alone would call that progress. One seed says nothing of other trainings, so the verdict is then about images
only.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from statistics import fmean
from typing import Any, Protocol

from attnsurgery.errors import SearchError
from attnsurgery.latency import Latency
from attnsurgery.search.config import SearchConfig
from attnsurgery.search.result.confirmation import Confirmation, Finalist
from attnsurgery.search.result.limits import Budgets
from attnsurgery.search.result.record import Record, Timing
from attnsurgery.search.result.statistics import pool_estimates


class Work(Protocol):
    """Does jobs of one kind, one for each payload, and returns their results in the same order."""

    def __call__(self, kind: str, *payloads: Mapping[str, Any]) -> list[dict[str, Any]]: ...


def confirm(
    config: SearchConfig, budgets: Budgets, order: Sequence[Record], reference: Latency, work: Work
) -> Confirmation:
    """Train finalists, choose the winner on the validation split, compare it with the base on the test split.

    For the comparison, winner and base are trained from seeds that no finalist was chosen by. The winner is measured
    again, and its training from the first of these seeds is saved as a timm directory. A finalist whose training
    diverges is left out, with the reason.

    Args:
        config: settings of the search.
        budgets: limits that the winner has to keep to.
        order: all candidates that may be the winner, the best first.
        reference: the base's latency.
        work: does jobs.

    Raises:
        StopRequested: the user asked for an end.
        SearchError: the base, or every finalist, cannot be trained.
    """
    measured = {"reference": reference}
    candidates = _within_budget(config, budgets, order, measured, work)
    finalists = _trained_to_choose(config, candidates, work)
    records = {record.digest: record for record, _ in candidates}
    for best in sorted(finalists, key=lambda finalist: finalist.rank(config.rank_by), reverse=True):
        if best.failed:
            continue
        winner = records[best.digest]
        payloads = [_trainings(record, config) for record in (winner, None)]
        scores = work("final training", *itertools.chain(*payloads))
        winner_scores, base_scores = scores[: len(payloads[0])], scores[len(payloads[0]) :]
        if failed := _failed(base_scores):
            raise SearchError(failed)
        if not _failed(winner_scores):
            break
        failure = replace(best, failed=_failed(winner_scores))
        finalists = [failure if finalist == best else finalist for finalist in finalists]
    else:
        failed = next((finalist.failed for finalist in finalists if not finalist.slow), "none keeps to its budget.")
        raise SearchError(f"no finalist could be trained again: {failed}")
    if not best.top1s:
        finalists = [_with_scores(finalist, winner_scores) if finalist == best else finalist for finalist in finalists]
    (verdict,) = work("verdict", {"record": winner.as_dict(), **measured})
    confirmation = Confirmation.from_dict(verdict)
    return replace(confirmation, finalists=tuple(finalists), rank_by=config.rank_by, anew=True)


def _trained_to_choose(config: SearchConfig, candidates: Sequence[tuple[Record, str]], work: Work) -> list[Finalist]:
    """The finalists in their order, with validation scores if there are several to choose from."""
    chosen_records = [record for record, slow in candidates if not slow]
    trainings = [_trainings(record, config) for record in chosen_records] if len(chosen_records) > 1 else []
    results = iter(work("training", *itertools.chain(*trainings)))
    finalists = []
    for record, slow in candidates:
        finalist = Finalist(record.number, record.digest or "", (), None)
        if slow:
            finalists.append(replace(finalist, failed=slow, slow=True))
            continue
        scores = list(islice(results, config.confirm_seeds))
        if failed := _failed(scores):
            finalist = replace(finalist, failed=failed)
        elif scores:
            finalist = _with_scores(finalist, scores)
        finalists.append(finalist)
    return finalists


def _trainings(record: Record | None, config: SearchConfig) -> list[dict[str, Any]]:
    """The payloads of the trainings of a candidate, or of the base (None), one for each seed."""
    data = record.as_dict() if record else None
    return [{"record": data, "index": index} for index in range(config.confirm_seeds)]


def _failed(scores: Sequence[Mapping[str, Any]]) -> str:
    """Why the first of the failed trainings failed; '' if none failed."""
    return next((score["failed"] for score in scores if "failed" in score), "")


def _with_scores(finalist: Finalist, scores: Sequence[Mapping[str, Any]]) -> Finalist:
    top1s, loss = tuple(score["top1"] for score in scores), fmean(score["loss"] for score in scores)
    return replace(finalist, top1s=top1s, loss=loss)


def _within_budget(
    config: SearchConfig, budgets: Budgets, order: Sequence[Record], measured: Mapping[str, Any], work: Work
) -> list[tuple[Record, str]]:
    """Measure candidates again, the best first, until enough of them are surely within the budget.

    Returns:
        Each measured candidate, with '' or the reason why it is not surely within the budget. If none is, the one with
        the lowest upper end of its interval counts as within.
    """
    if "latency" not in budgets.limits:
        return [(record, "") for record in order[: config.finalists]]
    timings: list[tuple[Record, str, float]] = []
    for record in order:
        if sum(not doubt for _, doubt, _ in timings) == config.finalists:
            break
        (result,) = work("timing", {"record": record.as_dict(), **measured})
        timing = Timing(**result)
        timings.append((record, _doubt(budgets, record, timing), _pooled_timing(record, timing).high_ms))
    if all(doubt for _, doubt, _ in timings):
        least = min(timings, key=lambda entry: entry[2])
        return [(record, "" if record is least[0] else doubt) for record, doubt, _ in timings]
    return [(record, doubt) for record, doubt, _ in timings]


def _doubt(budgets: Budgets, record: Record, timing: Timing) -> str:
    """Why a candidate is not surely within its budget; '' if it is."""
    again = budgets.check(replace(record, timing=timing))
    if not again.within:
        return f"{again.words} when measured again, over the budget"
    together = budgets.check(replace(record, timing=_pooled_timing(record, timing)), "high")
    if not together.within:
        return f"up to {together.words} when measured again, not surely within the budget"
    return ""


def _pooled_timing(record: Record, second: Timing) -> Timing:
    """The measurement of the trial pooled with a second one, made when the machine may have been in another state."""
    timings = [timing for timing in (record.timing, second) if timing is not None]
    ms, half = pool_estimates(
        [timing.ms for timing in timings], [(timing.high_ms - timing.low_ms) / 2 for timing in timings]
    )
    return replace(second, ms=ms, low_ms=ms - half, high_ms=ms + half)
