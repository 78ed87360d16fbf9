#!/usr/bin/env python
"""How many candidates a sampler has to train, simulated on tables of trained networks.

    scripts/bench/samplers.py [--repeats 50] [--tables strip] [--processes 2] [--samplers gp tpe]

A search is simulated on a table of docs/benchmarks/table (see table.py): latency and scores are looked up instead of
measured and trained, and everything else is the search's own code (attnsurgery.search.storage.store). The budget is the
median latency of all candidates. A sampler gets the validation scores of one seed, and the candidate with the best
top-1 of these is chosen, as in a search. The choice is judged by the mean test top-1 of the same candidate from the
other seeds, so that luck in one training does not count.

Figures: test top-1 in points over the base after 8, 16, 32 and 64 trained candidates, with the difference from the
additive sampler, its 95 % interval over repeats and the p-value of a paired two-sided Wilcoxon test; the number of
trained candidates that each sampler needs to reach random search with 64, and TPE with 64; how far the best validation
top-1 so far is from the best within the budget, which contains no luck of other trainings; and the hypervolume of top-1
and latency that is missing from that of the whole table. Writes docs/benchmarks/samplers.json, table by table, for all
samplers and at least 50 repeats. With `--samplers`, only these are simulated, and random, tpe and additive, with which
the figures compare.
"""

from __future__ import annotations

import argparse
import json
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
from _common import RESULTS, write
from _tables import SETUPS, SITES, TABLE, Options, edit_of
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState
from scipy.stats import wilcoxon
from table import WITH_EFFECT, latency_rows, rows_of

from attnsurgery.recipe.schema import Edit
from attnsurgery.samplers import SAMPLERS
from attnsurgery.samplers.places import Places
from attnsurgery.search.result.limits import Budgets
from attnsurgery.search.result.record import Record, Timing, trained
from attnsurgery.search.space import BoundSpace, Variable
from attnsurgery.search.storage.store import Store

NAMES = ["random", "nsga2", "evolution", "tpe", "gp", "additive"]
REFERENCE = "additive"
COMPARED = ("random", "tpe", REFERENCE)
"""The figures compare with these samplers."""
REPEATS = 50
MARKS = (8, 16, 32, 64)
TRAINED = max(MARKS)
_MAX_ASKS = 12
"""Number of asks for each candidate to be trained after which a sampler that repeats candidates is stopped."""


