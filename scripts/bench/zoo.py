#!/usr/bin/env python
"""What `attnsurgery.inspect` takes in every family of timm: seconds and memory, for its smallest and largest model.

Target: `total` at most 0.4 s in the median and never above 6 s, and never more than 1.5 GB, since nothing is allocated
for real.

    python scripts/bench/zoo.py [--choose] [--only PATTERN]     # about 2 minutes

Every model has a process of its own, forked from one in which two small models were inspected before: so imports count
for memory and not for time. `build` is timm's own constructor on the meta device, `inspect` all behind it: the recorded
forward and every site. Seconds are those of the processor, on one thread; on an idle machine they are the clock's.
--choose counts the parameters of all architectures anew, which takes most of an hour; else the choice that
docs/benchmarks/zoo.json holds is kept.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import multiprocessing
import os
import resource
import statistics
import time
from typing import Any

import timm
import torch
from _common import RESULTS, write

import attnsurgery
from attnsurgery.graph.find import survey
from attnsurgery.timm_plugin.architectures import weightless

MEDIAN, MOST, MEMORY_MB = 0.4, 6.0, 1500
PATIENCE = 300  # seconds for one model, on a machine that may be busy
OURS = {"zoo", "models"}
COLUMNS = {"parameters": 14, "build s": 9, "inspect s": 10, "total s": 9, "peak MB": 9, "sites": 7}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--choose", action="store_true", help="count parameters anew to find smallest and largest")
    parser.add_argument("--only", default="*", help="families of this pattern; nothing is written")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("test_resnet", "test_vit"):  # what torch loads at the first use of the meta device is loaded now
        assert attnsurgery.inspect(name).sites
    chosen = choose() if arguments.choose else kept_choice()
    rows = []
    columns = [f"{title:>{width}}" for title, width in COLUMNS.items()]
    print(f"{'family':28}{'model':44}{''.join(columns)}")
    for family, names in chosen.items():
        if fnmatch.fnmatch(family, arguments.only):
            for name in names:
                rows.append({"family": family, "model": name, **measured(name)})
                print(line(rows[-1]), flush=True)
    done = [row for row in rows if "error" not in row]
    seconds = [row["total"] for row in done]
    worst, fattest = max(done, key=lambda row: row["total"]), max(done, key=lambda row: row["peak_mb"])
    figures = {
        "processes_waiting": os.getloadavg(),  # over 1, 5 and 15 minutes: who shares caches is slower
        "families": len({row["family"] for row in rows}),
        "models": len(rows),
        "median_s": statistics.median(seconds),
        "median_inspect_s": statistics.median(row["inspect"] for row in done),
        "most_s": worst["total"],
        "peak_mb": fattest["peak_mb"],
        "over_6_s": [row["model"] for row in done if row["total"] > MOST],
        "over_1500_mb": [row["model"] for row in done if row["peak_mb"] > MEMORY_MB],
        "errors": {row["model"]: row["error"] for row in rows if "error" in row},
    }
    if arguments.only == "*":
        print(f"written {write('zoo', {'figures': figures, 'models': rows})}")
    print(f"not inspected  {len(figures['errors'])} {figures['errors'] or ''}")
    print(f"above {MOST:g} s      {len(figures['over_6_s'])}: {', '.join(figures['over_6_s']) or 'none'}")
    print(f"above {MEMORY_MB} MB  {len(figures['over_1500_mb'])}: {', '.join(figures['over_1500_mb']) or 'none'}")
    print(
        f"{len(rows)} models of {figures['families']} families: median {figures['median_s']:.2f} s (of it inspect "
        f"{figures['median_inspect_s']:.2f} s), most {worst['total']:.1f} s ({worst['model']}), peak memory "
        f"{fattest['peak_mb']:.0f} MB ({fattest['model']})"
    )


def measured(name: str) -> dict[str, Any]:
    """Seconds and memory of one model, in a process of its own; or what went wrong."""
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_inspect, args=(name, sender))
    process.start()
    sender.close()
    try:
        found: dict[str, Any] = receiver.recv() if receiver.poll(PATIENCE) else {"error": f"more than {PATIENCE} s"}
    except EOFError:
        found = {"error": "the process died"}
    process.kill()
    process.join()
    return found


def _inspect(name: str, sender: Any) -> None:
    try:
        start = time.process_time()
        model = weightless(name)
        built = time.process_time()
        sites = survey(model, spend=True).sites  # as `inspect` does with a name
        done = time.process_time()
    except Exception as error:  # one line of the table, and on with the next
        sender.send({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"})
        return
    sender.send(
        {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "build": built - start,
            "inspect": done - built,
            "total": done - start,
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
            "sites": len(sites),
        }
    )


def line(row: dict[str, Any]) -> str:
    head = f"{row['family']:28}{row['model']:44}"
    if "error" in row:
        return f"{head}{row['error']}"
    times = f"{row['build']:9.2f}{row['inspect']:10.2f}{row['total']:9.2f}"
    return f"{head}{row['parameters']:>14,}{times}{row['peak_mb']:9.0f}{row['sites']:7}"


def kept_choice() -> dict[str, list[str]]:
    chosen: dict[str, list[str]] = {}
    for row in json.loads((RESULTS / "zoo.json").read_text())["models"]:
        chosen.setdefault(row["family"], []).append(row["model"])
    return chosen


def choose() -> dict[str, list[str]]:
    """The smallest and the largest architecture of every family, by parameters."""
    chosen = {}
    for family in timm.list_modules():
        sizes = {name: parameters(name) for name in timm.list_models(module=family)} if family not in OURS else {}
        if sizes:
            ordered = sorted(sizes, key=lambda name: (sizes[name], name))
            chosen[family] = list(dict.fromkeys([ordered[0], ordered[-1]]))
    return chosen


def parameters(name: str) -> int:
    return sum(parameter.numel() for parameter in weightless(name).parameters())


if __name__ == "__main__":
    main()
