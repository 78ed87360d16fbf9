"""Detect the layout, prefix tokens and grid of the tensors in one recorded forward.

NCHW   (B, C, H, W)
NHWC   (B, H, W, C)
NLC    (B, N, C)      prefix tokens (class, registers) come first; the rest may be the rows of an H x W grid
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from typing import Any

import torch
from torch import nn

from attnsurgery.graph.forward_run import LOOPS, ForwardRun, map_shape, tensors
from attnsurgery.graph.resized_forward import ResizedForward
from attnsurgery.graph.site import Layout
from attnsurgery.graph.submodels import nearest_attribute
from attnsurgery.graph.trace import trace_owner

GridArgument = tuple[tuple[int, int], tuple[str, ...]]
"""A (height, width) and the names of the arguments that pass it."""


def guess_layout(shape: tuple[int, ...], image: tuple[int, int], channels_last: bool) -> Layout:
    """The layout of a tensor, from its shape without batch and the (H, W) of the image.

    A map keeps the proportions of the image, and the number of channels does not depend on them. So of NCHW and NHWC,
    the one in which height and width have shrunk by the same factor is right. If both have, `channels_last` decides,
    which is only a guess; see `LayoutDetector.layout_at`.
    """
    if len(shape) == 2:
        return "NLC"
    first, middle, last = shape
    as_nchw = abs(math.log((image[0] / middle) / (image[1] / last)))
    as_nhwc = abs(math.log((image[0] / first) / (image[1] / middle)))
    if as_nchw == as_nhwc:
        return "NHWC" if channels_last else "NCHW"
    return "NCHW" if as_nchw < as_nhwc else "NHWC"


@dataclass(frozen=True, slots=True)
class DetectedLayout:
    """Layout, prefix tokens and grid of a tensor; the fields are those of `Site`."""

    layout: Layout
    prefix_tokens: int = 0
    grid: tuple[int, int] | None = None
    grid_names: tuple[str, ...] = ()
    grid_source: str = ""
    source_layout: Layout = "NCHW"
    ordered: bool = True
    refused: str = ""


@dataclass
class LayoutDetector:
    """Detects layouts, prefix tokens and grids in one recorded model.

    The layout follows from the layers that take or return such a tensor: a convolution has channels first, a Linear
    last. Without such a layer, the proportions decide. Where C = H = W neither is possible, and the model is run once
    more on images of another shape.

    A grid needs evidence: its size is passed along with the tokens, or it is the size of the patch embedding, of a map
    that the model has made before, or of a map half as large. If a module that can hold a block makes that map, it
    publishes the size in each forward, and images of any size work.
    """

    model: nn.Module
    image: tuple[int, int]
    """(H, W) of the images."""
    modules: dict[str, nn.Module]
    """All recorded modules by path."""
    run: ForwardRun
    hosts: Container[str]
    """Paths of the modules that can hold a block."""
    models: tuple[str, ...] = ("",)
    """Paths of the timm models in the whole."""
    votes: dict[tuple[int, ...], Counter[Layout]] = field(default_factory=dict)
    """For each shape without batch, how many layers require which layout."""
    grids: dict[tuple[int, int], None] = field(default_factory=dict)
    """Sizes of maps in raster order, the likeliest first."""
    sources: list[tuple[int, str, tuple[int, int], Layout]] = field(default_factory=list)
    """Modules that make maps, in order of execution, with the size and layout of what they return."""
    grid_arguments: dict[str, list[GridArgument]] = field(default_factory=dict)
    """Sizes among the arguments of each module, computed at first use."""
    tokens: tuple[int, ...] = ()
    """The number of tokens in each token parameter; pit has one parameter for its class and distillation tokens."""
    layouts_by_id: dict[int, set[Layout]] = field(default_factory=dict)
    """The layouts that the layers around one tensor object require, by its id."""

    def __post_init__(self) -> None:
        learned = [(name.rpartition(".")[2], tensor) for name, tensor in self.model.named_parameters()]
        self.tokens = tuple(t.shape[1] for name, t in learned if "token" in name and t.ndim == 3 and t.shape[0] == 1)
        for path, module in self.modules.items():
            vote = _vote(module)
            if vote is not None and path in self.run.outputs:
                for value in (*self.run.inputs[path][0], self.run.outputs[path]):
                    if isinstance(value, torch.Tensor) and value.ndim == 4 and value.numel():
                        self.layouts_by_id.setdefault(id(value), set()).add(vote)
                        self.votes.setdefault(tuple(value.shape[1:]), Counter())[vote] += 1
        embeddings = dict.fromkeys(self._embedding(self.modules[path]) for path in self.models)
        for embedding in embeddings:
            # an embedding that accepts images of any size has no fixed grid
            strict = getattr(embedding, "strict_img_size", True)
            if strict:
                self.grids |= dict.fromkeys(self._fixed_grids(embedding))
            if not strict or not hasattr(embedding, "grid_size"):
                self.sources = self.sources or sorted(self._sources())

    def _embedding(self, model: nn.Module) -> nn.Module | None:
        candidates = [child for _, child in model.named_children() if getattr(child, "grid_size", None) is not None]
        embedding: nn.Module | None = getattr(model, "patch_embed", candidates[0] if candidates else None)
        return embedding

    def _fixed_grids(self, embedding: nn.Module | None) -> Iterator[tuple[int, int]]:
        size = getattr(embedding, "grid_size", None)
        if size is not None:
            yield int(size[0]), int(size[1])
        outputs = (tensor for versioned in self.run.output_tensors.values() for tensor, _ in versioned)
        maps = [tensor for tensor in outputs if tensor.ndim == 4 and tensor.numel()]
        shapes = dict.fromkeys(tuple(map(int, tensor.shape[1:])) for tensor in maps)
        sizes = []
        for shape in shapes:
            height, width = shape[1:] if self.layout(shape) == "NCHW" else shape[:2]
            if height * width > 1 and self._proportional(height, width):
                sizes.append((height, width))
        yield from sizes
        for height, width in sizes:
            for _ in range(4):
                height, width = math.ceil(height / 2), math.ceil(width / 2)
                yield height, width

    def _sources(self) -> Iterator[tuple[int, str, tuple[int, int], Layout]]:
        for path, output in self.run.outputs.items():
            module = self.modules[path]
            cuttable = path in self.hosts and any(module.children()) and not isinstance(module, LOOPS)
            if cuttable and self.run.once(path) and map_shape(output) and output.ndim == 4:
                shape = tuple(map(int, output.shape[1:]))
                layout = self.layout_at(shape, path)
                height, width = shape[1:] if layout == "NCHW" else shape[:2]
                if layout and height * width > 1 and self._proportional(height, width):
                    yield self.run.order[path], path, (height, width), layout

    def layout_at(
        self, shape: tuple[int, ...], owner: str, node: str | None = None, element: int | None = None
    ) -> Layout | None:
        """The layout of one tensor: of a node in the forward of `owner`, or of what it returns.

        The shape alone is sufficient unless it has the proportions of the image in both layouts.

        Args:
            shape: the shape of the tensor without batch.
            owner: path of the module.
            node: name of the fx node; None for what the owner returns.
            element: index of the tensor, where the owner returns several.

        Returns:
            The layout; None if it cannot be determined.
        """
        if len(shape) != 3 or not (self._proportional(*shape[1:]) and self._proportional(*shape[:2])):
            return self.layout(shape)
        return self._resized.layout(shape, owner, node, element) or self._by_layers(owner, node, element)

    @cached_property
    def _resized(self) -> ResizedForward:
        images = next(value for value in tensors(self.run.inputs[""][0]) if value.ndim == 4)
        channels, height, width = map(int, images.shape[1:])
        return ResizedForward(self.model, (channels, height, width), self.modules)

    def _by_layers(self, owner: str, node: str | None, element: int | None) -> Layout | None:
        """The layout that the layers before and after this tensor object require, if they agree."""
        layouts: set[Layout] = set()
        value: Any = None
        if node is None:
            value = self.run.outputs[owner]
            value = value if element is None else value[element]
        else:
            graph = trace_owner(self.modules[owner])
            match = next((n for n in graph.nodes if n.name == node), None) if graph is not None else None
            if match is None:
                return None
            if match.op == "call_module":
                value = self.run.outputs.get(f"{owner}.{match.target}")
            for user in match.users:
                vote = _vote(self.modules[owner].get_submodule(str(user.target))) if user.op == "call_module" else None
                layouts |= {vote} if vote else set()
        layouts |= self.layouts_by_id.get(id(value), set())
        return layouts.pop() if len(layouts) == 1 else None

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """The most likely layout of tensors of this shape without batch."""
        if len(shape) == 3 and shape in self.votes:
            (first, count), *runners_up = self.votes[shape].most_common()
            if not runners_up or runners_up[0][1] < count:
                return first
        return guess_layout(shape, self.image, nearest_attribute(self.modules, self.models[0], "output_fmt") == "NHWC")

    def detect(
        self, shape: tuple[int, ...], owner: str, order: float, node: str | None = None, element: int | None = None
    ) -> DetectedLayout:
        """Layout, prefix tokens and grid of a tensor; the arguments are those of `layout_at`.

        Args:
            order: the tensor's position in the order of execution.
        """
        certain = self.layout_at(shape, owner, node, element)
        layout = certain or self.layout(shape)
        if layout != "NLC":
            sides = shape[1:] if layout == "NCHW" else shape[:2]
            refused = "" if certain else _AMBIGUOUS.format(*shape)
            return DetectedLayout(layout, ordered=self._proportional(*sides), refused=refused)
        declared = nearest_attribute(self.modules, owner, "num_prefix_tokens")
        hint = int(declared or 0)
        reordered = nearest_attribute(self.modules, owner, "unroll") is not None
        for prefix in dict.fromkeys((0, hint, *self.tokens, 1, *self._sums())):
            count = shape[0] - prefix
            matches = [argument for argument in self._grid_arguments(owner) if math.prod(argument[0]) == count]
            if matches and not reordered:
                return DetectedLayout(layout, prefix, *matches[0])
            for source_order, path, grid, source_layout in () if reordered else reversed(self.sources):
                is_earlier = source_order < order and not f"{owner}.".startswith(f"{path}.")
                if is_earlier and math.prod(grid) == count:
                    return DetectedLayout(layout, prefix, grid, grid_source=path, source_layout=source_layout)
            for grid in () if reordered else self.grids:
                if math.prod(grid) == count:
                    return DetectedLayout(layout, prefix, grid)
        patches = getattr(nearest_attribute(self.modules, owner, "patch_embed"), "num_patches", None)
        unknown = declared is None and bool(self.tokens)
        return DetectedLayout(
            layout,
            hint if patches != shape[0] > hint else 0,
            ordered=False,
            refused=_UNKNOWN_PREFIX.format(shape[0]) if unknown else "",
        )

    def _sums(self) -> tuple[int, ...]:
        """Possible numbers of prefix tokens if several parameters hold them, such as class and register tokens."""
        return tuple(sum(subset) for count in range(2, 5) for subset in combinations(self.tokens[:6], count))

    def _grid_arguments(self, owner: str) -> list[GridArgument]:
        if owner not in self.grid_arguments:
            self.grid_arguments[owner] = list(self._find_grid_arguments(owner))
        return self.grid_arguments[owner]

    def _find_grid_arguments(self, owner: str) -> Iterator[GridArgument]:
        """Sizes among the arguments of a module: a pair of integers, or the only two integers."""
        args, kwargs = self.run.inputs[owner]
        try:
            bound = inspect.signature(self.modules[owner].forward).bind(*args, **kwargs).arguments
        except (TypeError, KeyError):
            return
        numbers: list[tuple[str, int]] = []
        for name, value in bound.items():
            if isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(side, int) for side in value):
                yield (value[0], value[1]), (name,)
            if isinstance(value, int) and not isinstance(value, bool):
                numbers.append((name, value))
        if len(numbers) == 2:
            (height, h), (width, w) = numbers
            yield (h, w), (height, width)

    def _proportional(self, height: int, width: int) -> bool:
        """True if height and width are those of the image, divided by the same stride and rounded."""
        stride = max(self.image[0] / height, self.image[1] / width)
        return abs(self.image[0] / stride - height) <= 1 and abs(self.image[1] / stride - width) <= 1


_AMBIGUOUS = (
    "its sizes {} x {} x {} do not distinguish channels from height and width, and the model takes no images of "
    "another shape, which would; use images of another size, or another site"
)
_UNKNOWN_PREFIX = (
    "of its {} positions it is not known how many are class or register tokens, which a block does not change: no "
    "module around it has num_prefix_tokens. Set that number as an attribute of the module that adds the tokens"
)


def _vote(module: nn.Module) -> Layout | None:
    """The layout of 4-d tensors that a layer requires, if any."""
    if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.GroupNorm)):
        return "NCHW"
    if isinstance(module, nn.Linear):
        return "NHWC"
    if isinstance(module, nn.LayerNorm):  # timm's LayerNorm2d permutes before and after
        return "NCHW" if "2d" in type(module).__name__ else "NHWC"
    return None