@SAMPLERS.register("evolution")
class Evolution(BaseSampler):
    """Aging evolution: mutates one place of the best of a few recent candidates.

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
        finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))[-self.population :]
        if not finished:  # no candidate was within the budget yet
            return {name: choices[self._rng.integers(len(choices))] for name, choices in self._places.choices.items()}
        tournament = [
            finished[index]
            for index in self._rng.choice(len(finished), min(self.tournament, len(finished)), replace=False)
        ]
        child = dict(max(tournament, key=lambda trial_: trial_.value or 0.0).params)
        name = list(self._places.choices)[self._rng.integers(len(self._places.choices))]
        other_choices = [choice for choice in self._places.choices[name] if choice != child[name]]
        return {**child, name: other_choices[self._rng.integers(len(other_choices))]}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        raise AssertionError("every place is sampled together with the others")


@dataclass(frozen=True)
class Table:
    """Scores by candidate and seed, and latencies."""

    sites: tuple[str, ...]
    options: Options
    scores: dict[tuple[str, ...], tuple[float, ...]]
    """What choices are judged by, by seed; larger is better."""
    val: dict[tuple[str, ...], tuple[float, ...]]
    """Top-1 on the validation images."""
    val_loss: dict[tuple[str, ...], tuple[float, ...]]
    ms: dict[tuple[str, ...], float]

    @classmethod
    def read(cls, name: str, measure: str = "test", folder: Path = TABLE) -> Table:
        """The table of a setup, whose choices are judged by a measure."""
        rows = rows_of(folder, name)

        def by_picks(column: str, sign: float = 1.0) -> dict[tuple[str, ...], tuple[float, ...]]:
            values: dict[tuple[str, ...], dict[int, float]] = {}
            for row in rows:
                values.setdefault(tuple(row["picks"]), {})[row["seed"]] = sign * row[column]
            return {picks: tuple(by_seed[seed] for seed in sorted(by_seed)) for picks, by_seed in values.items()}

        ms = {tuple(row["picks"]): row["ms"] for row in latency_rows(folder, name)}
        if missing := len({tuple(row["picks"]) for row in rows} - ms.keys()):
            measured = SETUPS[name].latencies or name
            raise SystemExit(f"{missing} candidates of {name} have no latency: table.py --setup {measured} --latency")
        scores = by_picks(measure, -1.0 if measure.endswith("loss") else 1.0)
        return cls(SITES, SETUPS[name].options, scores, by_picks("val"), by_picks("val_loss"), ms)

    @property
    def base(self) -> tuple[str, ...]:
        return ("none",) * len(self.sites)

    @cached_property
    def budget(self) -> float:
        return float(np.median(list(self.ms.values())))

    @cached_property
    def space(self) -> BoundSpace:
        def choices(site: str) -> dict[str, Edit | None]:
            return {name: edit_of(site, choice) if choice else None for name, choice in self.options.items()}

        variables = [Variable(site, (site,), choices(site)) for site in self.sites]
        return BoundSpace("table", "test_resnet", tuple(variables), None)

    @cached_property
    def seeds(self) -> int:
        """Number of trainings that every candidate has."""
        return min(map(len, self.scores.values()))

    def gain(self, picks: tuple[str, ...], search_seed: int) -> float:
        """The mean score from all seeds but that of the search, less that of the base."""
        others = [seed for seed in range(self.seeds) if seed != search_seed]
        return float(np.mean([self.scores[picks][seed] - self.scores[self.base][seed] for seed in others]))


def simulate(table: Table, sampler: str, repeat: int) -> list[tuple[str, ...]]:
    """The candidates that a search would train, in order."""
    seed = repeat % table.seeds
    budgets = Budgets({"latency": table.budget})
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder), optuna.storages.InMemoryStorage(), table.space, budgets, repeat, sampler)
        store.fix("base", {"record": Record(-1, "trained", metric=table.val[table.base][seed]).as_dict()})
        records: list[Record] = []
        while len(trained(records)) < TRAINED and len(records) < _MAX_ASKS * TRAINED:
            candidate = store.ask(records, table.space.places)
            finished = store.finish(_look_up(table, candidate.number, candidate.assignment, seed, records))
            assert finished is not None, "no other process uses this study"
            records.append(finished)
    return [tuple(record.assignment[site] for site in table.sites) for record in trained(records)]


def _look_up(table: Table, number: int, assignment: Mapping[str, str], seed: int, records: list[Record]) -> Record:
    picks = tuple(assignment[site] for site in table.sites)
    recipe = table.space.recipe_for(assignment)
    digest, ms = recipe.digest() if recipe else "", table.ms[picks]
    timing = Timing(ms, ms, ms, 1.0)
    top1, loss = table.val[picks][seed], table.val_loss[picks][seed]
    record = Record(number, "trained", assignment, digest=digest, timing=timing, metric=top1, loss=loss)
    if not recipe or any(record_.digest == digest for record_ in records):
        known_score = top1 if ms <= table.budget else None
        return Record(number, "duplicate", assignment, digest=digest, timing=timing, metric=known_score)
    if ms > table.budget:
        return Record(number, "over_budget", assignment, digest=digest, timing=timing)
    return record


def curve(table: Table, candidates: list[tuple[str, ...]], repeat: int) -> list[float]:
    """After each trained candidate, the score from the other seeds of the candidate that is the best so far."""
    search_seed = repeat % table.seeds
    scores, best = [], table.base
    for picks in candidates:
        best = max(best, picks, key=lambda candidate: (table.val[candidate][search_seed], -table.ms[candidate]))
        scores.append(table.gain(best, search_seed))
    return scores + scores[-1:] * (TRAINED - len(scores))


def validation_gaps(table: Table, candidates: list[tuple[str, ...]], repeat: int) -> list[float]:
    """At each mark, how far the best validation top-1 so far is from the best of all candidates within the budget.

    A sampler sees these scores and no others, so no luck of other trainings is in this.
    """
    val = {picks: scores[repeat % table.seeds] for picks, scores in table.val.items()}
    best = max(val[picks] for picks, ms in table.ms.items() if ms <= table.budget)
    return [best - max(val[picks] for picks in [table.base, *candidates[:mark]]) for mark in MARKS]


def missing_hypervolumes(table: Table, candidates: list[tuple[str, ...]], repeat: int) -> list[float]:
    """At each mark, the share of the table's hypervolume that is missing from that of the candidates trained so far."""
    search_seed = repeat % table.seeds
    within = [picks for picks, ms in table.ms.items() if ms <= table.budget]
    full = _hypervolume(table, within, search_seed)
    return [1.0 - _hypervolume(table, candidates[:mark], search_seed) / full for mark in MARKS]


