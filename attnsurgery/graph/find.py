"""Find a model's sites, from one forward of a twin without weights.

Hooks on the twin record what each module returns and in which order. The graph of a module's own forward shows what
happens between its children. Without any table of model families, these two give the blocks and stages (`units`), the
layouts and grids (`detect_layout`), and the sites inside blocks (`inside`).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Container, Iterable, Iterator
from typing import Any

from torch import fx, nn

from attnsurgery.errors import UsageError
from attnsurgery.graph.anatomy import Anatomy
from attnsurgery.graph.detect_layout import LayoutDetector
from attnsurgery.graph.forward_run import (
    LOOPS,
    NORMS,
    ForwardRun,
    UnstagedSite,
    map_shape,
    record_forward,
    same_data,
    tensors,
)
from attnsurgery.graph.site import Role, Site
from attnsurgery.graph.submodels import described_models, model_paths
from attnsurgery.graph.trace import rebuilds, replaces_itself, uncut_class
from attnsurgery.graph.twin import meta_twin
from attnsurgery.graph.units import Rows, is_container, runs_in_a_row, staging
from attnsurgery.graph.wrappers import replaced_forward, unwrapped

LEADING = re.compile(r"(^|\.)(stem|patch_embed|downsample)")
"""timm's names for the modules before the first stage and between stages."""
BARE_HOSTS = ("torch.nn.modules.activation", "torch.nn.modules.pooling", "timm.layers.activations")


def input_size_of(model: nn.Module) -> tuple[int, int, int]:
    """(C, H, W) of the images that a built timm model takes, also inside a wrapper or a larger module.

    Attributes of a model take precedence over its pretrained_cfg, and outer models over inner ones.
    """
    models = list(described_models(model))
    configs: list[dict[str, Any]] = [config for config in map(_config, models) if config.get("input_size")]
    channels, height, width = configs[0]["input_size"] if configs else (3, 224, 224)
    sizes = (
        getattr(part, "_traits", {}).get("img_size") or getattr(getattr(part, "patch_embed", None), "img_size", None)
        for part in models
    )
    size = next((size for size in sizes if size is not None), None)
    if size is not None:
        height, width = size
    return _channels(models, int(channels)), int(height), int(width)


def _config(model: nn.Module) -> dict[str, Any]:
    config: Any = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    return config if isinstance(config, dict) else {}


def _architecture(model: nn.Module) -> str | None:
    """timm's name for the model; for a model that describes itself by a base and a recipe, the name of the base."""
    arguments: dict[str, Any] = getattr(model, "_model_args", None) or {}
    base = arguments.get("base") if "recipe" in arguments else None
    return base or _config(model).get("architecture")


def _channels(models: list[nn.Module], default: int) -> int:
    """Number of channels of the images, by the first model that has it as an attribute or in its first convolution.

    The convolution may take a multiple of it, where the stem folds pixels into channels.
    """
    for model in models:
        arguments: dict[str, Any] = getattr(model, "_model_args", {})
        declared = getattr(model, "in_chans", arguments.get("in_chans"))
        declared = declared if isinstance(declared, int) else None
        first_conv = _config(model).get("first_conv") or ""
        name = next(iter(first_conv), "") if isinstance(first_conv, tuple | list) else first_conv
        weight = dict(model.named_parameters()).get(f"{name}.weight")
        default = default if declared is None else declared
        if weight is not None and weight.ndim > 1 and weight.shape[1] % default:
            return weight.shape[1]
        if weight is not None or declared is not None:
            return default
    return default


