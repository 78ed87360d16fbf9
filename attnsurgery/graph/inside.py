"""Sites inside one module's own forward: outputs of its children and operations, and the ends of its branches."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from attnsurgery.graph.attention import is_attention
from attnsurgery.graph.forward_run import ForwardRun, UnstagedSite, map_shape
from attnsurgery.graph.site import Role
from attnsurgery.graph.trace import ONE_AT_A_TIME

ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
DROPS = {"DropPath", "Dropout", "Identity", "DropBlock2d"}


Shapes = dict[fx.Node, tuple[int, ...] | None]
"""Shape without batch of each node's value; None where it is no tensor that a block could take."""


def inner_sites(
    path: str, owner: nn.Module, graph: fx.Graph, run: ForwardRun, cache: dict[Hashable, Shapes]
) -> Iterator[UnstagedSite]:
    """Every tensor of the graph that a block could take, in order.

    Args:
        path: path of the owner.
        owner: the module whose forward the graph is.
        graph: the traced forward.
        run: the recorded forward of the model.
        cache: results of replays, which are shared because most blocks of a stage have the same shapes.
    """
    key = _replay_key(path, owner, graph, run)
    if key not in cache:
        cache[key] = replayed_shapes(path, owner, graph, run)
    shapes = cache[key]
    additions = _residual_additions(owner, graph, shapes)
    ends = {addition.end for addition in additions.values()}
    spatial = _last_spatial(owner, graph, shapes)
    last_child = run.order[path] - 1.0
    listed: set[str] = set()
    total = len(graph.nodes) + 1
    for position, node in enumerate(graph.nodes):
        order = last_child + position / total
        address = f"{path}:{node.name}"
        if node.op == "call_module":
            last_child = float(run.order.get(f"{path}.{node.target}", last_child))
            order = last_child + position / total
            if node.target not in listed:
                address = f"{path}.{node.target}"
                listed.add(str(node.target))
        if node in additions:
            yield from _sides(path, node, additions[node], shapes, order)
        shape = shapes.get(node)
        if shape is None or node.op in ("placeholder", "output", "get_attr"):
            continue
        role: Role = "branch" if node in ends else "inner"
        attention = address if _is_attention(owner, graph, node, shapes) else ""
        yield UnstagedSite(order, address, path, node.name, shape, role, spatial=node is spatial, attention=attention)


def _is_attention(owner: nn.Module, graph: fx.Graph, node: fx.Node, shapes: Shapes) -> bool:
    """Whether the node is the only call of an attention module, which takes a tensor and returns one of its shape."""
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
        return False
    if not is_attention(owner.get_submodule(str(node.target))):
        return False
    calls = sum(other.op == "call_module" and other.target == node.target for other in graph.nodes)
    return calls == 1 and shapes.get(node.args[0]) == shapes.get(node)


def _sides(path: str, node: fx.Node, addition: Addition, shapes: Shapes, order: float) -> Iterator[UnstagedSite]:
    """The two sites of an addition that are one use of a tensor each: the input of the branch, and the shortcut.

    The shortcut is usually the same tensor as the branch input, and a block at one of them must not change the other.
    """
    sides: list[tuple[str, Role, fx.Node, tuple[str, ...]]] = [
        ("shortcut", "shortcut", addition.shortcut, (node.name,)),
    ]
    if addition.start is not None:
        sides.insert(0, ("input", "branch_input", addition.start, addition.readers))
    for index, (name, role, source, users) in enumerate(sides):
        shape = shapes.get(source)
        if shape is not None:
            before = order - (len(sides) - index) * 1e-6
            yield UnstagedSite(before, f"{path}:{node.name}.{name}", path, source.name, shape, role, users)


def _replay_key(path: str, owner: nn.Module, graph: fx.Graph, run: ForwardRun) -> Hashable:
    """What the shapes of a replay depend on: the graph, and sizes of inputs, parameters, buffers and child outputs."""
    children = [run.outputs.get(f"{path}.{name}") for name in _called(graph)]
    return graph, _sizes(run.inputs[path]), _sizes(owner._parameters), _sizes(owner._buffers), _sizes(children)


def _called(graph: fx.Graph) -> Iterator[str]:
    return (str(node.target) for node in graph.nodes if node.op == "call_module")


