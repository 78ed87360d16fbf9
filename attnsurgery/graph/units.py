"""A model's blocks and stages, read off one recorded forward.

timm's models are rows of blocks, but no two families write the rows alike: a Sequential, a ModuleList that the root
loops over, a stage module that runs a downsampling and then its blocks. What they share is the flow of data, so that
decides:

* a *row* hands its input through its children one after the other and returns what the last one returned: containers
  do, and stage modules whose blocks are in one;
* a *block* is what stands in a row and is none itself; a stage that does more than run its blocks (cross-stage
  networks, the branches of HRNet) still has them inside, and those count;
* what holds a single weight among richer blocks (stems, downsampling, position encodings) is none.
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

from attnsurgery.graph.record import LOOPS, NORMS, Run, map_shape, same_data, tensors
from attnsurgery.graph.trace import uncut_class
from attnsurgery.graph.within import feature_infos, feature_modules


def is_container(module: nn.Module) -> bool:
    """True for what only holds modules: it runs them in order, or leaves that to others."""
    return isinstance(module, LOOPS) and type(module).forward in [loop.forward for loop in LOOPS]


def runs_in_a_row(path: str, module: nn.Module, run: Run) -> bool:
    """True for regnet's RegStage and its like: no Sequential, but its forward loops over its children."""
    children = list(module.named_children())
    if isinstance(module, LOOPS) or not children or not _loops(uncut_class(module)):
        return False
    return run.outputs.get(path) is not None and run.outputs[path] is run.outputs.get(f"{path}.{children[-1][0]}")


@cache
def _loops(cls: Any) -> bool:
    return re.search(r"\.(children|named_children|modules)\(\)", _source(cls)) is not None


@cache
def adds(cls: Any) -> bool:
    """False if a forward cannot hold a residual addition, because its source has none; that saves a trace."""
    return re.search(r"\+|\badd_?\(", _source(cls) or "+") is not None


def _source(cls: Any) -> str:
    try:
        return inspect.getsource(cls.forward)
    except (OSError, TypeError):
        return ""


class Rows:
    """Which modules of a recorded model are rows, and which are blocks.

    Args:
        modules: by path; the root under the empty path.
        run: the recorded forward of the same.
        models: paths of the models whose blocks are meant; the root, or what a larger whole holds.
    """

    def __init__(self, modules: dict[str, nn.Module], run: Run, models: tuple[str, ...] = ("",)) -> None:
        self._modules = modules
        self._run = run
        self._models = models
        self._known: dict[str, bool] = {}
        self._within: dict[str, list[str]] = {}
        for path in modules:
            if path:
                self._within.setdefault(path.rpartition(".")[0], []).append(path)
        self._not_rows: set[Any] = set()
        # one of a class that is no row decides for all: without its shortcut, a residual block looks like one
        classes = {uncut_class(module) for path, module in modules.items() if run.once(path) and not self.is_row(path)}
        self._not_rows = {cls for cls in classes if not issubclass(cls, LOOPS)}

    def units(self) -> dict[str, None]:
        """Paths of the blocks, in order of execution."""
        found: list[str] = []
        for model in self._models:
            below = list(self._visit(model))
            # the model's own children are blocks only where no row holds any
            found += [path for path in below if path.rpartition(".")[0] != model] or below
        deep = [inner for path in found for inner in (list(self._inside(path)) or [path])]
        return dict.fromkeys(sorted(deep, key=lambda path: self._run.finished[path]))

    def weights(self, path: str) -> int:
        """How many weight tensors there are in a module: biases, norms and scales not counted."""
        parameters = self._modules[path].parameters()
        return sum(parameter.ndim > 1 and parameter.numel() > max(parameter.shape) for parameter in parameters)

    def last_child(self, path: str) -> str:
        """The path of the child that returned last."""
        return self._kids(path)[-1]

    def is_row(self, path: str) -> bool:
        if path not in self._known:
            module = self._modules[path]
            loops = path in self._models or is_container(module) or runs_in_a_row(path, module, self._run)
            self._known[path] = loops or self._relays(path)
        return self._known[path] and uncut_class(self._modules[path]) not in self._not_rows

    def _visit(self, path: str) -> Iterator[str]:
        kids = self._kids(path)
        if (
            path not in self._models
            and not isinstance(self._modules[path], LOOPS)
            and not _loops(uncut_class(self._modules[path]))
        ):
            # in a stage, what stands alone beside its row of blocks is not one of them
            kids = [kid for kid in kids if kid.rpartition(".")[0] != path or is_container(self._modules[kid])]
        for kid in kids:
            if self.is_row(kid):
                yield from self._visit(kid)
            elif self._could_be(kid):
                yield kid

    def _inside(self, path: str) -> Iterator[str]:
        """Residual blocks that stand in rows inside a block."""
        for kid in self._within.get(path, ()):
            if is_container(self._modules[kid]):
                inner = [unit for unit in self._visit(kid) if adds(uncut_class(self._modules[unit]))]
                yield from (unit for unit in inner if self._single(unit))

    def _single(self, path: str) -> bool:
        """True if a module takes a tensor and gives one of the same form, as a residual block does."""
        args, _ = self._run.inputs[path]
        shape = map_shape(self._run.outputs[path])
        return bool(args) and shape is not None and len(shape) == len(map_shape(args[0]) or ())

    def _kids(self, path: str) -> list[str]:
        """The children that ran, in that order; a list that nobody calls stands for what it holds."""
        found = []
        for kid in self._within.get(path, ()):
            if self._run.calls.get(kid):
                found.append(kid)
            elif isinstance(self._modules[kid], LOOPS):
                found += self._kids(kid)
        return sorted(found, key=lambda kid: self._run.finished[kid])

    def _could_be(self, path: str) -> bool:
        module = self._modules[path]
        return (
            any(module.children())
            and not isinstance(module, NORMS)
            and self._run.once(path)
            and any(_is_map(tensor) for tensor in tensors(self._run.outputs[path]))
        )

    def _relays(self, path: str) -> bool:
        """True if the module passes its input through its children one by one, blocks in a container among them."""
        kids = self._kids(path)
        a_list = isinstance(self._modules[path], LOOPS)
        rows = [kid for kid in kids if a_list or kid.rpartition(".")[0] != path or is_container(self._modules[kid])]
        held = (inner for row in rows for inner in (row, *self._kids(row)))
        if not self._run.once(path) or not any(self._could_be(inner) for inner in held):
            return False
        handed = self._run.given[path]
        for kid in kids:
            if not self._run.once(kid) or not same_data(handed, self._run.given[kid][:1]):
                return False
            handed = self._run.returned[kid]
        operated = hasattr(type(self._modules[path]), "uncut_class")  # a block of ours may stand at its output
        return operated or same_data(handed, self._run.returned[path])


