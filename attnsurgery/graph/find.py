"""A model's Sites, from one forward of a weightless twin.

Hooks on the twin tell what each module returns and in which order; the graph of each module's own forward tells what
happens between its children. From these come, without any table of model families:

* the *blocks*: innermost modules with children of their own that stand in a row;
* the *stages*, counted by stride as papers do: 1, 2, 3, 4 for strides 4, 8, 16, 32. A module belongs to the first
  entry of timm's `feature_info` that returns no earlier than it does, so that the stride-4 convolution in front of a
  stride-8 block counts as that block's. Where the stride never changes, stages are the quarters of the depth.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from attnsurgery.errors import UsageError
from attnsurgery.graph.anatomy import Anatomy
from attnsurgery.graph.layout import guess_layout
from attnsurgery.graph.record import NORMS, Found, Run, map_shape, meta_twin, record
from attnsurgery.graph.site import Site
from attnsurgery.graph.trace import rebuilds

LOOPS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
BARE_HOSTS = ("torch.nn.modules.activation", "torch.nn.modules.pooling", "timm.layers.activations")


def input_size_of(model: nn.Module) -> tuple[int, int, int]:
    """(C, H, W) of the images a built timm model takes; its own settings come before its pretrained_cfg."""
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    channels, height, width = config.get("input_size", (3, 224, 224))
    traits: dict[str, Any] = getattr(model, "_traits", {})
    size = traits.get("img_size") or getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is not None:
        height, width = size
    return _channels(model, int(channels)), int(height), int(width)


def _channels(model: nn.Module, usual: int) -> int:
    """Of the images: what the model says, or, before timm 1.0.31, what its first convolution says."""
    kept: dict[str, Any] = getattr(model, "_model_args", {})
    said = getattr(model, "in_chans", kept.get("in_chans"))
    if said is not None:
        return int(said)
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    name = config.get("first_conv")
    weight = dict(model.named_parameters()).get(f"{name[0] if isinstance(name, tuple | list) else name}.weight")
    if weight is None or weight.ndim < 2 or weight.shape[1] % usual == 0:  # a multiple: a stem that folds pixels
        return usual
    return weight.shape[1]


def survey(model: nn.Module, input_size: tuple[int, int, int] | None = None) -> Anatomy:
    """Every Site of the model.

    Args:
        model: a built timm model, on any device, with or without earlier surgery; it is left as it was.
        input_size: (C, H, W) of one image; by default what the model is built for.
    """
    size = input_size or input_size_of(model)
    if len(size) != 3 or not all(isinstance(side, int) and side > 0 for side in size):
        raise UsageError(f"input_size is (channels, height, width) of one image, and not {size!r}.")
    twin = meta_twin(model)
    modules = dict(_hosts(twin))
    run = record(twin, modules, size)
    stage_of = _stages(twin, run, size)
    channels_last = getattr(twin, "output_fmt", None) == "NHWC"

    def finish(place: Found) -> Site:
        layout = guess_layout(place.shape, size[1:], channels_last)
        return Site(
            address=place.address,
            owner=place.owner,
            node=place.node,
            shape=place.shape,
            layout=layout,
            stage=stage_of(place.order),
            depth=place.order,
            role=place.role,
            prefix_tokens=_prefix_tokens(twin, place.shape[0]) if layout == "NLC" else 0,
            users=place.users,
            spatial=place.spatial,
        )

    outputs = sorted(map(finish, _output_places(modules, run)), key=lambda site: site.depth)
    owners = {
        path: module
        for path, module in modules.items()
        if any(module.children())
        and not isinstance(module, (*LOOPS, *NORMS))
        and run.once(path)
        # what comes after the last feature, the head, is not a map any more
        and stage_of(run.finished[path]) is not None
    }
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    name = config.get("architecture") or type(model).__name__
    return Anatomy(name, size, tuple(_with_blocks(outputs)), owners, run, finish)


def _hosts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's modules by path, less the root, attention blocks of ours, and what will be rebuilt.

    Below a module that fuses itself for deployment nothing lasts, and one with `fuse` is itself replaced by the result.
    """
    hidden: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if path.startswith(hidden) and hidden:
            continue
        of_ours = hasattr(type(module), "grafted")  # a block, grafted or built in
        fleeting = hasattr(type(module), "fuse")
        if path and (of_ours or rebuilds(type(module))):
            hidden = (*hidden, f"{path}.")
        if path and not fleeting and not of_ours:
            yield path, module


def _prefix_tokens(model: nn.Module, tokens: int) -> int:
    """How many of so many tokens are no image patch; cait and xcit add theirs only behind the blocks."""
    prefix = int(getattr(model, "num_prefix_tokens", 0) or 0)
    patches = getattr(getattr(model, "patch_embed", None), "num_patches", None)
    return 0 if patches == tokens else prefix


