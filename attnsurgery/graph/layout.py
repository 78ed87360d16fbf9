"""How a Site's tensor becomes the (B, C, H, W) that blocks take, and how it comes back.

    NCHW   (B, C, H, W)   as it is
    NHWC   (B, H, W, C)   permuted; a channels-last view
    NLC    (B, N, C)      a map of N x 1, or of H x W where the block needs the grid; prefix tokens are cut off before
                          and put back after

The way there and back is a list of tensor methods, or one function of this file, so that the same table serves torch.fx
graphs and generated text. None of them copies data.
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
from timm.layers import register_notrace_function
from torch import fx, nn

from attnsurgery.errors import SurgeryError
from attnsurgery.graph.elsewhere import Elsewhere
from attnsurgery.graph.record import LOOPS, Run, map_shape, tensors
from attnsurgery.graph.site import Layout
from attnsurgery.graph.trace import trace_owner
from attnsurgery.graph.within import said_above

Told = tuple[tuple[int, int], tuple[str, ...]]
"""A (height, width) with the names of the arguments that say it."""
Steps = tuple[tuple[str, tuple[int, ...]], ...]

TO_NCHW: dict[Layout, Steps] = {
    "NCHW": (),
    "NHWC": (("permute", (0, 3, 1, 2)),),
    "NLC": (("transpose", (1, 2)), ("unsqueeze", (3,))),
}
FROM_NCHW: dict[Layout, Steps] = {
    "NCHW": (),
    "NHWC": (("permute", (0, 2, 3, 1)),),
    "NLC": (("squeeze", (3,)), ("transpose", (1, 2))),
}


def tokens_to_map(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, H * W, C) to (B, C, H, W), a channels-last view."""
    return _tokens_to_map(tokens, height, width)


def _tokens_to_map(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    if tokens.shape[1] != height * width:
        raise SurgeryError(
            f"a block was put on a grid of {height}x{width}, and there are {tokens.shape[1]} tokens: the size of the "
            "images has changed since. Build the model at that size, by its name or recipe."
        )
    return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], height, width)


register_notrace_function(tokens_to_map)
fx.wrap("_tokens_to_map")  # any symbolic trace keeps it as one call, for it asks how many tokens there are


def map_to_tokens(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) to (B, H * W, C)."""
    return x.flatten(2).transpose(1, 2)


class Grid:
    """Height and width of the map of this forward, told by the module that makes it to those that see its tokens."""

    def __init__(self, height: int, width: int) -> None:
        self.height = height
        self.width = width


def guess_layout(shape: tuple[int, ...], image: tuple[int, int], channels_last: bool) -> Layout:
    """The layout of a tensor without batch, from its shape and the (H, W) of the image it was made of.

    A map keeps the proportions of the image, and channels know nothing of them: of the two ways to read three sizes,
    the one that shrinks height and width alike is right. `channels_last` decides where both do; that is no more than a
    guess, see `Reader.layout_at`.
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
class Reading:
    """What a tensor is: see the fields of Site."""

    layout: Layout
    prefix_tokens: int = 0
    grid: tuple[int, int] | None = None
    grid_names: tuple[str, ...] = ()
    grid_source: str = ""
    source_layout: Layout = "NCHW"
    ordered: bool = True
    refused: str = ""