Staging = Callable[[float, float | None], int | None]
"""From an order of execution and the stride of a tensor to its stage; without a stride, only whether there is one."""


def staging(path: str, model: nn.Module, run: Run, image: tuple[int, int], units: dict[str, float]) -> Staging:
    """How stages are counted in this model.

    By timm's `feature_info`, if the modules that it names all run and have strides: a module belongs to the first entry
    that returns no earlier than it does, so that the stride-4 convolution in front of a stride-8 block counts as that
    block's. If not, by the stride of each tensor itself. Where the stride never changes, stages are the quarters of the
    depth.

    Args:
        path: where the model stands in the whole that was run; "" for the whole.
        units: the stride of what each of its blocks returns, by path.
    """
    named = feature_modules(path, model, run)
    known = sorted((run.finished[module], stride) for module, stride in named)
    depth = len(feature_infos(model))
    complete = bool(named) and len(named) == depth
    strides = {round(math.log2(max(stride, 1))) for stride in units.values()}
    isotropic = depth > 1 and len({_stage_of(stride) for _, stride in known}) == 1 if named else len(strides) == 1
    if not named and not isotropic:
        last = max((run.finished[path] for path in units), default=math.inf)
        return lambda order, stride: None if order > last else 0 if stride is None else _stage_of(stride)
    if isotropic and units:
        end = known[-1][0] if complete else math.inf  # behind the last feature, class attention is no part of the depth
        known = sorted((order, stride) for path, stride in units.items() if (order := run.finished[path]) <= end)
        # a feature extractor may have cut off the last blocks; the others are still where they were
        depth = max(len(known), depth if named and not complete else 0)
    stages = _stage_numbers([stride for _, stride in known], isotropic, depth)

    def stage_of(order: float, stride: float | None) -> int | None:
        for (last, reduction), stage in zip(known, stages, strict=True):
            # branches of several strides, side by side, run before the first feature is read off
            if order <= last and (stride is None or stride < 1.4 * reduction):
                return stage
        return None

    return stage_of


def _stage_of(stride: float) -> int:
    return max(0, round(math.log2(max(stride, 1))) - 1)


def _stage_numbers(reductions: list[float], isotropic: bool, depth: int) -> list[int]:
    """log2 of the stride less 1, or quarters of the depth; a stage that `output_stride` leaves at the stride before it
    still counts."""
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
