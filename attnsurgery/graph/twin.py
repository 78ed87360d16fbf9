"""Twins: copies of a model, with or without weights, that can be run, changed and discarded.

The model itself is never run. A twin has no wrappers (see `wrappers`) and no hooks of the user, so user code never sees
its tensors. A hook is the model's own if it is bound to an object of the model, as timm's feature hooks are, if its
closure holds only such objects and constants, or if it comes from torch, as for pruning. The twin has these hooks,
bound to its own objects.
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
"""Attributes that accelerate sets on a module; a twin runs the forward of the class instead."""
WITHOUT_HOOKS = "_attnsurgery_left_out"
"""The attribute of a twin with the class names of modules that have hooks in the model and not in the twin."""


def meta_twin(model: nn.Module, copied: bool = True) -> nn.Module:
    """A copy of the model on the meta device, in eval mode.

    It equals the result of copy.deepcopy except for weights, wrappers and user hooks, and is four times faster.

    Args:
        model: a model on any device.
        copied: False returns the model itself if it is on the meta device already.
    """
    if not copied and all(tensor.is_meta for tensors in (model.parameters(), model.buffers()) for tensor in tensors):
        return _without_fast_norms(model.eval())
    return _without_fast_norms(_Copier(plain_like).copied(model).eval())


def weighted_twin(model: nn.Module) -> nn.Module:
    """A copy of the model with its weights, on the same devices; each module keeps its training mode."""
    return _Copier(lambda tensor: tensor.detach().clone()).copied(model)


@contextmanager
def without_side_effects() -> Iterator[None]:
    """Inside the `with` statement, global module hooks and compilation are off, and tensors count their versions."""
    tables = [table for name, table in vars(torch_module).items() if name.startswith(_GLOBAL)]
    saved = [(table, dict(table)) for table in tables if isinstance(table, dict) and table]
    dynamo = sys.modules.get("torch._dynamo")  # if it is not imported, nothing is compiled
    for table, _ in saved:
        table.clear()
    try:
        with torch.inference_mode(False), dynamo.set_stance("force_eager") if dynamo else nullcontext():
            yield
    finally:
        for table, entries in saved:
            table.update(entries)


def _without_fast_norms(twin: nn.Module) -> nn.Module:
    """The twin with timm's fast norms off, which query autocast, because the meta device does not support it."""
    for module in twin.modules():
        if "_fast_norm" in module.__dict__:
            module.__dict__["_fast_norm"] = False
    return twin


