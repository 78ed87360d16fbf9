"""torch.compile for measurements: a model is compiled, or the measurement fails with an error.

Dynamo caches compiled code by the code object of a forward, which all models of a class share. After
`recompile_limit` (8) variants it runs further ones eagerly without an error, and a second batch size is compiled for
dynamic shapes. To measure neither by accident, each measurement begins with an empty cache and static shapes, and
reaching the limit is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from attnsurgery.errors import UsageError

Forward = Callable[[torch.Tensor], Any]
_at_reset = 0
"""Number of graphs that had been compiled when the cache was emptied."""
_LIMIT = 512
"""Largest number of variants of one code object: a model that is compiled in parts may have one for each block."""


@contextmanager
def fresh_compiler() -> Iterator[Callable[[], bool]]:
    """A context with an empty cache of compiled code, and errors where dynamo would fall back to eager silently.

    Models that the caller has compiled before are compiled again at their next call.

    Yields:
        A function, called after each placement of copies, that says whether there may be another one. A copy usually
        runs the code of its original; if it is compiled again, more copies would take too long.
    """
    import torch._dynamo as dynamo

    settings: Any = dynamo.config
    overrides = {
        **{name: _LIMIT for name in ("recompile_limit", "cache_size_limit")},
        **{name: _LIMIT * 8 for name in ("accumulated_recompile_limit", "accumulated_cache_size_limit")},
        **{name: True for name in ("fail_on_recompile_limit_hit", "fail_on_cache_limit_hit")},
    }
    global _at_reset
    torch.compiler.reset()
    _at_reset = graphs_compiled()
    with settings.patch({name: value for name, value in overrides.items() if hasattr(settings, name)}):
        counts: list[int] = []

        def no_recompilation() -> bool:
            counts.append(graphs_compiled())
            return counts[0] == counts[-1]

        yield no_recompilation


def compile_model(model: nn.Module) -> Forward:
    """The model's forward, compiled at its first call, which raises a UsageError if torch compiles nothing of it."""
    forward: Forward = torch.compile(model, dynamic=False)
    is_checked = False

    def call(x_BCHW: torch.Tensor) -> Any:
        nonlocal is_checked
        outputs = forward(x_BCHW)
        if not is_checked and graphs_compiled() == _at_reset:  # a copy may use the code of its original
            raise UsageError(
                f"torch.compile compiled nothing of {type(model).__name__}, so its compiled latency is not known. "
                "Use --mode eager, or cudagraph on a GPU."
            )
        is_checked = True
        return outputs

    return call


def graphs_compiled() -> int:
    """Number of graphs that dynamo has compiled since its counters were reset."""
    import torch._dynamo.utils as utils

    return int(utils.counters["stats"]["unique_graphs"])
