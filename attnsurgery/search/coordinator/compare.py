"""Trains winner, base and rivals for the verdict, from one seed after the other, until their comparison is decided."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from statistics import fmean
from typing import Any

import numpy as np

from attnsurgery.errors import SearchError
from attnsurgery.search.config import SearchConfig
from attnsurgery.search.coordinator.rivals import Entrant, Results, Work
from attnsurgery.search.result.answers import Values, values_of
from attnsurgery.search.result.confirmation import Confirmation, Finalist, Verdict
from attnsurgery.search.result.options import Option
from attnsurgery.search.result.record import Record, Timing
from attnsurgery.search.result.sequential import Design, Look, look_at, not_beaten, seeds_move_together

BASE, WINNER = "base", "winner"


def compare(
    config: SearchConfig,
    winner: Record,
    best: Finalist,
    finalists: Sequence[Finalist],
    entrants: Sequence[Entrant],
    work: Work,
) -> tuple[Confirmation, list[Option]] | str:
    """The comparison of the winner with the base and with rivals; or the reason why the winner could not be trained.

    All are trained from the same seeds, one by one, until each of the comparisons is decided. Whatever is surely not
    the best is trained no further.

    Args:
        config: settings of the search.
        winner: the record of the best finalist.
        best: the best finalist.
        finalists: all of them.
        entrants: the rivals.
        work: does jobs.

    Returns:
        The confirmation, and the options without the winner's final latency.

    Raises:
        SearchError: the base cannot be trained.
    """
    scored = [finalist.metrics for finalist in finalists if finalist.metrics]
    paired = seeds_move_together(np.array(scored)) if scored else False
    design = Design(config.first_seeds, config.most_seeds, config.difference / 100, paired)
    requests: dict[str, Callable[[int], dict[str, Any]]] = {
        WINNER: lambda index: training_of(winner, index, best.training),
        BASE: lambda index: training_of(None, index),
    }
    for entrant in entrants:
        requests[entrant.rival.key] = partial(_training_of_rival, entrant)
    trained = _train_until_decided(requests, design, work)
    if isinstance(trained, str):
        return trained
    results = trained.results
    if not best.metrics:
        finalists = [with_scores(one, results[WINNER]) if one == best else one for one in finalists]
    look = trained.looks[BASE]
    compared = compare_on_test(
        best.digest, trained.values[BASE], trained.values[WINNER], results[WINNER][0]["epochs"], look
    )
    balanced = [
        [result["balanced"] for result in results[name][: look.trainings] if result["balanced"] is not None]
        for name in (BASE, WINNER)
    ]
    confirmation = replace(
        compared,
        balanced=(fmean(balanced[0]), fmean(balanced[1])) if all(balanced) else None,
        finalists=tuple(finalists),
        rank_by=config.rank_by,
        anew=True,
        first_seeds=design.begin,
        most_seeds=design.most,
        difference=design.difference,
        paired=design.paired,
    )
    drafts = {
        WINNER: Option("winner", _name_of(winner), training=best.training),
        BASE: Option("base", config.base),
        **{entrant.rival.key: entrant.option for entrant in entrants},
    }
    return confirmation, _options(drafts, trained, design)


@dataclass(frozen=True, slots=True)
class _Trained:
    """The trainings of all that are compared, by name."""

    results: dict[str, Results]
    """The results of each training, in the order of the seeds. They are fewer for what is surely not the best."""
    values: dict[str, Values]
    """(S, N) of those that did not fail: the values of N test images after each of S trainings."""
    looks: dict[str, Look]
    """The comparison of the winner with each of them."""
    failures: dict[str, str]
    """Why the others failed."""


def _train_until_decided(
    requests: Mapping[str, Callable[[int], dict[str, Any]]], design: Design, work: Work
) -> _Trained | str:
    """Train all from the same seeds, one by one, until the winner's comparison with each of them is decided.

    A rival, or the base, is trained no further once its comparison with the winner is decided and anything is
    significantly better: neither the verdict nor the advice can change then.

    Args:
        requests: for each name, the payload of its training from the seed of an index.
        design: of the comparisons.
        work: does jobs.

    Returns:
        The trainings, or the reason why the winner could not be trained.

    Raises:
        SearchError: the base cannot be trained.
    """
    results: dict[str, Results] = {name: [] for name in requests}
    failures: dict[str, str] = {}
    names = list(requests)
    while True:
        start = len(results[WINNER])
        indices = range(start, start + 1) if start else range(design.begin)
        done = iter(work("final training", *(requests[name](index) for name in names for index in indices)))
        for name in names:
            results[name] += islice(done, len(indices))
            if failed := failed_in(results[name]):
                failures[name] = failed
        if BASE in failures:
            raise SearchError(failures[BASE])
        if WINNER in failures:
            return failures[WINNER]
        values = {
            name: np.stack([values_of(result) for result in results[name]]) for name in requests if name not in failures
        }
        looks = {
            name: look_at(values[WINNER], values_SN, design) for name, values_SN in values.items() if name != WINNER
        }
        if all(look.decided for look in looks.values()):
            return _Trained(results, values, looks, failures)
        may_be_best = dict(zip(values, not_beaten(list(values.values()), design), strict=True))
        names = [name for name in values if name == WINNER or may_be_best[name] or not looks[name].decided]


def _options(drafts: Mapping[str, Option], trained: _Trained, design: Design) -> list[Option]:
    """The options with what their trainings showed: accuracy, gain over the base, and whether one may be the best."""
    may_be_best = not_beaten(list(trained.values.values()), design)
    options = []
    for (name, values_SN), kept in zip(trained.values.items(), may_be_best, strict=True):
        option = replace(drafts[name], metric=float(values_SN.mean()), trainings=len(values_SN), may_be_best=kept)
        if name != BASE:
            gain = look_at(values_SN, trained.values[BASE], design).gain
            option = replace(option, gain=gain.mean, low=gain.low, high=gain.high)
        options.append(option)
    return options + [replace(drafts[name], left_out=failed) for name, failed in trained.failures.items()]


def _training_of_rival(entrant: Entrant, index: int) -> dict[str, Any]:
    training = asdict(entrant.training) if entrant.training else None
    return {**training_of(None, index, training), "rival": entrant.rival.key}


def _name_of(winner: Record) -> str:
    """The winner in words, which say what it spends the budget on: blocks, pixels, or both."""
    blocks = f"{winner.blocks} block{'s' if winner.blocks > 1 else ''}" if winner.blocks else ""
    size = (winner.recipe or {}).get("input_size")
    pixels = f"{size[0]} x {size[1]} pixels" if size else ""
    return f"trial {winner.number} ({' at '.join(filter(None, (blocks, pixels)))})"


def compare_on_test(
    digest: str, base_SN: Values, winner_SN: Values, epochs: int, look: Look | None = None
) -> Confirmation:
    """The verdict on the winner from its values of the same N test images as the base's.

    Args:
        digest: of the winner.
        base_SN: for each seed the values of the images, such as whether the base classified them correctly.
        winner_SN: the same for the winner.
        epochs: length of each training.
        look: the comparison of the two; by default the only look at these trainings.
    """
    look = look or look_at(winner_SN, base_SN, Design(len(base_SN), len(base_SN)))
    base_SN, winner_SN = base_SN[: look.trainings], winner_SN[: look.trainings]
    verdict: Verdict = "no significant difference"
    if look.significant:
        verdict = "better" if look.gain.mean > 0 else "worse"
    return Confirmation(
        digest=digest,
        images=base_SN.shape[1],
        seeds=look.trainings,
        epochs=epochs,
        base_metric=float(base_SN.mean()),
        winner_metric=float(winner_SN.mean()),
        low=look.gain.low,
        high=look.gain.high,
        p_value=look.gain.p_value,
        verdict=verdict,
        timing=Timing(0.0, 0.0, 0.0, 0.0),
        limit=look.limit,
        looks_at_seeds=look.number,
    )


def training_of(record: Record | None, index: int, training: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The payload of a training of a candidate, or of the base (None).

    Args:
        record: of the candidate.
        index: of the seed.
        training: its own settings; None for those that all trainings of its kind have.
    """
    payload = {"record": record.as_dict() if record else None, "index": index}
    return {**payload, "training": dict(training)} if training else payload


def failed_in(scores: Sequence[Mapping[str, Any]]) -> str:
    """Why the first of the failed trainings failed; '' if none failed."""
    return next((score["failed"] for score in scores if "failed" in score), "")


def with_scores(finalist: Finalist, scores: Sequence[Mapping[str, Any]]) -> Finalist:
    metrics, loss = tuple(score["metric"] for score in scores), fmean(score["loss"] for score in scores)
    return replace(finalist, metrics=metrics, loss=loss)
