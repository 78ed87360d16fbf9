"""A model's Sites, from one forward of a weightless twin.

Hooks on the twin tell what each module returns and in which order; the graph of each module's own forward tells what
happens between its children. From these come, without any table of model families, the blocks and stages (`units`), the
layouts and grids (`layout`), and the places inside blocks (`inside`).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from attnsurgery.errors import UsageError
from attnsurgery.graph.anatomy import Anatomy
from attnsurgery.graph.layout import Reader
from attnsurgery.graph.record import LOOPS, NORMS, Found, Run, map_shape, record, same_data, tensors
from attnsurgery.graph.site import Role, Site
from attnsurgery.graph.trace import rebuilds, replaces_itself, uncut_class
from attnsurgery.graph.twin import meta_twin
from attnsurgery.graph.units import Rows, is_container, runs_in_a_row, staging
from attnsurgery.graph.within import models_within, speakers
from attnsurgery.graph.wrappers import replaced_forward, unwrapped

LEADING = re.compile(r"(^|\.)(stem|patch_embed|downsample)")
"""What timm calls the modules between stages and before the first."""
BARE_HOSTS = ("torch.nn.modules.activation", "torch.nn.modules.pooling", "timm.layers.activations")


def input_size_of(model: nn.Module) -> tuple[int, int, int]:
    """(C, H, W) of the images a built timm model takes, also inside a wrapper or a larger whole.

    A model's own settings come before its pretrained_cfg, and what the outermost model says before what is in it.
    """
    said = list(speakers(model))
    configs: list[dict[str, Any]] = [config for config in map(_config, said) if config.get("input_size")]
    channels, height, width = configs[0]["input_size"] if configs else (3, 224, 224)
    sizes = (
        getattr(part, "_traits", {}).get("img_size") or getattr(getattr(part, "patch_embed", None), "img_size", None)
        for part in said
    )
    size = next((size for size in sizes if size is not None), None)
    if size is not None:
        height, width = size
    return _channels(said, int(channels)), int(height), int(width)


def _config(model: nn.Module) -> dict[str, Any]:
    found: Any = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    return found if isinstance(found, dict) else {}


def _architecture(model: nn.Module) -> str | None:
    """What timm calls the model; a model that describes itself by a base and a recipe has the name of its base."""
    kept: dict[str, Any] = getattr(model, "_model_args", None) or {}
    found = kept.get("base") if "recipe" in kept else None
    return found or _config(model).get("architecture")


def _channels(said: list[nn.Module], usual: int) -> int:
    """Of the images: what the first convolution takes, or what the model says where its stem folds pixels."""
    for model in said:
        kept: dict[str, Any] = getattr(model, "_model_args", {})
        told = getattr(model, "in_chans", kept.get("in_chans"))
        told = told if isinstance(told, int) else None
        named = _config(model).get("first_conv") or ""
        first = next(iter(named), "") if isinstance(named, tuple | list) else named
        weight = dict(model.named_parameters()).get(f"{first}.weight")
        usual = usual if told is None else told
        if weight is not None and weight.ndim > 1 and weight.shape[1] % usual:
            return weight.shape[1]
        if weight is not None or told is not None:
            return usual
    return usual


def survey(model: nn.Module, input_size: tuple[int, int, int] | None = None, spend: bool = False) -> Anatomy:
    """Every Site of the model.

    Args:
        model: a built timm model, on any device, with or without earlier surgery, in wrappers or inside a larger whole;
            it is left as it was, and none of its hooks is run.
        input_size: (C, H, W) of one image; by default what the model is built for.
        spend: nobody wants the model afterwards: one without weights need not be copied.

    Raises:
        UsageError: an input size that is none, or a model that cannot be looked into as it is; says what to do.
        SurgeryError: the model does not run on such images.
    """
    model = unwrapped(model, "inspect")
    size = input_size or input_size_of(model)
    if len(size) != 3 or not all(isinstance(side, int) and side > 0 for side in size):
        raise UsageError(f"input_size is (channels, height, width) of one image, and not {size!r}.")
    twin = meta_twin(model, copied=not spend)
    modules = {path: module for path, module in _not_ours(twin)}
    replaced = {path for path, module in modules.items() if replaced_forward(module)}
    run = record(twin, modules, size)
    within = models_within(modules, run)
    rows = Rows(modules, run, within)
    hosts = dict(_hosts(modules, within))
    reader = Reader(twin, size[1:], modules, run, hosts, within)
    units = rows.units()
    strides = {path: _stride(reader, path, size) for path in units}
    stagings = {path: staging(path, modules[path], run, size[1:], _below(path, strides)) for path in within}

    def stage_of(path: str, order: float, stride: float | None) -> int | None:
        """The stage in the model that the module belongs to; None in what the whole adds to its models."""
        model = next((known for known in within if f"{path}.".startswith(f"{known}." if known else "")), None)
        return None if model is None else stagings[model](order, stride)

    def finish(place: Found) -> Site:
        read = reader.read(place.shape, place.owner, place.order, place.node, place.element and place.element[0])
        site = Site(
            address=place.address,
            owner=place.owner,
            node=place.node,
            shape=place.shape,
            layout=read.layout,
            stage=None,
            depth=place.order,
            role=place.role,
            prefix_tokens=read.prefix_tokens,
            users=place.users,
            element=place.element,
            host=place.host,
            grid=read.grid,
            grid_names=read.grid_names,
            grid_source=read.grid_source,
            source_layout=read.source_layout,
            ordered=read.ordered,
            spatial=place.spatial,
            refused=_REPLACED.format(path=place.owner) if place.owner in replaced else read.refused,
        )
        stride = math.sqrt(size[1] * size[2] / site.positions)
        return dataclasses.replace(site, stage=stage_of(place.owner, place.order, stride))

    def in_body(path: str) -> bool:
        """What comes after the last feature of a model, its head, is not a map any more."""
        outside = not any(f"{path}.".startswith(f"{known}." if known else "") for known in within)
        return outside or stage_of(path, run.finished[path], None) is not None

    outputs = sorted(map(finish, _output_places(hosts, run, rows, units)), key=lambda site: site.depth)
    owners = {
        path: module
        for path, module in hosts.items()
        if any(module.children()) and not isinstance(module, (*LOOPS, *NORMS)) and run.once(path) and in_body(path)
    }
    name = next(filter(None, map(_architecture, speakers(model))), None)
    found = tuple(_with_blocks(_richest(outputs, rows)))
    return Anatomy(name or type(model).__name__, size, found, owners, run, finish, within)


_REPLACED = (
    "the forward of {path!r} was replaced on the object itself, so a block put into its class would never run: set it "
    "in a subclass, or take it away (del module.forward) and set it again afterwards"
)


def _below(path: str, strides: dict[str, float]) -> dict[str, float]:
    return {unit: stride for unit, stride in strides.items() if not path or unit.startswith(f"{path}.")}


def _stride(reader: Reader, path: str, size: tuple[int, int, int]) -> float:
    """Of the first map that a module returns: the square root of the image's pixels for each position."""
    shape = next(shape for tensor in tensors(reader.run.outputs[path]) if (shape := map_shape(tensor)))
    read = reader.read(shape, path, reader.run.finished[path])
    height, width = {"NCHW": shape[1:], "NHWC": shape[:2], "NLC": (shape[0] - read.prefix_tokens, 1)}[read.layout]
    return math.sqrt(size[1] * size[2] / (height * width))


