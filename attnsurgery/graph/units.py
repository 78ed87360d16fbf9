"""Find a model's blocks and stages from one recorded forward.

timm's models are rows of blocks, but each family writes the rows in its own way: a Sequential, a ModuleList that the
root loops over, a stage module that runs a downsampling and then its blocks. They share the flow of data, so that
decides:

* A *row* passes its input through its children one after the other and returns what the last one returned. Containers
  are rows, and so are stage modules whose blocks are in a container.
* A *block* is a module in a row that is not a row itself. A stage that does more than run its blocks (cross-stage
  networks, the branches of HRNet) has them inside, and those count.
* A module with a single weight among blocks with more (stems, downsampling, position encodings) is not a block.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import nn

from attnsurgery.graph.forward_run import LOOPS, NORMS, ForwardRun, map_shape, same_data, tensors
from attnsurgery.graph.submodels import feature_infos, feature_modules
from attnsurgery.graph.trace import uncut_class


def is_container(module: nn.Module) -> bool:
    """True for a module that only holds others: it runs them in order, or another module runs them."""
    return isinstance(module, LOOPS) and type(module).forward in [loop.forward for loop in LOOPS]


def runs_in_a_row(path: str, module: nn.Module, run: ForwardRun) -> bool:
    """True for a module such as regnet's RegStage: not a Sequential, but its forward loops over its children."""
    children = list(module.named_children())
    if isinstance(module, LOOPS) or not children or not _loops(uncut_class(module)):
        return False
    return run.outputs.get(path) is not None and run.outputs[path] is run.outputs.get(f"{path}.{children[-1][0]}")


@cache
def _loops(cls: Any) -> bool:
    return re.search(r"\.(children|named_children|modules)\(\)", _source(cls)) is not None


@cache
def adds(cls: Any) -> bool:
    """False if the source of the forward has no addition, so that no trace is needed to find residual branches."""
    return re.search(r"\+|\badd_?\(", _source(cls) or "+") is not None


def _source(cls: Any) -> str:
    try:
        return inspect.getsource(cls.forward)
    except (OSError, TypeError):
        return ""


class Rows:
    """Which modules of a recorded model are rows, and which are blocks.

    Args:
        modules: all modules by path; the root has the empty path.
        run: the recorded forward of the root.
        models: paths of the timm models whose blocks are searched; the root, or models inside it.
    """

    def __init__(self, modules: dict[str, nn.Module], run: ForwardRun, models: tuple[str, ...] = ("",)) -> None:
        self._modules = modules
        self._run = run
        self._models = models
        self._is_row: dict[str, bool] = {}
        self._children: dict[str, list[str]] = {}
        for path in modules:
            if path:
                self._children.setdefault(path.rpartition(".")[0], []).append(path)
        self._not_rows: set[Any] = set()
        # if one module of a class is no row, none is: a residual block without a shortcut looks like a row
        classes = {uncut_class(module) for path, module in modules.items() if run.once(path) and not self.is_row(path)}
        self._not_rows = {cls for cls in classes if not issubclass(cls, LOOPS)}

    def units(self) -> dict[str, None]:
        """Paths of the blocks, in order of execution."""
        paths: list[str] = []
        for model in self._models:
            below = list(self._visit(model))
            # the model's own children are blocks only where no row holds any
            paths += [path for path in below if path.rpartition(".")[0] != model] or below
        deep = [inner for path in paths for inner in (list(self._inside(path)) or [path])]
        return dict.fromkeys(sorted(deep, key=lambda path: self._run.order[path]))

    def weights(self, path: str) -> int:
        """The number of weight tensors in a module, without biases, norms and scales."""
        parameters = self._modules[path].parameters()
        return sum(parameter.ndim > 1 and parameter.numel() > max(parameter.shape) for parameter in parameters)

    def last_child(self, path: str) -> str:
        """The path of the child that returned last."""
        return self._executed_children(path)[-1]

    def is_row(self, path: str) -> bool:
        """True if the module is a row."""
        if path not in self._is_row:
            module = self._modules[path]
            loops = path in self._models or is_container(module) or runs_in_a_row(path, module, self._run)
            self._is_row[path] = loops or self._relays(path)
        return self._is_row[path] and uncut_class(self._modules[path]) not in self._not_rows

    def _visit(self, path: str) -> Iterator[str]:
        kids = self._executed_children(path)
        if (
            path not in self._models
            and not isinstance(self._modules[path], LOOPS)
            and not _loops(uncut_class(self._modules[path]))
        ):
            # in a stage, a module beside the container of its blocks is not a block
            kids = [kid for kid in kids if kid.rpartition(".")[0] != path or is_container(self._modules[kid])]
        for kid in kids:
            if self.is_row(kid):
                yield from self._visit(kid)
            elif self._is_block_like(kid):
                yield kid

    def _inside(self, path: str) -> Iterator[str]:
        """Residual blocks in the rows inside a block."""
        for kid in self._children.get(path, ()):
            if is_container(self._modules[kid]):
                inner = [unit for unit in self._visit(kid) if adds(uncut_class(self._modules[unit]))]
                yield from (unit for unit in inner if self._keeps_rank(unit))

    def _keeps_rank(self, path: str) -> bool:
        """True if a module maps a tensor to one of the same number of axes, as a residual block does."""
        args, _ = self._run.inputs[path]
        shape = map_shape(self._run.outputs[path])
        return bool(args) and shape is not None and len(shape) == len(map_shape(args[0]) or ())

    def _executed_children(self, path: str) -> list[str]:
        """The children that ran, in order of execution; a container that nobody calls counts as its children."""
        executed = []
        for kid in self._children.get(path, ()):
            if self._run.calls.get(kid):
                executed.append(kid)
            elif isinstance(self._modules[kid], LOOPS):
                executed += self._executed_children(kid)
        return sorted(executed, key=lambda kid: self._run.order[kid])

    def _is_block_like(self, path: str) -> bool:
        """True if the module could be a block: it has children, runs once and returns a map."""
        module = self._modules[path]
        return (
            any(module.children())
            and not isinstance(module, NORMS)
            and self._run.once(path)
            and any(_is_map(tensor) for tensor in tensors(self._run.outputs[path]))
        )

    def _relays(self, path: str) -> bool:
        """True if the module passes its input through its children one by one, and some are blocks in a container."""
        kids = self._executed_children(path)
        is_list = isinstance(self._modules[path], LOOPS)
        rows = [kid for kid in kids if is_list or kid.rpartition(".")[0] != path or is_container(self._modules[kid])]
        candidates = (inner for row in rows for inner in (row, *self._executed_children(row)))
        if not self._run.once(path) or not any(self._is_block_like(inner) for inner in candidates):
            return False
        current = self._run.input_tensors[path]
        for kid in kids:
            if not self._run.once(kid) or not same_data(current, self._run.input_tensors[kid][:1]):
                return False
            current = self._run.output_tensors[kid]
        operated = hasattr(type(self._modules[path]), "uncut_class")  # an inserted block may follow its output
        return operated or same_data(current, self._run.output_tensors[path])