def survey(model: nn.Module, input_size: tuple[int, int, int] | None = None, spend: bool = False) -> Anatomy:
    """Find all sites of the model.

    Args:
        model: a built timm model, on any device, with or without earlier surgery, in wrappers or inside a larger
            module. It is not changed, and none of its hooks is run.
        input_size: (C, H, W) of one image; by default the size that the model is built for.
        spend: the caller does not need the model afterwards, so a model without weights need not be copied.

    Raises:
        UsageError: the input size is invalid, or the model is in a wrapper that does not allow this; the message says
            what to do.
        SurgeryError: the model does not run on such images.
    """
    model = unwrapped(model, "inspect")
    size = input_size or input_size_of(model)
    if len(size) != 3 or not all(isinstance(side, int) and side > 0 for side in size):
        raise UsageError(f"input_size is (channels, height, width) of one image, and not {size!r}.")
    twin = meta_twin(model, copied=not spend)
    modules = dict(_base_modules(twin))
    replaced = {path for path, module in modules.items() if replaced_forward(module)}  # recording replaces some too
    run = record_forward(twin, modules, size)
    models = model_paths(modules, run)
    rows = Rows(modules, run, models)
    hosts = dict(_hosts(modules, models))
    detector = LayoutDetector(twin, size[1:], modules, run, hosts, models)
    units = rows.units()
    finisher = _Finisher(detector, size, units, replaced)
    outputs = sorted(map(finisher.finish, _output_sites(hosts, run, rows, units)), key=lambda site: site.depth)
    owners = {
        path: module
        for path, module in hosts.items()
        if any(module.children()) and not isinstance(module, (*LOOPS, *NORMS))
        if run.once(path) and finisher.is_in_body(path)
    }
    name = next(filter(None, map(_architecture, described_models(model))), None)
    sites = tuple(_with_blocks(_demote_leading(outputs, rows)))
    return Anatomy(name or type(model).__name__, size, sites, owners, run, finisher.finish, models)


class _Finisher:
    """Adds layout, grid and stage to the sites of one recorded model.

    Args:
        detector: detects layouts and grids in the model.
        size: (C, H, W) of the images.
        units: paths of the model's blocks.
        replaced: paths of modules whose forward was replaced on the object, which can hold no block.
    """

    def __init__(
        self, detector: LayoutDetector, size: tuple[int, int, int], units: Iterable[str], replaced: Container[str]
    ) -> None:
        self._detector = detector
        self._run = detector.run
        self._pixels = size[1] * size[2]
        self._replaced = replaced
        strides = {path: self._stride(path) for path in units}
        self._stagings = {
            path: staging(path, detector.modules[path], self._run, size[1:], _below(path, strides))
            for path in detector.models
        }

    def finish(self, place: UnstagedSite) -> Site:
        """The complete site."""
        element = place.element and place.element[0]
        detected = self._detector.detect(place.shape, place.owner, place.order, place.node, element)
        site = Site(
            address=place.address,
            owner=place.owner,
            node=place.node,
            shape=place.shape,
            layout=detected.layout,
            stage=None,
            depth=place.order,
            role=place.role,
            prefix_tokens=detected.prefix_tokens,
            users=place.users,
            element=place.element,
            host=place.host,
            grid=detected.grid,
            grid_names=detected.grid_names,
            grid_source=detected.grid_source,
            source_layout=detected.source_layout,
            ordered=detected.ordered,
            spatial=place.spatial,
            attention=place.attention,
            refused=_REPLACED.format(path=place.owner) if place.owner in self._replaced else detected.refused,
        )
        stride = math.sqrt(self._pixels / site.positions)
        return dataclasses.replace(site, stage=self._stage_of(place.owner, place.order, stride))

    def is_in_body(self, path: str) -> bool:
        """False for a module in the head of a model, which comes after the last feature and has no map."""
        return self._model_of(path) is None or self._stage_of(path, self._run.order[path], None) is not None

    def _model_of(self, path: str) -> str | None:
        """The path of the model that a module belongs to; None for modules outside of all models."""
        prefixes = ((model, f"{model}." if model else "") for model in self._detector.models)
        return next((model for model, prefix in prefixes if f"{path}.".startswith(prefix)), None)

    def _stage_of(self, path: str, order: float, stride: float | None) -> int | None:
        """The stage of a module in its model; None outside of all models and in a head."""
        model = self._model_of(path)
        return None if model is None else self._stagings[model](order, stride)

    def _stride(self, path: str) -> float:
        """Stride of the first map that a module returns: the square root of the pixels of the image per position."""
        shape = next(shape for tensor in tensors(self._run.outputs[path]) if (shape := map_shape(tensor)))
        detected = self._detector.detect(shape, path, self._run.order[path])
        sides = {"NCHW": shape[1:], "NHWC": shape[:2], "NLC": (shape[0] - detected.prefix_tokens, 1)}
        height, width = sides[detected.layout]
        return math.sqrt(self._pixels / (height * width))


