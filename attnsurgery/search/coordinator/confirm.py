"""The last word: winner and base, trained equally long from the same weights, on images that the search never saw.

Picking the best of many noisy measurements is biased (the winner's curse), in latency as in accuracy. So the few best
are measured again, and one whose interval is not wholly within the budget leaves its place to the next; they are
trained again, from seeds that the search did not use; and the best of them on the validation images, all seeds
together, is the winner. That choice favours lucky trainings once more. So the winner and the base are then trained from
seeds that nothing was chosen by, and only these trainings see the test images. Where there is one finalist there is
nothing to choose, and it is trained from these last seeds alone.

Both chance of images and chance of training are counted (`attnsurgery.search.result.statistics.gain_of`): the same
model trained again may do half a point better, and a test of images alone would call that progress. With one seed
nothing is known of other trainings, and the verdict is one on images.
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
from attnsurgery.search.result.statistics import pooled


class Work(Protocol):
    """Has jobs done: see attnsurgery.search.workers.pool."""

    def __call__(self, kind: str, *given: Mapping[str, Any]) -> list[dict[str, Any]]: ...


def confirm(
    config: SearchConfig, budgets: Budgets, order: Sequence[Record], reference: Latency, work: Work
) -> Confirmation:
    """Train finalists, choose the winner on the validation split, hold it beside the base on the test split.

    Winner and base are trained for that from seeds that no finalist was chosen by. The winner is measured again, and as
    trained from the first of these seeds saved as a timm directory. A finalist whose training diverges is left out, and
    its reason kept.

    Args:
        order: all that may be the winner, the best first.
        work: from a kind of job, and what each is given, to the results.

    Raises:
        StopAsked: the user asked for an end.
        SearchError: the base, or every finalist, cannot be trained.
    """
    measured = {"reference": reference}
    kept = _within_budget(config, budgets, order, measured, work)
    finalists = _trained_to_choose(config, kept, work)
    records = {record.digest: record for record, _ in kept}
    for best in sorted(finalists, key=lambda one: one.rank(config.rank_by), reverse=True):
        if best.failed:
            continue
        winner = records[best.digest]
        asked = [_trainings(record, config) for record in (winner, None)]
        scores = work("final training", *itertools.chain(*asked))
        mine, of_base = scores[: len(asked[0])], scores[len(asked[0]) :]
        if failed := _failed(of_base):
            raise SearchError(failed)
        if not _failed(mine):
            break
        finalists = [replace(one, failed=_failed(mine)) if one == best else one for one in finalists]
    else:
        failed = next((one.failed for one in finalists if not one.slow), "none keeps to its budget.")
        raise SearchError(f"no finalist could be trained again: {failed}")
    if not best.top1s:
        finalists = [_scored(one, mine) if one == best else one for one in finalists]
    (verdict,) = work("verdict", {"record": winner.as_dict(), **measured})
    found = Confirmation.from_dict(verdict)
    return replace(found, finalists=tuple(finalists), rank_by=config.rank_by, anew=True)


def _trained_to_choose(config: SearchConfig, kept: Sequence[tuple[Record, str]], work: Work) -> list[Finalist]:
    """The finalists in their order, with the scores that one of them is chosen by; without, where there is one."""
    asked = [record for record, slow in kept if not slow]
    trainings = [_trainings(record, config) for record in asked] if len(asked) > 1 else []
    found = iter(work("training", *itertools.chain(*trainings)))
    finalists = []
    for record, slow in kept:
        one = Finalist(record.number, record.digest or "", (), None)
        if slow:
            finalists.append(replace(one, failed=slow, slow=True))
            continue
        scores = list(islice(found, config.confirm_seeds))
        failed = _failed(scores)
        finalists.append(replace(one, failed=failed) if failed else _scored(one, scores) if scores else one)
    return finalists


def _trainings(record: Record | None, config: SearchConfig) -> list[dict[str, Any]]:
    """Of a candidate, or of the base, from each of as many seeds: what a job is given."""
    given = record.as_dict() if record else None
    return [{"record": given, "index": index} for index in range(config.confirm_seeds)]


def _failed(scores: Sequence[Mapping[str, Any]]) -> str:
    """Why the first training failed that did; '' if none did."""
    return next((score["failed"] for score in scores if "failed" in score), "")


def _scored(finalist: Finalist, scores: Sequence[Mapping[str, Any]]) -> Finalist:
    top1s, loss = tuple(score["top1"] for score in scores), fmean(score["loss"] for score in scores)
    return replace(finalist, top1s=top1s, loss=loss)


def _within_budget(
    config: SearchConfig, budgets: Budgets, order: Sequence[Record], measured: Mapping[str, Any], work: Work
) -> list[tuple[Record, str]]:
    """The first that surely keep to their budget when they are measured again, and those before them that do not, with
    what they took. Where none does, the one with the least to fear is as good as it gets."""
    if "latency" not in budgets.most:
        return [(record, "") for record in order[: config.finalists]]
    found: list[tuple[Record, str, float]] = []
    for record in order:
        if sum(not doubt for _, doubt, _ in found) == config.finalists:
            break
        (again,) = work("timing", {"record": record.as_dict(), **measured})
        timing = Timing(**again)
        found.append((record, _doubt(budgets, record, timing), _taken_together(record, timing).high_ms))
    if all(doubt for _, doubt, _ in found):
        least = min(found, key=lambda entry: entry[2])
        return [(record, "" if record is least[0] else doubt) for record, doubt, _ in found]
    return [(record, doubt) for record, doubt, _ in found]


def _doubt(budgets: Budgets, record: Record, timing: Timing) -> str:
    """Why a candidate is not surely within its budget; '' if it is."""
    again = budgets.check(replace(record, timing=timing))
    if not again.within:
        return f"{again.words} when measured again, over the budget"
    together = budgets.check(replace(record, timing=_taken_together(record, timing)), "high")
    if not together.within:
        return f"up to {together.words} when measured again, not surely within the budget"
    return ""


def _taken_together(record: Record, again: Timing) -> Timing:
    """The measurement of the trial and the one made again, at another time, when the machine may have been another."""
    known = [timing for timing in (record.timing, again) if timing is not None]
    ms, half = pooled([timing.ms for timing in known], [(timing.high_ms - timing.low_ms) / 2 for timing in known])
    return replace(again, ms=ms, low_ms=ms - half, high_ms=ms + half)
