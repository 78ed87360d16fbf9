"""Linear algebra on one thread: faster for small matrices, and with the same rounding whatever the number of cores.

Results depend on the number of threads in their last digits. On one thread a search chooses the same candidates on a
machine with two cores and on one with a hundred.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import ParamSpec, TypeVar

from threadpoolctl import ThreadpoolController

Params = ParamSpec("Params")
Result = TypeVar("Result")


def on_one_thread(function: Callable[Params, Result]) -> Callable[Params, Result]:
    """A function decorator: inside the function, the BLAS libraries of numpy and scipy use one thread."""

    @wraps(function)
    def limited(*args: Params.args, **kwargs: Params.kwargs) -> Result:
        with _controller().limit(limits=1, user_api="blas"):
            return function(*args, **kwargs)

    return limited


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()  # inspects every loaded library, which takes time, so only once
