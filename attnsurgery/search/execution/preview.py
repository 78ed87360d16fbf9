"""Previews a search: its size, the share of candidates within the budgets, and its duration. Nothing is written."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from attnsurgery.errors import AttnSurgeryError
from attnsurgery.evaluate import Epoch, Watch
from attnsurgery.latency import Latency, LatencyBackend
from attnsurgery.samplers.places import Picks
from attnsurgery.search.config import AUTO, SearchConfig
from attnsurgery.search.execution.assemble import assemble, before_images
from attnsurgery.search.execution.baseline import base_latency_at, first_epochs, least_ratio
from attnsurgery.search.execution.bench import Bench
from attnsurgery.search.execution.exhausted import HOPELESS
from attnsurgery.search.execution.over_budget import BaseFacts, refuse_over_budget
from attnsurgery.search.execution.rivals import bench_of, propose_rivals
from attnsurgery.search.execution.scorers import Candidate, Scorer, Shared
from attnsurgery.search.execution.supernet import COUNTED, PASSES
from attnsurgery.search.execution.trial import build, outline, train_seed
from attnsurgery.search.execution.verdict import LONGER
from attnsurgery.search.execution.what_fits import what_fits
from attnsurgery.search.listener import Listener
from attnsurgery.search.result.promotion import CHECKED, places_on
from attnsurgery.search.result.record import Record, Timing
from attnsurgery.search.rivals import PROPOSED, Rival, rivals_of
from attnsurgery.search.rungs import repeats_wanted, rungs_of, shares
from attnsurgery.search.storage.run_directory import check_free
from attnsurgery.search.storage.urls import check_url
from attnsurgery.search.tuning import expected_trainings
from attnsurgery.search.watching import StopRequested, Watching
from attnsurgery.surgery.verify import count_macs

DRAWN = 12
"""Number of candidates that are built and measured."""
_COUNTED = 2000
"""Number of candidates that are compared with the exact budgets, which need no measurement."""
_STEPS = 12
_SECONDS = 10.0
"""Training steps that are timed, and the time after which fewer do; the first step, which allocates, is left out."""
_FORWARD = 1 / 3
"""The share of a forward pass in a training step, roughly."""


@dataclass(frozen=True)
class Preview:
    """What is known of a search before it begins."""

    base: str
    """Name of the base."""
    space: str
    """Name of the search space."""
    places: int
    """Number of places in the space."""
    candidates: int
    """Number of candidates in the space."""
    most_blocks: int | None
    """Maximum number of blocks in one candidate."""
    left_out: tuple[str, ...]
    """Choices that this model does not allow, with the reason."""
    budgets: str
    """The budgets in words."""
    conditions: str
    """The conditions of the latency in words."""
    data: str
    """The data in words."""
    base_ms: float
    """Latency of the base, in ms."""
    base_parameters: int
    """Number of parameters of the base."""
    base_macs: int
    """Multiply-accumulates of the base for one image."""
    sizes: tuple[tuple[str, float], ...]
    """Each input size of the space, the base's own first, with the base's latency there in ms; () if there is one."""
    fitting: int
    """Number of measured candidates within all budgets."""
    drawn: int
    """Number of measured candidates, drawn uniformly within the exact budgets; 0 if the draws found none."""
    exact_share: float
    """Share of the space within the budgets for parameters and multiply-accumulates, 0 to 1."""
    low: float
    """Lower end of the 95 % interval of the share of the space within all budgets (Wilson, of `fitting` in `drawn`)."""
    high: float
    """Upper end of that interval."""
    rungs: tuple[tuple[str, int, float], ...]
    """For each rung from the lowest: how it trains, number of candidates, seconds to train and score one of them."""
    rivals: tuple[str, ...]
    """The rivals that the search is expected to train: models, and input sizes of the base."""
    seconds: float
    """Expected duration of the whole search. If none of the measured candidates fits, the time until it gives up."""

    @property
    def share(self) -> float:
        """Estimated share of the space within all budgets, 0 to 1."""
        return self.exact_share * self.fitting / max(1, self.drawn)

    @property
    def none_fits(self) -> bool:
        """Whether candidates were measured and none of them is within all budgets."""
        return self.drawn > 0 and self.fitting == 0

    def as_dict(self) -> dict[str, Any]:
        """JSON data."""
        return asdict(self) | {"share": self.share, "none_fits": self.none_fits}


class _Enough(Exception):
    pass


class _Timer(Watch):
    """Records when each training step begins, and ends the training after enough steps."""

    def __init__(self, stop: Callable[[], bool]) -> None:
        self._stop = stop
        self._times: list[float] = []

    def step(self) -> None:
        if self._stop():
            raise StopRequested
        self._times.append(time.perf_counter())
        if len(self._times) > _STEPS or (len(self._times) > 3 and self._times[-1] - self._times[0] > _SECONDS):
            raise _Enough

    def epoch(self, epoch: Epoch) -> None:
        if len(self._times) > 3:
            raise _Enough

    @property
    def seconds(self) -> float:
        """Median duration of a step, in s; 0 if there were too few."""
        return float(np.median(np.diff(self._times)[1:])) if len(self._times) > 2 else 0.0


def preview(
    config: SearchConfig,
    listener: Listener | None = None,
    stop: Callable[[], bool] | None = None,
    *,
    backend: LatencyBackend | None = None,
) -> Preview:
    """Build the base, measure it and a few candidates, and time a few training steps.

    Args:
        config: all settings of the search.
        listener: told of progress.
        stop: whether the user asked for an end.
        backend: measures latencies instead of the backend that the configuration names.

    Raises:
        StopRequested: the user asked for an end.
        NothingFeasibleError: the base alone is over the budget.
        AttnSurgeryError: as `run` before its first trial.
    """
    listener, stop = listener or Listener(), stop or (lambda: False)
    check_free(Path(config.output))
    if config.storage:
        check_url(config.storage)
    early = before_images(config, backend)
    references = _checked_base(early, listener, stop, suggest=backend is None) if early else []
    bench = assemble(config, listener, backend)
    bench.base.to(config.device).eval()
    references = references or _checked_base(bench, listener, stop, suggest=backend is None)
    rng = np.random.default_rng(0)
    candidates = [picks for _ in range(_COUNTED) if (picks := bench.space.places.drawn(rng, lambda _: True))]
    exact = sum(map(bench.places.holds, candidates)) / max(1, len(candidates))
    candidate, fitting, measured = _measure_drawn(bench, references, rng, listener, stop)
    listener.phase("timing training steps")
    counts = places_on(len(bench.rungs), config.trials, config.halving)
    if shares(config):  # the candidates that a supernet is checked by are promoted as well
        counts[1] = min(counts[0], counts[1] + CHECKED)
    timed = bench.at(bench.space.size_of(candidate.assignment))
    macs = [costs.base["macs"] for costs in bench.costs.sizes]  # a candidate of another size takes about as much longer
    scale = float(np.mean(macs)) / macs[bench.space.size_index(candidate.assignment)]
    rungs = tuple(
        (
            str(rung),
            count,
            _trial_seconds(timed, scorer, replace(candidate, model=copy.deepcopy(candidate.model)), count, stop)
            * scale,
        )
        for rung, count, scorer in zip(rungs_of(config), counts, timed.rungs, strict=True)
    )
    low, high = _wilson(fitting, measured)
    share = fitting / measured if measured else 1.0
    rivals = _rival_sizes(bench, references[0], Watching(listener, stop)) if share else {}
    return Preview(
        base=config.base,
        space=bench.space.name,
        places=len(bench.space.variables),
        candidates=bench.space.size(),
        most_blocks=bench.space.max_blocks,
        left_out=bench.space.left_out,
        budgets=bench.budgets.describe(),
        conditions=bench.backend.describe(),
        data=bench.data.describe(),
        base_ms=references[0].p50_ms,
        base_parameters=bench.costs.base["parameters"],
        base_macs=bench.costs.base["macs"],
        sizes=tuple(zip(bench.space.sizes, (latency.p50_ms for latency in references), strict=False)),
        fitting=fitting,
        drawn=measured,
        exact_share=exact,
        low=exact * low,
        high=exact * high,
        rungs=rungs,
        rivals=tuple(rivals),
        seconds=_seconds(bench, [(count, seconds) for _, count, seconds in rungs], share, list(rivals.values())),
    )


def _checked_base(bench: Bench, listener: Listener, stop: Callable[[], bool], *, suggest: bool) -> list[Latency]:
    """The base's latency at each input size of the space, its own first.

    Raises:
        NothingFeasibleError: the base alone is over the budget.
        StopRequested: the user asked for an end.
    """
    listener.phase("measuring the base")
    reference = bench.backend.measure(bench.base)
    watch = Watching(listener, stop)
    alternatives = (lambda: what_fits(bench, reference.p50_ms, watch)) if suggest else None
    others = []
    for size in (other.size for other in bench.at_sizes):
        watch.step()
        there = bench.at(size)
        latency = base_latency_at(bench, size, reference, watch)
        others.append(BaseFacts(latency, there.peak_mb(there.base), least_ratio(there, latency, watch)))
    own = BaseFacts(reference, bench.peak_mb(bench.base), least_ratio(bench, reference, watch))
    refuse_over_budget(bench, own, alternatives, others)
    return [reference, *(other.latency for other in others)]


def _measure_drawn(
    bench: Bench,
    references: Sequence[Latency],
    rng: np.random.Generator,
    listener: Listener,
    stop: Callable[[], bool],
) -> tuple[Candidate, int, int]:
    """Measure candidates drawn uniformly within the exact budgets.

    Returns:
        The last candidate, or the base if none was drawn; how many are within all budgets; how many were measured.

    Raises:
        StopRequested: the user asked for an end.
    """
    candidate, fitting = Candidate(bench.base, bench.space.nothing), 0
    drawn: set[Picks] = set()
    for index in range(DRAWN):
        if stop():
            raise StopRequested
        picks = bench.places.drawn(rng, lambda picks: picks not in drawn)
        if picks is None:
            break
        drawn.add(picks)
        listener.phase(f"measuring candidate {index + 1} of {DRAWN}")
        assignment = bench.space.places.params(picks)
        model, fits = _measured(bench, assignment, references[bench.space.size_index(assignment)])
        candidate, fitting = Candidate(model, assignment), fitting + fits
    return candidate, fitting, len(drawn)


def _measured(bench: Bench, assignment: Mapping[str, str], reference: Latency) -> tuple[nn.Module, bool]:
    """The model of a candidate, and whether its measured costs are within the budgets."""
    recipe = bench.space.recipe_for(assignment)
    assert recipe is not None, "the base itself is not drawn"
    bench = bench.at(bench.space.size_of(assignment))
    model = build(bench, recipe)
    timing = Timing.of(bench.backend.compare(bench.base, model, reference))
    record = replace(outline(bench, 0, assignment), timing=timing, peak_mb=bench.peak_mb(model))
    return model, bench.budgets.check(record).within


def _trial_seconds(bench: Bench, scorer: Scorer, candidate: Candidate, count: int, stop: Callable[[], bool]) -> float:
    """Seconds to score one of `count` candidates on a rung: its own training, or its share of a supernet's."""
    timer, shared = _Timer(stop), isinstance(scorer, Shared)
    size = min(bench.config.train_batch_size, len(bench.data.train))
    steps = scorer.settings.epochs * len(bench.data.train) / size
    start = time.perf_counter()
    try:
        if isinstance(scorer, Shared):
            scorer.train(train_seed(bench), timer)
        else:
            scorer.score(candidate, train_seed(bench), timer)
            return time.perf_counter() - start  # the training ended before there were enough steps
        training = time.perf_counter() - start
    except _Enough:
        training = timer.seconds * steps
    forward = training / steps * _FORWARD
    if shared:
        return training / count + forward / PASSES * (len(bench.data.val) / size + COUNTED)
    return training + forward * len(bench.data.val) / size


