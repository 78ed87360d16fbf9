"""Trace one module's own forward as a torch.fx graph, with every child a leaf.

A GraphModule of the whole model loses timm's methods (`forward_features`, `reset_classifier`, ...), and tracing through
children bakes their state into the graph. So the unit of tracing here is a single module: its children remain calls by
name, and only the Python code of that one forward is baked in.

That code can still depend on `self.training` or on optional arguments. Therefore both modes can be traced, and optional
arguments stay symbolic only if the forward never branches on them.
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

from attnsurgery.graph.symbols import Symbol, type_checks_refused

# Attributes that may change after surgery; a forward that reads them cannot become a graph.
CHANGING_STATE = ("grad_checkpointing",)
# Methods by which a module rebuilds itself for deployment; its forward is another one afterwards.
REBUILDS = ("reparameterize", "fuse", "switch_to_deploy")

ONE_AT_A_TIME = threading.RLock()
"""torch.fx patches nn.Module while it traces, so another forward at that time would become part of the trace."""


class _ForwardTracer(fx.Tracer):
    """Traces one forward; each child is a call, and so is each function that timm registers as not traceable."""

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
    """True if timm replaces such a module by what `fuse` returns; the `fuse` of some only changes the module."""
    try:
        return hasattr(cls, "fuse") and re.search(r"^\s+return self\s*$", inspect.getsource(cls.fuse), re.M) is None
    except (OSError, TypeError):
        return True


def uncut_class(module: nn.Module) -> Any:
    """The class of a module before any surgery, whose forward is traced."""
    return getattr(type(module), "uncut_class", type(module))


def uncut_copy(module: nn.Module) -> nn.Module:
    """A shallow copy with the module's class before surgery; children are shared, the dictionary of children is not."""
    twin: nn.Module = object.__new__(uncut_class(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__["_modules"] = dict(module._modules)
    return twin


def trace_owner(module: nn.Module, training: bool = False) -> fx.Graph | None:
    """The module's own forward as a graph in the given mode, or None if it cannot be a graph.

    It cannot be one if it has Python control flow on tensors or their types, reads state that timm changes later
    (`grad_checkpointing`), or is rebuilt for deployment. A site at the module's *output* needs no trace.
    """
    return _trace(module, training)[0]


def trace_in_both_modes(module: nn.Module) -> tuple[fx.Graph, fx.Graph] | None:
    """The graphs in eval and in train mode; the same graph twice if the forward never reads `self.training`."""
    evaluating, reads_training = _trace(module, False)
    training = _trace(module, True)[0] if reads_training else evaluating
    return None if evaluating is None or training is None else (evaluating, training)


def _trace(module: nn.Module, training: bool) -> tuple[fx.Graph | None, bool]:
    """The graph, and whether the forward reads `self.training`."""
    if any(name in module.__dict__ for name in CHANGING_STATE) or rebuilds(type(module)):
        return None, False
    twin = uncut_copy(module)
    cls: Any = type(twin)
    twin.__class__ = _reporting_training(cls)
    twin.__dict__.update(mode=training, reads_training=False)
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
    return graph, bool(twin.__dict__["reads_training"])


def _with_symbolic_rate(dropout: nn.Module, name: str, host: nn.Module) -> nn.Module:
    """A stand-in whose rate `p` stays an attribute in the graph, because schedules change it and attention reads it."""

    def rate(self: nn.Module) -> Any:
        return host.__dict__["tracer"].create_proxy("get_attr", f"{name}.p", (), {})

    stand_in: nn.Module = object.__new__(type("Dropout", (type(dropout),), {"p": property(rate)}))
    stand_in.__dict__.update((key, value) for key, value in dropout.__dict__.items() if key != "p")
    return stand_in


@cache
def _reporting_training(cls: Any) -> type[nn.Module]:
    """A subclass whose property `training` notes that it was read."""

    def training(self: nn.Module) -> bool:
        self.__dict__["reads_training"] = True
        return bool(self.__dict__["mode"])

    return type(cls.__name__, (cls,), {"training": property(training), "__module__": cls.__module__})


def same(first: fx.Graph, second: fx.Graph) -> bool:
    """True if two graphs have the same nodes."""
    if first is second:
        return True

    def content(graph: fx.Graph) -> list[tuple[str, str, str]]:
        return [(node.name, str(node.target), str((node.args, node.kwargs))) for node in graph.nodes]

    return content(first) == content(second)


@contextmanager
def _symbolic_dropout_in_attention() -> Iterator[None]:
    """Make fused attention accept a symbolic dropout rate, which it does not before torch 2.7."""
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
    tracer = module.__dict__["tracer"] = _ForwardTracer()
    try:
        with ONE_AT_A_TIME, _symbolic_dropout_in_attention(), type_checks_refused(type(module)):
            graph = tracer.trace(module, concrete_args=concrete)
    except Exception:  # whatever a forward raises on symbolic values, it cannot be a graph
        return None
    # a value that is computed from a buffer during tracing is a constant, which .to() and a new size do not change
    return None if any("_tensor_constant" in str(node.target) for node in graph.nodes) else graph


def _optional_arguments(module: nn.Module) -> dict[str, Any]:
    parameters: Sequence[inspect.Parameter] = list(inspect.signature(type(module).forward).parameters.values())[1:]
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.default is not inspect.Parameter.empty
    }


def _operations(graph: fx.Graph) -> list[str]:
    """The operations of a graph, without the checks that fx adds for fixed arguments."""
    checks = {"_assert_is_none", "_assert", "eq"}
    return [
        f"{node.op} {node.target}"
        for node in graph.nodes
        if node.op != "placeholder" and getattr(node.target, "__name__", str(node.target)) not in checks
    ]
