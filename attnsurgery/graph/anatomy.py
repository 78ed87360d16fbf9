"""Anatomy: a model's places for blocks, found as they are asked for.

Outputs of modules come with the one forward of the twin; what happens inside a module costs a trace of it. A selector
such as 'stage:3 before_last_block' needs no trace and 'stage:3 branches' only those of that stage's blocks, so a
trace is made when somebody asks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator
from functools import cached_property

from torch import fx, nn

from attnsurgery.errors import SiteError, did_you_mean
from attnsurgery.graph.inside import Shapes, inner_sites
from attnsurgery.graph.record import Found, Run, map_shape
from attnsurgery.graph.site import Role, Site
from attnsurgery.graph.trace import trace_owner, uncut_class
from attnsurgery.graph.units import adds


class Anatomy:
    """What `inspect` returns.

    Args:
        name: what the model is called in messages.
        input_size: (C, H, W) of the images the shapes were found with.
        outputs: what modules return, in order of execution.
        owners: modules whose forward can be traced for more, by path, on the meta device.
        run: the recorded forward.
        models: paths of the models that say where stages are; the whole, or those in a larger whole.
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
        models: tuple[str, ...] = ("",),
    ) -> None:
        self.name = name
        self.input_size = input_size
        self._outputs = outputs
        self._owners = owners
        self._run = run
        self._finish = finish
        self.models = models
        self._inside: dict[str, tuple[Site, ...]] = {}
        self._graphs: dict[str, fx.Graph | None] = {}
        self._shapes: dict[Hashable, Shapes] = {}

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """Every site, in order of execution; where a tensor is both, its module's parent holds it."""
        found = {site.address: site for site in self._outputs}
        for path in self._owners:
            found.update((site.address, site) for site in self._sites_inside(path))
        return tuple(sorted(found.values(), key=lambda site: site.depth))

    def of(self, model: str) -> Anatomy:
        """The places of one of the models that a larger whole holds."""

        def below(path: str) -> bool:
            return not model or path == model or path.startswith(f"{model}.")

        outputs = tuple(site for site in self._outputs if below(site.owner))
        owners = {path: owner for path, owner in self._owners.items() if below(path)}
        part = Anatomy(self.name, self.input_size, outputs, owners, self._run, self._finish, (model,))
        part._inside, part._graphs, part._shapes = self._inside, self._graphs, self._shapes
        return part

    def hint(self) -> str:
        """Why there may be no place where one would be, in words; empty where nothing is in the way."""
        often = next((path for path, count in self._run.calls.items() if path and count > 1), None)
        if often is None or self._outputs:
            return ""
        return (
            f" Its modules run more than once in one forward ({often!r} {self._run.calls[often]} times), and a block "
            "must run exactly once: operate on the module that is called so often by itself."
        )

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

    def grid_at(self, owner: str, node: str | None, element: tuple[int, int] | None) -> tuple[int, int] | None:
        """The grid of a tensor inside a module, or of what that returns."""
        near = self._outputs if node is None else self._sites_inside(owner)
        sites = (site for site in near if (site.owner, site.node, site.element) == (owner, node, element))
        return next((site.grid for site in sites), None)

    def blocks(self, stage: int) -> tuple[Site, ...]:
        """Outputs of the stage's blocks, in order."""
        return tuple(site for site in self._outputs if site.stage == stage and site.role == "block")

    def sides(self, stage: int, role: Role) -> tuple[Site, ...]:
        """The stage's residual branches, in order: where they end ('branch'), what they read ('branch_input'), and what
        they are added to ('shortcut')."""
        found = {
            site.address: site
            for path, owner in self._owners.items()
            if adds(uncut_class(owner))
            for site in self._sites_inside(path)
            if site.stage == stage and site.role == role
        }
        return tuple(sorted(found.values(), key=lambda site: site.depth))

    def spatial(self, stage: int) -> tuple[Site, ...]:
        """What the last 3x3 (or larger) convolution of each block gives, normalised and activated."""
        within = tuple(f"{block.owner}." for block in self.blocks(stage))
        last = {}
        for path in self._owners:
            block = next((start for start in within if f"{path}.".startswith(start)), None)
            for site in self._sites_inside(path) if block else ():
                if site.spatial:
                    last[block] = site
        return tuple(sorted(last.values(), key=lambda site: site.depth))

    def trunk(self, stage: int) -> tuple[Site, ...]:
        """The stage's last blocks in a row, as far back as none changes the size of the map: what a span may cover."""
        row: list[Site] = []
        for site in reversed(self.blocks(stage)):
            if not self.keeps_size(site) or (row and not self._hands_on(site, row[-1])):
                break
            row.append(site)
        return tuple(reversed(row))

    def around(self, site: Site) -> Site | None:
        """What the nearest module around a place returns whose positions lie as in the image, if there is one."""
        returned = {output.owner: output for output in self._outputs if output.ordered and output.element is None}
        path = site.owner
        while path and path not in returned:
            path = path.rpartition(".")[0]
        return returned.get(path)

    def keeps_size(self, site: Site) -> bool:
        """True if the site is what a module returns, of the shape it was given: it can be a span of one."""
        # a bare activation is no trunk: many work in place, on the very tensor that a mask reads
        composite = site.owner in self._owners and not site.host
        own = composite and site.node is None and not site.users and not _second(site)
        return own and self._taken(site) == site.shape

    def span(self, first: Site, last: Site) -> Site:
        """From the input of one module to the output of another, through a chain of blocks or of one parent's modules.

        Raises:
            SiteError: they are no such chain, or what goes in has another shape than what comes out.
        """
        address = f"{first.address} .. {last.address}"
        if _second(first) or _second(last):
            raise SiteError(f"{address!r}: a span reads and returns the first of several tensors only.")
        for end in (first, last):
            if end.node is not None or end.span:
                raise SiteError(f"{address!r}: a span goes from module to module, and {end.address!r} is inside one.")
        parent = first.owner.rpartition(".")[0]
        row = [
            site
            for site in self._outputs
            if (site.owner.rpartition(".")[0] == parent or site.role == "block") and not _second(site)
        ]
        chain = [first]
        while chain[-1].owner != last.owner:
            behind = [site for site in row if self._hands_on(chain[-1], site) and site not in chain]
            if not behind:
                raise SiteError(
                    f"{address!r}: a span is a chain of blocks, or of modules of one parent, in which each takes what "
                    f"the one before returns, and {self.name} does not lead from {chain[-1].owner!r} to "
                    f"{last.owner!r} that way."
                )
            chain.append(behind[0])
        if self._taken(first) != last.shape:
            raise SiteError(
                f"{address!r} takes {_times(self._taken(first))} and returns {_times(last.shape)}: a span keeps the "
                f"shape. Begin it behind {first.owner!r}."
            )
        return dataclasses.replace(
            last, address=address, owner=first.owner, span=tuple(site.owner for site in chain), role="span"
        )

    def _taken(self, site: Site) -> tuple[int, ...] | None:
        """The shape of what a module is given."""
        args, _ = self._run.inputs[site.owner]
        return map_shape(args[0]) if args else None

    def _hands_on(self, site: Site, behind: Site) -> bool:
        """True if the one module takes the very tensor that the other returned."""
        args, _ = self._run.inputs[behind.owner]
        output = self._run.outputs[site.owner]
        return bool(args) and args[0] is (output[site.element[0]] if site.element else output)

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
            yield from map(self._finish, inner_sites(path, owner, graph, self._run, self._shapes))


def _second(site: Site) -> bool:
    return site.element is not None and site.element[0] > 0


def _times(shape: tuple[int, ...] | None) -> str:
    return "x".join(map(str, shape)) if shape else "something else"


def _kind(owner: nn.Module) -> str:
    """What a forward can depend on: class, plain values and kinds of children. The twelve blocks of a ViT are of one.

    Good enough to find places; a cut is made into a graph of its very owner.
    """
    plain = [(k, v) for k, v in owner.__dict__.items() if isinstance(v, (bool, int, float, str, tuple, type(None)))]
    children = [(name, id(type(child))) for name, child in owner._modules.items()]
    return f"{id(uncut_class(owner))} {plain} {children}"
