"""The owner's forward, rewritten; everything else about the owner stays what it is.

Only the module whose own forward holds the cut gets a new class, a generated subclass of its old one, so `isinstance`
keeps holding. There are three kinds of cuts:

* at the module's *output*: the generated forward calls the old one and passes its result through the block.
  Nothing is traced, so nothing can be baked: flags such as `grad_checkpointing` keep working.
* *inside*: the old forward is traced with its children as leaves, the calls are inserted into the graph, and
  torch.fx generates the code. Where the graphs of the two modes differ, both are kept and the forward asks
  `self.training`.
* around a *span* of modules: the first one computes the gate from its own input, before anything can write to that,
  the last one multiplies. In between the gate travels as an attribute of the very tensor the modules hand on, so
  nothing is stored in a module: two forwards at once, recomputation in checkpoints, torch.compile and torch.export see
  plain data flow. TorchScript knows no such attributes, and a span of several modules says so there.

The generated source is what gets pickled, with the names it needs: a pickle or deep copy builds the very same class
again. Two owners with the same source share one class, so torch.compile and torch.jit.script see one type, not
sixteen.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import itertools
import linecache
import operator
import types
import typing
from functools import cache
from typing import Any, Optional

import torch
from torch import fx, nn

from attnsurgery.errors import SiteError, SurgeryError
from attnsurgery.graph.channel_layout import FROM_NCHW, TO_NCHW, map_to_tokens, tokens_to_map
from attnsurgery.graph.trace import same, trace_in_both_modes, uncut_class, uncut_copy
from attnsurgery.surgery.gate import carried, carry
from attnsurgery.surgery.graft import RECORD, Graft, Slot

# Methods of timm that change what a forward reads, such as the windows of a Swin block; an older graph is stale then.
CHANGES = ("set_input_size",)

Bindings = tuple[tuple[str, str, Any], ...]


def surgical_class(owner: nn.Module, grafts: tuple[Graft, ...]) -> type[nn.Module]:
    """The class that runs `grafts` in order; the owner's first class if its own forward already does.

    Args:
        owner: a module that already has the children named by `grafts`; only its class is still to be changed.

    Raises:
        SiteError: the place does not exist in one of the modes, or the owner's forward cannot be a graph.
    """
    base: type[nn.Module] = uncut_class(owner)
    cuts = [graft for graft in grafts if graft.slot == "new"]
    outside = [graft for graft in cuts if graft.node is None]
    inside = tuple(graft for graft in grafts if graft.node is not None)
    parts: list[tuple[str, Bindings]] = []
    called = "_uncut_forward"
    if any(graft.slot == "new" for graft in inside):
        called = "_inside" if outside else "forward"
        parts += _cut_inside(owner, inside, called)
    if outside:
        parts.append(_wrapping(base, outside, called))
    if not parts:
        return base
    merged = {name: (name, kind, value) for _, bindings in parts for name, kind, value in bindings}
    return _class(base, "\n".join(source for source, _ in parts), tuple(merged.values()))


def _cut_inside(owner: nn.Module, grafts: tuple[Graft, ...], name: str) -> list[tuple[str, Bindings]]:
    """The owner's forward, with the calls inserted, as a method called `name`."""
    graphs = trace_in_both_modes(owner)
    if graphs is None:
        raise SiteError(f"the forward of {uncut_class(owner).__name__} cannot be traced; cut at its output instead.")
    base = uncut_class(owner)
    alike = same(*graphs)
    evaluating = _inserted(graphs[0], owner, grafts, "eval")
    if alike and not _by_keyword(base):
        return [_generated(evaluating, name)]
    if alike:  # torch.fx writes no arguments that are given by keyword alone
        return [_generated(evaluating, "_both"), _dispatching(base, name, "_both", "_both")]
    training = _inserted(graphs[1], owner, grafts, "train")
    return [_generated(evaluating, "_evaluating"), _generated(training, "_training"), _dispatching(base, name)]


def _by_keyword(base: type[nn.Module]) -> bool:
    """True if an argument of the forward can be given by keyword alone."""
    kinds = [parameter.kind for parameter in inspect.signature(base.forward).parameters.values()]
    return inspect.Parameter.KEYWORD_ONLY in kinds


def find_slot(owner: nn.Module, child: str, node: str | None) -> Slot | None:
    """How `owner` keeps a place for `child` right behind `node`: as None, as an Identity it calls, or not at all.

    The place counts only if tracing shows one call of it, on that very node, in both modes.
    """
    if node is None:
        return None
    kept = getattr(owner, child, owner)
    if kept is not None and type(kept) is not nn.Identity:
        return None
    trial = uncut_copy(owner)
    trial.__dict__.pop(child, None)
    trial._modules[child] = nn.Identity()
    for graph in set(trace_in_both_modes(trial) or [fx.Graph()]):
        calls = [n for n in graph.nodes if n.op == "call_module" and n.target == child]
        if len(calls) != 1 or [str(source) for source in calls[0].args] != [node]:
            return None
    return "none" if kept is None else "identity"


