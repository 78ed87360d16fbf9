"""Sites inside one module's own forward: what its children return, what its operations give, where its branches end."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from attnsurgery.graph.record import Found, Run, map_shape
from attnsurgery.graph.site import Role
from attnsurgery.graph.trace import ONE_AT_A_TIME

ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
DROPS = {"DropPath", "Dropout", "Identity", "DropBlock2d"}


def inner_sites(path: str, owner: nn.Module, graph: fx.Graph, run: Run) -> Iterator[Found]:
    """Every tensor of the graph that a block could take, in order."""
    values = _values(path, owner, graph, run)
    ends = _branch_ends(owner, graph, values)
    last_child = run.finished[path] - 1.0
    named: set[str] = set()
    total = len(graph.nodes) + 1
    for position, node in enumerate(graph.nodes):
        address = f"{path}:{node.name}"
        if node.op == "call_module":
            last_child = float(run.finished.get(f"{path}.{node.target}", last_child))
            if node.target not in named:
                address = f"{path}.{node.target}"
                named.add(str(node.target))
        shape = map_shape(values.get(node))
        if shape is None or node.op in ("placeholder", "output", "get_attr"):
            continue
        role: Role = "branch" if node in ends else "inner"
        yield Found(last_child + position / total, address, path, node.name, shape, role)


def _values(path: str, owner: nn.Module, graph: fx.Graph, run: Run) -> dict[fx.Node, Any]:
    """What every node of the graph is, replayed with the recorded outputs of the owner's children."""
    values: dict[fx.Node, Any] = {}

    class Replay(fx.Interpreter):
        def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
            return run.outputs[f"{path}.{target}"]

        def run_node(self, n: fx.Node) -> Any:
            values[n] = super().run_node(n)
            return values[n]

    args, kwargs = run.inputs[path]
    bound = inspect.signature(owner.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    symbolic = sum(node.op == "placeholder" for node in graph.nodes)
    try:
        with torch.no_grad(), ONE_AT_A_TIME:
            Replay(owner, garbage_collect_values=False, graph=graph).run(*list(bound.arguments.values())[:symbolic])
    except Exception:  # an operation that meta tensors do not know: the sites up to there still stand
        return values
    return values


def _branch_ends(owner: nn.Module, graph: fx.Graph, values: dict[fx.Node, Any]) -> set[fx.Node]:
    """The ends of residual branches: of the two sides of an addition, the one that went the longer way.

    What only drops the branch on its last step is stepped over, so that a block comes before stochastic depth.
    """
    ends = set()
    ancestors: dict[fx.Node, set[fx.Node]] = {}
    for node in graph.nodes:
        sides = node.all_input_nodes
        ancestors[node] = {node}.union(*(ancestors[source] for source in sides))
        if node.target not in ADDITIONS or len(sides) != 2:
            continue
        if any(map_shape(values.get(side)) != map_shape(values.get(node)) for side in sides):
            continue
        lengths = [sum(n.op == "call_module" for n in ancestors[side]) for side in sides]
        joined = all(any(n.op == "placeholder" for n in ancestors[side]) for side in sides)
        if not joined or lengths[0] == lengths[1]:
            continue
        end = sides[lengths.index(max(lengths))]
        while end.op == "call_module" and len(end.users) == 1 and _drops(owner, end):
            end = end.all_input_nodes[0]
        if end.op not in ("placeholder", "get_attr") and map_shape(values.get(end)) is not None:
            ends.add(end)
    return ends


def _drops(owner: nn.Module, node: fx.Node) -> bool:
    return type(owner.get_submodule(str(node.target))).__name__ in DROPS
