"""What a run does before its first trial: start workers, measure the base early, make the starting weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from attnsurgery.errors import SearchError
from attnsurgery.latency import LatencyBackend
from attnsurgery.search.config import SearchConfig
from attnsurgery.search.coordinator.base_record import measure_base
from attnsurgery.search.execution.assemble import assemble, before_images
from attnsurgery.search.execution.baseline import hash_of
from attnsurgery.search.execution.bench import Bench
from attnsurgery.search.execution.jobs import Data, Job
from attnsurgery.search.listener import Listener
from attnsurgery.search.storage.run_directory import SUPERNET_WEIGHTS, WEIGHTS, remove_own, set_aside
from attnsurgery.search.workers.launch import LAUNCHERS, Launcher
from attnsurgery.search.workers.pool import InProcessPool, WorkerPool
from attnsurgery.search.workers.processes import ProcessPool


def measured_early(
    config: SearchConfig, listener: Listener, stop: Callable[[], bool], backend: LatencyBackend | None
) -> Data | None:
    """The base's latency, measured before many images are opened; None where the search measures it afterwards.

    Workers on other machines are not started twice, because they may have to wait for their turn.

    Raises:
        NothingFeasibleError: the base alone is over a budget.
    """
    if config.launcher != "local" or (bench := before_images(config, backend)) is None:
        return None
    with started_pool(config, listener, stop, backend, bench) as (_, pool):
        return measure_base(bench, pool, suggest=backend is None)


@contextmanager
def started_pool(
    config: SearchConfig,
    listener: Listener,
    stop: Callable[[], bool],
    backend: LatencyBackend | None,
    early: Bench | None = None,
) -> Iterator[tuple[Bench, WorkerPool]]:
    """The bench and the workers of a search; with a `backend`, this process does the work itself.

    Args:
        config: all settings.
        listener: told of progress.
        stop: whether the user asked for an end.
        backend: measures latencies instead of the backend that the configuration names.
        early: a bench without images, for jobs that need none.
    """
    alone = config.workers == 0 or backend is not None
    make = LAUNCHERS[config.launcher]  # looked up before images are read: an unknown name is an error
    with ExitStack() as stack:
        launcher: Launcher | None = None
        if make.prepares and not alone:  # another may hold a cluster until its pool is closed, so it is made last
            launcher = make(config)
            stack.callback(launcher.close)
            launcher.prepare()
        bench = early or assemble(config, listener, backend, decode=alone)
        pool: WorkerPool
        if alone:
            pool = InProcessPool(bench, listener, stop)
        else:
            launcher = launcher or make(bench.config)
            launcher.config, launcher.decode = bench.config, early is None
            pool = ProcessPool(launcher, listener, stop, versions=bench.versions())
        stack.callback(pool.close)
        yield bench, pool


def starting_weights_of(
    pool: WorkerPool, bench: Bench, folder: Path, facts: Mapping[str, Any], listener: Listener
) -> str:
    """The hash of the starting weights; each process loads the weights themselves where it needs them.

    Args:
        facts: data of the search as its study has it. Weights that the study does not know are not used.

    Raises:
        SearchError: the weights in the run directory are not those that the search began with.
    """
    path, expected = folder / WEIGHTS, (facts.get("config") or {}).get("weights")
    if expected is None:
        _clear(folder, WEIGHTS, listener)
    if not facts.get("base"):
        _clear(folder, SUPERNET_WEIGHTS, listener)
    if path.exists():
        if (actual := hash_of(path)) != expected:
            raise SearchError(
                f"{path} does not hold the weights that the search began with: their hash was {expected}, and is now "
                f"{actual}. Put them back, or remove the file, and they are made again; or begin another search beside "
                "this one with --new."
            )
        if not isinstance(pool, InProcessPool):
            return actual
    (result,) = pool.all([Job("weights")])
    bench.fresh, bench.head = result["fresh"], result["head"]
    return str(result["weights"])


def _clear(folder: Path, name: str, listener: Listener) -> None:
    """Free a name in the run directory: a file that the search wrote is removed, any other is renamed."""
    remove_own(folder, name)
    if new_name := set_aside(folder, name):
        listener.phase(f"{name} was not made by this search: it is not used, and kept as {new_name}")