@dataclass
class Reader:
    """Tells layouts, prefix tokens and grids in one recorded model.

    A layout is what the layers say that take such a tensor or give it: a convolution has channels first, a Linear last.
    Where none does, proportions decide. Where C = H = W neither can, and the model is run once more, on images of
    another shape. A grid needs evidence, too: the size is passed along with the tokens; or it is that of the patch
    embedding; or of a map the model has made on the way, or a map half as large. Where a module that can be cut makes
    that map, it is asked in each forward, and images of any size go.
    """

    model: nn.Module
    image: tuple[int, int]
    modules: dict[str, nn.Module]
    run: Run
    hosts: Container[str]
    """Paths of the modules that can be cut."""
    models: tuple[str, ...] = ("",)
    """Paths of the models that the whole is made of: what one says of its tokens holds for its modules."""
    votes: dict[tuple[int, ...], Counter[Layout]] = field(default_factory=dict)
    grids: dict[tuple[int, int], None] = field(default_factory=dict)
    """Sizes of maps in raster order, the likeliest first."""
    sources: list[tuple[int, str, tuple[int, int], Layout]] = field(default_factory=list)
    """Modules that make maps, in order of execution, with the size and layout of what they return."""
    told: dict[str, list[Told]] = field(default_factory=dict)
    tokens: tuple[int, ...] = ()
    """How many tokens each parameter called so holds: pit's class and distillation tokens are one."""
    said: dict[int, set[Layout]] = field(default_factory=dict)
    """What the layers say that take or give one very tensor, by its id."""

    def __post_init__(self) -> None:
        learned = [(name.rpartition(".")[2], tensor) for name, tensor in self.model.named_parameters()]
        self.tokens = tuple(t.shape[1] for name, t in learned if "token" in name and t.ndim == 3 and t.shape[0] == 1)
        for path, module in self.modules.items():
            vote = _vote(module)
            if vote is not None and path in self.run.outputs:
                for value in (*self.run.inputs[path][0], self.run.outputs[path]):
                    if isinstance(value, torch.Tensor) and value.ndim == 4 and value.numel():
                        self.said.setdefault(id(value), set()).add(vote)
                        self.votes.setdefault(tuple(value.shape[1:]), Counter())[vote] += 1
        embeddings = dict.fromkeys(self._embedding(self.modules[path]) for path in self.models)
        for embedding in embeddings:
            # one that accepts images of any size has no grid of its own
            strict = getattr(embedding, "strict_img_size", True)
            if strict:
                self.grids |= dict.fromkeys(self._fixed_grids(embedding))
            if not strict or not hasattr(embedding, "grid_size"):
                self.sources = self.sources or sorted(self._sources())

    def _embedding(self, model: nn.Module) -> nn.Module | None:
        named = [child for _, child in model.named_children() if getattr(child, "grid_size", None) is not None]
        found: nn.Module | None = getattr(model, "patch_embed", named[0] if named else None)
        return found

    def _fixed_grids(self, embedding: nn.Module | None) -> Iterator[tuple[int, int]]:
        size = getattr(embedding, "grid_size", None)
        if size is not None:
            yield int(size[0]), int(size[1])
        maps = [t for found in self.run.returned.values() for t, _ in found if t.ndim == 4 and t.numel()]
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
                    yield self.run.finished[path], path, (height, width), layout

    def layout_at(
        self, shape: tuple[int, ...], owner: str, node: str | None = None, element: int | None = None
    ) -> Layout | None:
        """The layout of one tensor: a node in the forward of `owner`, or what it returns. None where nothing tells.

        The shape alone does as long as one reading of it has the proportions of the image, and the other has not.
        """
        if len(shape) != 3 or not (self._proportional(*shape[1:]) and self._proportional(*shape[:2])):
            return self.layout(shape)
        return self._elsewhere.layout(shape, owner, node, element) or self._by_layers(owner, node, element)

    @cached_property
    def _elsewhere(self) -> Elsewhere:
        images = next(value for value in tensors(self.run.inputs[""][0]) if value.ndim == 4)
        channels, height, width = map(int, images.shape[1:])
        return Elsewhere(self.model, (channels, height, width), self.modules)

    def _by_layers(self, owner: str, node: str | None, element: int | None) -> Layout | None:
        """What the layers say that give or take this very tensor, if they agree."""
        said: set[Layout] = set()
        value: Any = None
        if node is None:
            value = self.run.outputs[owner]
            value = value if element is None else value[element]
        else:
            graph = trace_owner(self.modules[owner])
            found = next((n for n in graph.nodes if n.name == node), None) if graph is not None else None
            if found is None:
                return None
            if found.op == "call_module":
                value = self.run.outputs.get(f"{owner}.{found.target}")
            for user in found.users:
                vote = _vote(self.modules[owner].get_submodule(str(user.target))) if user.op == "call_module" else None
                said |= {vote} if vote else set()
        said |= self.said.get(id(value), set())
        return said.pop() if len(said) == 1 else None

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """The layout of tensors of this shape without batch, as far as their shape tells it."""
        if len(shape) == 3 and shape in self.votes:
            (first, most), *others = self.votes[shape].most_common()
            if not others or others[0][1] < most:
                return first
        return guess_layout(shape, self.image, said_above(self.modules, self.models[0], "output_fmt") == "NHWC")

    def read(
        self, shape: tuple[int, ...], owner: str, order: float, node: str | None = None, element: int | None = None
    ) -> Reading:
        """What a tensor of this shape without batch is: a node in the forward of `owner`, or what it returns."""
        known = self.layout_at(shape, owner, node, element)
        layout = known or self.layout(shape)
        if layout != "NLC":
            sides = shape[1:] if layout == "NCHW" else shape[:2]
            return Reading(layout, ordered=self._proportional(*sides), refused="" if known else _UNTOLD.format(*shape))
        said = said_above(self.modules, owner, "num_prefix_tokens")
        hint = int(said or 0)
        reordered = said_above(self.modules, owner, "unroll") is not None
        for prefix in dict.fromkeys((0, hint, *self.tokens, 1, *self._sums())):
            told = [found for found in self._told_to(owner) if math.prod(found[0]) == shape[0] - prefix]
            if told and not reordered:
                return Reading(layout, prefix, *told[0])
            for when, path, grid, form in () if reordered else reversed(self.sources):
                if when < order and math.prod(grid) == shape[0] - prefix and not f"{owner}.".startswith(f"{path}."):
                    return Reading(layout, prefix, grid, grid_source=path, source_layout=form)
            for grid in () if reordered else self.grids:
                if math.prod(grid) == shape[0] - prefix:
                    return Reading(layout, prefix, grid)
        patches = getattr(said_above(self.modules, owner, "patch_embed"), "num_patches", None)
        unknown = said is None and bool(self.tokens)
        return Reading(
            layout,
            hint if patches != shape[0] > hint else 0,
            ordered=False,
            refused=f"of its {shape[0]} positions it is not known how many are class or register tokens, which a block "
            "leaves alone: no module around it has num_prefix_tokens. Set that number as an attribute of the module "
            "that adds the tokens"
            if unknown
            else "",
        )

    def _sums(self) -> tuple[int, ...]:
        """How many prefix tokens there may be where several parameters hold them: class and register tokens."""
        return tuple(sum(some) for count in range(2, 5) for some in combinations(self.tokens[:6], count))

    def _told_to(self, owner: str) -> list[Told]:
        if owner not in self.told:
            self.told[owner] = list(self._told(owner))
        return self.told[owner]

    def _told(self, owner: str) -> Iterator[Told]:
        """Sizes among the arguments of a module: a pair, or two numbers in a row."""
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
        """True if height and width are those of the image, divided by one stride and rounded."""
        stride = max(self.image[0] / height, self.image[1] / width)
        return abs(self.image[0] / stride - height) <= 1 and abs(self.image[1] / stride - width) <= 1


_UNTOLD = (
    "its sizes {} x {} x {} do not tell the channels from height and width, and the model takes no images of another "
    "shape, which would tell; use images of another size, or another place"
)


def _vote(module: nn.Module) -> Layout | None:
    if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.GroupNorm)):
        return "NCHW"
    if isinstance(module, nn.Linear):
        return "NHWC"
    if isinstance(module, nn.LayerNorm):  # timm's LayerNorm2d permutes before and after
        return "NCHW" if "2d" in type(module).__name__ else "NHWC"
    return None
