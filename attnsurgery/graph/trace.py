"""One module's own forward as a torch.fx graph, with every child a leaf.

A whole-model GraphModule loses what makes a timm model one (`forward_features`, `reset_classifier`, ...), and tracing
through children bakes their state. So the unit of tracing here is a single module: its children stay calls by name, and
what is baked is only what that one forward does in Python.

What it does in Python can still depend on `self.training` or on optional arguments. `trace_owner` therefore traces in
both modes, and keeps the optional arguments symbolic only where the forward never asks about them.
"""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import timm.layers
import torch
from torch import fx, nn
from torch.nn import functional

from attnsurgery.graph.symbols import Symbol, types_unasked

# Python state that is expected to change after surgery; a forward that reads it cannot be frozen into a graph.
CHANGING_STATE = ("grad_checkpointing",)
# Methods by which a module rebuilds itself for deployment: its forward afterwards is another one.
REBUILDS = ("reparameterize", "fuse", "switch_to_deploy")

ONE_AT_A_TIME = threading.RLock()
"""torch.fx patches nn.Module for as long as it traces; another forward at that moment would end up in the trace."""


class _OwnForward(fx.Tracer):
    """Traces one forward: every child is a call, and so is every function timm asks not to trace."""

    def __init__(self) -> None:
        # without autowrap_modules=(), fx wraps every function of `math` anew for each trace, a third of its time
        no_modules: Any = ()  # torch up to 2.14 types the argument as a tuple of exactly one
        super().__init__(autowrap_modules=no_modules, autowrap_functions=tuple(timm.layers.get_notrace_functions()))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Symbol(node, self)


def rebuilds(cls: type[nn.Module]) -> bool:
    """True if modules of this class rebuild themselves for deployment."""
    return any(hasattr(cls, name) for name in REBUILDS)


@cache
def replaces_itself(cls: Any) -> bool:
    """True if timm puts what `fuse` returns in the place of such a module; some only change themselves."""
    try:
        return hasattr(cls, "fuse") and re.search(r"^\s+return self\s*$", inspect.getsource(cls.fuse), re.M) is None
    except (OSError, TypeError):
        return True


def uncut_class(module: nn.Module) -> Any:
    """The class whose forward is traced: what the module was before any surgery."""
    return getattr(type(module), "uncut_class", type(module))


def uncut_copy(module: nn.Module) -> nn.Module:
    """A shallow copy with the module's first class; children are shared, the table of children is not."""
    twin: nn.Module = object.__new__(uncut_class(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__["_modules"] = dict(module._modules)
    return twin


def trace_owner(module: nn.Module, training: bool = False) -> fx.Graph | None:
    """The module's own forward as a graph in the given mode, or None where no graph can stand for it.

    That is: Python control flow on tensors or on their type, state that timm changes later (`grad_checkpointing`), a
    forward that is rebuilt for deployment. A site at the module's *output* needs no trace and works there all the same.
    """
    return _trace(module, training)[0]


def trace_in_both_modes(module: nn.Module) -> tuple[fx.Graph, fx.Graph] | None:
    """The graphs in eval and in train mode; one graph twice where the forward never asks which mode it is in."""
    evaluating, asked = _trace(module, False)
    training = _trace(module, True)[0] if asked else evaluating
    return None if evaluating is None or training is None else (evaluating, training)


def _trace(module: nn.Module, training: bool) -> tuple[fx.Graph | None, bool]:
    """The graph, and whether the forward asked for `self.training` on the way."""
    if any(name in module.__dict__ for name in CHANGING_STATE) or rebuilds(type(module)):
        return None, False
    twin = uncut_copy(module)
    cls: Any = type(twin)
    twin.__class__ = _watching(cls)
    twin.__dict__.update(mode=training, asked=False)
    for name, child in twin._modules.items():
        if isinstance(child, nn.modules.dropout._DropoutNd):
            twin._modules[name] = _with_symbolic_rate(child, name, twin)
    graph = _try_trace(twin, None)
    defaults = _optional_arguments(twin)
    if defaults:
        # optional arguments stay symbolic if fixing them at their defaults changes nothing but themselves
        fixed = _try_trace(twin, defaults)
        if graph is None or fixed is None or _operations(graph) != _operations(fixed):
            graph = fixed
    return graph, bool(twin.__dict__["asked"])


def _with_symbolic_rate(dropout: nn.Module, name: str, host: nn.Module) -> nn.Module:
    """A stand-in whose rate `p` stays an attribute in the graph: schedules change it, and attentions read it."""

    def read(self: nn.Module) -> Any:
        return host.__dict__["tracer"].create_proxy("get_attr", f"{name}.p", (), {})

    stand_in: nn.Module = object.__new__(type("Dropout", (type(dropout),), {"p": property(read)}))
    stand_in.__dict__.update((key, value) for key, value in dropout.__dict__.items() if key != "p")
    return stand_in


@cache
def _watching(cls: Any) -> type[nn.Module]:
    """The class with a `training` that remembers being read."""

    def read(self: nn.Module) -> bool:
        self.__dict__["asked"] = True
        return bool(self.__dict__["mode"])

    return type(cls.__name__, (cls,), {"training": property(read), "__module__": cls.__module__})


def same(one: fx.Graph, other: fx.Graph) -> bool:
    """True if two graphs do the same, whatever objects they are made of."""
    if one is other:
        return True

    def content(graph: fx.Graph) -> list[tuple[str, str, str]]:
        return [(node.name, str(node.target), str((node.args, node.kwargs))) for node in graph.nodes]

    return content(one) == content(other)


@contextmanager
def _symbolic_dropout_in_attention() -> Iterator[None]:
    """For torch before 2.7, whose fused attention does not take a symbol for its dropout rate."""
    if torch.__version__ >= "2.7":
        yield
        return
    attend = functional.scaled_dot_product_attention

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        symbol = next((value for value in (*args, *kwargs.values()) if isinstance(value, fx.Proxy)), None)
        if symbol is None:
            return attend(*args, **kwargs)
        return symbol.tracer.create_proxy("call_function", attend, args, kwargs)

    vars(functional)["scaled_dot_product_attention"] = wrapped
    try:
        yield
    finally:
        vars(functional)["scaled_dot_product_attention"] = attend


def _try_trace(module: nn.Module, concrete: dict[str, Any] | None) -> fx.Graph | None:
    tracer = module.__dict__["tracer"] = _OwnForward()
    try:
        with ONE_AT_A_TIME, _symbolic_dropout_in_attention(), types_unasked(type(module)):
            graph = tracer.trace(module, concrete_args=concrete)
    except Exception:  # whatever a foreign forward raises on symbolic values, the answer is the same: no graph
        return None
    # what torch computed from a buffer while it traced is a constant that would follow neither .to() nor a new size
    return None if any("_tensor_constant" in str(node.target) for node in graph.nodes) else graph


def _optional_arguments(module: nn.Module) -> dict[str, Any]:
    parameters: Sequence[inspect.Parameter] = list(inspect.signature(type(module).forward).parameters.values())[1:]
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.default is not inspect.Parameter.empty
    }


def _operations(graph: fx.Graph) -> list[str]:
    """The calls of a graph, less the checks that fx adds for fixed arguments."""
    checks = {"_assert_is_none", "_assert", "eq"}
    return [
        f"{node.op} {node.target}"
        for node in graph.nodes
        if node.op != "placeholder" and getattr(node.target, "__name__", str(node.target)) not in checks
    ]
