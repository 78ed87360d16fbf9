"""Scores that cost one batch and no training: what a trained score is held against, and never the last word.

Both see a candidate before its first step. They are recorded for every trained candidate, and the report says how well
they would have ordered the candidates: a search that a proxy predicts need not have been made by training, and one
that none predicts had to be.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F

from attnsurgery.evaluate.memory import halving

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_NORMS = (*BATCH_NORMS, nn.LayerNorm, nn.GroupNorm)


def grad_norm(model: nn.Module, x_BCHW: torch.Tensor, labels_B: torch.Tensor, pieces: int = 1) -> float:
    """Euclidean norm of the gradient of the cross-entropy over all parameters, from one batch, in eval mode.

    A batch that memory does not hold is passed in pieces whose gradients are added up, which is the same gradient.

    A candidate that starts as its base has the base's gradient everywhere but in its blocks, so among candidates of one
    base this says how much there is to be gained by opening their gates. From Abdelfattah et al., "Zero-cost proxies
    for lightweight NAS", ICLR 2021, section 3.2.

    Args:
        pieces: so many from the start, where memory is known to be short.

    Raises:
        torch.OutOfMemoryError and others: one image at a time is too many.
    """
    training = model.training
    model.eval()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        gradients = halving(lambda size: _gradients(model, parameters, x_BCHW, labels_B, size), len(labels_B), pieces)
    finally:
        model.train(training)
    squares = [gradient.double().square().sum() for gradient in gradients if gradient is not None]
    return float(torch.stack(squares).sum().sqrt())


def _gradients(
    model: nn.Module, parameters: list[nn.Parameter], x_BCHW: torch.Tensor, labels_B: torch.Tensor, size: int
) -> list[torch.Tensor | None]:
    """Of the mean loss of the batch, by parameter, from at most `size` images at a time."""
    total: list[torch.Tensor | None] = [None] * len(parameters)
    with torch.enable_grad():
        for x_PCHW, labels_P in zip(torch.split(x_BCHW, size), torch.split(labels_B, size), strict=True):
            loss = F.cross_entropy(model(x_PCHW).float(), labels_P) * (len(labels_P) / len(labels_B))
            for index, gradient in enumerate(torch.autograd.grad(loss, parameters, allow_unused=True)):
                before = total[index]
                total[index] = gradient if before is None or gradient is None else before + gradient
    return total


def synflow(model: nn.Module, input_size: tuple[int, int, int]) -> float:
    """Synaptic flow: natural logarithm of the sum over all parameters of parameter times gradient, without data.

    All parameters are replaced by their absolute values and all norms by the identity, and the sum of the outputs for
    an image of ones is derived; in double precision, for it multiplies up over the layers. It was made for chains of
    linear layers and ReLU: a sigmoid saturates under so large numbers, and a block that gates with one adds hardly
    anything. A block whose gate is shut has no flow at all, so candidates are to start as in the papers. From Tanaka et
    al., "Pruning neural networks without any data by iteratively conserving synaptic flow", NeurIPS 2020, equation 2;
    as a score of architectures in Abdelfattah et al., ICLR 2021.

    Args:
        input_size: (C, H, W) of an image.
    """
    twin = copy.deepcopy(model).eval().double()
    with torch.no_grad():
        for tensor in twin.parameters():
            tensor.abs_()
    parameters = [parameter.requires_grad_() for parameter in twin.parameters()]
    ones = torch.ones(1, *input_size, dtype=torch.double, device=parameters[0].device)
    with torch.enable_grad(), _without_norms(twin):
        flow = twin(ones).sum()
        gradients = torch.autograd.grad(flow, parameters, allow_unused=True)
    pairs = zip(parameters, gradients, strict=True)
    total = sum(float((tensor.detach() * gradient).sum()) for tensor, gradient in pairs if gradient is not None)
    return math.log(total) if total > 0 else -math.inf


@contextmanager
def _without_norms(model: nn.Module) -> Iterator[None]:
    """Norms hand on what they are given."""
    handles = [
        module.register_forward_hook(lambda _module, given, _output: given[0])
        for module in model.modules()
        if isinstance(module, _NORMS)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
