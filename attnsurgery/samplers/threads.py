"""Linear algebra of small matrices, which several threads make slower, and which each number of threads rounds its own
way: with one, a search asks for the same candidates on a machine with two cores and on one with a hundred."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import ParamSpec, TypeVar

from threadpoolctl import ThreadpoolController

Given = ParamSpec("Given")
Result = TypeVar("Result")


def on_one_thread(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """The same function, in which numpy and scipy use one thread."""

    @wraps(function)
    def alone(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        with _controller().limit(limits=1, user_api="blas"):
            return function(*args, **kwargs)

    return alone


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()  # looks at every library that is loaded, so once
