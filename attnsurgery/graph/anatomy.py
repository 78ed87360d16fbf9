"""Anatomy: the sites of a model, found on demand.

Outputs of modules are known from the one forward of the twin, but sites inside a module need a trace of it. A selector
such as 'stage:3 before_last_block' needs no trace, and 'stage:3 branches' only those of that stage's blocks, so traces
are made on demand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator
from functools import cached_property

from torch import fx, nn

from attnsurgery.errors import SiteError, did_you_mean
from attnsurgery.graph.attention import OwnAttention, own_attention
from attnsurgery.graph.forward_run import ForwardRun, UnstagedSite, map_shape
from attnsurgery.graph.inside import Shapes, inner_sites
from attnsurgery.graph.site import Role, Site
from attnsurgery.graph.trace import trace_owner, uncut_class
from attnsurgery.graph.units import adds


class Anatomy:
    """The sites of a model, as returned by `inspect`.

    Args:
        name: name of the model in messages.
        input_size: (C, H, W) of the images that the shapes hold for.
        outputs: sites at the outputs of modules, in order of execution.
        owners: modules whose forward can be traced for further sites, by path, on the meta device.
        run: the recorded forward.
        finish: adds layout and stage to a site.
        models: paths of the timm models, which define the stages: the root, or models inside it.
    """

    def __init__(
        self,
        name: str,
        input_size: tuple[int, int, int],
        outputs: tuple[Site, ...],
        owners: dict[str, nn.Module],
        run: ForwardRun,
        finish: Callable[[UnstagedSite], Site],
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
        self._own: dict[str, OwnAttention] = {}

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """All sites, in order of execution.

        Where a tensor is the output of a module and a value in its parent's forward, the site is the parent's.
        """
        by_address = {site.address: site for site in self._outputs}
        for path in self._owners:
            by_address.update((site.address, site) for site in self._sites_inside(path))
        return tuple(sorted(by_address.values(), key=lambda site: site.depth))

    def of(self, model: str) -> Anatomy:
        """The sites of one of `models`.

        Args:
            model: path of the model.
        """

        def below(path: str) -> bool:
            return not model or path == model or path.startswith(f"{model}.")

        outputs = tuple(site for site in self._outputs if below(site.owner))
        owners = {path: owner for path, owner in self._owners.items() if below(path)}
        part = Anatomy(self.name, self.input_size, outputs, owners, self._run, self._finish, (model,))
        part._inside, part._graphs, part._shapes = self._inside, self._graphs, self._shapes
        return part

    def hint(self) -> str:
        """A possible reason why sites are missing, for messages; empty if there is none."""
        repeated = next((path for path, count in self._run.calls.items() if path and count > 1), None)
        if repeated is None or self._outputs:
            return ""
        return (
            f" Its modules run more than once in one forward ({repeated!r} {self._run.calls[repeated]} times), and a "
            "block must run exactly once: operate on the module that is called so often by itself."
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
        """The grid of the tensor with this owner, node and element (see `Site`); None if there is none."""
        candidates = self._outputs if node is None else self._sites_inside(owner)
        sites = (site for site in candidates if (site.owner, site.node, site.element) == (owner, node, element))
        return next((site.grid for site in sites), None)

    def blocks(self, stage: int) -> tuple[Site, ...]:
        """Outputs of the stage's blocks, in order of execution."""
        return tuple(site for site in self._outputs if site.stage == stage and site.role == "block")

    def sides(self, stage: int, role: Role) -> tuple[Site, ...]:
        """Sites of the stage's residual branches, in order of execution.

        Args:
            stage: number of the stage.
            role: 'branch' for the ends of branches, 'branch_input' for what they read, or 'shortcut' for what they are
                added to.
        """
        by_address = {
            site.address: site
            for path, owner in self._owners.items()
            if adds(uncut_class(owner))
            for site in self._sites_inside(path)
            if site.stage == stage and site.role == role
        }
        return tuple(sorted(by_address.values(), key=lambda site: site.depth))

    def spatial(self, stage: int) -> tuple[Site, ...]:
        """For each block, the result of the last 3x3 (or larger) convolution after its normalization and activation."""
        prefixes = tuple(f"{block.owner}." for block in self.blocks(stage))
        last = {}
        for path in self._owners:
            block = next((start for start in prefixes if f"{path}.".startswith(start)), None)
            for site in self._sites_inside(path) if block else ():
                if site.spatial:
                    last[block] = site
        return tuple(sorted(last.values(), key=lambda site: site.depth))

    def attentions(self, stage: int) -> tuple[Site, ...]:
        """What the stage's own attention modules return, where a block can take their place, in order of execution."""
        found: list[Site] = []
        prefixes = tuple(f"{block.owner}." for block in self.blocks(stage))
        for path in self._owners:
            if f"{path}.".startswith(prefixes):
                found += (site for site in self._sites_inside(path) if site.attention)
        paths = [f"{site.attention}." for site in found]
        outermost = (site for site in found if not any(site.attention.startswith(path) for path in paths))
        return tuple(sorted(outermost, key=lambda site: site.depth))

    def own_attention(self, site: Site) -> OwnAttention:
        """The model's own attention module at a site of which `attention` is not empty."""
        if site.attention not in self._own:
            module = self._owners[site.owner].get_submodule(site.attention.removeprefix(f"{site.owner}."))
            self._own[site.attention] = own_attention(site.attention, module, self._run.inputs[site.attention][0])
        return self._own[site.attention]

    def classes(self, stage: int) -> set[str]:
        """Names of the classes of all modules inside the stage's blocks."""
        owners = (self._owners.get(block.owner) for block in self.blocks(stage))
        return {uncut_class(module).__name__ for owner in owners if owner is not None for module in owner.modules()}

    def trunk(self, stage: int) -> tuple[Site, ...]:
        """The longest run of blocks at the end of the stage that keep the size of the map, which a span may cover."""
        row: list[Site] = []
        for site in reversed(self.blocks(stage)):
            if not self.keeps_size(site) or (row and not self._hands_on(site, row[-1])):
                break
            row.append(site)
        return tuple(reversed(row))

    def around(self, site: Site) -> Site | None:
        """The output of the nearest enclosing module whose positions lie as in the image; None if there is none."""
        by_owner = {output.owner: output for output in self._outputs if output.ordered and output.element is None}
        path = site.owner
        while path and path not in by_owner:
            path = path.rpartition(".")[0]
        return by_owner.get(path)

    def keeps_size(self, site: Site) -> bool:
        """True if the site is the output of a module with the shape of its input, so it can be a span of one."""
        # an activation alone is no span: many work in place, on the tensor that a mask reads
        is_composite = site.owner in self._owners and not site.host
        is_output = is_composite and site.node is None and not site.users and not _is_further_output(site)
        return is_output and self._input_shape(site) == site.shape

    def span(self, first: Site, last: Site) -> Site:
        """The span from the input of one module to the output of another.

        Args:
            first: the output of the first module.
            last: the output of the last module, reached through a chain of blocks or of modules with one parent.

        Raises:
            SiteError: there is no such chain, or the span's input and output have different shapes.
        """
        address = f"{first.address} .. {last.address}"
        if _is_further_output(first) or _is_further_output(last):
            raise SiteError(f"{address!r}: a span reads and returns the first of several tensors only.")
        for end in (first, last):
            if end.node is not None or end.span:
                raise SiteError(f"{address!r}: a span goes from module to module, and {end.address!r} is inside one.")
        parent = first.owner.rpartition(".")[0]
        row = [
            site
            for site in self._outputs
            if (site.owner.rpartition(".")[0] == parent or site.role == "block") and not _is_further_output(site)
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
        if self._input_shape(first) != last.shape:
            raise SiteError(
                f"{address!r} takes {_times(self._input_shape(first))} and returns {_times(last.shape)}: a span keeps "
                f"the shape. Begin it behind {first.owner!r}."
            )
        return dataclasses.replace(
            last, address=address, owner=first.owner, span=tuple(site.owner for site in chain), role="span"
        )

    def _input_shape(self, site: Site) -> tuple[int, ...] | None:
        """The shape of a module's first argument; None if it is no map."""
        args, _ = self._run.inputs[site.owner]
        return map_shape(args[0]) if args else None

    def _hands_on(self, site: Site, behind: Site) -> bool:
        """True if the module of `behind` takes the tensor object that the module of `site` returned."""
        args, _ = self._run.inputs[behind.owner]
        output = self._run.outputs[site.owner]
        return bool(args) and args[0] is (output[site.element[0]] if site.element else output)

    @cached_property
    def stages(self) -> tuple[int, ...]:
        """Numbers of the stages that have a block, ascending; the stem is no stage."""
        return tuple(sorted({s.stage for s in self._outputs if s.stage and s.role == "block"}))

    def _sites_inside(self, path: str) -> tuple[Site, ...]:
        if path not in self._inside:
            self._inside[path] = tuple(self._trace(path))
        return self._inside[path]

    def _trace(self, path: str) -> Iterator[Site]:
        owner = self._owners[path]
        key = _trace_key(owner)
        if key not in self._graphs:
            self._graphs[key] = trace_owner(owner)
        graph = self._graphs[key]
        if graph is not None:
            yield from map(self._finish, inner_sites(path, owner, graph, self._run, self._shapes))


def _is_further_output(site: Site) -> bool:
    """True for all but the first of several tensors that a module returns."""
    return site.element is not None and site.element[0] > 0


def _times(shape: tuple[int, ...] | None) -> str:
    return "x".join(map(str, shape)) if shape else "something else"


def _trace_key(owner: nn.Module) -> str:
    """What a forward can depend on: class, plain attributes and classes of children. All blocks of a ViT share a key.

    This is precise enough to find sites; `operate` traces each owner itself.
    """
    plain = [(k, v) for k, v in owner.__dict__.items() if isinstance(v, (bool, int, float, str, tuple, type(None)))]
    children = [(name, id(type(child))) for name, child in owner._modules.items()]
    return f"{id(uncut_class(owner))} {plain} {children}"
