"""The steps, in the order of their worth: what proves that it works, the table of latencies, what searches do.

Limits are the most that a step may take; those with many rows leave the last out when their time is over.
"""

from __future__ import annotations

from gpu_bench.runner import Step

STEPS = (
    Step("card", 1, "gpu_bench.card_step:run", 60, 10, "state of the card, software, a first matrix product"),
    Step("tests", 1, "gpu_bench.pytest_step:run", 240, 25, "pytest -m gpu, a row for each test"),
    Step("search", 1, "gpu_bench.search_steps:search", 90, 30, "a search of 3 trials under the default conditions"),
    Step("search-workers", 1, "gpu_bench.search_steps:search_workers", 100, 40, "the same with two workers"),
    Step(
        "meter",
        1,
        "gpu_bench.meter_step:run",
        150,
        25,
        "a model against itself in every mode, and Triton's measurements",
    ),
    Step("crossover", 1, "gpu_bench.blocks_step:crossover", 75, 15, "which kernel attention should take"),
    Step("kernels", 2, "gpu_bench.kernels_step:run", 60, 15, "parts of blocks and torch's kernels, in microseconds"),
    Step("latency", 2, "gpu_bench.latency_step:run", 400, 30, "surgical models against their bases"),
    Step("blocks", 2, "gpu_bench.blocks_step:blocks", 75, 20, "blocks compared with common implementations"),
    Step("targets", 2, "gpu_bench.targets_step:run", 75, 15, "SE compiled, non-local trained, the meter's interval"),
    Step("out-of-memory", 3, "gpu_bench.search_steps:out_of_memory", 120, 40, "a training that memory does not hold"),
    Step("killed-worker", 3, "gpu_bench.search_steps:killed_worker", 80, 30, "a search one of whose workers is killed"),
    Step("budget", 3, "gpu_bench.search_steps:budget", 260, 60, "do winners keep to their budgets?"),
    Step("latency-model", 3, "gpu_bench.latency_step:model", 160, 60, "latencies predicted after 40 s of calibration"),
    Step("ladder", 3, "gpu_bench.costs_step:ladder", 90, 10, "siblings and input sizes, in milliseconds"),
    Step("slots", 3, "gpu_bench.costs_step:slots", 150, 15, "blocks in wide and in narrow slots"),
    Step("training", 3, "gpu_bench.training_step:run", 75, 15, "images a second of a training step"),
)
NAMES = frozenset(step.name for step in STEPS)
