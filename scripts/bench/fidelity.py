#!/usr/bin/env python
"""How well cheap scores order candidates: each rung, the supernet and the proxies against full training.

    scripts/bench/fidelity.py CIFAR10 [--nets 32] [--results DIR]

So many candidates of docs/benchmarks/table, drawn at random, are scored by every cheaper way there is, from seed
0, and held against the table's full training from seed 1: Kendall's tau-b over the candidates. The full training from
seed 0 stands beside them, of these candidates and of the whole table: no way can be expected to do better, and one that
seems to was lucky. Resumable. Targets: full rung 0.7, supernet 0.6. Writes docs/benchmarks/fidelity.json.
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
from samplers import Table
from table import CHOSEN, OPTIONS, ROOT, SITES, SIZE, TABLE, WAYS, data_of, made, settings_of, start_of

from attnsurgery.evaluate import EVALUATORS, Data
from attnsurgery.evaluate.proxies import grad_norm, synflow
from attnsurgery.graph.find import survey
from attnsurgery.search.execution.scorers import Alone, Candidate, Scorer, Shared
from attnsurgery.search.execution.supernet import Supernet
from attnsurgery.search.result.statistics import kendall_tau_b
from attnsurgery.surgery.verify import count_macs

RUNGS = (("blocks", 1), ("blocks", 4), ("finetune", 1), ("finetune", 2))
SUPERNETS = (4, 16)
SEED, JUDGE = 0, 1
FULL = "full training, another seed"
FULL_ALL = "the same of the whole table"
Picks = tuple[str, ...]


def scorers(table: Table, data: Data, base: torch.nn.Module, folder: Path) -> dict[str, Scorer]:
    settings = settings_of(WAYS[CHOSEN])
    ways: dict[str, Scorer] = {
        f"{name}:{epochs}": Alone(EVALUATORS[name](data, replace(settings, epochs=epochs))) for name, epochs in RUNGS
    }
    for epochs in SUPERNETS:
        torch.manual_seed(SEED)
        supernet = Supernet(base, table.space, survey(base, SIZE))
        path = folder / f"supernet-{epochs}.safetensors"
        ways[f"supernet:{epochs}"] = Shared(supernet, base, data, replace(settings, epochs=epochs), path)
    return ways


def proxies(model: torch.nn.Module, opened: torch.nn.Module, data: Data) -> dict[str, float]:
    x_BCHW, labels_B = next(data.train.train_batches(64, "cpu", SEED, 0))
    return {
        "grad_norm": grad_norm(model, x_BCHW, labels_B),
        "synflow": synflow(opened, SIZE),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "macs": count_macs(model, SIZE),
    }


def scored(way: Scorer, base: torch.nn.Module, picks: Picks) -> dict[str, float]:
    began = time.process_time()
    assignment = dict(zip(SITES, picks, strict=True))
    score = way.score(Candidate(made(base, picks, SEED), assignment), SEED)
    return {"val": score.top1, "val_loss": score.loss, "cpu_seconds": time.process_time() - began}


def run(asked: argparse.Namespace, table: Table) -> list[dict[str, Any]]:
    """A row for each candidate and way, the missing ones made now."""
    folder: Path = asked.results
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "fidelity.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    done = {(row["way"], tuple(row["picks"])) for row in rows}
    data = data_of(asked.cifar, WAYS[CHOSEN])
    base = start_of(WAYS[CHOSEN], data, asked.table)
    order = torch.randperm(len(table.scores), generator=torch.Generator().manual_seed(2)).tolist()
    chosen = [list(table.scores)[index] for index in order[: asked.nets]]
    ways: dict[str, Callable[[Picks], dict[str, float]]] = {
        "proxies": lambda picks: proxies(made(base, picks, SEED), made(base, picks, SEED, "paper"), data)
    }
    for name, scorer in scorers(table, data, base, folder).items():
        ways[name] = lambda picks, scorer=scorer: scored(scorer, base, picks)  # type: ignore[misc]
    with path.open("a") as file:
        for name, way in ways.items():
            for picks in chosen:
                if (name, picks) not in done:
                    rows.append({"way": name, "picks": list(picks), **way(picks)})
                    file.write(json.dumps(rows[-1]) + "\n")
                    file.flush()
            print(f"{name}: {len(chosen)} candidates", flush=True)
    return [row for row in rows if tuple(row["picks"]) in chosen]


def figures(rows: list[dict[str, Any]], tables: dict[str, Table]) -> dict[str, dict[str, Any]]:
    """Tau of every way in both measures, with what one candidate costs."""
    by_way: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_way.setdefault(row["way"], []).append(row)
    found: dict[str, dict[str, Any]] = {}
    for measure, table in tables.items():

        def tau(values: dict[Picks, float], table: Table = table) -> float | None:
            return kendall_tau_b(list(values.values()), [table.scores[picks][JUDGE] for picks in values])

        chosen = [tuple(row["picks"]) for row in by_way["proxies"]]
        found.setdefault(FULL, {})[measure] = tau({picks: table.scores[picks][SEED] for picks in chosen})
        found.setdefault(FULL_ALL, {})[measure] = tau({picks: scores[SEED] for picks, scores in table.scores.items()})
        sign = -1.0 if measure.endswith("loss") else 1.0
        for way, some in by_way.items():
            if way == "proxies":
                for name in ("grad_norm", "synflow", "parameters", "macs"):
                    found.setdefault(name, {})[measure] = tau({tuple(row["picks"]): row[name] for row in some})
            else:
                one = found.setdefault(way, {})
                one[measure] = tau({tuple(row["picks"]): sign * row[measure] for row in some})
                one["cpu_seconds"] = sum(row["cpu_seconds"] for row in some) / len(some)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cifar", type=Path)
    parser.add_argument("--nets", type=int, default=32)
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "fidelity")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    tables = {measure: Table.read(measure, asked.table) for measure in ("val_loss", "val")}
    found = figures(run(asked, tables["val_loss"]), tables)
    if asked.table == TABLE:
        print(f"written {write('fidelity', {'nets': asked.nets, 'options': OPTIONS, 'tau': found})}")
    for way, row in sorted(found.items(), key=lambda pair: -(pair[1]["val_loss"] or 0.0)):
        cost = f"{row['cpu_seconds']:.0f} s a candidate" if "cpu_seconds" in row else ""
        said = "  ".join(f"{name} {'none' if row[name] is None else format(row[name], '+.3f')}" for name in tables)
        print(f"{way:28} tau {said}  {cost}")
    best = max(found[f"supernet:{epochs}"]["val_loss"] or 0.0 for epochs in SUPERNETS)
    full, whole = (found[way]["val_loss"] for way in (FULL, FULL_ALL))
    print(
        f"in validation loss: full training {full:.3f} ({whole:.3f} of the whole table; target 0.7), "
        f"supernet {best:.3f} (target 0.6)"
    )


if __name__ == "__main__":
    main()
