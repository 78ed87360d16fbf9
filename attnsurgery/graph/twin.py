"""Twins: copies of a model that can be run, changed and thrown away, with its weights or without a byte of them.

The model itself is never run. A twin has no wrappers (see `wrappers`) and no hooks of the user's: a hook is the model's
own if it is bound to something that the model holds, as timm's feature hooks are, or closes over nothing else that can
change, or is one of torch's, as pruning is; then the twin has it, bound to the twin's own. Any other hook is left out,
so that nothing of the user's sees a tensor of ours.
"""

from __future__ import annotations

import copy
import functools
import sys
import types
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from attnsurgery.graph.wrappers import bare, inner, plain_like

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_FLAGS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
_GLOBAL = ("_global_forward", "_global_backward")
_COMPILED = ("_compiled_call_impl",)
_OFFLOADED = ("forward", "_hf_hook", "_old_forward", "_original_forward")
"""What accelerate sets on a module; a twin runs the forward of the class."""
LEFT_OUT = "_attnsurgery_left_out"
"""The attribute of a twin that names the modules whose hooks it does not have."""


def meta_twin(model: nn.Module, copied: bool = True) -> nn.Module:
    """A copy of the model without a byte of weights, in eval mode; the model itself if that will do and has no weights.

    What copy.deepcopy would give, but for weights, wrappers and users' hooks; four times faster, for plain values are
    not looked into.
    """
    if not copied and all(tensor.is_meta for tensors in (model.parameters(), model.buffers()) for tensor in tensors):
        return _without_fast_norms(model.eval())
    return _without_fast_norms(_Copier(plain_like).copied(model).eval())


def weighted_twin(model: nn.Module) -> nn.Module:
    """A copy of the model with its weights, each module in its own mode, on the same devices."""
    return _Copier(lambda tensor: tensor.detach().clone()).copied(model)


@contextmanager
def quietly() -> Iterator[None]:
    """No hook that somebody has put on all modules is run, tensors count their versions, and nothing is compiled."""
    tables = [table for name, table in vars(torch_module).items() if name.startswith(_GLOBAL)]
    kept = [(table, dict(table)) for table in tables if isinstance(table, dict) and table]
    dynamo = sys.modules.get("torch._dynamo")  # where nobody has imported it, nothing is compiled
    for table, _ in kept:
        table.clear()
    try:
        with torch.inference_mode(False), dynamo.set_stance("force_eager") if dynamo else nullcontext():
            yield
    finally:
        for table, entries in kept:
            table.update(entries)


def _without_fast_norms(twin: nn.Module) -> nn.Module:
    """The same; timm's fast norms ask about autocast, which torch does not know on meta."""
    for module in twin.modules():
        if "_fast_norm" in module.__dict__:
            module.__dict__["_fast_norm"] = False
    return twin


