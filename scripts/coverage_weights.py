"""Weights for the models of the coverage run: built without initial values, every one of them woken.

Building is quick because random initial values are left out: all of them are overwritten by `woken`. What memory
held before is NaN in a base, so a tensor that `woken` misses shows in its output.
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
    """What was built while `swift` was on."""

    blocks: int = 0


@contextmanager
def swift(poison: bool = False) -> Iterator[Built]:
    """Models are built without random initial values, attention blocks with them.

    Args:
        poison: fill what would stay uninitialised with NaN.
    """
    built = Built()
    make_block = surgery.build_block
    fillers = [(torch.Tensor, name) for name in ("normal_", "uniform_", "erfinv_")]
    # these also shift and clamp, each a walk through all of the memory
    fillers += [(nn.init, "orthogonal_"), (nn.init, "_no_grad_trunc_normal_"), (weight_init, "_trunc_normal_")]
    kept = [getattr(holder, name) for holder, name in fillers]

    def enable() -> None:
        for holder, name in fillers:
            setattr(holder, name, _returns_self)
        torch.use_deterministic_algorithms(poison)  # then torch.empty gives NaN

    def disable() -> None:
        for (holder, name), filler in zip(fillers, kept, strict=True):
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
    """`pretrained=True` loads this state dict, at the moment and in the way timm loads published weights."""
    load = _builder.load_pretrained

    def load_ours(model: nn.Module, *args: Any, **kwargs: Any) -> None:
        own = model.state_dict()
        model.load_state_dict({key: value for key, value in state.items() if key in own}, strict=True)

    _builder.load_pretrained = load_ours
    try:
        yield
    finally:
        _builder.load_pretrained = load


class Noise:
    """Normal random numbers at the speed of a copy: slices of one pool, whose length is prime, so that rows differ."""

    def __init__(self, seed: int, length: int = 1048583) -> None:
        self.pool = torch.randn(length, generator=torch.Generator().manual_seed(seed))
        self.at = 0

    def fill(self, tensor: torch.Tensor, scale: float, shift: float = 0.0) -> None:
        """Overwrite the tensor with numbers of this mean and standard deviation."""
        rest = tensor.view(-1) if tensor.is_contiguous() else tensor.new_empty(tensor.numel())
        whole = rest
        while rest.numel():
            part = self.pool[self.at : self.at + rest.numel()].to(tensor.dtype)
            torch.mul(part, scale, out=rest[: part.numel()])
            self.at = (self.at + part.numel()) % self.pool.numel()
            rest = rest[part.numel() :]
        if shift:
            whole += shift
        if not tensor.is_contiguous():
            tensor.copy_(whole.view(tensor.shape))


@torch.no_grad()
def woken(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """Every parameter random and none zero, every batch norm with the statistics that these images have, eval mode.

    timm starts the last norm of residual branches and layer scales at zero or nearly so: on a fresh model whatever
    stands there sees zeros. With random weights of unit gain some nets, those without norms, would still die or explode
    on the way; so each layer whose output leaves the range of 1/4 to 4 in a first run is scaled to 1.
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

    def tame(layer: nn.Module, args: Any, output: Any) -> Any:
        if id(layer) in scaled or not isinstance(output, torch.Tensor):
            return None
        scaled.add(id(layer))
        size = max(float(output.std()), 0.01)  # what is nearly constant must not be blown up
        if not math.isfinite(size) or 0.25 < size < 4 or size == 0:
            return None
        for parameter in (layer.weight, layer.bias):
            if parameter is not None:
                parameter.div_(size)
        return output / size

    layers = [module for module in model.modules() if type(module).__name__ in ("Linear", "Conv2d", "Conv2dSame")]
    handles = [layer.register_forward_hook(tame) for layer in layers]
    try:
        with settling(model):
            model.eval()(images)
    finally:
        for handle in handles:
            handle.remove()
    return fresh(model)


@contextmanager
def settling(model: nn.Module) -> Iterator[None]:
    """In the next run, in eval mode, let each batch norm take the statistics of what it is given."""
    done: set[int] = set()

    def settle(norm: nn.Module, args: Any) -> None:
        if id(norm) in done:
            return
        done.add(id(norm))
        dimensions = [0, *range(2, args[0].ndim)]
        norm.running_mean.copy_(args[0].mean(dimensions))
        spread = args[0].var(dimensions, unbiased=False)
        # a channel that hardly varies here would be blown up beyond measure as soon as it does
        norm.running_var.copy_(spread.clamp(min=0.1 * float(spread.mean()) + 1e-6))

    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    handles = [norm.register_forward_pre_hook(settle) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def fan_in(parameter: torch.Tensor) -> int:
    """How many inputs a weight adds up; what comes first in a batch of one, positions or tokens, adds up nothing."""
    return math.prod(parameter.shape[1:]) if parameter.shape[0] > 1 else 4


def fresh(model: nn.Module) -> nn.Module:
    """In eval mode, without what runs before have left: levit's attention biases, which then get no gradient."""
    return model.train().eval()
