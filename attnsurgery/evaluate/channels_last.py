"""The channels-last memory format of convolution weights while a model is trained or evaluated.

It is used on a CPU always, and on CUDA on request. On a CPU oneDNN then reorders neither weights nor activations around
each convolution: a training step of tf_efficientnet_lite0 at 64 pixels takes 0.6 of the time, of resnet18 0.9, and
transformers neither gain nor lose (scripts/bench/training.py). On CUDA the kernels for tensor cores expect this format;
other kernels reorder around each convolution or take longer. The format is a matter of strides, so shapes, values and
saved files are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

import torch
from torch import nn

from attnsurgery.faults import fault_of


class ChannelsLast:
    """A context in which the convolution weights of a model are channels last, if the device is to have them so.

    Activations get these strides too. Where a model's own code does not accept that (`x.view(batch, -1)` of a feature
    map), its first forward pass fails, and the original format is used from then on.

    Args:
        model: changed in place, and only in its strides.
        device: a torch device; on a CPU the format is always used.
        on_cuda: use the format on CUDA too.
    """

    def __init__(self, model: nn.Module, device: str, on_cuda: bool = False) -> None:
        self._convolutions: list[nn.Conv2d] = []
        kind = torch.device(device).type
        if kind == "cpu" or (kind == "cuda" and on_cuda):
            self._convolutions = [
                module for module in model.modules() if isinstance(module, nn.Conv2d) and module.weight.is_contiguous()
            ]
        self._has_run = False

    def __enter__(self) -> Self:
        self._convert(torch.channels_last)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._convert(torch.contiguous_format)

    def run(self, forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """`forward(x)`; if the first call fails, it is repeated in the original format, which is kept from then on."""
        if self._has_run:
            return forward(x)
        self._has_run = True
        try:
            return forward(x)
        except RuntimeError as error:
            if fault_of(error) is not None:
                self._has_run = False  # a device fault says nothing about the format
                raise
            self._convert(torch.contiguous_format)
            self._convolutions = []
            return forward(x)

    def _convert(self, memory_format: torch.memory_format) -> None:
        for module in self._convolutions:
            module.weight.data = module.weight.data.contiguous(memory_format=memory_format)