def _not_ours(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's modules by path, less attention blocks of ours, grafted or built in."""
    hidden: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if hidden and path.startswith(hidden):
            continue
        if hasattr(type(module), "grafted"):
            hidden = (*hidden, f"{path}.")
        else:
            yield path, module


def _hosts(modules: dict[str, nn.Module], within: tuple[str, ...]) -> Iterator[tuple[str, nn.Module]]:
    """Those that can hold a block: not the root, and none that will be rebuilt.

    Below a module that fuses itself for deployment nothing lasts, and one with `fuse` is itself replaced by the result,
    if that is another. A whole model's `fuse` has its modules do so, and says nothing of those that do not.

    Args:
        within: paths of the models.
    """
    hidden: tuple[str, ...] = ()
    for path, module in modules.items():
        if hidden and path.startswith(hidden):
            continue
        if path not in ("", *within) and rebuilds(type(module)):
            hidden = (*hidden, f"{path}.")
        # a torch.fx graph writes its forward anew whenever it is recompiled or copied
        if path and not replaces_itself(uncut_class(module)) and not isinstance(module, fx.GraphModule):
            yield path, module


def _output_places(modules: dict[str, nn.Module], run: Run, rows: Rows, units: dict[str, None]) -> Iterator[Found]:
    """What modules return: those with children and a forward of their own, and bare activations in a container."""
    for path, module in modules.items():
        # a list with a forward of its own, such as a dense block, cannot have one child more, but its last child can
        looping = isinstance(module, LOOPS) and path in units
        if not run.once(path) or (isinstance(module, (*LOOPS, *NORMS)) and not looping):
            continue
        composite = any(module.children())
        if runs_in_a_row(path, module, run) if composite else not _may_host_bare(path, module, modules):
            continue
        host = rows.last_child(path).removeprefix(f"{path}.") if looping else ""
        role: Role = "block" if path in units else "inner"
        output = run.outputs[path]
        shape = map_shape(output)
        if shape is not None:
            yield Found(run.finished[path], path, path, None, shape, role, host=host)
        elif type(output) in (list, tuple):
            arity = len(output) if isinstance(output, tuple) else 0
            for index, value in enumerate(output):
                shape = map_shape(value)
                before = [*run.given[path], *((earlier, earlier._version) for earlier in tensors(output[:index]))]
                if shape is None or same_data(before, [(value, value._version)]):
                    continue
                order = run.finished[path] + index * 1e-3
                main: Role = role if value.ndim == tensors(output)[0].ndim else "inner"  # the state of a mixer is none
                yield Found(order, f"{path}:{index}", path, None, shape, main, element=(index, arity), host=host)


def _may_host_bare(path: str, module: nn.Module, modules: dict[str, nn.Module]) -> bool:
    """A module without children may hold a block only where no forward stands above it, and nobody ever swaps it."""
    parent = modules.get(path.rpartition(".")[0])
    stateless = next(module.parameters(), None) is None and next(module.buffers(), None) is None
    return parent is not None and is_container(parent) and stateless and type(module).__module__.startswith(BARE_HOSTS)


def _richest(sites: list[Site], rows: Rows) -> list[Site]:
    """A stage's blocks less what only leads to them, if there are others: stems, downsampling, position encodings."""
    weights = {
        site.address: 0 if LEADING.search(site.address) else rows.weights(site.owner)
        for site in sites
        if site.role == "block"
    }
    most: dict[int | None, int] = {}
    for site in sites:
        most[site.stage] = max(most.get(site.stage, 0), weights.get(site.address, 0))
    return [
        dataclasses.replace(site, role="inner")
        if site.role == "block" and weights[site.address] < 2 <= most[site.stage]
        else site
        for site in sites
    ]


def _with_blocks(sites: list[Site]) -> Iterator[Site]:
    """Stages of bare layers (vgg, densenet) have no block; what may hold one there counts as one."""
    served = {site.stage for site in sites if site.role == "block"}
    for site in sites:
        bare = site.node is None and site.layout == "NCHW" and site.stage not in served
        yield dataclasses.replace(site, role="block") if bare and site.stage else site