Staging = Callable[[float, float | None], int | None]
"""Maps a position in the order of execution and the stride of a tensor to its stage; None is outside of all stages.

Without a stride, the result only says whether there is a stage."""


def staging(path: str, model: nn.Module, run: ForwardRun, image: tuple[int, int], units: dict[str, float]) -> Staging:
    """How stages are numbered in this model.

    If all modules of timm's `feature_info` run and have strides, a module belongs to the first of them that returns no
    earlier than it does; so the stride-4 convolution before a stride-8 block belongs to that block's stage. Otherwise
    the stride of each tensor decides. Where the stride never changes, stages are the quarters of the depth.

    Args:
        path: path of the model in the root that was run; "" for the root.
        model: the model.
        run: the recorded forward of the root.
        image: (H, W) of the images.
        units: the stride of the output of each of its blocks, by path.
    """
    features = feature_modules(path, model, run)
    ends = sorted((run.order[module], stride) for module, stride in features)
    depth = len(feature_infos(model))
    complete = bool(features) and len(features) == depth
    strides = {round(math.log2(max(stride, 1))) for stride in units.values()}
    isotropic = depth > 1 and len({_stage_of(stride) for _, stride in ends}) == 1 if features else len(strides) == 1
    if not features and not isotropic:
        last = max((run.order[path] for path in units), default=math.inf)
        return lambda order, stride: None if order > last else 0 if stride is None else _stage_of(stride)
    if isotropic and units:
        end = ends[-1][0] if complete else math.inf  # class attention after the last feature does not count as depth
        ends = sorted((order, stride) for path, stride in units.items() if (order := run.order[path]) <= end)
        # a feature extractor may have cut off the last blocks; the depth still counts them
        depth = max(len(ends), depth if features and not complete else 0)
    stages = _stage_numbers([stride for _, stride in ends], isotropic, depth)

    def stage_of(order: float, stride: float | None) -> int | None:
        for (last, reduction), stage in zip(ends, stages, strict=True):
            # parallel branches of several strides may run before the first feature returns
            if order <= last and (stride is None or stride < 1.4 * reduction):
                return stage
        return None

    return stage_of


def _stage_of(stride: float) -> int:
    return max(0, round(math.log2(max(stride, 1))) - 1)


def _stage_numbers(reductions: list[float], isotropic: bool, depth: int) -> list[int]:
    """The stage of each feature: log2 of the stride minus 1, or the quarter of the depth.

    A stage that keeps the stride of the one before it, because of `output_stride`, gets the next number.
    """
    if isotropic:
        return [1 + 4 * index // max(depth, len(reductions)) for index in range(len(reductions))]
    stages: list[int] = []
    for index, reduction in enumerate(reductions):
        stage = _stage_of(reduction)
        dilated = index > 0 and reduction == reductions[index - 1] and stage > 0
        stages.append(stages[-1] + 1 if dilated else max([stage, *stages[-1:]]))
    return stages


def _is_map(tensor: torch.Tensor) -> bool:
    """False for a class token by itself."""
    shape = map_shape(tensor)
    return shape is not None and (len(shape) == 3 or shape[0] > 1)
