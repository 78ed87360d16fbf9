"""Run a model on images of another shape, to distinguish height and width from channels where the sizes are equal."""

from __future__ import annotations

import inspect
from collections.abc import Container
from functools import cached_property

from torch import nn

from attnsurgery.graph.forward_run import ForwardRun, map_shape, record_forward
from attnsurgery.graph.inside import replayed_shapes
from attnsurgery.graph.site import Layout
from attnsurgery.graph.trace import trace_owner
from attnsurgery.graph.twin import meta_twin


class ResizedForward:
    """A second forward of a twin without weights, on images twice as high or twice as wide, run at first use.

    Args:
        twin: the model without weights, recorded before; it is copied and not changed.
        size: (C, H, W) of the images of the first forward.
        paths: paths of the recorded modules.
    """

    def __init__(self, twin: nn.Module, size: tuple[int, int, int], paths: Container[str]) -> None:
        self._twin = twin
        self._size = size
        self._paths = paths
        self._inside: dict[str, dict[str, tuple[int, ...] | None]] = {}
        self._side = 0
        """The side of the images that is doubled: 0 is the height, 1 the width."""

    def layout(self, shape: tuple[int, ...], owner: str, node: str | None, element: int | None) -> Layout | None:
        """The layout of a tensor of this shape (without batch) in the first forward, by the side that has grown.

        Args:
            shape: the shape of the tensor in the first forward.
            owner: path of the module that returns the tensor or whose forward computes it.
            node: name of the fx node in the owner's forward; None for what the owner returns.
            element: index of the tensor, where the owner returns several.

        Returns:
            The layout; None if the model does not run on such images, or if not exactly one side has grown.
        """
        resized = self._shape(owner, node, element)
        if resized is None or len(resized) != len(shape):
            return None
        grown = [axis for axis, side in enumerate(shape) if resized[axis] != side]
        readings: dict[int, Layout] = {1 + self._side: "NCHW", self._side: "NHWC"}
        return readings.get(grown[0]) if len(grown) == 1 else None

    def _shape(self, owner: str, node: str | None, element: int | None) -> tuple[int, ...] | None:
        """The shape, without batch, of the same tensor in the second forward."""
        if self._run is None or owner not in self._run.outputs:
            return None
        if node is None:
            output = self._run.outputs[owner]
            return map_shape(output if element is None else output[element])
        if owner not in self._inside:
            module = self._copy.get_submodule(owner)
            graph = trace_owner(module)
            shapes = {} if graph is None else replayed_shapes(owner, module, graph, self._run)
            self._inside[owner] = {value.name: shape for value, shape in shapes.items()}
        return self._inside[owner].get(node)

    @cached_property
    def _run(self) -> ForwardRun | None:
        channels, height, width = self._size
        for self._side, size in enumerate(((channels, 2 * height, width), (channels, height, 2 * width))):
            for resized in (False, True):
                self._copy = meta_twin(self._twin)
                try:
                    if resized:
                        _resize(self._copy, size[1:])
                    watched = {path: module for path, module in self._copy.named_modules() if path in self._paths}
                    return record_forward(self._copy, watched, size)
                except Exception:  # a model may raise anything on an unsupported size
                    continue
        return None


def _resize(model: nn.Module, size: tuple[int, int]) -> None:
    """Adapt a model with windows or position embeddings to images of (height, width)."""
    for part in model.modules():
        of_class = getattr(
            type(part), "set_input_size", None
        )  # surgery may have set a method on the instance that surveys the model
        if of_class is not None:
            of_class(part, **{next(name for name in inspect.signature(of_class).parameters if name != "self"): size})
            return
