#!/usr/bin/env python
"""How many candidates a sampler has to train, on a table of networks that were really trained.

    scripts/bench/samplers.py [--repeats 50] [--measure val_loss] [--processes 2] [--samplers gp tpe]

A search is played on docs/benchmarks/table (see table.py): the study asks, latency and score are looked up in
place of measuring and training, and everything else is the search's own (attnsurgery.search.storage.store). The budget
is the median latency of all candidates. What a sampler is told is the score from one seed; what its choice is worth is
the score of the same candidate from the other seed, so being lucky once counts for nothing.

Figures: how many trained candidates each sampler needs for what random search reaches with 64, and for what TPE does;
worth after 16, 32 and 64 with the p-value of a paired Wilcoxon test against the additive sampler; and the hypervolume
of worth and latency that is missing from that of the whole table. Scores are scaled so that 0 is the base and 1 the
best candidate within the budget. Writes docs/benchmarks/samplers.json, if every sampler takes part, 50 times or more.
With `--samplers`, only these are played, beside random, tpe and additive, which the figures compare with.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from _common import write
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState
from scipy.stats import wilcoxon
from table import CHOSEN, OPTIONS, SITES, TABLE, rows_of

from attnsurgery.recipe.schema import Edit
from attnsurgery.samplers import SAMPLERS
from attnsurgery.samplers.places import Places
from attnsurgery.search.result.limits import Budgets
from attnsurgery.search.result.record import Record, Timing, trained
from attnsurgery.search.space import BoundSpace, Variable
from attnsurgery.search.storage.store import Store

NAMES = ["random", "nsga2", "evolution", "tpe", "gp", "additive"]
OURS = "additive"
COMPARED = ("random", "tpe", OURS)
"""The figures are relative to these."""
REPEATS = 50
MARKS = (16, 32, 64)
TRAINED = max(MARKS)
_ASKS = 12
"""So many asks for each candidate to be trained, and a sampler is given up: it repeats itself."""


@SAMPLERS.register("evolution")
class Evolution(BaseSampler):
    """Aging evolution: the best of a few of the last ones, with one place drawn anew.

    Real et al., "Regularized evolution for image classifier architecture search", AAAI 2019, algorithm 1.
    """

    population, tournament = 16, 5

    def __init__(self, places: Places, seed: int, base_score: float | None = None) -> None:
        self._places = places
        self._rng = np.random.default_rng(seed)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {name: optuna.distributions.CategoricalDistribution(c) for name, c in self._places.choices.items()}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))[-self.population :]
        if not done:  # nothing that it began with fits
            return {name: choices[self._rng.integers(len(choices))] for name, choices in self._places.choices.items()}
        some = [done[index] for index in self._rng.choice(len(done), min(self.tournament, len(done)), replace=False)]
        child = dict(max(some, key=lambda one: one.value or 0.0).params)
        name = list(self._places.choices)[self._rng.integers(len(self._places.choices))]
        others = [choice for choice in self._places.choices[name] if choice != child[name]]
        return {**child, name: others[self._rng.integers(len(others))]}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        raise AssertionError("every place is sampled together with the others")


@dataclass(frozen=True)
class Table:
    """Scores by candidate and seed, larger is better, and latencies."""

    sites: tuple[str, ...]
    options: dict[str, dict[str, Any] | None]
    scores: dict[tuple[str, ...], tuple[float, ...]]
    ms: dict[tuple[str, ...], float]

    @classmethod
    def read(cls, measure: str, folder: Path = TABLE) -> Table:
        by_picks: dict[tuple[str, ...], dict[int, float]] = {}
        for row in rows_of(folder, CHOSEN):
            score = -row[measure] if measure.endswith("loss") else row[measure]
            by_picks.setdefault(tuple(row["picks"]), {})[row["seed"]] = score
        scores = {picks: tuple(by_seed[seed] for seed in sorted(by_seed)) for picks, by_seed in by_picks.items()}
        ms = {tuple(row["picks"]): row["ms"] for row in rows_of(folder, "latency")}
        return cls(SITES, OPTIONS, scores, ms)

    @property
    def base(self) -> tuple[str, ...]:
        return ("none",) * len(self.sites)

    @cached_property
    def budget(self) -> float:
        return float(np.median(list(self.ms.values())))

    @cached_property
    def space(self) -> BoundSpace:
        def choices(site: str) -> dict[str, Edit | None]:
            return {name: Edit(at=site, **given) if given else None for name, given in self.options.items()}

        variables = [Variable(site, (site,), choices(site)) for site in self.sites]
        return BoundSpace("table", "test_resnet", tuple(variables), None)

    def scaled(self, picks: tuple[str, ...], seed: int) -> float:
        """0 is the base and 1 the best within the budget, all from that seed."""
        base = self.scores[self.base][seed]
        best = max(scores[seed] for picks, scores in self.scores.items() if self.ms[picks] <= self.budget)
        return (self.scores[picks][seed] - base) / (best - base)


def played(table: Table, sampler: str, repeat: int) -> list[tuple[str, ...]]:
    """The candidates that a search would train, in order."""
    seed = repeat % 2
    budgets = Budgets({"latency": table.budget})
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder), optuna.storages.InMemoryStorage(), table.space, budgets, repeat, sampler)
        store.fix("base", {"record": Record(-1, "trained", top1=table.scaled(table.base, seed)).as_dict()})
        records: list[Record] = []
        while len(trained(records)) < TRAINED and len(records) < _ASKS * TRAINED:
            candidate = store.ask(records, table.space.places)
            finished = store.finish(_looked_up(table, candidate.number, candidate.assignment, seed, records))
            assert finished is not None, "nobody else is at this study"
            records.append(finished)
    return [tuple(record.assignment[site] for site in table.sites) for record in trained(records)]


def _looked_up(table: Table, number: int, assignment: Mapping[str, str], seed: int, before: list[Record]) -> Record:
    picks = tuple(assignment[site] for site in table.sites)
    recipe = table.space.recipe_for(assignment)
    digest, ms = recipe.digest() if recipe else "", table.ms[picks]
    timing = Timing(ms, ms, ms, 1.0)
    score = table.scaled(picks, seed)
    record = Record(number, "trained", assignment, digest=digest, timing=timing, top1=score, loss=-score)
    if not recipe or any(other.digest == digest for other in before):
        known = score if ms <= table.budget else None
        return Record(number, "duplicate", assignment, digest=digest, timing=timing, top1=known)
    if ms > table.budget:
        return Record(number, "over_budget", assignment, digest=digest, timing=timing)
    return record


def curve(table: Table, candidates: list[tuple[str, ...]], repeat: int) -> list[float]:
    """After one, two, three ... trained: what the best so far by its own seed is worth by the other."""
    told, apart = repeat % 2, (repeat + 1) % 2
    worth, best = [], table.base
    for picks in candidates:
        best = max(best, picks, key=lambda one: table.scores[one][told])
        worth.append(table.scaled(best, apart))
    return worth + worth[-1:] * (TRAINED - len(worth))


def missing(table: Table, candidates: list[tuple[str, ...]], repeat: int) -> list[float]:
    """At each mark: the share of the whole table's hypervolume that the candidates trained so far lack."""
    apart = (repeat + 1) % 2
    within = [picks for picks, ms in table.ms.items() if ms <= table.budget]
    whole = _hypervolume(table, within, apart)
    return [1.0 - _hypervolume(table, candidates[:mark], apart) / whole for mark in MARKS]