def _inserted(graph: fx.Graph, owner: nn.Module, grafts: tuple[Graft, ...], mode: str) -> fx.Graph:
    """The owner's graph with every graft's call put in."""
    nodes = {node.name: node for node in graph.nodes}
    for node in graph.nodes:
        if node.op == "placeholder":
            node.target = _argument_name(owner, str(node.target))
    last: dict[tuple[str | None, tuple[str, ...]], fx.Node] = {}
    for graft in grafts:
        place = nodes.get(str(graft.node))
        if place is None or not all(user in nodes for user in graft.users):
            raise SiteError(f"{uncut_class(owner).__name__} has no single tensor at {graft.node} in {mode} mode.")
        # what another block has made of the tensor, for the same users or for all
        before = last.get((graft.node, graft.users)) or last.get((graft.node, ())) or place
        users = [nodes[user] for user in graft.users] or list(before.users)
        last[graft.node, graft.users] = (
            nodes[graft.child] if graft.slot != "new" else _insert(graph, before, users, graft)
        )
    graph.lint()
    return graph


def _argument_name(owner: nn.Module, target: str) -> str:
    """fx renames arguments that were fixed at their defaults (mask_1); callers still say mask=."""
    names = inspect.signature(uncut_class(owner).forward).parameters
    bare = target.lstrip("*")
    return target if bare in names else bare.rpartition("_")[0]


def _insert(graph: fx.Graph, before: fx.Node, users: list[fx.Node], graft: Graft) -> fx.Node:
    """Right behind the value where all users get the block's result; else as late as its first user allows."""
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
            kept = graph.call_function(operator.getitem, (value, (everything, slice(None, prefix))))
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
            value = graph.call_function(torch.cat, ((kept, value), 1))
    for user in users:
        user.replace_input_with(before, value)
    graph.erase_node(marker)
    return value


def _grid_nodes(graph: fx.Graph, graft: Graft) -> list[Any]:
    """Height and width: nodes that read them off the owner's arguments, or plain numbers."""
    assert graft.grid is not None
    if graft.grid_source:
        return [graph.create_node("get_attr", f"{graft.told}.{side}") for side in ("height", "width")]
    arguments = {str(node.target): node for node in graph.nodes if node.op == "placeholder"}
    told = [arguments[name] for name in graft.grid_names if name in arguments]
    if len(told) == 1 == len(graft.grid_names):
        return [graph.call_function(operator.getitem, (told[0], side)) for side in (0, 1)]
    return list(told) if len(told) == 2 else list(graft.grid)


def _wrapping(base: type[nn.Module], cuts: list[Graft], called: str) -> tuple[str, Bindings]:
    """A forward that calls the old one and passes what it returns through the blocks."""
    declared, passed = _arguments(base)
    x = passed.partition(",")[0]
    x = f"{x[1:]}[0]" if x.startswith("*") else x
    before, after, at_last = [], [], []
    for number, graft in enumerate(cuts):
        gate, prefix = f"gate_{number}", graft.prefix_tokens
        if graft.part == "tells":
            first = 2 if graft.layout == "NCHW" else 1
            told = [
                f"    self.{graft.told}.{side} = y.shape[{first + i}]" for i, side in enumerate(("height", "width"))
            ]
            after += ["if not torch.jit.is_scripting():", *told]
            continue
        y = "y" if graft.element is None else f"y_{number}"
        if graft.element is not None:
            after += [f"{y} = y[{graft.element[0]}]"]
        if graft.part in ("place", "point"):
            rest = f"{y}[:, {prefix}:]" if prefix else y
            after += _through(graft, rest, gate if graft.part == "point" or prefix else y)
            changed = f"{rest} * {gate}.to({y}.dtype)" if graft.part == "point" else gate
        else:
            read = f"{x}[:, {prefix}:]" if prefix else x
            before += _through(graft, read, gate) if graft.held else [f"{gate} = carried({x}, {graft.carrier!r})"]
            changed = f"{y}[:, {prefix}:] * {gate}.to({y}.dtype)" if prefix else f"{y} * {gate}.to({y}.dtype)"
        if graft.part in ("first", "middle"):
            at_last += [
                f"carry({'y' if graft.element is None else f'y[{graft.element[0]}]'}, {graft.carrier!r}, {gate})"
            ]
            continue
        if prefix:
            after += [f"{y} = torch.cat(({y}[:, :{prefix}], {changed}), 1)"]
        elif changed != gate:
            after += [f"{y} = {changed}"]
        if graft.element is not None:
            after += [f"y = {_with_element(*graft.element, y)}"]
    lines = [*before, f"y = self.{called}({passed})", *after, *at_last, "return y"]
    source = "\n    ".join([f"def forward({declared}):", *lines]) + "\n"
    known = {"carry": carry, "carried": carried, "tokens_to_map": tokens_to_map, "map_to_tokens": map_to_tokens}
    return source, (*_ANNOTATING, *((name, "object", value) for name, value in known.items() if f"{name}(" in source))


