"""The process of one step: calls its function with the rows to fill. Started by runner.py."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import signal
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # scripts/bench, and not this folder

from gpu_bench.rows import PART, Rows  # noqa: E402

_VERSIONS = ("torch", "triton", "timm", "optuna", "attnsurgery")


def conditions() -> dict[str, Any]:
    """What a figure depends on: card, driver, clocks, software, date; of software, what this process has loaded."""
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "card": os.environ.get("BENCH_CARD", ""),
        "python": platform.python_version(),
    }
    found |= {name: str(sys.modules[name].__version__) for name in _VERSIONS if name in sys.modules}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        from attnsurgery.latency import card

        found |= card.facts("cuda") | card.state("cuda")
    return found


def fatal(error: BaseException) -> bool:
    """Whether the error has broken this process's use of the device."""
    if "torch" not in sys.modules:
        return False
    from attnsurgery.faults import Fault, fault_of

    return any(fault_of(one) is Fault.DEVICE for one in (error, error.__cause__) if one is not None)


def end_with_parent() -> None:
    """Kill this process and all that it has started as soon as the runner is gone, however that ended."""

    def watch() -> None:
        while os.read(0, 1):  # not sys.stdin, whose lock would be in the way at the end
            pass
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("step", "body", "rows", "now", "run", "left"):
        parser.add_argument(name)
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args()
    end_with_parent()
    rows = Rows(Path(asked.rows), asked.step, asked.run, float(asked.left), Path(asked.now), conditions, fatal)
    module, _, function = asked.body.partition(":")
    getattr(importlib.import_module(module), function)(rows, asked.tiny)
    if rows.left_out:
        print(f"left out for want of time: {', '.join(rows.left_out)}")
        raise SystemExit(PART)


if __name__ == "__main__":
    main()
