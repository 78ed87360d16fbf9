"""Bypass: switch blocks off temporarily, so that the model computes what it would without them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from attnsurgery.errors import SurgeryError
from attnsurgery.graph.wrappers import check_uncompiled, unwrapped
from attnsurgery.surgery.owners import grafted_blocks
from attnsurgery.surgery.select_blocks import select_blocks


@contextmanager
def bypass(model: nn.Module, *blocks: str) -> Iterator[tuple[str, ...]]:
    """Inside the `with` statement, these blocks are the identity, so the model computes what it would without them.

    Their parameters stay in the model and get no gradient meanwhile.

    Args:
        model: a surgical model, in a wrapper or not.
        blocks: paths, patterns or selectors, as for `remove`; by default all blocks.

    Yields:
        The paths of the blocks that are bypassed.

    Raises:
        SiteError: an entry of `blocks` matches no block.
        SurgeryError: the model has no blocks.
        UsageError: the model is compiled or scripted, so its forward is fixed; the message says what to do.
    """
    model = unwrapped(model, "bypass")
    grafted = grafted_blocks(model)
    if not grafted:
        raise SurgeryError("this model has no inserted block to bypass.")
    paths = select_blocks(model, blocks) if blocks else list(grafted)
    check_uncompiled(model, paths, "bypass")
    instance_forwards = {path: vars(grafted[path]).get("forward") for path in paths}
    try:
        for path in paths:
            # hosts add in place to the result of a block, so it must not share memory with the input
            grafted[path].__dict__["forward"] = torch.ones_like if grafted[path].gates else torch.clone
        yield tuple(paths)
    finally:
        for path, forward in instance_forwards.items():
            grafted[path].__dict__.pop("forward", None)
            if forward is not None:
                grafted[path].__dict__["forward"] = forward