def _with_element(index: int, arity: int, value: str) -> str:
    """`y`, a tuple of `arity` or a list, with another element; in words that torch.jit.script knows."""
    if not arity:
        return f"y[:{index}] + [{value}] + y[{index + 1}:]"
    return "(" + " ".join(f"{value if i == index else f'y[{i}]'}," for i in range(arity)) + ")"


def _through(graft: Graft, source: str, target: str) -> list[str]:
    """Statements that give `target` what the block makes of the tensor `source`."""
    if graft.grid:
        call = f"{target} = map_to_tokens(self.{graft.child}(tokens_to_map({source}, %s)))"
        if not graft.grid_source:
            return [call % graft.size]
        # TorchScript knows no object to share, so there the size is fixed
        fixed = call % ", ".join(map(str, graft.grid))
        return ["if torch.jit.is_scripting():", f"    {fixed}", "else:", f"    {call % graft.size}"]
    there = "".join(f".{method}({', '.join(map(str, args))})" for method, args in TO_NCHW[graft.layout])
    back = "".join(f".{method}({', '.join(map(str, args))})" for method, args in FROM_NCHW[graft.layout])
    return [f"{target} = self.{graft.child}({source}{there}){back}"]


def _dispatching(
    base: type[nn.Module], name: str, evaluating: str = "_evaluating", training: str = "_training"
) -> tuple[str, Bindings]:
    declared, passed = _arguments(base)
    asks = "" if evaluating == training else f"    if self.training:\n        return self.{training}({passed})\n"
    return f"def {name}({declared}):\n{asks}    return self.{evaluating}({passed})\n", _ANNOTATING


_ANNOTATING: Bindings = (("torch", "module", "torch"), ("Optional", "object", Optional))
_SCRIPTED = {bool: "bool", int: "int", float: "float", torch.Tensor: "torch.Tensor"}


def _typed(hint: Any) -> str:
    """The annotation as text, for types that torch.jit.script knows."""
    if hint in _SCRIPTED:
        return f": {_SCRIPTED[hint]}"
    parts = [part for part in typing.get_args(hint) if part is not type(None)]
    optional = len(parts) == 1 and len(typing.get_args(hint)) == 2 and parts[0] in _SCRIPTED
    return f": Optional[{_SCRIPTED[parts[0]]}]" if optional else ""


def _arguments(base: type[nn.Module]) -> tuple[str, str]:
    """The forward's arguments as declared and as passed on; defaults are put back by `_new_class`.

    The first argument is `self` here, whatever the forward calls it; a decorator may have left it among `*args`.
    torch.jit.script takes types from the text, and those it knows are written there.
    """
    declared, passed = ["self"], []
    starred = False
    try:
        hints = typing.get_type_hints(base.forward)
    except Exception:  # a name that only type checkers can see
        hints = {}
    parameters = list(inspect.signature(base.forward).parameters.items())
    unnamed = not parameters or parameters[0][1].kind is inspect.Parameter.VAR_POSITIONAL
    for name, parameter in parameters if unnamed else parameters[1:]:
        if parameter.kind is parameter.VAR_POSITIONAL:
            starred = True
            declared.append(f"*{name}")
            passed.append(f"*{name}")
        elif parameter.kind is parameter.VAR_KEYWORD:
            declared.append(f"**{name}")
            passed.append(f"**{name}")
        elif parameter.kind is parameter.KEYWORD_ONLY:
            typed = name + _typed(hints.get(name))
            declared += [typed] if starred else ["*", typed]
            starred = True
            passed.append(f"{name}={name}")
        else:
            declared.append(name + _typed(hints.get(name)))
            passed.append(name)
    return ", ".join(declared), ", ".join(passed)


def _generated(graph: fx.Graph, name: str) -> tuple[str, Bindings]:
    """The code torch.fx writes for the graph, as a method called `name`, and the names it uses."""
    code = graph.python_code("self")
    source = code.src[code.src.index("def forward(") :].replace("def forward(", f"def {name}(", 1).strip() + "\n"
    return source, tuple(_binding(name, code.globals[name]) for name in _names(source) if name in code.globals)


