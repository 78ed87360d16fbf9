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

from gpu_bench.rows import INCOMPLETE, Rows  # noqa: E402

_VERSIONS = ("torch", "triton", "timm", "optuna", "attnsurgery")


def conditions() -> dict[str, Any]:
    """The conditions of a figure: card, driver, clocks, date, and the versions of software that is loaded."""
    facts: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "card": os.environ.get("BENCH_CARD", ""),
        "python": platform.python_version(),
    }
    facts |= {name: str(sys.modules[name].__version__) for name in _VERSIONS if name in sys.modules}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        from attnsurgery.latency import card

        facts |= card.facts("cuda") | card.state("cuda")
    return facts


def fatal(error: BaseException) -> bool:
    """Whether this process cannot use the device after an error."""
    if "torch" not in sys.modules:
        return False
    from attnsurgery.faults import Fault, fault_of

    return any(fault_of(cause) is Fault.DEVICE for cause in (error, error.__cause__) if cause is not None)


def end_with_parent() -> None:
    """Kill this process and its children as soon as the runner has ended, for whatever reason."""

    def watch() -> None:
        while os.read(0, 1):  # not sys.stdin, whose lock would block the end of the process
            pass
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("step", "body", "rows", "now", "run", "left"):
        parser.add_argument(name)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    end_with_parent()
    rows = Rows(
        Path(options.rows), options.step, options.run, float(options.left), Path(options.now), conditions, fatal
    )
    module, _, function = options.body.partition(":")
    getattr(importlib.import_module(module), function)(rows, options.tiny)
    if rows.left_out:
        print(f"left out for want of time: {', '.join(rows.left_out)}")
        raise SystemExit(INCOMPLETE)


if __name__ == "__main__":
    main()
