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
from typing import Any

import numpy as np

from attnsurgery.errors import SearchError
from attnsurgery.latency import Latency
from attnsurgery.search.config import SearchConfig
from attnsurgery.search.coordinator.compare import compare, failed_in, training_of, with_scores
from attnsurgery.search.coordinator.rivals import Work, meet_rivals
from attnsurgery.search.execution.baseline import timing_of
from attnsurgery.search.result.confirmation import Confirmation, Finalist
from attnsurgery.search.result.limits import Budgets
from attnsurgery.search.result.record import Record, Timing
from attnsurgery.search.result.statistics import pool_estimates
from attnsurgery.search.tuning import Training, Tuned, alternatives


def confirm(
    config: SearchConfig,
    budgets: Budgets,
    order: Sequence[Record],
    reference: Latency,
    work: Work,
    tuned: Tuned | None = None,
    pilot: int = 1,
) -> Confirmation:
    """Train finalists, choose the winner on the validation split, compare it with the base on the test split.

    For the comparison, winner and base, and the rivals of `--against`, are trained from seeds that no finalist was
    chosen by. The winner is measured again, and its training from the first of these seeds is saved as a timm
    directory. A finalist whose training diverges is left out, with the reason.

    Args:
        config: settings of the search.
        budgets: limits that the winner has to keep to.
        order: all candidates that may be the winner, the best first.
        reference: the base's latency.
        work: does jobs.
        tuned: how base and candidates are trained, if that was chosen; each finalist then gets its own best settings.
        pilot: epochs of the shortest training, by which learning rates of rivals are chosen.

    Raises:
        StopRequested: the user asked for an end.
        SearchError: the base, or every finalist, cannot be trained.
    """
    measured = {"reference": reference}
    candidates = _within_budget(config, budgets, order, measured, work)
    trainings = alternatives(config, tuned) if tuned else ()
    finalists = _tuned([_finalist(record, slow) for record, slow in candidates], candidates, config, trainings, work)
    records = {record.digest: record for record, _ in candidates}
    finalists = _trained_to_choose(config, finalists, records, work)
    entrants, others = meet_rivals(config, budgets, reference, work, tuned, pilot)
    for best in sorted(finalists, key=lambda finalist: finalist.rank(config.rank_by), reverse=True):
        if best.failed:
            continue
        winner = records[best.digest]
        comparison = compare(config, winner, best, finalists, entrants, work)
        if not isinstance(comparison, str):
            break
        finalists = [replace(best, failed=comparison) if finalist == best else finalist for finalist in finalists]
    else:
        failed = next((finalist.failed for finalist in finalists if not finalist.slow), "none keeps to its budget.")
        raise SearchError(f"no finalist could be trained again: {failed}")
    (saved,) = work("winner", {"record": winner.as_dict(), **measured})
    confirmation, options = comparison
    timings = {"winner": Timing(**saved["timing"]), "base": timing_of(reference)}
    options = [replace(option, timing=timings.get(option.kind, option.timing)) for option in options]
    confirmation = replace(confirmation, timing=timings["winner"], options=(*options, *others))
    return confirmation.with_base(tuned.trained_out) if tuned else confirmation


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
        [training_of(record, 0, asdict(training)) for training in trainings] for record, slow in candidates if not slow
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
    return (score["metric"], -score["loss"]) if config.rank_by == "metric" else (-score["loss"], score["metric"])


def _trained_to_choose(
    config: SearchConfig, finalists: Sequence[Finalist], records: Mapping[str | None, Record], work: Work
) -> list[Finalist]:
    """The finalists, with validation scores if there are several to choose from."""
    chosen = [finalist for finalist in finalists if not finalist.failed]
    if len(chosen) < 2:
        return list(finalists)
    payloads = [
        training_of(records[finalist.digest], index, finalist.training)
        for finalist in chosen
        for index in range(config.first_seeds)
    ]
    results = iter(work("training", *payloads))
    scored = []
    for finalist in finalists:
        if not finalist.failed:
            scores = list(islice(results, config.first_seeds))
            failed = failed_in(scores)
            finalist = replace(finalist, failed=failed) if failed else with_scores(finalist, scores)
        scored.append(finalist)
    return scored


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
