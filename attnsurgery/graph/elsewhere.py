"""The same model on images of another shape: it tells height and width from channels where all three are alike."""

from __future__ import annotations

import inspect
from collections.abc import Container
from functools import cached_property

from torch import nn

from attnsurgery.graph.inside import replayed_shapes
from attnsurgery.graph.record import Run, map_shape, record
from attnsurgery.graph.site import Layout
from attnsurgery.graph.trace import trace_owner
from attnsurgery.graph.twin import meta_twin


class Elsewhere:
    """One more forward of a weightless twin, on images twice as high or twice as wide, made when somebody asks.

    Args:
        twin: the model without weights, recorded before; it is copied and left as it is.
        size: (C, H, W) of the images that it was recorded with.
        paths: of the modules that were watched.
    """

    def __init__(self, twin: nn.Module, size: tuple[int, int, int], paths: Container[str]) -> None:
        self._twin = twin
        self._size = size
        self._paths = paths
        self._inside: dict[str, dict[str, tuple[int, ...] | None]] = {}
        self._side = 0
        """Which side of the images was doubled: the height, 0, or the width, 1."""

    def layout(self, shape: tuple[int, ...], owner: str, node: str | None, element: int | None) -> Layout | None:
        """The layout of a tensor that had this shape without batch, by the side that has grown with the images.

        None where the model takes no such images, or where not exactly one side has grown.
        """
        other = self._shape(owner, node, element)
        if other is None or len(other) != len(shape):
            return None
        grown = [place for place, side in enumerate(shape) if other[place] != side]
        readings: dict[int, Layout] = {1 + self._side: "NCHW", self._side: "NHWC"}
        return readings.get(grown[0]) if len(grown) == 1 else None

    def _shape(self, owner: str, node: str | None, element: int | None) -> tuple[int, ...] | None:
        """Of what a module returns or a node of its forward gives, without batch."""
        if self._run is None or owner not in self._run.outputs:
            return None
        if node is None:
            output = self._run.outputs[owner]
            return map_shape(output if element is None else output[element])
        if owner not in self._inside:
            module = self._copy.get_submodule(owner)
            graph = trace_owner(module)
            shapes = {} if graph is None else replayed_shapes(owner, module, graph, self._run)
            self._inside[owner] = {found.name: shape for found, shape in shapes.items()}
        return self._inside[owner].get(node)

    @cached_property
    def _run(self) -> Run | None:
        channels, height, width = self._size
        for self._side, size in enumerate(((channels, 2 * height, width), (channels, height, 2 * width))):
            for resized in (False, True):
                self._copy = meta_twin(self._twin)
                try:
                    if resized:
                        _resize(self._copy, size[1:])
                    watched = {path: module for path, module in self._copy.named_modules() if path in self._paths}
                    return record(self._copy, watched, size)
                except Exception:  # whatever a model raises on a size that it was not made for
                    continue
        return None


def _resize(model: nn.Module, size: tuple[int, int]) -> None:
    """Make a model that has windows or embeddings of its own one for images of (height, width)."""
    for part in model.modules():
        of_class = getattr(type(part), "set_input_size", None)  # an instance may hold one that surveys the model
        if of_class is not None:
            of_class(part, **{next(name for name in inspect.signature(of_class).parameters if name != "self"): size})
            return
