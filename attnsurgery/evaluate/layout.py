"""Convolution weights with channels last while a model is trained or judged: on a CPU, and on CUDA if asked for.

oneDNN then neither reorders weights nor activations around each convolution: a training step of tf_efficientnet_lite0
at 64 pixels takes 0.6 of the time, of resnet18 0.9, and transformers neither gain nor lose (scripts/bench/training.py).
On CUDA the kernels for tensor cores want them so, and others reorder around each convolution or take longer. Channels
last is a matter of strides, so shapes, values and what is saved stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

import torch
from torch import nn

from attnsurgery.faults import fault_of


class ChannelsLast:
    """The context in which they are, if this device is to have them.

    Args:
        asked: on CUDA they are; a CPU has them always.

    Activations get these strides too. Where a model's own code cannot do with that (`x.view(batch, -1)` of a
    feature map), its first forward shows it, and all goes on with the weights as they were.
    """

    def __init__(self, model: nn.Module, device: str, asked: bool = False) -> None:
        self._kept: list[nn.Conv2d] = []
        kind = torch.device(device).type
        if kind == "cpu" or (kind == "cuda" and asked):
            self._kept = [
                module for module in model.modules() if isinstance(module, nn.Conv2d) and module.weight.is_contiguous()
            ]
        self._tried = False

    def __enter__(self) -> Self:
        self._lay(torch.channels_last)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lay(torch.contiguous_format)

    def run(self, forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """`forward(x)`; the first time also if it takes another layout."""
        if self._tried:
            return forward(x)
        self._tried = True
        try:
            return forward(x)
        except RuntimeError as error:
            if fault_of(error) is not None:
                self._tried = False  # it tells nothing of the layout
                raise
            self._lay(torch.contiguous_format)
            self._kept = []
            return forward(x)

    def _lay(self, layout: torch.memory_format) -> None:
        for module in self._kept:
            module.weight.data = module.weight.data.contiguous(memory_format=layout)
