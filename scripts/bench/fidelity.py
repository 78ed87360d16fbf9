#!/usr/bin/env python
"""How well cheap scores rank candidates: rungs, supernet and proxies, compared with full training.

    scripts/bench/fidelity.py CIFAR10 [--nets 32] [--results DIR]

Random candidates of docs/benchmarks/table are scored by every cheaper method, from seed 0, and compared with the
table's full training from seed 1: Kendall's tau-b over the candidates. The full training from seed 0 is included, for
these candidates and for the whole table, as an upper limit: no cheaper method is expected to exceed it. Resumable.
Targets: full rung 0.7, supernet 0.6. Writes docs/benchmarks/fidelity.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _common import write
from _tables import ROOT, SETUPS, SITES, TABLE, build_candidate, data_of, settings_of, start_of
from samplers import Table
from table import CHOSEN_SETUP

from attnsurgery.data import Data
from attnsurgery.evaluate import EVALUATORS
from attnsurgery.evaluate.proxies import grad_norm, synflow
from attnsurgery.graph.find import survey
from attnsurgery.search.execution.scorers import Alone, Candidate, Scorer, Shared
from attnsurgery.search.execution.supernet import Supernet
from attnsurgery.search.result.statistics import kendall_tau_b
from attnsurgery.surgery.verify import count_macs
from attnsurgery.tasks.classification import Classification

RUNGS = (("blocks", 1), ("blocks", 4), ("finetune", 1), ("finetune", 2))
SUPERNETS = (4, 16)
SEED, JUDGE = 0, 1
FULL = "full training, another seed"
FULL_ALL = "the same of the whole table"
Picks = tuple[str, ...]
SETUP = SETUPS[CHOSEN_SETUP]


def scorers(table: Table, data: Data, base: torch.nn.Module, folder: Path) -> dict[str, Scorer]:
    settings = settings_of(SETUP)
    scorers_by_name: dict[str, Scorer] = {
        f"{name}:{epochs}": Alone(EVALUATORS[name](data, replace(settings, epochs=epochs))) for name, epochs in RUNGS
    }
    for epochs in SUPERNETS:
        torch.manual_seed(SEED)
        supernet = Supernet(base, table.space, survey(base, SETUP.size))
        path = folder / f"supernet-{epochs}.safetensors"
        its_settings = replace(settings, epochs=epochs)
        scorers_by_name[f"supernet:{epochs}"] = Shared(supernet, base, data, its_settings, Classification(), path)
    return scorers_by_name


def proxies(model: torch.nn.Module, opened: torch.nn.Module, data: Data) -> dict[str, float]:
    x_BCHW, labels_B = next(data.train.train_batches(64, "cpu", SEED, 0))
    return {
        "grad_norm": grad_norm(model, x_BCHW, labels_B),
        "synflow": synflow(opened, SETUP.size),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "macs": count_macs(model, SETUP.size),
    }


def score_candidate(scorer: Scorer, base: torch.nn.Module, picks: Picks) -> dict[str, float]:
    start = time.process_time()
    assignment = dict(zip(SITES, picks, strict=True))
    score = scorer.score(Candidate(build_candidate(base, picks, SEED, SETUP), assignment), SEED)
    return {"val": score.metric, "val_loss": score.loss, "cpu_seconds": time.process_time() - start}


def run(options: argparse.Namespace, table: Table) -> list[dict[str, Any]]:
    """A row for each candidate and method; missing ones are computed."""
    folder: Path = options.results
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "fidelity.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    existing = {(row["way"], tuple(row["picks"])) for row in rows}
    data = data_of(options.cifar, SETUP)
    base = start_of(SETUP, data, options.table)
    order = torch.randperm(len(table.scores), generator=torch.Generator().manual_seed(2)).tolist()
    sample = [list(table.scores)[index] for index in order[: options.nets]]
    functions: dict[str, Callable[[Picks], dict[str, float]]] = {
        "proxies": lambda picks: proxies(
            build_candidate(base, picks, SEED, SETUP), build_candidate(base, picks, SEED, SETUP, "paper"), data
        )
    }
    for name, scorer in scorers(table, data, base, folder).items():
        functions[name] = lambda picks, scorer=scorer: score_candidate(scorer, base, picks)  # type: ignore[misc]
    with path.open("a") as file:
        for name, score in functions.items():
            for picks in sample:
                if (name, picks) not in existing:
                    rows.append({"way": name, "picks": list(picks), **score(picks)})
                    file.write(json.dumps(rows[-1]) + "\n")
                    file.flush()
            print(f"{name}: {len(sample)} candidates", flush=True)
    return [row for row in rows if tuple(row["picks"]) in sample]


def figures(rows: list[dict[str, Any]], tables: dict[str, Table]) -> dict[str, dict[str, Any]]:
    """Tau of every method in both measures, and the processor time for one candidate."""
    by_method: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_method.setdefault(row["way"], []).append(row)
    taus: dict[str, dict[str, Any]] = {}
    for measure, table in tables.items():

        def tau(values: dict[Picks, float], table: Table = table) -> float | None:
            return kendall_tau_b(list(values.values()), [table.scores[picks][JUDGE] for picks in values])

        sample = [tuple(row["picks"]) for row in by_method["proxies"]]
        taus.setdefault(FULL, {})[measure] = tau({picks: table.scores[picks][SEED] for picks in sample})
        taus.setdefault(FULL_ALL, {})[measure] = tau({picks: scores[SEED] for picks, scores in table.scores.items()})
        sign = -1.0 if measure.endswith("loss") else 1.0
        for method, method_rows in by_method.items():
            if method == "proxies":
                for name in ("grad_norm", "synflow", "parameters", "macs"):
                    taus.setdefault(name, {})[measure] = tau({tuple(row["picks"]): row[name] for row in method_rows})
            else:
                entry = taus.setdefault(method, {})
                entry[measure] = tau({tuple(row["picks"]): sign * row[measure] for row in method_rows})
                entry["cpu_seconds"] = sum(row["cpu_seconds"] for row in method_rows) / len(method_rows)
    return taus


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cifar", type=Path)
    parser.add_argument("--nets", type=int, default=32)
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "fidelity")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tables = {measure: Table.read(CHOSEN_SETUP, measure, options.table) for measure in ("val_loss", "val")}
    taus = figures(run(options, tables["val_loss"]), tables)
    if options.table == TABLE:
        print(f"written {write('fidelity', {'nets': options.nets, 'options': SETUP.options, 'tau': taus})}")
    for method, row in sorted(taus.items(), key=lambda pair: -(pair[1]["val_loss"] or 0.0)):
        cost = f"{row['cpu_seconds']:.0f} s a candidate" if "cpu_seconds" in row else ""
        tau_text = "  ".join(f"{name} {'none' if row[name] is None else format(row[name], '+.3f')}" for name in tables)
        print(f"{method:28} tau {tau_text}  {cost}")
    best = max(taus[f"supernet:{epochs}"]["val_loss"] or 0.0 for epochs in SUPERNETS)
    full, full_table = (taus[method]["val_loss"] for method in (FULL, FULL_ALL))
    print(
        f"in validation loss: full training {full:.3f} ({full_table:.3f} of the whole table; target 0.7), "
        f"supernet {best:.3f} (target 0.6)"
    )


if __name__ == "__main__":
    main()
