"""torch.compile for measurements: what was asked to be compiled is compiled, or the measurement fails and says so.

Dynamo keeps compiled code by the code object of a forward, which all models of a class share, and after
`recompile_limit` (8) variants runs the rest eagerly without an error. A second batch size is compiled for any batch
size. Both would be measured silently. So each measurement begins with an empty cache and static shapes, and a limit
that is hit is an error.
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
"""Graphs that had been compiled when the cache was emptied."""
_LIMIT = 512
"""Variants of one code object: a model that is compiled piece by piece may have one for each of its blocks."""


@contextmanager
def fresh_compiler() -> Iterator[Callable[[], bool]]:
    """An empty cache of compiled code, and errors where dynamo would give up silently.

    Models that the caller has compiled before are compiled again at their next call.

    Yields:
        Asked after each placement of copies: whether another may be made. A copy usually runs what was compiled for
        its original; where it had to be compiled anew, that takes too long to do it again and again.
    """
    import torch._dynamo as dynamo

    settings: Any = dynamo.config
    wanted = {
        **{name: _LIMIT for name in ("recompile_limit", "cache_size_limit")},
        **{name: _LIMIT * 8 for name in ("accumulated_recompile_limit", "accumulated_cache_size_limit")},
        **{name: True for name in ("fail_on_recompile_limit_hit", "fail_on_cache_limit_hit")},
    }
    global _at_reset
    torch.compiler.reset()
    _at_reset = graphs_compiled()
    with settings.patch({name: value for name, value in wanted.items() if hasattr(settings, name)}):
        first: list[int] = []

        def cheap() -> bool:
            first.append(graphs_compiled())
            return first[0] == first[-1]

        yield cheap


def compiled(model: nn.Module) -> Forward:
    """The model's forward, compiled at its first call.

    Raises, at its first call:
        UsageError: torch compiles nothing of it.
    """
    forward: Forward = torch.compile(model, dynamic=False)
    checked = False

    def call(x_BCHW: torch.Tensor) -> Any:
        nonlocal checked
        found = forward(x_BCHW)
        if not checked and graphs_compiled() == _at_reset:  # a twin may use what was compiled for the other
            raise UsageError(
                f"torch.compile compiled nothing of {type(model).__name__}, so its compiled latency is not known. "
                "Use --mode eager, or cudagraph on a GPU."
            )
        checked = True
        return found

    return call


def graphs_compiled() -> int:
    """Graphs that dynamo has compiled since its counters were reset."""
    import torch._dynamo.utils as utils

    return int(utils.counters["stats"]["unique_graphs"])
