#!/usr/bin/env python
"""Time and memory of `attnsurgery.inspect` for the smallest and the largest model of every family of timm.

Target: `total` at most 0.4 s in the median and never above 6 s, and never more than 1.5 GB, since no weights are
allocated.

    python scripts/bench/zoo.py [--choose] [--only PATTERN]     # about 2 minutes

Every model is inspected in its own process, which is forked after two small models were inspected, so that imports
count for memory and not for time. `build` is timm's own constructor on the meta device, `inspect` everything after it:
the recorded forward pass and all sites. Times are processor seconds on one thread. --choose counts the parameters of
all architectures again, which takes most of an hour; otherwise the choice in docs/benchmarks/zoo.json is used.
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

MEDIAN, MAXIMUM, MEMORY_MB = 0.4, 6.0, 1500
TIMEOUT_S = 300  # for one model, on a machine that may be busy
OWN_MODULES = {"zoo", "models"}
COLUMNS = {"parameters": 14, "build s": 9, "inspect s": 10, "total s": 9, "peak MB": 9, "sites": 7}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--choose", action="store_true", help="count parameters again to find smallest and largest")
    parser.add_argument("--only", default="*", help="families of this pattern; nothing is written")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("test_resnet", "test_vit"):  # torch loads modules at the first use of the meta device
        assert attnsurgery.inspect(name).sites
    families = choose() if arguments.choose else stored_choice()
    rows = []
    columns = [f"{title:>{width}}" for title, width in COLUMNS.items()]
    print(f"{'family':28}{'model':44}{''.join(columns)}")
    for family, names in families.items():
        if fnmatch.fnmatch(family, arguments.only):
            for name in names:
                rows.append({"family": family, "model": name, **measure(name)})
                print(line(rows[-1]), flush=True)
    inspected = [row for row in rows if "error" not in row]
    seconds = [row["total"] for row in inspected]
    worst, fattest = max(inspected, key=lambda row: row["total"]), max(inspected, key=lambda row: row["peak_mb"])
    figures = {
        "processes_waiting": os.getloadavg(),  # over 1, 5 and 15 minutes: other processes slow the measurement down
        "families": len({row["family"] for row in rows}),
        "models": len(rows),
        "median_s": statistics.median(seconds),
        "median_inspect_s": statistics.median(row["inspect"] for row in inspected),
        "most_s": worst["total"],
        "peak_mb": fattest["peak_mb"],
        "over_6_s": [row["model"] for row in inspected if row["total"] > MAXIMUM],
        "over_1500_mb": [row["model"] for row in inspected if row["peak_mb"] > MEMORY_MB],
        "errors": {row["model"]: row["error"] for row in rows if "error" in row},
    }
    if arguments.only == "*":
        print(f"written {write('zoo', {'figures': figures, 'models': rows})}")
    print(f"not inspected  {len(figures['errors'])} {figures['errors'] or ''}")
    print(f"above {MAXIMUM:g} s      {len(figures['over_6_s'])}: {', '.join(figures['over_6_s']) or 'none'}")
    print(f"above {MEMORY_MB} MB  {len(figures['over_1500_mb'])}: {', '.join(figures['over_1500_mb']) or 'none'}")
    print(
        f"{len(rows)} models of {figures['families']} families: median {figures['median_s']:.2f} s (of it inspect "
        f"{figures['median_inspect_s']:.2f} s), most {worst['total']:.1f} s ({worst['model']}), peak memory "
        f"{fattest['peak_mb']:.0f} MB ({fattest['model']})"
    )


def measure(name: str) -> dict[str, Any]:
    """Seconds and memory of one model, measured in its own process; or the error."""
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_inspect, args=(name, sender))
    process.start()
    sender.close()
    try:
        result: dict[str, Any] = receiver.recv() if receiver.poll(TIMEOUT_S) else {"error": f"more than {TIMEOUT_S} s"}
    except EOFError:
        result = {"error": "the process died"}
    process.kill()
    process.join()
    return result


def _inspect(name: str, sender: Any) -> None:
    try:
        start = time.process_time()
        model = weightless(name)
        build_end = time.process_time()
        sites = survey(model, spend=True).sites  # as `inspect` does with a name
        end = time.process_time()
    except Exception as error:  # reported in the model's row
        sender.send({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"})
        return
    sender.send(
        {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "build": build_end - start,
            "inspect": end - build_end,
            "total": end - start,
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


def stored_choice() -> dict[str, list[str]]:
    families: dict[str, list[str]] = {}
    for row in json.loads((RESULTS / "zoo.json").read_text())["models"]:
        families.setdefault(row["family"], []).append(row["model"])
    return families


def choose() -> dict[str, list[str]]:
    """The smallest and the largest architecture of every family, by parameters."""
    families = {}
    for family in timm.list_modules():
        sizes = (
            {name: parameters(name) for name in timm.list_models(module=family)} if family not in OWN_MODULES else {}
        )
        if sizes:
            ordered = sorted(sizes, key=lambda name: (sizes[name], name))
            families[family] = list(dict.fromkeys([ordered[0], ordered[-1]]))
    return families


def parameters(name: str) -> int:
    return sum(parameter.numel() for parameter in weightless(name).parameters())


if __name__ == "__main__":
    main()
