"""Select blocks of a surgical model: by path, by a pattern of paths, or by a selector of their sites."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from attnsurgery.errors import SiteError, did_you_mean
from attnsurgery.graph.anatomy import Anatomy
from attnsurgery.graph.find import survey
from attnsurgery.graph.select import matcher, select
from attnsurgery.graph.site import Site
from attnsurgery.graph.twin import meta_twin
from attnsurgery.surgery.graft import Graft
from attnsurgery.surgery.owners import grafted_blocks, joined, operated
from attnsurgery.surgery.remove import remove

Key = tuple[str, str | None, tuple[str, ...], tuple[str, ...], tuple[int, int] | None, str]
"""A place and the name of the block there, which together identify a block of a model."""


def key_of_site(site: Site, block: str) -> Key:
    """The key of a block at a site."""
    return site.owner, site.node, site.users, site.span, site.element, block


def base_anatomy(model: nn.Module, input_size: tuple[int, int, int] | None = None) -> Anatomy:
    """The anatomy of a surgical model's base, surveyed on a copy without the blocks."""
    return survey(remove(meta_twin(model)), input_size, spend=True)


def blocks_by_place(model: nn.Module) -> dict[Key, str]:
    """Paths of the blocks by their keys."""
    return {
        _key(path, graft): joined(path, graft.child)
        for path, _, grafts in operated(model)
        for graft in grafts
        if graft.owns_block
    }


def select_blocks(model: nn.Module, names: Iterable[str], input_size: tuple[int, int, int] | None = None) -> list[str]:
    """Paths of the selected blocks, as `grafted_blocks` gives them, in the model's order.

    Args:
        model: a surgical model without wrappers.
        names: each the path of a block ('layer3.0.non_local'), a pattern of paths ('layer3.*.se'), or a selector of
            sites with blocks ('stage:3 last', 'layer3.0.bn3').
        input_size: (C, H, W) of one image, for selectors; by default the size that the model is built for.

    Raises:
        SiteError: a name matches no block; the message gives the nearest that does.
    """
    blocks = list(grafted_blocks(model))
    anatomy: Anatomy | None = None
    selected: set[str] = set()
    for name in names:
        pattern = matcher(name)
        matches = [path for path in blocks if path == name] or [path for path in blocks if pattern(path)]
        if not matches and blocks:
            anatomy = anatomy or base_anatomy(model, input_size)
            matches = _blocks_at(model, name, anatomy)
        if not matches:
            listed = ", ".join(blocks[:5]) + ", ..." * (len(blocks) > 5) if blocks else "none"
            near = did_you_mean(name, blocks)
            raise SiteError(
                f"{name!r} names no block, and no place with a block, of this model.{near} Blocks: {listed}."
            )
        selected.update(matches)
    return [path for path in blocks if path in selected]


def _blocks_at(model: nn.Module, selector: str, anatomy: Anatomy) -> list[str]:
    try:
        sites = select(selector, anatomy)
    except SiteError:
        return []
    places = {key_of_site(site, "")[:-1] for site in sites}
    # a block that gates a single module stands on a span of one
    places |= {(site.owner, None, (), (site.owner,), None) for site in sites if site.node is None and not site.span}
    return [path for key, path in blocks_by_place(model).items() if key[:-1] in places]


def _key(path: str, graft: Graft) -> Key:
    return path, graft.node, graft.users, graft.span, graft.element, graft.block