def _sizes(value: Any) -> Hashable:
    """The value with sizes in place of tensors; an object that is not plain data is represented by its id."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(map(_sizes, value))
    if isinstance(value, dict):
        return tuple((key, _sizes(entry)) for key, entry in value.items())
    return repr(value) if isinstance(value, (bool, int, float, str, type(None))) else id(value)


def replayed_shapes(path: str, owner: nn.Module, graph: fx.Graph, run: ForwardRun) -> Shapes:
    """Shapes of all values of the graph, which is replayed with the recorded outputs of the owner's children."""
    shapes: Shapes = {}

    class Replay(fx.Interpreter):
        def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
            return run.outputs[f"{path}.{target}"]

        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            shapes[n] = map_shape(value)
            return value

    args, kwargs = run.inputs[path]
    bound = inspect.signature(owner.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    symbolic = sum(node.op == "placeholder" for node in graph.nodes)
    try:
        with torch.no_grad(), ONE_AT_A_TIME:
            Replay(owner, graph=graph).run(*list(bound.arguments.values())[:symbolic])
    except Exception:  # an operation without meta support; the sites before it are still valid
        return shapes
    return shapes


class Addition(NamedTuple):
    """The two sides of a residual addition."""

    end: fx.Node
    """The last value of the branch, before dropout or stochastic depth."""
    shortcut: fx.Node
    """The value that the branch is added to."""
    start: fx.Node | None
    """The only value that the branch reads; None if it reads several."""
    readers: tuple[str, ...]
    """Names of the nodes of the branch that read it."""


def _residual_additions(owner: nn.Module, graph: fx.Graph, shapes: Shapes) -> dict[fx.Node, Addition]:
    """The additions that end a residual branch: the branch is the side with more module calls behind it.

    Dropout and stochastic depth at the end of the branch are skipped, so a block is put before them.
    """
    additions = {}
    ancestors: dict[fx.Node, set[fx.Node]] = {}
    for node in graph.nodes:
        sides = node.all_input_nodes
        ancestors[node] = {node}.union(*(ancestors[source] for source in sides))
        if node.target not in ADDITIONS or len(sides) != 2:
            continue
        if any(shapes.get(side) != shapes.get(node) for side in sides):
            continue
        lengths = [sum(n.op == "call_module" for n in ancestors[side]) for side in sides]
        joined = all(any(n.op == "placeholder" for n in ancestors[side]) for side in sides)
        if not joined or lengths[0] == lengths[1]:
            continue
        branch, shortcut = sides if lengths[0] > lengths[1] else reversed(sides)
        end = branch
        while end.op == "call_module" and len(end.users) == 1 and _drops(owner, end):
            end = end.all_input_nodes[0]
        if end.op in ("placeholder", "get_attr") or shapes.get(end) is None:
            continue
        branch_nodes = ancestors[branch] - ancestors[shortcut]
        # other arguments of the forward, such as a mask, are no maps
        reads = {
            source: None
            for reader in branch_nodes
            for source in reader.all_input_nodes
            if source not in branch_nodes and shapes.get(source) is not None
        }
        start = next(iter(reads)) if len(reads) == 1 else None
        readers = tuple(
            n.name for n in graph.nodes if start is not None and n in branch_nodes and start in n.all_input_nodes
        )
        additions[node] = Addition(end, shortcut, start, readers)
    return additions


def _last_spatial(owner: nn.Module, graph: fx.Graph, shapes: Shapes) -> fx.Node | None:
    """The result of the last 3x3 (or larger) convolution, after the normalization and activation that follow it."""
    node = next((n for n in reversed(graph.nodes) if n.op == "call_module" and _is_spatial(owner, n)), None)
    while node is not None and len(node.users) == 1:
        behind = next(iter(node.users))
        if behind.op != "call_module" or shapes.get(behind) != shapes.get(node):
            break
        if any(parameter.ndim > 1 for parameter in owner.get_submodule(str(behind.target)).parameters()):
            break
        node = behind
    return node


def _is_spatial(owner: nn.Module, node: fx.Node) -> bool:
    kernels = [m.kernel_size for m in owner.get_submodule(str(node.target)).modules() if isinstance(m, nn.Conv2d)]
    return len(kernels) == 1 and max(kernels[0]) > 1


def _drops(owner: nn.Module, node: fx.Node) -> bool:
    return type(owner.get_submodule(str(node.target))).__name__ in DROPS
