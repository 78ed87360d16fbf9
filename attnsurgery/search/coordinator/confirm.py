"""The confirmation: winner and base, trained equally long from the same weights, on images that the search never saw.

Picking the best of many noisy measurements is biased (the winner's curse), in latency as in accuracy. So the best few
candidates are measured again, and a candidate whose interval is not wholly within the budget is replaced by the next
one. Where the search chose the learning rates of all candidates, each of these finalists then gets its own best of
their neighbours, as the base got. They are trained again, from seeds that the search did not use, and the best of them
on the validation images, averaged over the seeds, is the winner. This choice favours lucky trainings once more. So the
winner and the base are then trained from seeds that nothing was chosen by, and only these trainings see the test
images. A single finalist needs no choice between finalists.

The verdict counts both the chance of images and the chance of training
(`attnsurgery.search.result.statistics.gain_of`): the same model trained again may do half a point better, and a test of
images alone would call that progress. Trainings are added one by one until the gain is decided
(`attnsurgery.search.result.sequential`). One seed says nothing of other trainings, so the verdict is then about images
only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice
from statistics import fmean
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from attnsurgery.errors import SearchError
from attnsurgery.latency import Latency
from attnsurgery.search.config import SearchConfig
from attnsurgery.search.result.confirmation import Confirmation, Finalist, Verdict
from attnsurgery.search.result.limits import Budgets
from attnsurgery.search.result.record import Record, Timing
from attnsurgery.search.result.sequential import Look, look_at, seeds_move_together
from attnsurgery.search.result.statistics import pool_estimates
from attnsurgery.search.tuning import Training

Results = list[dict[str, Any]]


class Work(Protocol):
    """Does jobs of one kind, one for each payload, and returns their results in the same order."""

    def __call__(self, kind: str, *payloads: Mapping[str, Any]) -> Results: ...


def confirm(
    config: SearchConfig,
    budgets: Budgets,
    order: Sequence[Record],
    reference: Latency,
    work: Work,
    trainings: Sequence[Training] = (),
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
        trainings: settings of which each finalist gets its own best, that of all trials first; none if they were given.

    Raises:
        StopRequested: the user asked for an end.
        SearchError: the base, or every finalist, cannot be trained.
    """
    measured = {"reference": reference}
    candidates = _within_budget(config, budgets, order, measured, work)
    finalists = _tuned([_finalist(record, slow) for record, slow in candidates], candidates, config, trainings, work)
    records = {record.digest: record for record, _ in candidates}
    finalists = _trained_to_choose(config, finalists, records, work)
    for best in sorted(finalists, key=lambda finalist: finalist.rank(config.rank_by), reverse=True):
        if best.failed:
            continue
        winner = records[best.digest]
        comparison = _compared(config, winner, best, finalists, work)
        if isinstance(comparison, Confirmation):
            break
        finalists = [replace(best, failed=comparison) if finalist == best else finalist for finalist in finalists]
    else:
        failed = next((finalist.failed for finalist in finalists if not finalist.slow), "none keeps to its budget.")
        raise SearchError(f"no finalist could be trained again: {failed}")
    (saved,) = work("winner", {"record": winner.as_dict(), **measured})
    return replace(comparison, timing=Timing(**saved["timing"]))


def _finalist(record: Record, slow: str) -> Finalist:
    return Finalist(record.number, record.digest or "", (), None, failed=slow, slow=bool(slow))


def _tuned(
    finalists: Sequence[Finalist],
    candidates: Sequence[tuple[Record, str]],
    config: SearchConfig,
    trainings: Sequence[Training],
    work: Work,
) -> list[Finalist]:
    """The finalists, each with its own best of several settings; the score of each comes from one training."""
    if len(trainings) < 2:
        return list(finalists)
    tried = [
        [_training(record, 0, asdict(training)) for training in trainings] for record, slow in candidates if not slow
    ]
    results = iter(work("training", *(payload for payloads in tried for payload in payloads)))
    tuned = []
    for finalist in finalists:
        if not finalist.failed:
            scores = list(islice(results, len(trainings)))
            best = max(range(len(trainings)), key=lambda at: _rank(scores[at], config))
            finalist = replace(finalist, training=asdict(trainings[best]))
        tuned.append(finalist)
    return tuned


def _rank(score: Mapping[str, Any], config: SearchConfig) -> tuple[float, float]:
    if "failed" in score:
        return -np.inf, 0.0
    return (score["top1"], -score["loss"]) if config.rank_by == "top1" else (-score["loss"], score["top1"])