class _Copier:
    """One deep copy.

    Args:
        tensor: makes the twin's tensor of one of the model's.
    """

    def __init__(self, tensor: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.memo: dict[int, Any] = {}
        self._tensor = tensor
        self._begun: dict[int, nn.Module] = {}
        """Empty twins of modules, so that a function can be bound to one whose turn has not come."""
        self._pairs: list[tuple[nn.Module, nn.Module]] = []
        self._kept: list[Any] = []
        """What has an id in `memo` must live as long."""

    def copied(self, model: nn.Module) -> nn.Module:
        with torch.inference_mode(False), torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                self.tensor(tensor)
            copying = [module for module in model.modules() if hasattr(type(module), "__deepcopy__")]
            theirs = {id(part) for module in copying for part in module.modules()}
            for module in model.modules():
                if inner(module) is None and id(module) not in theirs:
                    self._begun[id(module)] = self._remember(module, object.__new__(type(module)))
            twin = self.module(model)
            left_out = [self._hooks(module, made) for module, made in self._pairs]
        names = tuple(type(module).__name__ for (module, _), out in zip(self._pairs, left_out, strict=True) if out)
        if names:
            twin.__dict__[LEFT_OUT] = tuple(dict.fromkeys(names))
        return twin

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in self.memo:
            made = self._tensor(tensor)
            if isinstance(tensor, nn.Parameter):
                made = nn.Parameter(made, requires_grad=tensor.requires_grad)
            self._remember(tensor, made)
        known: torch.Tensor = self.memo[id(tensor)]
        return known

    def module(self, module: nn.Module) -> nn.Module:
        begun = self._begun.pop(id(module), None)
        if begun is None and id(module) in self.memo:
            known: nn.Module = self.memo[id(module)]
            return known
        if inner(module) is not None:
            inside = self.module(bare(module))
            self._remember(module, inside)
            return inside
        if hasattr(type(module), "__deepcopy__"):
            made: nn.Module = copy.deepcopy(module, self.memo)
            self._pairs += [(part, self.memo[id(part)]) for part in module.modules() if id(part) in self.memo]
            return made
        twin: nn.Module = begun if begun is not None else self._remember(module, object.__new__(type(module)))
        self._pairs.append((module, twin))
        state = twin.__dict__
        left = _OFFLOADED if "_hf_hook" in module.__dict__ else ()
        for key, value in module.__dict__.items():
            if key in ("_parameters", "_buffers"):
                state[key] = {name: None if held is None else self.tensor(held) for name, held in value.items()}
            elif key == "_modules":
                state[key] = {name: None if child is None else self.module(child) for name, child in value.items()}
            elif key in HOOKS or key in _FLAGS:
                state[key] = OrderedDict()
                self._remember(value, state[key])
            elif key not in _COMPILED and key not in left:
                state[key] = self.value(value)
        return twin

    def value(self, value: Any) -> Any:
        """A copy of what a module has as an attribute; what cannot be copied is shared."""
        kind: Any = type(value)
        if value is None or kind in _PLAIN:
            return value
        if id(value) in self.memo:
            return self.memo[id(value)]
        if isinstance(value, torch.Tensor):
            return self.tensor(value)
        if isinstance(value, nn.Module):
            return self.module(value)
        if kind in (dict, OrderedDict, defaultdict):
            table: Any = defaultdict(value.default_factory) if kind is defaultdict else kind()
            self._remember(value, table)
            table.update((key, self.value(held)) for key, held in value.items())
            return table
        if kind is list:
            row: list[Any] = self._remember(value, [])
            row += map(self.value, value)
            return row
        if kind is tuple or hasattr(kind, "_fields"):
            parts = map(self.value, value)
            return tuple(parts) if kind is tuple else kind(*parts)
        if kind is types.MethodType:
            return types.MethodType(value.__func__, self.value(value.__self__))
        if kind is types.FunctionType:
            return self._rebound(value)[0]
        if kind is functools.partial:
            given = [*map(self.value, value.args)]
            return functools.partial(
                self.value(value.func), *given, **{k: self.value(v) for k, v in value.keywords.items()}
            )
        if _is_record(kind):
            made = self._remember(value, object.__new__(kind))
            made.__dict__.update((key, self.value(held)) for key, held in value.__dict__.items())
            return made
        try:
            return copy.deepcopy(value, self.memo)
        except Exception:  # a logger, a lock, a file, a generator: whatever it is, it is no part of the numbers
            return value

    def _remember(self, value: Any, made: Any) -> Any:
        self.memo[id(value)] = made
        self._kept.append(value)
        return made

    def _rebound(self, function: types.FunctionType) -> tuple[types.FunctionType, bool, bool]:
        """The function with the twin's objects in place of the model's in what it closes over; whether there are any;
        and whether there is anything else there that can change."""
        cells = function.__closure__ or ()
        held = foreign = False
        made = []
        for cell in cells:
            try:
                content = cell.cell_contents
            except ValueError:  # not assigned yet
                made.append(cell)
                continue
            new = content
            if type(content) in _PLAIN or isinstance(content, (type, types.ModuleType)) or content is None:
                pass
            elif id(content) in self.memo or isinstance(content, types.MethodType):
                mine = id(content) in self.memo or id(content.__self__) in self.memo
                held, foreign = held or mine, foreign or not mine
                new = self.value(content) if mine else content
            elif isinstance(content, types.FunctionType) and content is not function:
                new, theirs, other = self._rebound(content)
                held, foreign = held or theirs, foreign or other
            else:
                foreign = True
            made.append(cell if new is content else types.CellType(new))
        if not held:
            return function, held, foreign
        twin = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(made)
        )
        twin.__kwdefaults__ = function.__kwdefaults__
        return twin, held, foreign

    def _own(self, hook: Any) -> Any:
        """The hook as the twin has it; None for a hook of the user's."""
        if isinstance(hook, types.MethodType):
            return (
                types.MethodType(hook.__func__, self.value(hook.__self__)) if id(hook.__self__) in self.memo else None
            )
        if isinstance(hook, functools.partial):
            own = self._own(hook.func)
            return own and functools.partial(own, *map(self.value, hook.args), **hook.keywords)
        if isinstance(hook, types.FunctionType):
            made, held, foreign = self._rebound(hook)
            return made if held and not foreign else None
        if id(hook) in self.memo or type(hook).__module__.startswith("torch.nn.utils"):
            return self.value(hook)
        return None

    def _hooks(self, module: nn.Module, twin: nn.Module) -> bool:
        """Give the twin the model's own hooks; True if there are others."""
        out = False
        for name in HOOKS:
            table = {}
            for key, hook in getattr(module, name, {}).items():
                own = self._own(hook)
                out = out or own is None
                if own is not None:
                    table[key] = own
            made = twin.__dict__.setdefault(name, OrderedDict())
            made.clear()
            made.update(table)
        for name in _FLAGS:
            there = twin._forward_pre_hooks if "pre" in name else twin._forward_hooks
            flags = {key: flag for key, flag in getattr(module, name, {}).items() if key in there}
            made = twin.__dict__.setdefault(name, OrderedDict())
            made.clear()
            made.update(flags)
        return out


_PLAIN = frozenset(
    {bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device, types.BuiltinFunctionType, type}
)


@functools.cache
def _is_record(kind: Any) -> bool:
    """True for instances that hold nothing but attributes, and do not say how they are to be copied."""
    standard = ("__reduce_ex__", "__reduce__", "__getstate__", "__new__")
    return (
        kind.__flags__ & _MADE_IN_PYTHON != 0
        and all(getattr(kind, name, None) is getattr(object, name, None) for name in standard)
        and not hasattr(kind, "__deepcopy__")
        and not hasattr(kind, "__setstate__")
        and not any(getattr(base, "__slots__", ()) for base in kind.__mro__)
        and kind.__module__ not in ("threading", "logging", "weakref")
    )


_MADE_IN_PYTHON = 1 << 9
"""The flag of classes that a class statement has made."""
