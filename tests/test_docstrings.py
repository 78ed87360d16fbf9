"""The examples in docstrings run and give the outputs that they show."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import attnsurgery
from attnsurgery.search import SearchConfig, run

EXAMPLES: list[Callable[..., Any]] = [
    attnsurgery.inspect,
    attnsurgery.plan,
    attnsurgery.operate,
    attnsurgery.remove,
    attnsurgery.verify,
    attnsurgery.register,
    attnsurgery.save_delta,
    attnsurgery.load_delta,
    run,
]


@pytest.mark.parametrize("verb", EXAMPLES, ids=lambda verb: verb.__name__)
@pytest.mark.slow
def test_docstring_example_runs(verb: Callable[..., Any], tmp_path: Path) -> None:
    """Each public verb has an example in its docstring, which runs as a doctest."""
    names = {"attnsurgery": attnsurgery, "timm": timm, "torch": torch, "folder": tmp_path}
    names |= {"SearchConfig": SearchConfig, "run": run}
    (example,) = doctest.DocTestFinder(recurse=False).find(verb, verb.__name__, globs=names)
    assert example.examples, f"{verb.__name__} has no example"
    lines: list[str] = []
    results = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=lines.append)
    assert results.failed == 0, "".join(lines)
