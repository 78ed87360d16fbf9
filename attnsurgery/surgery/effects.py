"""Measure what each inserted block has an effect on, and whether it can learn, by gradients of random directions.

A probe of 0 is added to the result of each block, times a random direction. The gradient of a random projection of the
output with respect to the probe is 0 only if the output does not depend on the block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from attnsurgery.blocks import Block
from attnsurgery.errors import SurgeryError
from attnsurgery.graph.submodels import described_models
from attnsurgery.surgery.outputs import flattened
from attnsurgery.surgery.owners import grafted_blocks


class Effects(NamedTuple):
    """Paths of blocks without an effect on the output, or without learning."""

    unused: set[str]
    """Neither the output nor the features depend on them."""
    features_only: set[str]
    """The features depend on them, but the output does not."""
    stuck: set[str]
    """They can never leave the identity."""

    def reach(self, path: str) -> Literal["output", "features", "nothing"]:
        """What depends on the result of a block; see `BlockReport.reaches`."""
        if path in self.unused:
            return "nothing"
        return "features" if path in self.features_only else "output"


def measured_effects(model: nn.Module, images: torch.Tensor) -> Effects:
    """The effects of all blocks, measured by one backward pass. The model's parameters are changed.

    They are perturbed first, because a norm that starts at 0, as timm's last norms of residual branches do, would hide
    the effect of a block before it.
    """
    generator = torch.Generator().manual_seed(0)
    frozen = {id(p) for block in grafted_blocks(model).values() for p in block.parameters() if not p.requires_grad}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and id(parameter) not in frozen:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
                scale = float(parameter.float().square().mean().sqrt()) + 0.1
                parameter.add_(noise.to(parameter.dtype), alpha=0.05 * scale)
    model.eval()
    without_effect, stuck = _one_backward(model, model, images, generator)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        stuck = set()  # the whole model is frozen on purpose
    unused = without_effect
    for part in described_models(model):
        for name in ("forward_features", "forward_intermediates"):  # the features of pit are only its class tokens
            features = getattr(part, name, None)
            if unused and features is not None:
                run = functools.partial(_features_of_part, model, part, features)
                unused = unused & _one_backward(model, run, images, generator)[0]
    return Effects(unused, without_effect - unused, stuck)


def _features_of_part(model: nn.Module, part: nn.Module, features: Callable[[Any], Any], images: torch.Tensor) -> Any:
    """The features of a model inside a larger module, for the input that it gets from that."""
    if part is model:
        return features(images)
    inputs: list[Any] = []
    handle = part.register_forward_pre_hook(lambda _, args: inputs.extend(args[:1]))
    try:
        with torch.no_grad():
            model(images)
    finally:
        handle.remove()
    return features(inputs[0]) if inputs else images


def _one_backward(
    model: nn.Module, run: Callable[[torch.Tensor], Any], images: torch.Tensor, generator: torch.Generator
) -> tuple[set[str], set[str]]:
    """One backward through `run`.

    Returns:
        The blocks without an effect on the result of `run`, and those that can never learn, because they are the
        identity and get no gradient, or because the model detaches them.
    """
    probes: dict[str, torch.Tensor] = {}
    directions: dict[str, torch.Tensor] = {}
    idle: set[str] = set()

    def add(path: str) -> Any:
        def hook(block: Block, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            if torch.equal(output, torch.ones_like(output) if block.gates else args[0]):
                idle.add(path)  # although all its parameters were perturbed
            if path not in probes:  # a checkpoint runs its blocks again in backward, through the same probe
                probes[path] = torch.zeros((), device=output.device, dtype=output.dtype, requires_grad=True)
                # a constant direction would vanish in a layer norm
                direction = torch.randn(output.shape, generator=generator)
                directions[path] = direction.to(output.device, output.dtype)
            return output + probes[path] * directions[path]

        return hook

    blocks = grafted_blocks(model)
    handles = [block.register_forward_hook(add(path)) for path, block in blocks.items()]
    model.zero_grad(set_to_none=True)
    try:
        with torch.enable_grad():
            output = flattened(run(images))
            weights = torch.randn(output.shape, generator=generator).to(output.device)
            if output.requires_grad:
                (output * weights).sum().backward()  # type: ignore[no-untyped-call]
        without_gradient = [path for path, probe in probes.items() if _is_zero(probe.grad)]
        detached = _with_effect(without_gradient, probes, run, images)
    except RuntimeError as error:
        if "inplace" in str(error) or "in-place" in str(error):
            raise SurgeryError(f"an in-place operation of the host corrupts a block, backward fails: {error}") from None
        raise
    finally:
        for handle in handles:
            handle.remove()
    untrained = {path for path in probes if all(_is_zero(p.grad) for p in blocks[path].parameters() if p.requires_grad)}
    return set(without_gradient) - detached, (untrained & idle) | detached


def _with_effect(
    paths: list[str], probes: dict[str, torch.Tensor], run: Callable[[torch.Tensor], Any], images: torch.Tensor
) -> set[str]:
    """The blocks that the output depends on although they get no gradient.

    The reason is no_grad, detach or a reentrant checkpoint between block and output.
    """
    paths_with_effect = set()
    with torch.no_grad():
        before = flattened(run(images)) if paths else torch.empty(0)
        for path in paths:
            probes[path].fill_(1.0)
            if not torch.equal(torch.nan_to_num(flattened(run(images))), torch.nan_to_num(before)):
                paths_with_effect.add(path)
            probes[path].fill_(0.0)
    return paths_with_effect


def _is_zero(gradient: torch.Tensor | None) -> bool:
    return gradient is None or not bool((gradient != 0).any())
