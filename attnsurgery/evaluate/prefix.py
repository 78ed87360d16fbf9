"""The features of a model in front of its first attention block, so that they can be computed once for every image.

Where only blocks and later layers are trained, the modules in front of the first block compute the same features in
each epoch. One forward pass shows which modules these are: those that finish before the first block begins. In a
forward pass with cached features the last of them returns the features, and the others return zeros that nothing reads.
This is checked: unless the outputs are equal bit for bit, an earlier module is tried, or nothing is cached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from attnsurgery.faults import fault_of

_MAX_ATTEMPTS = 32
"""Number of modules, from the last one backwards, that are tried as the end of the prefix."""


class _PrefixOutput(Exception):
    """Ends a forward pass at the end of the prefix, with the features."""

    def __init__(self, output: torch.Tensor) -> None:
        super().__init__()
        self.output = output


class Prefix:
    """The part of a model in front of its first block. Made by `find`.

    Args:
        model: a model with blocks.
        last: the module whose output is the features.
        before: earlier modules, with their outputs, as meta tensors, for a batch of `batch` images.
        batch: the size of that batch.
    """

    def __init__(self, model: nn.Module, last: nn.Module, before: dict[nn.Module, Any], batch: int) -> None:
        self.model = model
        self._last = last
        self._before = before
        self._batch = batch

    @classmethod
    def find(cls, model: nn.Module, x_BCHW: torch.Tensor) -> Prefix | None:
        """The longest prefix that its features can replace; None if there is none, or no block.

        Args:
            model: in eval mode.
            x_BCHW: at least two images.
        """
        modules = _modules_before_blocks(model, x_BCHW)
        images = x_BCHW[1:]  # another batch size reveals modules whose output has no batch dimension
        expected = model(images)
        for number in range(len(modules) - 1, max(-1, len(modules) - 1 - _MAX_ATTEMPTS), -1):
            last, output = modules[number]
            if not isinstance(output, torch.Tensor):
                continue
            prefix = cls(model, last, dict(modules[:number]), len(x_BCHW))
            try:
                with prefix.resume_from(prefix.features(images)):
                    outputs = model(torch.zeros_like(images))
            except Exception as error:  # a forward that depends on more than the shape of what is zero here
                if fault_of(error) is not None:
                    raise
                continue
            if isinstance(outputs, torch.Tensor) and torch.equal(outputs, expected):
                return prefix
        return None

    def features(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """The output of the prefix for these images, (B, ...); the rest of the model does not run."""

        def stop(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            raise _PrefixOutput(output)

        handle = self._last.register_forward_hook(stop)
        try:
            self.model(x_BCHW)
        except _PrefixOutput as reached:
            return reached.output
        finally:
            handle.remove()
        raise RuntimeError("the last module of the prefix did not run")

    @contextmanager
    def resume_from(self, features: torch.Tensor) -> Iterator[None]:
        """A context in which a forward pass begins with these features; of its images only their number matters."""
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


def _modules_before_blocks(model: nn.Module, x_BCHW: torch.Tensor) -> list[tuple[nn.Module, Any]]:
    """The largest modules that run once and finish before the first block begins, in this order.

    Returns:
        Each module with its output as meta tensors.
    """
    results: list[tuple[nn.Module, Any]] = []
    blocks = [module for module in model.modules() if getattr(module, "grafted", False)]
    if not blocks:
        return []
    calls: dict[nn.Module, int] = {}
    blocks_begun: list[bool] = []

    def on_block(module: nn.Module, args: Any) -> None:
        blocks_begun.append(True)

    def on_end(module: nn.Module, args: Any, output: Any) -> None:
        calls[module] = calls.get(module, 0) + 1
        if not blocks_begun:
            results.append((module, tree_map_only(torch.Tensor, lambda t: t.to("meta"), output)))

    handles = [block.register_forward_pre_hook(on_block) for block in blocks]
    handles += [module.register_forward_hook(on_end) for module in model.modules()]
    try:
        model(x_BCHW)
    finally:
        for handle in handles:
            handle.remove()
    finished = [
        (module, output) for module, output in results if calls[module] == 1 and "forward" not in module.__dict__
    ]
    inside = {child for module, _ in finished for child in module.modules() if child is not module}
    return [(module, output) for module, output in finished if module not in inside]
