"""Insert blocks into a module's own forward, as calls in its torch.fx graph.

The forward is traced with the module's children as leaves, the calls are inserted into the graph, and torch.fx
generates the code. If the graphs of the two modes differ, both are kept and the forward branches on `self.training`.
"""

from __future__ import annotations

import ast
import inspect
import operator
import types
from functools import cache
from typing import Any

import torch
from torch import fx, nn

from attnsurgery.errors import SiteError
from attnsurgery.graph.channel_layout import FROM_NCHW, TO_NCHW, map_to_tokens, tokens_to_map
from attnsurgery.graph.trace import same, trace_in_both_modes, uncut_class, uncut_copy
from attnsurgery.surgery.forward_source import Method, dispatching
from attnsurgery.surgery.graft import Graft, Slot


def insert_inside(owner: nn.Module, grafts: tuple[Graft, ...], name: str) -> list[Method]:
    """The owner's forward with the calls inserted, as a method called `name`.

    Args:
        owner: a module that has the blocks as children.
        grafts: the surgery inside its forward.
        name: name of the method; further methods are helpers of it.

    Raises:
        SiteError: the site does not exist in one of the modes, or the owner's forward cannot be a graph.
    """
    graphs = trace_in_both_modes(owner)
    if graphs is None:
        raise SiteError(f"the forward of {uncut_class(owner).__name__} cannot be traced; cut at its output instead.")
    base = uncut_class(owner)
    is_same = same(*graphs)
    evaluating = _inserted(graphs[0], owner, grafts, "eval")
    if is_same and not _has_keyword_only(base):
        return [_generated(evaluating, name)]
    if is_same:  # torch.fx does not generate keyword-only arguments
        return [_generated(evaluating, "_both"), dispatching(base, name, "_both", "_both")]
    training = _inserted(graphs[1], owner, grafts, "train")
    return [_generated(evaluating, "_evaluating"), _generated(training, "_training"), dispatching(base, name)]


def _has_keyword_only(base: type[nn.Module]) -> bool:
    """True if the forward has a keyword-only argument."""
    kinds = [parameter.kind for parameter in inspect.signature(base.forward).parameters.values()]
    return inspect.Parameter.KEYWORD_ONLY in kinds


def find_slot(owner: nn.Module, child: str, node: str | None) -> Slot | None:
    """The slot that `owner` reserves for `child` right after `node`, or None if it reserves none.

    It counts only if the graphs of both modes call the child exactly once, on that node.
    """
    if node is None:
        return None
    existing = getattr(owner, child, owner)
    if existing is not None and type(existing) is not nn.Identity:
        return None
    trial = uncut_copy(owner)
    trial.__dict__.pop(child, None)
    trial._modules[child] = nn.Identity()
    for graph in set(trace_in_both_modes(trial) or [fx.Graph()]):
        calls = [n for n in graph.nodes if n.op == "call_module" and n.target == child]
        if len(calls) != 1 or [str(source) for source in calls[0].args] != [node]:
            return None
    return "none" if existing is None else "identity"


def _inserted(graph: fx.Graph, owner: nn.Module, grafts: tuple[Graft, ...], mode: str) -> fx.Graph:
    """The owner's graph with the calls of all grafts inserted."""
    nodes = {node.name: node for node in graph.nodes}
    for node in graph.nodes:
        if node.op == "placeholder":
            node.target = _argument_name(owner, str(node.target))
    last: dict[tuple[str | None, tuple[str, ...]], fx.Node] = {}
    for graft in grafts:
        place = nodes.get(str(graft.node))
        if place is None or not all(user in nodes for user in graft.users):
            raise SiteError(f"{uncut_class(owner).__name__} has no single tensor at {graft.node} in {mode} mode.")
        # the result of an earlier block at the same place, for the same users or for all
        before = last.get((graft.node, graft.users)) or last.get((graft.node, ())) or place
        users = [nodes[user] for user in graft.users] or list(before.users)
        last[graft.node, graft.users] = (
            nodes[graft.child] if graft.slot != "new" else _insert(graph, before, users, graft)
        )
    graph.lint()
    return graph


def _argument_name(owner: nn.Module, target: str) -> str:
    """The declared name of an argument; fx renames those that are fixed at their defaults, as in `mask_1`."""
    names = inspect.signature(uncut_class(owner).forward).parameters
    bare = target.lstrip("*")
    return target if bare in names else bare.rpartition("_")[0]


def _insert(graph: fx.Graph, before: fx.Node, users: list[fx.Node], graft: Graft) -> fx.Node:
    """Insert one call: right after the value if all users get the block's result, else right before the first user."""
    value = before
    if graft.users:
        first = next(node for node in graph.nodes if node in users)
        with graph.inserting_before(first):
            marker = graph.call_function(operator.pos, (before,))
    else:
        with graph.inserting_after(before):
            marker = graph.call_function(operator.pos, (before,))
    with graph.inserting_before(marker):
        prefix = graft.prefix_tokens
        if prefix:
            everything = slice(None)
            prefix_part = graph.call_function(operator.getitem, (value, (everything, slice(None, prefix))))
            value = graph.call_function(operator.getitem, (value, (everything, slice(prefix, None))))
        plain = value
        if graft.grid:
            value = graph.call_function(tokens_to_map, (value, *_grid_nodes(graph, graft)))
        else:
            for method, args in TO_NCHW[graft.layout]:
                value = graph.call_method(method, (value, *args))
        value = graph.call_module(graft.child, (value,))
        if graft.grid:
            value = graph.call_function(map_to_tokens, (value,))
        else:
            for method, args in FROM_NCHW[graft.layout]:
                value = graph.call_method(method, (value, *args))
        if graft.part == "point":
            value = graph.call_function(operator.mul, (plain, graph.call_method("type_as", (value, plain))))
        if prefix:
            value = graph.call_function(torch.cat, ((prefix_part, value), 1))
    for user in users:
        user.replace_input_with(before, value)
    graph.erase_node(marker)
    return value


def _grid_nodes(graph: fx.Graph, graft: Graft) -> list[Any]:
    """Height and width of the grid, as nodes that read the owner's arguments or attributes, or as numbers."""
    assert graft.grid is not None
    if graft.grid_source:
        return [graph.create_node("get_attr", f"{graft.grid_attribute}.{side}") for side in ("height", "width")]
    arguments = {str(node.target): node for node in graph.nodes if node.op == "placeholder"}
    sizes = [arguments[name] for name in graft.grid_names if name in arguments]
    if len(sizes) == 1 == len(graft.grid_names):
        return [graph.call_function(operator.getitem, (sizes[0], side)) for side in (0, 1)]
    return list(sizes) if len(sizes) == 2 else list(graft.grid)


def _generated(graph: fx.Graph, name: str) -> Method:
    """The code that torch.fx generates for the graph, as a method called `name`."""
    code = graph.python_code("self")
    source = code.src[code.src.index("def forward(") :].replace("def forward(", f"def {name}(", 1).strip() + "\n"
    return source, tuple(_binding(name, code.globals[name]) for name in _names(source) if name in code.globals)


@cache
def _names(source: str) -> tuple[str, ...]:
    return tuple(sorted({node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}))


def _binding(name: str, value: Any) -> tuple[str, str, Any]:
    """The binding of a name; a module is bound by its name, because it cannot be pickled."""
    if isinstance(value, types.ModuleType):
        return name, "module", value.__name__
    return name, "object", value