_REPLACED = (
    "the forward of {path!r} was replaced on the object itself, so a block put into its class would never run: set it "
    "in a subclass, or take it away (del module.forward) and set it again afterwards"
)


def _below(path: str, strides: dict[str, float]) -> dict[str, float]:
    return {unit: stride for unit, stride in strides.items() if not path or unit.startswith(f"{path}.")}


def _base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's modules by path, without attention blocks of this package, inserted or built in."""
    hidden: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if hidden and path.startswith(hidden):
            continue
        if hasattr(type(module), "grafted"):
            hidden = (*hidden, f"{path}.")
        else:
            yield path, module


def _hosts(modules: dict[str, nn.Module], models: tuple[str, ...]) -> Iterator[tuple[str, nn.Module]]:
    """The modules that can hold a block: all but the root and those that are rebuilt for deployment.

    A module that fuses itself for deployment replaces its children, and `fuse` may return another module for it. The
    `fuse` of a whole model only calls that of its modules.

    Args:
        modules: all modules by path.
        models: paths of the timm models.
    """
    hidden: tuple[str, ...] = ()
    for path, module in modules.items():
        if hidden and path.startswith(hidden):
            continue
        if path not in ("", *models) and rebuilds(type(module)):
            hidden = (*hidden, f"{path}.")
        # a GraphModule generates its forward again whenever it is recompiled or copied
        if path and not replaces_itself(uncut_class(module)) and not isinstance(module, fx.GraphModule):
            yield path, module


def _output_sites(
    modules: dict[str, nn.Module], run: ForwardRun, rows: Rows, units: dict[str, None]
) -> Iterator[UnstagedSite]:
    """Outputs of modules that have children and a forward of their own, and of activations in a container."""
    for path, module in modules.items():
        # a container with its own forward, such as a dense block, can have no further child, but its last child can
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
            yield UnstagedSite(run.order[path], path, path, None, shape, role, host=host)
        elif type(output) in (list, tuple):
            arity = len(output) if isinstance(output, tuple) else 0
            for index, value in enumerate(output):
                shape = map_shape(value)
                before = [
                    *run.input_tensors[path],
                    *((earlier, earlier._version) for earlier in tensors(output[:index])),
                ]
                if shape is None or same_data(before, [(value, value._version)]):
                    continue
                order = run.order[path] + index * 1e-3
                # a tensor of another rank is no map, such as the state of a mixer
                main: Role = role if value.ndim == tensors(output)[0].ndim else "inner"
                yield UnstagedSite(order, f"{path}:{index}", path, None, shape, main, element=(index, arity), host=host)


def _may_host_bare(path: str, module: nn.Module, modules: dict[str, nn.Module]) -> bool:
    """True if a module without children may hold a block: it is in a container and is never replaced."""
    parent = modules.get(path.rpartition(".")[0])
    stateless = next(module.parameters(), None) is None and next(module.buffers(), None) is None
    return parent is not None and is_container(parent) and stateless and type(module).__module__.startswith(BARE_HOSTS)


def _demote_leading(sites: list[Site], rows: Rows) -> list[Site]:
    """Make stems, downsampling and position encodings inner sites, if their stage has larger blocks."""
    weights = {
        site.address: 0 if LEADING.search(site.address) else rows.weights(site.owner)
        for site in sites
        if site.role == "block"
    }
    largest: dict[int | None, int] = {}
    for site in sites:
        largest[site.stage] = max(largest.get(site.stage, 0), weights.get(site.address, 0))
    return [
        dataclasses.replace(site, role="inner")
        if site.role == "block" and weights[site.address] < 2 <= largest[site.stage]
        else site
        for site in sites
    ]


def _with_blocks(sites: list[Site]) -> Iterator[Site]:
    """Make all outputs block sites in stages that consist of single layers (vgg, densenet) and so have no block."""
    stages_with_blocks = {site.stage for site in sites if site.role == "block"}
    for site in sites:
        is_plain_output = site.node is None and site.layout == "NCHW" and site.stage not in stages_with_blocks
        yield dataclasses.replace(site, role="block") if is_plain_output and site.stage else site
