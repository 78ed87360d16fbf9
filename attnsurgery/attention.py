"""What the blocks of a model weigh on one image, as arrays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from attnsurgery.blocks import Block
from attnsurgery.errors import SurgeryError, UnknownNameError, UsageError, did_you_mean
from attnsurgery.surgery.owners import joined, operated
from attnsurgery.surgery.select_blocks import base_anatomy

Array = NDArray[np.float32]


def attention_map(
    model: nn.Module,
    image: torch.Tensor,
    query: tuple[int, int] | None = None,
    *,
    block: str | None = None,
    in_image: bool = False,
) -> Array:
    """What one block of a model weighs on one image, in eval mode; the model is left as it was.

    Args:
        model: a surgical model, or any that holds blocks.
        image: (C, H, W) or (1, C, H, W), prepared as the model takes it.
        query: (row, column) of a pixel of the image, for blocks that attend from one position to others.
        block: the block by its path in the model, such as 'layer3.0.non_local'; may be left out if there is one only.
        in_image: give each pixel of the image the weight of the place it lies in, instead of the block's own map.

    Returns:
        float32, by the kind of the block:

        * `non_local`, and `dual` with its position attention: (H, W), how much the position of the query takes from
          each position of the block's map. Softmax weights add up to 1. With sub-sampling, the map is the pooled one,
          and rows and columns that its windows leave out have the weight 0 in the image.
        * `se`: (C,), the gate of each channel; of kind 'sse' (H, W), that of each position; of 'scse' (C, H, W), what
          they come to.
        * `residual_attention`: (C, H, W), the mask M, before alpha.

    Raises:
        UnknownNameError: no such block; names those that there are.
        UsageError: the block has no such weights, or wants a query or none; or a query outside of the image, or a block
            on tokens whose place in the image is not known.
        SurgeryError: the block does not run in a forward.
    """
    path, chosen = _chosen(model, block)
    batch = image[None] if image.ndim == 3 else image
    if batch.ndim != 4 or len(batch) != 1:
        raise UsageError(f"attention_map takes one image, (C, H, W), and was given {tuple(image.shape)}.")
    attends = hasattr(chosen, "attention_from")
    if not attends and not hasattr(chosen, "gates_of"):
        raise UsageError(
            f"the block {path!r} ({type(chosen).__name__}) has no weights to show; those of non_local, dual, se and "
            "residual_attention can be shown."
        )
    if attends is (query is None):
        wanted = "attends from one position to others: give query=(row, column), a pixel of the image"
        raise UsageError(f"the block {path!r} {wanted if attends else 'has no position of its own: leave query out'}.")
    height, width = int(batch.shape[2]), int(batch.shape[3])
    if query is not None and not (0 <= query[0] < height and 0 <= query[1] < width):
        raise UsageError(f"the query {query} lies outside of the image, which has {height} x {width} pixels.")
    with _evaluating(model), torch.no_grad():
        x = _on_its_map(model, path, _taken(model, path, chosen, batch), tuple(map(int, batch.shape[1:])))
        rows, columns = int(x.shape[2]), int(x.shape[3])
        known: Any = chosen
        if query is not None:
            found = known.attention_from(x, query[0] * rows // height, query[1] * columns // width)
        else:
            found = known.gates_of(x)
    array: Array = found[0].float().cpu().numpy()
    if not in_image or array.ndim < 2:
        return array
    window = int(getattr(chosen, "subsample", 1))
    down = _places(height, rows, array.shape[-2], window)
    across = _places(width, columns, array.shape[-1], window)
    padded = np.pad(array, [(0, 0)] * (array.ndim - 2) + [(0, 1), (0, 1)])
    return padded[..., down[:, None], across[None, :]]


def _places(pixels: int, side: int, pooled: int, window: int) -> NDArray[np.intp]:
    """For each pixel along one side of the image, its place on the pooled map; `pooled` where no window covers it."""
    on_map = np.arange(pixels) * side // pixels
    return np.minimum(on_map // min(window, side), pooled) if pooled < side else on_map


def _chosen(model: nn.Module, name: str | None) -> tuple[str, Block]:
    blocks = {path: module for path, module in model.named_modules() if isinstance(module, Block)}
    if name is not None and name in blocks:
        return name, blocks[name]
    there = ", ".join(blocks) or "none"
    if name is not None:
        raise UnknownNameError(f"there is no block {name!r}.{did_you_mean(name, blocks)} The model's blocks: {there}.")
    if len(blocks) != 1:
        raise UsageError(f"say which block is meant, block=...; the model's blocks: {there}.")
    return next(iter(blocks.items()))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _taken(model: nn.Module, path: str, block: Block, batch: torch.Tensor) -> torch.Tensor:
    """What the block is given in a forward of the image."""
    taken: list[torch.Tensor] = []
    handle = block.register_forward_pre_hook(lambda _, args: taken.append(args[0].clone()))
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    try:
        model(batch.to(parameter.device, parameter.dtype))
    finally:
        handle.remove()
    if not taken:
        raise SurgeryError(f"the block {path!r} does not run in a forward of the model.")
    return taken[0]


def _on_its_map(model: nn.Module, path: str, x: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """(1, C, H, W); a block that does not ask how tokens lie gets them as one column, (1, C, N, 1)."""
    for owner, _, grafts in operated(model):
        for graft in grafts:
            if graft.owns_block and joined(owner, graft.child) == path and graft.layout == "NLC" and not graft.grid:
                place = graft.span[-1] if graft.span else owner
                channels, height, width = size
                grid = base_anatomy(model, (channels, height, width)).grid_at(place, graft.node, graft.element)
                if grid is None:
                    raise UsageError(f"the block {path!r} is on tokens whose place in the image is not known.")
                return x.reshape(x.shape[0], x.shape[1], *grid)
    return x
