"""An evaluator for tests that trains nothing, and has injected faults when it is told to.

Its folder on PYTHONPATH makes it known to workers, as an installed package would be. From the environment:

    DUMMY_SECONDS   how long a score takes; 0 by default
    DUMMY_FAULTS   a folder; each file in it is one injected fault, named by its kind and anything behind a dash:
                    kill, hang, memory, device, exit. Whoever removes the file has the fault.
    DUMMY_LOG       a file; each score adds a line of JSON: who it was, and in how many pieces
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

from attnsurgery.evaluate._base import Evaluator, Score, SplitName, Watch


class Dummy(Evaluator):
    """A score that depends on the model's structure and the seed alone."""

    def score(self, model: nn.Module, seed: int, on: SplitName = "val", watch: Watch | None = None) -> Score:
        begun, seconds = time.monotonic(), float(os.environ.get("DUMMY_SECONDS", 0))
        _mishap()
        while True:
            if watch:
                watch.step()
            left = begun + seconds - time.monotonic()
            if left <= 0:
                break
            time.sleep(min(0.1, left))
        structure = sorted((name, tuple(tensor.shape)) for name, tensor in model.state_dict().items())
        identity = hashlib.sha256(json.dumps(structure).encode()).hexdigest()
        _log({"who": identity, "pieces": self.settings.pieces, "pid": os.getpid()})
        number = int(hashlib.sha256(f"{identity}:{seed}".encode()).hexdigest()[:8], 16) / 2**32
        correct_N = torch.rand(len(self.split(on)), generator=torch.Generator().manual_seed(seed)) < 0.5 + number / 4
        return Score(0.5 + number / 4, 1 - number / 4, time.monotonic() - begun, self.settings.epochs, correct_N)


def _mishap() -> None:
    folder = os.environ.get("DUMMY_FAULTS")
    for planned in sorted(Path(folder).iterdir()) if folder else ():
        try:
            planned.unlink()
        except FileNotFoundError:
            continue  # another worker has it
        kind = planned.name.partition("-")[0]
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "hang":
            time.sleep(3600)
        elif kind == "memory":
            raise torch.OutOfMemoryError("a forced lack of memory")
        elif kind == "device":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        elif kind == "exit":
            print("the driver is gone", file=sys.stderr, flush=True)
            os._exit(7)
        return


def _log(entry: dict[str, object]) -> None:
    if path := os.environ.get("DUMMY_LOG"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