class _Copier:
    """Makes one deep copy of a model.

    Args:
        tensor: returns the twin's tensor for one of the model's.
    """

    def __init__(self, tensor: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.memo: dict[int, Any] = {}
        self._tensor = tensor
        self._empty_twins: dict[int, nn.Module] = {}
        """Twins of modules that are not filled in yet, so that a function can be bound to them earlier."""
        self._pairs: list[tuple[nn.Module, nn.Module]] = []
        self._originals: list[Any] = []
        """All objects whose ids are in `memo`; they must live as long as it does."""

    def copied(self, model: nn.Module) -> nn.Module:
        """The twin of a model."""
        with torch.inference_mode(False), torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                self.tensor(tensor)
            copying = [module for module in model.modules() if hasattr(type(module), "__deepcopy__")]
            copied_elsewhere = {id(part) for module in copying for part in module.modules()}
            for module in model.modules():
                if inner(module) is None and id(module) not in copied_elsewhere:
                    self._empty_twins[id(module)] = self._remember(module, object.__new__(type(module)))
            twin = self.module(model)
            has_user_hooks = [self._hooks(module, twin_module) for module, twin_module in self._pairs]
        names = tuple(
            type(module).__name__ for (module, _), missing in zip(self._pairs, has_user_hooks, strict=True) if missing
        )
        if names:
            twin.__dict__[WITHOUT_HOOKS] = tuple(dict.fromkeys(names))
        return twin

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """The twin's tensor; one copy for all places that hold the same tensor."""
        if id(tensor) not in self.memo:
            copied = self._tensor(tensor)
            if isinstance(tensor, nn.Parameter):
                copied = nn.Parameter(copied, requires_grad=tensor.requires_grad)
            self._remember(tensor, copied)
        existing: torch.Tensor = self.memo[id(tensor)]
        return existing

    def module(self, module: nn.Module) -> nn.Module:
        """The twin of a module, without its wrappers and hooks."""
        empty = self._empty_twins.pop(id(module), None)
        if empty is None and id(module) in self.memo:
            existing: nn.Module = self.memo[id(module)]
            return existing
        if inner(module) is not None:
            inside = self.module(bare(module))
            self._remember(module, inside)
            return inside
        if hasattr(type(module), "__deepcopy__"):
            copied: nn.Module = copy.deepcopy(module, self.memo)
            self._pairs += [(part, self.memo[id(part)]) for part in module.modules() if id(part) in self.memo]
            return copied
        twin: nn.Module = empty if empty is not None else self._remember(module, object.__new__(type(module)))
        self._pairs.append((module, twin))
        state = twin.__dict__
        excluded = _OFFLOADED if "_hf_hook" in module.__dict__ else ()
        for key, value in module.__dict__.items():
            if key in ("_parameters", "_buffers"):
                state[key] = {name: None if tensor is None else self.tensor(tensor) for name, tensor in value.items()}
            elif key == "_modules":
                state[key] = {name: None if child is None else self.module(child) for name, child in value.items()}
            elif key in HOOKS or key in _FLAGS:
                state[key] = OrderedDict()
                self._remember(value, state[key])
            elif key not in _COMPILED and key not in excluded:
                state[key] = self.value(value)
        return twin

    def value(self, value: Any) -> Any:
        """A copy of an attribute's value; a value that cannot be copied is shared."""
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
            table.update((key, self.value(entry)) for key, entry in value.items())
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
            args = [*map(self.value, value.args)]
            return functools.partial(
                self.value(value.func), *args, **{k: self.value(v) for k, v in value.keywords.items()}
            )
        if _is_record(kind):
            instance = self._remember(value, object.__new__(kind))
            instance.__dict__.update((key, self.value(entry)) for key, entry in value.__dict__.items())
            return instance
        try:
            return copy.deepcopy(value, self.memo)
        except Exception:  # a logger, a lock, a file or a generator, which does not affect the outputs
            return value

    def _remember(self, value: Any, copied: Any) -> Any:
        self.memo[id(value)] = copied
        self._originals.append(value)
        return copied

    def _rebound(self, function: types.FunctionType) -> tuple[types.FunctionType, bool, bool]:
        """Rebind a function's closure from the model's objects to the twin's.

        Returns:
            The function; whether its closure holds objects of the model; whether it holds other mutable objects.
        """
        cells = function.__closure__ or ()
        has_own = has_foreign = False
        new_cells = []
        for cell in cells:
            try:
                content = cell.cell_contents
            except ValueError:  # not assigned yet
                new_cells.append(cell)
                continue
            new = content
            if type(content) in _PLAIN or isinstance(content, (type, types.ModuleType)) or content is None:
                pass
            elif id(content) in self.memo or isinstance(content, types.MethodType):
                is_own = id(content) in self.memo or id(content.__self__) in self.memo
                has_own, has_foreign = has_own or is_own, has_foreign or not is_own
                new = self.value(content) if is_own else content
            elif isinstance(content, types.FunctionType) and content is not function:
                new, inner_own, inner_foreign = self._rebound(content)
                has_own, has_foreign = has_own or inner_own, has_foreign or inner_foreign
            else:
                has_foreign = True
            new_cells.append(cell if new is content else types.CellType(new))
        if not has_own:
            return function, has_own, has_foreign
        twin = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(new_cells)
        )
        twin.__kwdefaults__ = function.__kwdefaults__
        return twin, has_own, has_foreign

    def _own_hook(self, hook: Any) -> Any:
        """The twin's version of a hook of the model; None for a hook of the user."""
        if isinstance(hook, types.MethodType):
            return (
                types.MethodType(hook.__func__, self.value(hook.__self__)) if id(hook.__self__) in self.memo else None
            )
        if isinstance(hook, functools.partial):
            inner_hook = self._own_hook(hook.func)
            return inner_hook and functools.partial(inner_hook, *map(self.value, hook.args), **hook.keywords)
        if isinstance(hook, types.FunctionType):
            rebound, has_own, has_foreign = self._rebound(hook)
            return rebound if has_own and not has_foreign else None
        if id(hook) in self.memo or type(hook).__module__.startswith("torch.nn.utils"):
            return self.value(hook)
        return None

    def _hooks(self, module: nn.Module, twin: nn.Module) -> bool:
        """Give the twin the module's own hooks; True if the module has hooks of the user too."""
        has_user_hooks = False
        for name in HOOKS:
            table = {}
            for key, hook in getattr(module, name, {}).items():
                twin_hook = self._own_hook(hook)
                has_user_hooks = has_user_hooks or twin_hook is None
                if twin_hook is not None:
                    table[key] = twin_hook
            target = twin.__dict__.setdefault(name, OrderedDict())
            target.clear()
            target.update(table)
        for name in _FLAGS:
            hooks = twin._forward_pre_hooks if "pre" in name else twin._forward_hooks
            flags = {key: flag for key, flag in getattr(module, name, {}).items() if key in hooks}
            target = twin.__dict__.setdefault(name, OrderedDict())
            target.clear()
            target.update(flags)
        return has_user_hooks


_PLAIN = frozenset(
    {bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device, types.BuiltinFunctionType, type}
)


@functools.cache
def _is_record(kind: Any) -> bool:
    """True for classes whose instances only hold attributes and define no way of copying."""
    standard = ("__reduce_ex__", "__reduce__", "__getstate__", "__new__")
    return (
        kind.__flags__ & _HEAP_TYPE != 0
        and all(getattr(kind, name, None) is getattr(object, name, None) for name in standard)
        and not hasattr(kind, "__deepcopy__")
        and not hasattr(kind, "__setstate__")
        and not any(getattr(base, "__slots__", ()) for base in kind.__mro__)
        and kind.__module__ not in ("threading", "logging", "weakref")
    )


_HEAP_TYPE = 1 << 9
"""The type flag of classes that are defined by a class statement."""