@cache
def _names(source: str) -> tuple[str, ...]:
    return tuple(sorted({node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}))


def _binding(name: str, value: Any) -> tuple[str, str, Any]:
    """A module is kept by name: it cannot be pickled."""
    if isinstance(value, types.ModuleType):
        return name, "module", value.__name__
    return name, "object", value


def _class(base: type[nn.Module], source: str, bindings: Bindings) -> type[nn.Module]:
    key = base, source, bindings
    if key not in _CLASSES:
        _CLASSES[key] = _new_class(base, source, bindings)
    return _CLASSES[key]


_CLASSES: dict[tuple[Any, str, Bindings], type[nn.Module]] = {}


def _new_class(base: type[nn.Module], source: str, bindings: Bindings) -> type[nn.Module]:
    """The generated subclass; the same arguments give the same class."""
    filename = f"<attnsurgery {hashlib.sha256(source.encode()).hexdigest()[:16]} {base.__qualname__}>"
    # torch.jit.script and tracebacks read the source through linecache; no mtime means it is never thrown out
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    names = {n: importlib.import_module(v) if kind == "module" else v for n, kind, v in bindings}
    namespace: dict[str, Any] = dict(names)  # without __name__: torch.compile would look for them in that module
    exec(compile(source, filename, "exec"), namespace)
    methods = {n: v for n, v in namespace.items() if isinstance(v, types.FunctionType) and n not in names}
    for name, method in methods.items():
        method.__defaults__, method.__kwdefaults__ = _defaults(method, base)
        method.__annotations__ = dict(base.forward.__annotations__)
        method.__qualname__ = f"Surgical{base.__name__}.{name}"
    body = {
        **methods,
        **{name: _then_rewritten(name) for name in CHANGES if hasattr(base, name)},
        "__doc__": f"{base.__name__} with attention blocks in its forward; generated by attnsurgery.",
        "__module__": __name__,
        "__reduce__": _reduce,
        "uncut_class": base,
        "_uncut_forward": _renamed(base.forward),
        "_recipe_of_class": (base, source, bindings),
    }
    if "carry" in namespace or "carried" in namespace:
        body["__prepare_scriptable__"] = _refuse_scripting
    return type(f"Surgical{base.__name__}", (base,), body)


def _defaults(
    method: types.FunctionType, base: type[nn.Module]
) -> tuple[tuple[Any, ...] | None, dict[str, Any] | None]:
    """Those that the forward declares for the arguments of a generated method, also through decorators."""
    declared = inspect.signature(base.forward).parameters
    code = method.__code__
    given = {name: declared[name].default for name in declared if declared[name].default is not inspect.Parameter.empty}
    positional, end = code.co_varnames[: code.co_argcount], code.co_argcount + code.co_kwonlyargcount
    trailing = list(itertools.takewhile(given.__contains__, reversed(positional)))[::-1]
    by_keyword = {name: given[name] for name in code.co_varnames[code.co_argcount : end] if name in given}
    return tuple(given[name] for name in trailing) or None, by_keyword or None


def _then_rewritten(name: str) -> Any:
    """The base's method, after which the forward is generated anew."""

    def change(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = getattr(self.uncut_class, name)(self, *args, **kwargs)
        self.__class__ = surgical_class(self, self.__dict__[RECORD])
        return result

    change.__name__ = name
    return change


def _refuse_scripting(self: nn.Module) -> nn.Module:
    raise SurgeryError(
        "a block on a span of several modules cannot be scripted: TorchScript tensors carry no attributes. Use "
        "torch.export, or a span of one module."
    )


def _renamed(forward: Any) -> Any:
    """The old forward under a name of its own: torch.jit.script compiles a method by its function's name."""
    if not isinstance(forward, types.FunctionType):
        return forward
    copy = types.FunctionType(
        forward.__code__, forward.__globals__, "_uncut_forward", forward.__defaults__, forward.__closure__
    )
    copy.__kwdefaults__ = forward.__kwdefaults__
    copy.__annotations__ = forward.__annotations__
    return copy


def _reduce(self: nn.Module) -> tuple[Any, ...]:
    made_of: tuple[Any, ...] = type(self)._recipe_of_class  # type: ignore[attr-defined]
    state: Any = object.__getstate__(self)
    return _restore, made_of, state


def _restore(base: type[nn.Module], source: str, bindings: Bindings) -> nn.Module:
    """An empty instance of the class that `source` generates; pickle and copy fill in its state."""
    module: nn.Module = object.__new__(_class(base, source, bindings))
    return module
