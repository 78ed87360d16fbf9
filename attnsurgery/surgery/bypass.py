"""Blocks switched off for a while: the host computes what it would without them, and nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from attnsurgery.errors import SurgeryError
from attnsurgery.graph.wrappers import check_uncompiled, unwrapped
from attnsurgery.surgery.owners import grafted_blocks
from attnsurgery.surgery.select_blocks import named_blocks


@contextmanager
def bypass(model: nn.Module, *blocks: str) -> Iterator[tuple[str, ...]]:
    """Inside the `with`, these blocks are the identity, so that the model computes what it would without them.

    Their parameters stay where they are and get no gradient meanwhile.

    Args:
        model: a surgical model, in a wrapper or not.
        blocks: paths, patterns or selectors, as `remove` takes them; by default all blocks.

    Yields:
        The paths of the blocks that are bypassed.

    Raises:
        SiteError: a name that means no block.
        SurgeryError: the model has no blocks.
        UsageError: a compiled or scripted model, whose forward is fixed; says what to do.
    """
    model = unwrapped(model, "bypass")
    there = grafted_blocks(model)
    if not there:
        raise SurgeryError("there is no block of ours in this model to bypass.")
    meant = named_blocks(model, blocks) if blocks else list(there)
    check_uncompiled(model, meant, "bypass")
    own = {path: vars(there[path]).get("forward") for path in meant}
    try:
        for path in meant:
            # hosts add in place to what a block returns, so it must be a tensor of its own
            there[path].__dict__["forward"] = torch.ones_like if there[path].gates else torch.clone
        yield tuple(meant)
    finally:
        for path, forward in own.items():
            there[path].__dict__.pop("forward", None)
            if forward is not None:
                there[path].__dict__["forward"] = forward
