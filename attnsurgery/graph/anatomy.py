"""Anatomy: a model's places for blocks, found as they are asked for.

Outputs of modules come with the one forward of the twin; what happens inside a module costs a trace of it. A selector
such as 'stage:3 before_last_block' needs no trace and 'stage:3 branches' only those of that stage's blocks, so a
trace is made when somebody asks.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from functools import cache, cached_property
from typing import Any, cast

from torch import fx, nn

from attnsurgery.errors import SiteError, did_you_mean
from attnsurgery.graph.inside import inner_sites
from attnsurgery.graph.record import Found, Run
from attnsurgery.graph.site import Site
from attnsurgery.graph.trace import trace_owner, uncut_class


class Anatomy:
    """What `inspect` returns.

    Args:
        name: what the model is called in messages.
        input_size: (C, H, W) of the images the shapes were found with.
        outputs: what modules return, in order of execution.
        owners: modules whose forward can be traced for more, by path, on the meta device.
        run: the recorded forward.
        finish: makes a Site of what was found.
    """

    def __init__(
        self,
        name: str,
        input_size: tuple[int, int, int],
        outputs: tuple[Site, ...],
        owners: dict[str, nn.Module],
        run: Run,
        finish: Callable[[Found], Site],
    ) -> None:
        self.name = name
        self.input_size = input_size
        self._outputs = outputs
        self._owners = owners
        self._run = run
        self._finish = finish
        self._inside: dict[str, tuple[Site, ...]] = {}
        self._graphs: dict[str, fx.Graph | None] = {}

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """Every site, in order of execution; where a tensor is both, its module's parent holds it."""
        found = {site.address: site for site in self._outputs}
        for path in self._owners:
            found.update((site.address, site) for site in self._sites_inside(path))
        return tuple(sorted(found.values(), key=lambda site: site.depth))

    def site(self, address: str) -> Site:
        """The site at exactly this address.

        Raises:
            SiteError: there is none; the message names the nearest.
        """
        for site in self.sites:
            if site.address == address:
                return site
        raise SiteError(
            f"{self.name} has no site {address!r}.{did_you_mean(address, (s.address for s in self.sites))} "
            f"See them all: attnsurgery inspect {self.name} --all"
        )

    def blocks(self, stage: int) -> tuple[Site, ...]:
        """Outputs of the stage's blocks, in order."""
        return tuple(site for site in self._outputs if site.stage == stage and site.role == "block")

    def branches(self, stage: int) -> tuple[Site, ...]:
        """Ends of the stage's residual branches, in order."""
        found = {
            site.address: site
            for path, owner in self._owners.items()
            if adds(cast(Any, uncut_class(owner)))
            for site in self._sites_inside(path)
            if site.stage == stage and site.role == "branch"
        }
        return tuple(sorted(found.values(), key=lambda site: site.depth))

    @cached_property
    def stages(self) -> tuple[int, ...]:
        """Stages that have a block, ascending; the stem is none."""
        return tuple(sorted({s.stage for s in self._outputs if s.stage and s.role == "block"}))

    def _sites_inside(self, path: str) -> tuple[Site, ...]:
        if path not in self._inside:
            self._inside[path] = tuple(self._trace(path))
        return self._inside[path]

    def _trace(self, path: str) -> Iterator[Site]:
        owner = self._owners[path]
        kind = _kind(owner)
        if kind not in self._graphs:
            self._graphs[kind] = trace_owner(owner)
        graph = self._graphs[kind]
        if graph is not None:
            yield from map(self._finish, inner_sites(path, owner, graph, self._run))


def _kind(owner: nn.Module) -> str:
    """What a forward can depend on: class, plain values and kinds of children. The twelve blocks of a ViT are of one.

    Good enough to find places; a cut is made into a graph of its very owner.
    """
    plain = [(k, v) for k, v in owner.__dict__.items() if isinstance(v, (bool, int, float, str, tuple, type(None)))]
    children = [(name, id(type(child))) for name, child in owner._modules.items()]
    return f"{id(uncut_class(owner))} {plain} {children}"


@cache
def adds(cls: Any) -> bool:
    """False if a forward cannot hold a residual addition, because its source has none; that saves a trace."""
    try:
        source = inspect.getsource(cls.forward)
    except (OSError, TypeError):  # no source to read: it might
        return True
    return re.search(r"\+|\badd_?\(", source) is not None