def _rival_sizes(bench: Bench, reference: Latency, watch: Watching) -> dict[str, float]:
    """The rivals that the search is expected to train, each with its multiply-accumulates relative to the base's.

    The search measures a rival, and does not train it if it is over the budget. Here its latency is predicted from its
    multiply-accumulates.

    Raises:
        StopRequested: the user asked for an end.
    """
    config = bench.config
    keys: Sequence[str] = [rival.key for rival in rivals_of(config)]
    if config.against is None and config.pretrained:
        keys = propose_rivals(bench, {"reference": reference}, watch)["names"][:PROPOSED]
    sizes = {}
    for key in keys:
        watch.step()
        with suppress(AttnSurgeryError):  # the search leaves it out, with the reason
            rival = bench_of(bench, key, watch)
            macs = count_macs(rival.base, rival.anatomy.input_size)
            size = macs / bench.costs.base["macs"]
            ms, parameters = size * reference.p50_ms, sum(parameter.numel() for parameter in rival.base.parameters())
            timing = Timing(ms, ms, ms, size)
            if bench.budgets.check(Record(-1, "pending", timing=timing, parameters=parameters, macs=macs)).within:
                sizes[Rival.of(key).words] = size
    return sizes


def _seconds(bench: Bench, rungs: list[tuple[int, float]], share: float, rivals: Sequence[float] = ()) -> float:
    """Expected duration of a search in s: base and candidates on every rung, confirmation, rivals, all measurements.

    Args:
        bench: what trials are made on.
        rungs: the number of candidates on each rung, and the seconds of one.
        share: of the candidates that is within the budgets, 0 to 1.
        rivals: the size of each rival that is trained, relative to the base.
    """
    config = bench.config
    weights = {"all": 1.0, "head": _FORWARD, "nothing": 0.0}[bench.fresh] * config.base_epochs
    if bench.fresh == "all" and (first := bench.data.first):  # and a new head after that
        share_of_images = len(first.train) / len(bench.data.train)
        weights = first_epochs(config, first) * share_of_images + _FORWARD * config.base_epochs
    weights /= bench.evaluator.settings.epochs
    initial = weights + (expected_trainings(config) if config.tunes else 0.0)
    if share == 0.0:
        return sum(seconds for _, seconds in rungs) + initial * rungs[-1][1] + (1 + HOPELESS) * config.latency_seconds
    finalists = min(config.finalists, rungs[-1][0])
    longer = LONGER if isinstance(config.final_epochs, str) else config.final_epochs / bench.evaluator.settings.epochs
    final = (config.first_seeds + config.most_seeds) / 2 * longer  # on average
    extra_trainings = 2 * final  # of winner and base
    extra_trainings += finalists * config.first_seeds if finalists > 1 else 0
    extra_trainings += finalists * (2.0 * (config.lr == AUTO) + (config.block_lr_scale == AUTO))
    extra_trainings += initial
    of_each_rival = weights + final + (expected_trainings(config, plain=True) if config.tunes else 0.0)
    extra_trainings += sum(size * of_each_rival for size in rivals)
    measured = config.trials / share + 4 + 2 * config.finalists + len(rivals)
    trainings = sum((count + 1) * seconds for count, seconds in rungs)
    if (wanted := repeats_wanted(config)) <= rungs[0][0]:
        trainings += wanted * rungs[0][1]
    return trainings + extra_trainings * rungs[-1][1] + measured * config.latency_seconds


def _wilson(hits: int, count: int) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson, "Probable inference", JASA 1927)."""
    from scipy.stats import binomtest

    if count == 0:
        return 0.0, 0.0
    interval = binomtest(hits, count).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)