def _trained_to_choose(
    config: SearchConfig, finalists: Sequence[Finalist], records: Mapping[str | None, Record], work: Work
) -> list[Finalist]:
    """The finalists, with validation scores if there are several to choose from."""
    chosen = [finalist for finalist in finalists if not finalist.failed]
    if len(chosen) < 2:
        return list(finalists)
    payloads = [
        _training(records[finalist.digest], index, finalist.training)
        for finalist in chosen
        for index in range(config.first_seeds)
    ]
    results = iter(work("training", *payloads))
    scored = []
    for finalist in finalists:
        if not finalist.failed:
            scores = list(islice(results, config.first_seeds))
            failed = _failed(scores)
            finalist = replace(finalist, failed=failed) if failed else _with_scores(finalist, scores)
        scored.append(finalist)
    return scored


def _compared(
    config: SearchConfig, winner: Record, best: Finalist, finalists: Sequence[Finalist], work: Work
) -> Confirmation | str:
    """The comparison of the winner with the base; the reason why the winner could not be trained.

    Args:
        config: settings of the search.
        winner: the record of the best finalist.
        best: the best finalist.
        finalists: all of them.
        work: does jobs.

    Raises:
        SearchError: the base cannot be trained.
    """
    scored = [finalist.top1s for finalist in finalists if finalist.top1s]
    paired = seeds_move_together(np.array(scored)) if scored else False
    own: Results = []  # of the winner's trainings
    base: Results = []
    while True:
        start = len(own)
        count = 1 if start else config.first_seeds
        indices = range(start, start + count)
        results = work(
            "final training",
            *(_training(winner, index, best.training) for index in indices),
            *(_training(None, index) for index in indices),
        )
        own, base = own + results[:count], base + results[count:]
        if failed := _failed(base):
            raise SearchError(failed)
        if failed := _failed(own):
            return failed
        own_SN, base_SN = (np.stack([right_of(result) for result in side]) for side in (own, base))
        look = look_at(
            own_SN,
            base_SN,
            begin=config.first_seeds,
            most=config.most_seeds,
            difference=config.difference / 100,
            paired=paired,
        )
        if look.decided:
            break
    if not best.top1s:
        finalists = [_with_scores(one, own) if one == best else one for one in finalists]
    compared = compare_on_test(best.digest, base_SN, own_SN, own[0]["epochs"], look)
    balanced = [[result["balanced"] for result in side if result["balanced"] is not None] for side in (base, own)]
    return replace(
        compared,
        balanced=(fmean(balanced[0]), fmean(balanced[1])) if all(balanced) else None,
        finalists=tuple(finalists),
        rank_by=config.rank_by,
        anew=True,
        first_seeds=config.first_seeds,
        most_seeds=config.most_seeds,
        difference=config.difference / 100,
        paired=paired,
    )


def compare_on_test(
    digest: str, base_SN: npt.NDArray[np.bool_], winner_SN: npt.NDArray[np.bool_], epochs: int, look: Look | None = None
) -> Confirmation:
    """The verdict on the winner from its answers and the base's on the same N test images.

    Args:
        digest: of the winner.
        base_SN: booleans for each seed, true where the base classified an image correctly.
        winner_SN: the same for the winner.
        epochs: length of each training.
        look: the comparison of the two; by default the only look at these trainings.
    """
    trainings, images = base_SN.shape
    look = look or look_at(winner_SN, base_SN, begin=trainings, most=trainings, difference=0.0)
    verdict: Verdict = "no significant difference"
    if look.significant:
        verdict = "better" if look.gain.mean > 0 else "worse"
    return Confirmation(
        digest=digest,
        images=images,
        seeds=trainings,
        epochs=epochs,
        base_top1=float(base_SN.mean()),
        winner_top1=float(winner_SN.mean()),
        low=look.gain.low,
        high=look.gain.high,
        p_value=look.gain.p_value,
        verdict=verdict,
        timing=Timing(0.0, 0.0, 0.0, 0.0),
        limit=look.limit,
        looks_at_seeds=look.number,
    )


def right_of(result: Mapping[str, Any]) -> npt.NDArray[np.bool_]:
    """(N,) booleans: which test images a training classified correctly, from the packed form in its result."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(result["right"]), np.uint8), count=result["images"])
    return bits.astype(bool)


def _training(record: Record | None, index: int, training: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The payload of a training of a candidate, or of the base (None).

    Args:
        record: of the candidate.
        index: of the seed.
        training: its own settings; None for those that all trainings of its kind have.
    """
    payload = {"record": record.as_dict() if record else None, "index": index}
    return {**payload, "training": dict(training)} if training else payload


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