def _hypervolume(table: Table, candidates: list[tuple[str, ...]], seed: int) -> float:
    """Of worth above the base and milliseconds below the budget."""
    volume, reached = 0.0, 0.0
    for picks in sorted([*candidates, table.base], key=lambda one: -table.scaled(one, seed)):
        saved = table.budget - table.ms[picks]
        if saved > reached:
            volume += (saved - reached) * max(0.0, table.scaled(picks, seed))
            reached = saved
    return volume


def search(table: Table, task: tuple[str, int]) -> dict[str, Any]:
    sampler, repeat = task
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    candidates = played(table, sampler, repeat)
    return {
        "sampler": sampler,
        "repeat": repeat,
        "trained": len(candidates),
        "worth": curve(table, candidates, repeat),
        "missing": missing(table, candidates, repeat),
    }


def needed(curves: np.ndarray[Any, Any], level: float) -> int | None:
    """Trained candidates after which the mean curve is at that level."""
    there = np.flatnonzero(curves.mean(0) >= level)
    return int(there[0]) + 1 if len(there) else None


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    by_sampler: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["repeat"]):
        by_sampler.setdefault(row["sampler"], []).append(row)
    curves = {name: np.array([row["worth"] for row in some]) for name, some in by_sampler.items()}
    lacks = {name: np.array([row["missing"] for row in some]) for name, some in by_sampler.items()}
    ours = curves[OURS]

    def p_values(name: str) -> dict[int, float]:
        return {mark: _p(ours[:, mark - 1], curves[name][:, mark - 1]) for mark in MARKS} if name != OURS else {}

    return {
        name: {
            "worth": {mark: float(curve[:, mark - 1].mean()) for mark in MARKS},
            "missing_hypervolume": {mark: float(lacks[name][:, i].mean()) for i, mark in enumerate(MARKS)},
            "ours_is_better_p": p_values(name),
            "needed_for_random_64": needed(curve, float(curves["random"][:, -1].mean())),
            "needed_for_tpe_64": needed(curve, float(curves["tpe"][:, -1].mean())),
        }
        for name, curve in curves.items()
    }


def _p(ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any]) -> float:
    """One-sided: that ours are no better."""
    if np.allclose(ours, theirs):
        return 1.0
    return float(wilcoxon(ours, theirs, alternative="greater").pvalue)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--measure", default="val_loss")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--samplers", nargs="+", choices=NAMES, default=NAMES)
    options = parser.parse_args()
    table = Table.read(options.measure, options.table)
    names = [name for name in NAMES if name in {*options.samplers, *COMPARED}]
    tasks = [(name, repeat) for repeat in range(options.repeats) for name in names]
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        rows = list(pool.map(partial(search, table), tasks, chunksize=5))
    table_of_figures = figures(rows)
    if options.table == TABLE and names == NAMES and options.repeats >= REPEATS:
        data = {"measure": options.measure, "repeats": options.repeats, "figures": table_of_figures}
        print(f"written {write('samplers', data)}")
    for name, row in table_of_figures.items():
        worth = "  ".join(f"{row['worth'][mark]:.3f}" for mark in MARKS)
        lack = "  ".join(f"{row['missing_hypervolume'][mark]:.3f}" for mark in MARKS)
        p = "  ".join(f"{row['ours_is_better_p'][mark]:.1e}" for mark in MARKS) if row["ours_is_better_p"] else ""
        print(f"{name:10} worth {worth}   missing hypervolume {lack}   p {p}")
    ours = table_of_figures[OURS]
    print(
        f"{OURS}: {ours['needed_for_random_64']} trained for what random reaches with 64 (target 16), "
        f"{ours['needed_for_tpe_64']} for what TPE does (target 24)"
    )


if __name__ == "__main__":
    main()