def _hypervolume(table: Table, candidates: list[tuple[str, ...]], search_seed: int) -> float:
    """The hypervolume of scores from the other seeds above the base and milliseconds below the budget."""
    volume, reached_ms = 0.0, 0.0
    for picks in sorted([*candidates, table.base], key=lambda candidate: -table.gain(candidate, search_seed)):
        saved_ms = table.budget - table.ms[picks]
        if saved_ms > reached_ms:
            volume += (saved_ms - reached_ms) * max(0.0, table.gain(picks, search_seed))
            reached_ms = saved_ms
    return volume


def run_task(table: Table, task: tuple[str, int]) -> dict[str, Any]:
    sampler, repeat = task
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    candidates = simulate(table, sampler, repeat)
    return {
        "sampler": sampler,
        "repeat": repeat,
        "trained": len(candidates),
        "worth": curve(table, candidates, repeat),
        "gaps": validation_gaps(table, candidates, repeat),
        "missing": missing_hypervolumes(table, candidates, repeat),
    }


def needed(curves: np.ndarray[Any, Any], level: float) -> int | None:
    """The number of trained candidates after which the mean curve reaches a level; None if it does not."""
    reached = np.flatnonzero(curves.mean(0) >= level)
    return int(reached[0]) + 1 if len(reached) else None


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    by_sampler: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["repeat"]):
        by_sampler.setdefault(row["sampler"], []).append(row)
    curves = {name: np.array([row["worth"] for row in sampler_rows]) for name, sampler_rows in by_sampler.items()}
    gaps, missing_by_sampler = (
        {name: np.array([row[column] for row in sampler_rows]) for name, sampler_rows in by_sampler.items()}
        for column in ("gaps", "missing")
    )
    reference = curves[REFERENCE]
    return {
        name: {
            "gain": {mark: float(curve[:, mark - 1].mean()) for mark in MARKS},
            "additive_is_better_by": {
                mark: _difference(reference[:, mark - 1], curve[:, mark - 1]) for mark in MARKS if name != REFERENCE
            },
            "validation_gap": {mark: float(gaps[name][:, i].mean()) for i, mark in enumerate(MARKS)},
            "missing_hypervolume": {mark: float(missing_by_sampler[name][:, i].mean()) for i, mark in enumerate(MARKS)},
            "needed_for_random_64": needed(curve, float(curves["random"][:, -1].mean())),
            "needed_for_tpe_64": needed(curve, float(curves["tpe"][:, -1].mean())),
        }
        for name, curve in curves.items()
    }


def _difference(reference: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> dict[str, float]:
    """The mean of paired differences, half of its 95 % interval, and the p-value of a two-sided Wilcoxon test."""
    difference = reference - other
    half = 1.96 * float(difference.std(ddof=1)) / len(difference) ** 0.5
    p = 1.0 if np.allclose(difference, 0) else float(wilcoxon(reference, other).pvalue)
    return {"mean": float(difference.mean()), "half_width_95": half, "p": p}


def print_figures(name: str, table_of_figures: dict[str, Any]) -> None:
    print(f"{name}: gain in points over the base after {', '.join(map(str, MARKS))} trained candidates")
    for sampler, row in table_of_figures.items():
        gains = "  ".join(f"{100 * row['gain'][mark]:6.2f}" for mark in MARKS)
        better = "  ".join(
            f"{100 * found['mean']:+.2f} +- {100 * found['half_width_95']:.2f} (p {found['p']:.1e})"
            for found in row["additive_is_better_by"].values()
        )
        print(f"  {sampler:10} {gains}   additive less this: {better}" if better else f"  {sampler:10} {gains}")
    reference = table_of_figures[REFERENCE]
    print(
        f"  {REFERENCE}: {reference['needed_for_random_64']} trained candidates reach random search with 64, "
        f"{reference['needed_for_tpe_64']} reach TPE with 64"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=TABLE)
    parser.add_argument("--tables", nargs="+", choices=list(SETUPS), default=list(WITH_EFFECT))
    parser.add_argument("--samplers", nargs="+", choices=NAMES, default=NAMES)
    options = parser.parse_args()
    names = [name for name in NAMES if name in {*options.samplers, *COMPARED}]
    tasks = [(name, repeat) for repeat in range(options.repeats) for name in names]
    whole = options.folder == TABLE and names == NAMES and options.repeats >= REPEATS
    path = RESULTS / "samplers.json"
    by_table = json.loads(path.read_text())["tables"] if whole and path.exists() else {}
    for table_name in options.tables:
        table = Table.read(table_name, folder=options.folder)
        with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
            rows = list(pool.map(partial(run_task, table), tasks, chunksize=5))
        by_table[table_name] = figures(rows)
        print_figures(table_name, by_table[table_name])
        if whole:
            print(f"written {write('samplers', {'repeats': options.repeats, 'tables': by_table})}")


if __name__ == "__main__":
    main()
