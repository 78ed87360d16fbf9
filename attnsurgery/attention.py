"""Attention maps and gates of blocks on one image, as arrays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from attnsurgery.blocks import BLOCKS, Block
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
    """The attention weights or gates of one block on one image, in eval mode; the model is not changed.

    Args:
        model: a surgical model, or any model with blocks.
        image: (C, H, W) or (1, C, H, W), preprocessed for the model.
        query: (row, column) of a pixel of the image, for blocks that attend from one position to others.
        block: path of the block in the model, such as 'layer3.0.non_local'; optional if there is only one.
        in_image: True returns the weight for each pixel of the image instead of the block's own map.

    Returns:
        A float32 array that depends on the block:

        * of a block with a method `attention_from`, such as `non_local`, and `dual` with its position attention:
          (H, W), the weights of all positions of the block's map in the sum of the query's position. Softmax weights
          sum to 1. With sub-sampling it is the pooled map, and rows and columns that no window covers have the weight 0
          in the image.
        * of a block with a method `gates_of`, what it returns: for `se` (C,), the gate of each channel, or (H, W) with
          kind 'sse', the gate of each position, or (C, H, W) with 'scse', the combination of both; for
          `residual_attention` (C, H, W), the mask M, before alpha.

    Raises:
        UnknownNameError: there is no such block; the message lists the model's blocks.
        UsageError: the block has no such weights, `query` is missing, superfluous or outside of the image, or the block
            is on tokens whose positions in the image are unknown.
        SurgeryError: the block does not run in a forward.
    """
    path, module = _block_of(model, block)
    batch = image[None] if image.ndim == 3 else image
    if batch.ndim != 4 or len(batch) != 1:
        raise UsageError(f"attention_map takes one image, (C, H, W), and was given {tuple(image.shape)}.")
    _check_query(path, module, query, (int(batch.shape[2]), int(batch.shape[3])))
    with _evaluating(model), torch.no_grad():
        x = _on_its_map(model, path, _input_of(model, path, module, batch), tuple(map(int, batch.shape[1:])))
        array = _weights(module, x, query, (int(batch.shape[2]), int(batch.shape[3])))
    if not in_image or array.ndim < 2:
        return array
    window = int(getattr(module, "subsample", 1))
    rows = _map_indices(int(batch.shape[2]), int(x.shape[2]), array.shape[-2], window)
    columns = _map_indices(int(batch.shape[3]), int(x.shape[3]), array.shape[-1], window)
    padded = np.pad(array, [(0, 0)] * (array.ndim - 2) + [(0, 1), (0, 1)])
    return padded[..., rows[:, None], columns[None, :]]


def _check_query(path: str, block: Block, query: tuple[int, int] | None, size: tuple[int, int]) -> None:
    """
    Raises:
        UsageError: the block has no weights, `query` does not fit the block, or it is outside of the image.
    """
    attends = hasattr(block, "attention_from")
    if not _has_weights(type(block)):
        *names, last = (name for name in BLOCKS if _has_weights(BLOCKS[name]))
        raise UsageError(
            f"the block {path!r} ({type(block).__name__}) has no weights to show; those of {', '.join(names)} and "
            f"{last} can be shown."
        )
    if attends is (query is None):
        missing = "attends from one position to others: give query=(row, column), a pixel of the image"
        raise UsageError(f"the block {path!r} {missing if attends else 'has no position of its own: leave query out'}.")
    height, width = size
    if query is not None and not (0 <= query[0] < height and 0 <= query[1] < width):
        raise UsageError(f"the query {query} lies outside of the image, which has {height} x {width} pixels.")


def _has_weights(block: type[Block]) -> bool:
    return hasattr(block, "attention_from") or hasattr(block, "gates_of")


def _weights(block: Any, x: torch.Tensor, query: tuple[int, int] | None, size: tuple[int, int]) -> Array:
    """The block's weights for its input x, (1, C, H, W), on an image of (height, width)."""
    if query is None:
        weights = block.gates_of(x)
    else:
        row, column = (query[axis] * int(x.shape[2 + axis]) // size[axis] for axis in (0, 1))
        weights = block.attention_from(x, row, column)
    array: Array = weights[0].float().cpu().numpy()
    return array


def _map_indices(pixels: int, side: int, pooled: int, window: int) -> NDArray[np.intp]:
    """For each pixel along one side of the image, its index on the pooled map; `pooled` where no window covers it."""
    on_map = np.arange(pixels) * side // pixels
    return np.minimum(on_map // min(window, side), pooled) if pooled < side else on_map


def _block_of(model: nn.Module, name: str | None) -> tuple[str, Block]:
    """Path and module of the requested block, or of the only one."""
    blocks = {path: module for path, module in model.named_modules() if isinstance(module, Block)}
    if name is not None and name in blocks:
        return name, blocks[name]
    listed = ", ".join(blocks) or "none"
    if name is not None:
        raise UnknownNameError(f"there is no block {name!r}.{did_you_mean(name, blocks)} The model's blocks: {listed}.")
    if len(blocks) != 1:
        raise UsageError(f"say which block, by block=...; the model's blocks: {listed}.")
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


def _input_of(model: nn.Module, path: str, block: Block, batch: torch.Tensor) -> torch.Tensor:
    """The block's input in a forward of the image."""
    inputs: list[torch.Tensor] = []
    handle = block.register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()))
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    try:
        model(batch.to(parameter.device, parameter.dtype))
    finally:
        handle.remove()
    if not inputs:
        raise SurgeryError(f"the block {path!r} does not run in a forward of the model.")
    return inputs[0]


def _on_its_map(model: nn.Module, path: str, x: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """The block's input as a map, (1, C, H, W); a block without a grid gets its tokens as one column, (1, C, N, 1)."""
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
