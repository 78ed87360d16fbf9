"""Zero-cost proxies: scores from one batch without training, which are compared with the scores after training.

They are computed before the first training step of every trained candidate. The report says how well they would have
ranked the candidates, and so whether training was necessary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F

from attnsurgery.data.memory import halve_until_it_fits
from attnsurgery.tasks import Criterion

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_NORMS = (*BATCH_NORMS, nn.LayerNorm, nn.GroupNorm)


def grad_norm(
    model: nn.Module,
    x_BCHW: torch.Tensor,
    targets_B: torch.Tensor,
    pieces: int = 1,
    criterion: Criterion = F.cross_entropy,
) -> float:
    """Euclidean norm of the gradient of the loss over all parameters, from one batch, in eval mode.

    A batch that does not fit into memory is split, with accumulated gradients, which gives the same gradient.

    A candidate that starts as its base has the base's gradient everywhere but in its blocks. So among candidates of one
    base the norm says how much the loss could fall by opening their gates. From Abdelfattah et al., "Zero-cost proxies
    for lightweight NAS", ICLR 2021, section 3.2.

    Args:
        model: its training flag is restored.
        x_BCHW: images, normalised.
        targets_B: what the outputs should be, such as classes.
        pieces: number of parts that the batch is split into, where memory is known to be short.
        criterion: the loss; by default the cross-entropy.

    Raises:
        torch.OutOfMemoryError: one image at a time does not fit.
    """
    training = model.training
    model.eval()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        gradients = halve_until_it_fits(
            lambda size: _gradients(model, parameters, x_BCHW, targets_B, size, criterion), len(targets_B), pieces
        )
    finally:
        model.train(training)
    squares = [gradient.double().square().sum() for gradient in gradients if gradient is not None]
    return float(torch.stack(squares).sum().sqrt())


def _gradients(
    model: nn.Module,
    parameters: list[nn.Parameter],
    x_BCHW: torch.Tensor,
    targets_B: torch.Tensor,
    size: int,
    criterion: Criterion,
) -> list[torch.Tensor | None]:
    """The gradient of the batch's mean loss for each parameter, from at most `size` images at a time."""
    total: list[torch.Tensor | None] = [None] * len(parameters)
    with torch.enable_grad():
        for x_PCHW, targets_P in zip(torch.split(x_BCHW, size), torch.split(targets_B, size), strict=True):
            loss = criterion(model(x_PCHW).float(), targets_P) * (len(targets_P) / len(targets_B))
            for index, gradient in enumerate(torch.autograd.grad(loss, parameters, allow_unused=True)):
                existing = total[index]
                total[index] = gradient if existing is None or gradient is None else existing + gradient
    return total


def synflow(model: nn.Module, input_size: tuple[int, int, int]) -> float:
    """Synaptic flow: natural logarithm of the sum over all parameters of parameter times gradient, without data.

    All parameters are replaced by their absolute values and all norms by the identity; the gradient is that of the sum
    of the outputs for an image of ones. It is in double precision, since the numbers grow from layer to layer. The
    score was designed for linear layers and ReLU: sigmoids saturate at such numbers, so a block that gates with one
    contributes hardly anything. A closed gate contributes nothing, so candidates should start as in the papers. From
    Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic flow", NeurIPS 2020,
    equation 2; as a score of architectures in Abdelfattah et al., ICLR 2021.

    Args:
        model: unchanged; a copy is used.
        input_size: (C, H, W) of an image.
    """
    twin = copy.deepcopy(model).eval().double()
    with torch.no_grad():
        for tensor in twin.parameters():
            tensor.abs_()
    parameters = [parameter.requires_grad_() for parameter in twin.parameters()]
    image = torch.ones(1, *input_size, dtype=torch.double, device=parameters[0].device)
    with torch.enable_grad(), _without_norms(twin):
        flow = twin(image).sum()
        gradients = torch.autograd.grad(flow, parameters, allow_unused=True)
    pairs = zip(parameters, gradients, strict=True)
    total = sum(float((tensor.detach() * gradient).sum()) for tensor, gradient in pairs if gradient is not None)
    return math.log(total) if total > 0 else -math.inf


@contextmanager
def _without_norms(model: nn.Module) -> Iterator[None]:
    """A context in which norms return their input."""
    handles = [
        module.register_forward_hook(lambda _module, inputs, _output: inputs[0])
        for module in model.modules()
        if isinstance(module, _NORMS)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