def _output_places(modules: dict[str, nn.Module], run: Run) -> Iterator[Found]:
    """What modules return: those with children and a forward of their own, and bare activations in a container."""
    units = _units(modules, run)
    for path, module in modules.items():
        shape = map_shape(run.outputs.get(path))
        if shape is None or not run.once(path) or isinstance(module, (*LOOPS, *NORMS)):
            continue
        composite = any(module.children())
        if runs_in_a_row(path, module, run) if composite else not _may_host_bare(path, module, modules):
            continue
        yield Found(run.finished[path], path, path, None, shape, "block" if path in units else "inner")


def is_container(module: nn.Module) -> bool:
    """True for what only holds modules: it runs them in order, or leaves that to others."""
    return isinstance(module, LOOPS) and type(module).forward in [loop.forward for loop in LOOPS]


def runs_in_a_row(path: str, module: nn.Module, run: Run) -> bool:
    """True for regnet's RegStage and its like: no Sequential, but it only runs its children, all of one class."""
    children = list(module.named_children())
    if isinstance(module, LOOPS) or len({type(child) for _, child in children}) != 1:
        return False
    if isinstance(children[0][1], LOOPS) or not any(children[0][1].children()):
        return False
    return run.outputs.get(path) is not None and run.outputs[path] is run.outputs.get(f"{path}.{children[-1][0]}")


def _units(modules: dict[str, nn.Module], run: Run) -> set[str]:
    """Paths of the model's blocks: the innermost modules with children of their own that stand in a row."""
    rows = {path for path, module in modules.items() if is_container(module) or runs_in_a_row(path, module, run)}
    candidates = [
        path
        for path, module in modules.items()
        if path not in rows
        and path.rpartition(".")[0] in rows | {""}
        and any(module.children())
        and not isinstance(module, (*LOOPS, *NORMS))
        and run.once(path)
        and map_shape(run.outputs.get(path)) is not None
    ]
    inner = {path for path in candidates if not any(other.startswith(f"{path}.") for other in candidates)}
    # the root's own children are blocks only where no container holds any
    return {path for path in inner if "." in path} or inner


def _may_host_bare(path: str, module: nn.Module, modules: dict[str, nn.Module]) -> bool:
    """A module without children may hold a block only where no forward stands above it, and nobody ever swaps it."""
    parent = modules.get(path.rpartition(".")[0])
    stateless = next(module.parameters(), None) is None and next(module.buffers(), None) is None
    return parent is not None and is_container(parent) and stateless and type(module).__module__.startswith(BARE_HOSTS)


def _stages(model: nn.Module, run: Run, size: tuple[int, int, int]) -> Callable[[float], int | None]:
    """The function from an order of execution to a stage."""
    infos = [dict(info) for info in (getattr(model, "feature_info", None) or [])]
    known = [(run.finished[i["module"]], float(i["reduction"])) for i in infos if i.get("module") in run.finished]
    isotropic = len(known) > 1 and len(known) == len(infos) and len({reduction for _, reduction in known}) == 1
    if len(known) < max(1, len(infos)):  # feature_info names modules that do not exist: strides of the maps themselves
        known = [
            (order, size[1] / output.shape[2])
            for path, order in run.finished.items()
            if isinstance(output := run.outputs[path], torch.Tensor) and output.ndim == 4 and output.shape[2] > 1
        ]
    known.sort()
    stages = _stage_numbers([reduction for _, reduction in known], isotropic, repeats=len(known) == len(infos))

    def stage_of(order: float) -> int | None:
        return next((stage for (last, _), stage in zip(known, stages, strict=True) if order <= last), None)

    return stage_of


def _stage_numbers(reductions: list[float], isotropic: bool, repeats: bool) -> list[int]:
    """log2 of the stride less 1, or quarters; one that `output_stride` keeps at the stride before it still counts."""
    if isotropic:
        return [1 + 4 * index // len(reductions) for index in range(len(reductions))]
    stages: list[int] = []
    for index, reduction in enumerate(reductions):
        stage = max(0, round(math.log2(max(reduction, 1))) - 1)
        dilated = repeats and index > 0 and reduction == reductions[index - 1] and stage > 0
        stages.append(stages[-1] + 1 if dilated else max([stage, *stages[-1:]]) if repeats else stage)
    return stages


def _with_blocks(sites: list[Site]) -> Iterator[Site]:
    """Stages of bare layers (vgg, densenet) have no block; what may hold one there counts as one."""
    served = {site.stage for site in sites if site.role == "block"}
    for site in sites:
        bare = site.node is None and site.layout == "NCHW" and site.stage not in served
        yield dataclasses.replace(site, role="block") if bare and site.stage else site
