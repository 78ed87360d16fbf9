"""Random weights for the models of the coverage run, which are built without initial values.

Building is fast without random initial values, which `randomise_weights` overwrites anyway. In a base, uninitialised
memory is NaN, so a tensor that `randomise_weights` misses shows in its output.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import weight_init
from timm.models import _builder
from torch import nn

from attnsurgery.surgery import operate as surgery


@dataclass
class Built:
    """Counts what is built in the context of `skip_initial_values`."""

    blocks: int = 0
    """Number of attention blocks."""


@contextmanager
def skip_initial_values(poison: bool = False) -> Iterator[Built]:
    """A context in which models are built without random initial values, and attention blocks with them.

    Args:
        poison: fill uninitialised memory with NaN.
    """
    built = Built()
    make_block = surgery.build_block
    fillers = [(torch.Tensor, name) for name in ("normal_", "uniform_", "erfinv_")]
    # these also shift and clamp, each in a pass over all of the memory
    fillers += [(nn.init, "orthogonal_"), (nn.init, "_no_grad_trunc_normal_"), (weight_init, "_trunc_normal_")]
    originals = [getattr(holder, name) for holder, name in fillers]

    def enable() -> None:
        for holder, name in fillers:
            setattr(holder, name, _returns_self)
        torch.use_deterministic_algorithms(poison)  # makes torch.empty return NaN

    def disable() -> None:
        for (holder, name), filler in zip(fillers, originals, strict=True):
            setattr(holder, name, filler)
        torch.use_deterministic_algorithms(False)

    def with_values(*args: Any, **kwargs: Any) -> Any:
        disable()
        try:
            built.blocks += 1
            return make_block(*args, **kwargs)
        finally:
            enable()

    surgery.build_block = with_values
    enable()
    try:
        yield built
    finally:
        disable()
        surgery.build_block = make_block


def _returns_self(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return tensor


@contextmanager
def weights_at_load(state: dict[str, torch.Tensor]) -> Iterator[None]:
    """A context in which `pretrained=True` loads this state dict, when timm would load published weights."""
    load = _builder.load_pretrained

    def load_state(model: nn.Module, *args: Any, **kwargs: Any) -> None:
        names = model.state_dict()
        model.load_state_dict({key: value for key, value in state.items() if key in names}, strict=True)

    _builder.load_pretrained = load_state
    try:
        yield
    finally:
        _builder.load_pretrained = load


class Noise:
    """Fast normal random numbers: slices of a pool, whose length is prime, so that rows of weights differ."""

    def __init__(self, seed: int, length: int = 1048583) -> None:
        self.pool = torch.randn(length, generator=torch.Generator().manual_seed(seed))
        self.at = 0

    def fill(self, tensor: torch.Tensor, scale: float, shift: float = 0.0) -> None:
        """Overwrite a tensor with numbers of standard deviation `scale` and mean `shift`."""
        remaining = tensor.view(-1) if tensor.is_contiguous() else tensor.new_empty(tensor.numel())
        values = remaining
        while remaining.numel():
            part = self.pool[self.at : self.at + remaining.numel()].to(tensor.dtype)
            torch.mul(part, scale, out=remaining[: part.numel()])
            self.at = (self.at + part.numel()) % self.pool.numel()
            remaining = remaining[part.numel() :]
        if shift:
            values += shift
        if not tensor.is_contiguous():
            tensor.copy_(values.view(tensor.shape))


@torch.no_grad()
def randomise_weights(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """Set all parameters to random nonzero numbers, and all batch norms to the statistics of these images; eval mode.

    timm initialises the last norm of residual branches, and layer scales, with zero or nearly zero, so the input of
    blocks behind them would be zero. With random weights of unit gain the activations of networks without norms would
    vanish or explode, so each layer whose output has a standard deviation outside of 1/4 to 4 is rescaled to 1.
    """
    noise = Noise(0)
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        if parameter.ndim < 2:
            centre = 0.0 if "bias" in name.rpartition(".")[2] else 1.0
            noise.fill(parameter, 0.2, centre)
        else:
            noise.fill(parameter, 1 / math.sqrt(fan_in(parameter)))
    scaled: set[int] = set()

    def rescale(layer: nn.Module, args: Any, output: Any) -> Any:
        if id(layer) in scaled or not isinstance(output, torch.Tensor):
            return None
        scaled.add(id(layer))
        size = max(float(output.std()), 0.01)  # an output that is nearly constant must not be scaled up
        if not math.isfinite(size) or 0.25 < size < 4 or size == 0:
            return None
        for parameter in (layer.weight, layer.bias):
            if parameter is not None:
                parameter.div_(size)
        return output / size

    layers = [module for module in model.modules() if type(module).__name__ in ("Linear", "Conv2d", "Conv2dSame")]
    handles = [layer.register_forward_hook(rescale) for layer in layers]
    try:
        with calibrate_norms(model):
            model.eval()(images)
    finally:
        for handle in handles:
            handle.remove()
    return reset_to_eval(model)


@contextmanager
def calibrate_norms(model: nn.Module) -> Iterator[None]:
    """A context in which each batch norm sets its running statistics to those of its first input, in eval mode."""
    calibrated: set[int] = set()

    def calibrate(norm: nn.Module, args: Any) -> None:
        if id(norm) in calibrated:
            return
        calibrated.add(id(norm))
        dimensions = [0, *range(2, args[0].ndim)]
        norm.running_mean.copy_(args[0].mean(dimensions))
        variance = args[0].var(dimensions, unbiased=False)
        # a channel that hardly varies here would be scaled up excessively as soon as it does
        norm.running_var.copy_(variance.clamp(min=0.1 * float(variance.mean()) + 1e-6))

    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    handles = [norm.register_forward_pre_hook(calibrate) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def fan_in(parameter: torch.Tensor) -> int:
    """Number of inputs that a weight sums; 4 where the first dimension is 1, as in position embeddings."""
    return math.prod(parameter.shape[1:]) if parameter.shape[0] > 1 else 4


def reset_to_eval(model: nn.Module) -> nn.Module:
    """The model in eval mode without cached values of earlier runs, such as levit's attention biases."""
    return model.train().eval()
