"""The operation: everything is decided and built first, then the model is changed; after an error it is as it was."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from attnsurgery.blocks import BLOCKS, Block
from attnsurgery.blocks._base import build_block
from attnsurgery.errors import SiteError, did_you_mean
from attnsurgery.graph.trace import uncut_copy
from attnsurgery.surgery.plan import Insertion, Plan
from attnsurgery.surgery.rewrite import RECORD, Graft, find_slot, surgical_class

PATHS = "_attnsurgery_blocks"
"""The attribute of a model that says where blocks were put, so that a lost one is missed."""


def operate(model: nn.Module, plan: Plan) -> nn.Module:
    """Insert every block of the plan into the model, in place, in the order written.

    Args:
        model: the model the plan was made for; it may have been operated on before.

    Returns:
        The same object.

    Raises:
        SiteError: a site's owner is not in this model, or its forward cannot be cut there. The model is unchanged.
    """
    by_owner: dict[str, list[Insertion]] = {}
    for insertion in plan:
        by_owner.setdefault(insertion.site.owner, []).append(insertion)
    prepared = [_prepare(model, path, insertions) for path, insertions in by_owner.items()]
    for path, owner, grafts, blocks, cls in prepared:
        for name, block in blocks.items():
            setattr(owner, name, block)
        owner.__dict__[RECORD] = grafts
        owner.__class__ = cls
        model.__dict__[PATHS] = (*model.__dict__.get(PATHS, ()), *(f"{path}.{name}" for name in blocks))
    return model


def remove(model: nn.Module) -> nn.Module:
    """Take every grafted block out again, in place: classes, children and state dict are those of the base.

    Returns:
        The same object; a model without surgery is returned as it is.
    """
    for _, owner, grafts in list(operated(model)):
        for graft in reversed(grafts):
            if graft.slot == "identity":
                setattr(owner, graft.child, nn.Identity())
            else:
                delattr(owner, graft.child)
            if graft.slot == "none":
                setattr(owner, graft.child, None)
        del owner.__dict__[RECORD]
        owner.__class__ = getattr(type(owner), "uncut_class", type(owner))
    model.__dict__.pop(PATHS, None)
    return model


def operated(model: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[Graft, ...]]]:
    """Path, module and record of every owner that was operated on."""
    for path, module in model.named_modules():
        grafts = module.__dict__.get(RECORD)
        if grafts:
            yield path, module, grafts


def grafted_blocks(model: nn.Module) -> dict[str, Block]:
    """Every grafted block by its path in the model."""
    return {
        f"{path}.{graft.child}" if path else graft.child: owner.get_submodule(graft.child)  # type: ignore[misc]
        for path, owner, grafts in operated(model)
        for graft in grafts
    }


Prepared = tuple[str, nn.Module, tuple[Graft, ...], dict[str, Block], type[nn.Module]]


def _prepare(model: nn.Module, path: str, insertions: list[Insertion]) -> Prepared:
    """New blocks and the new class for one owner; the owner itself is not touched."""
    owner = _owner(model, path)
    device, dtype = _home(owner, model)
    trial = uncut_copy(owner)
    grafts: list[Graft] = list(owner.__dict__.get(RECORD, ()))
    blocks: dict[str, Block] = {}
    for insertion in insertions:
        site = insertion.site
        if any((graft.node, graft.block) == (site.node, insertion.block) for graft in grafts):
            raise SiteError(f"there is a {insertion.block!r} at {site.address!r} already.")
        block = build_block(
            insertion.block, site.channels, insertion.options, insertion.start, device=device, dtype=dtype
        )
        wanted = BLOCKS[insertion.block].child_name
        slot = find_slot(trial, wanted, site.node)
        name = wanted if slot else _free_name(trial, wanted)
        block.grafted = True
        block.train(owner.training)
        trial.__dict__.pop(name, None)
        trial._modules[name] = block
        blocks[name] = block
        grafts.append(
            Graft(
                child=name,
                node=site.node,
                layout=site.layout,
                prefix_tokens=site.prefix_tokens,
                slot=slot or "new",
                block=insertion.block,
                options=dict(insertion.options),
                start=insertion.start,
            )
        )
    try:
        return path, owner, tuple(grafts), blocks, surgical_class(trial, tuple(grafts))
    except SiteError as error:
        raise SiteError(f"{path!r}: {error}") from None


def _owner(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        near = did_you_mean(path, (name for name, _ in model.named_modules()))
        raise SiteError(f"the plan cuts into {path!r}, which {type(model).__name__} does not have.{near}") from None


def _home(owner: nn.Module, model: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
    """Device and dtype of the tensors around the cut."""
    for module in (owner, model):
        for parameter in module.parameters():
            if parameter.is_floating_point():
                return parameter.device, parameter.dtype
    return None, None


def _free_name(owner: nn.Module, wanted: str) -> str:
    """`wanted`, or `wanted_2` ...: a name the host already uses, even as None, would be run by its own forward."""
    name, count = wanted, 1
    while hasattr(owner, name):
        count += 1
        name = f"{wanted}_{count}"
    return name
