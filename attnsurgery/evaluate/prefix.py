"""What a model computes before its first attention block, computed once for every image.

Where only blocks, and what comes behind them, are trained, everything in front gives the same in each epoch. Which
modules are in front shows in one forward: those that are done before the first block begins. In a forward with kept
features the last of these hands them over, and the others return zeros that nobody reads. That this is so is not
assumed: the outputs have to be equal bit for bit, or else an earlier module is tried, or nothing is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from attnsurgery.faults import fault_of

_TRIES = 32
"""Modules, from the last one backwards, that are tried as the one that hands over."""


class _Reached(Exception):
    def __init__(self, output: torch.Tensor) -> None:
        super().__init__()
        self.output = output


class Prefix:
    """The part of a model in front of its first block. Made by `find`.

    Args:
        model: with blocks in it.
        last: the module that hands the features over.
        before: modules that are done earlier, with what they return for a batch of `batch` images.
    """

    def __init__(self, model: nn.Module, last: nn.Module, before: dict[nn.Module, Any], batch: int) -> None:
        self.model = model
        self._last = last
        self._before = before
        self._batch = batch

    @classmethod
    def find(cls, model: nn.Module, x_BCHW: torch.Tensor) -> Prefix | None:
        """The longest prefix whose features can stand for it; None if there is none, or no block.

        Args:
            model: in eval mode.
            x_BCHW: some images, two or more.
        """
        done = _done_before_blocks(model, x_BCHW)
        fewer = x_BCHW[1:]  # shapes that do not follow the number of images show
        expected = model(fewer)
        for number in range(len(done) - 1, max(-1, len(done) - 1 - _TRIES), -1):
            last, output = done[number]
            if not isinstance(output, torch.Tensor):
                continue
            found = cls(model, last, dict(done[:number]), len(x_BCHW))
            try:
                with found.handed_over(found.features(fewer)):
                    got = model(torch.zeros_like(fewer))
            except Exception as error:  # zeros where a forward asks for more than a shape
                if fault_of(error) is not None:
                    raise
                continue
            if isinstance(got, torch.Tensor) and torch.equal(got, expected):
                return found
        return None

    def features(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """What the prefix gives for these images; the rest of the model does not run."""

        def stop(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            raise _Reached(output)

        handle = self._last.register_forward_hook(stop)
        try:
            self.model(x_BCHW)
        except _Reached as reached:
            return reached.output
        finally:
            handle.remove()
        raise RuntimeError("the module that hands features over did not run")

    @contextmanager
    def handed_over(self, features: torch.Tensor) -> Iterator[None]:
        """In this context a forward of the model begins with these features; of its images only the number counts."""
        count = len(features)

        def zeros(output: torch.Tensor) -> torch.Tensor:
            shape = (count, *output.shape[1:]) if output.ndim and output.shape[0] == self._batch else output.shape
            return torch.zeros((), dtype=output.dtype, device=features.device).expand(shape)

        def returns(value: Any) -> Callable[..., Any]:
            return lambda *args, **kwargs: value

        for module, output in self._before.items():
            module.__dict__["forward"] = returns(tree_map_only(torch.Tensor, zeros, output))
        self._last.__dict__["forward"] = returns(features)
        try:
            yield
        finally:
            for module in (*self._before, self._last):
                del module.__dict__["forward"]


def _done_before_blocks(model: nn.Module, x_BCHW: torch.Tensor) -> list[tuple[nn.Module, Any]]:
    """The largest modules that are done, once, before the first block begins, in that order.

    With what they return, as meta tensors.
    """
    done: list[tuple[nn.Module, Any]] = []
    blocks = [module for module in model.modules() if getattr(module, "grafted", False)]
    if not blocks:
        return []
    calls: dict[nn.Module, int] = {}
    over: list[bool] = []

    def begins(module: nn.Module, args: Any) -> None:
        over.append(True)

    def ends(module: nn.Module, args: Any, output: Any) -> None:
        calls[module] = calls.get(module, 0) + 1
        if not over:
            done.append((module, tree_map_only(torch.Tensor, lambda t: t.to("meta"), output)))

    handles = [block.register_forward_pre_hook(begins) for block in blocks]
    handles += [module.register_forward_hook(ends) for module in model.modules()]
    try:
        model(x_BCHW)
    finally:
        for handle in handles:
            handle.remove()
    finished = [(module, output) for module, output in done if calls[module] == 1 and "forward" not in module.__dict__]
    inside = {child for module, _ in finished for child in module.modules() if child is not module}
    return [(module, output) for module, output in finished if module not in inside]
