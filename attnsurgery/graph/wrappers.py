"""Wrappers around a model or its parts: those that are passed through, and those that are refused with the reason.

A *wrapper* is a module that only runs another one: DataParallel, a checkpoint wrapper, torch.compile, PEFT's copy of a
module that it saves. Paths leave wrappers out, so an address is the same for a wrapped and a bare model. Some wrappers
record the parameters of the model when they are made and would miss a block that is inserted or removed later. They are
refused, as the table KINDS says for each verb.

All code of the package that traverses a user's model uses `walk`, `submodule` or `unwrapped`. docs/wrappers.md has the
same table for users.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import torch
from torch import nn

from attnsurgery.errors import SiteError, UsageError, did_you_mean

Verb = Literal["inspect", "operate", "verify", "remove", "bypass", "freeze"]
CHANGING: tuple[Verb, ...] = ("operate", "remove")
EVERY: tuple[Verb, ...] = ("inspect", "operate", "verify", "remove", "bypass", "freeze")


@dataclass(frozen=True, slots=True)
class Kind:
    """A class of another library that wraps models or changes the type of their modules."""

    package: str
    """The first part of the name of the Python module that defines it."""
    cls: str
    """Name of the class."""
    inner: str = ""
    """The attribute with the module that it runs; empty if it is no wrapper."""
    refuses: Mapping[Verb, str] = field(default_factory=dict)
    """Reasons for refusal and what to do instead, by verb; other verbs apply to the inner module."""


def _for(verbs: tuple[Verb, ...], why: str) -> dict[Verb, str]:
    return dict.fromkeys(verbs, why)


_DDP = (
    "DistributedDataParallel averages the gradients of the parameters that existed when it was created: change "
    "model.module, and wrap that in a new DistributedDataParallel"
)
_FSDP = (
    "FSDP has sharded the parameters over processes: call this on the plain model before it is sharded, or load a full "
    "state dict into a plain model"
)
_COMPILED = (
    "torch.compile has compiled the forward as it was: change the model that was compiled (model._orig_mod), and "
    "compile that again"
)
_SCRIPTED = "TorchScript has no Python forward any more: call this on the model before torch.jit.script or trace"
_PEFT = (
    "PEFT saves adapters alone, and blocks would be missing from what it saves: operate on the base first and name the "
    "blocks in modules_to_save, or change model.get_base_model() and save attnsurgery.block_parameters of it yourself"
)
_AVERAGED = (
    "it holds a running average of another model, parameter by parameter: change that model, and start a new average"
)

KINDS: tuple[Kind, ...] = (
    Kind("torch", "DataParallel", "module"),
    Kind("torch", "DistributedDataParallel", "module", _for((*CHANGING, "freeze"), _DDP)),
    Kind("torch", "FullyShardedDataParallel", "_fsdp_wrapped_module", _for(EVERY, _FSDP)),
    Kind("torch", "FSDPModule", "", _for(EVERY, _FSDP)),
    Kind("torch", "OptimizedModule", "_orig_mod", _for((*CHANGING, "bypass"), _COMPILED)),
    Kind("torch", "ScriptModule", "", _for(EVERY, _SCRIPTED)),
    Kind("torch", "ActivationWrapper", "_checkpoint_wrapped_module"),
    Kind("torch", "AveragedModel", "module", _for(CHANGING, _AVERAGED)),
    Kind("timm", "ModelEma", "module", _for(CHANGING, _AVERAGED)),
    Kind("timm", "ModelEmaV2", "module", _for(CHANGING, _AVERAGED)),
    Kind("timm", "ModelEmaV3", "module", _for(CHANGING, _AVERAGED)),
    Kind("peft", "PeftModel", "base_model", _for(CHANGING, _PEFT)),
    Kind("peft", "BaseTuner", "model", _for(CHANGING, _PEFT)),
    Kind("peft", "ModulesToSaveWrapper", "original_module"),
)

_OFFLOADED = (
    "accelerate has replaced the forward of {path!r} and may keep its weights elsewhere: "
    "accelerate.hooks.remove_hook_from_module(model, recurse=True), call this, and dispatch the model again"
)
_QUANTISED = (
    "the weights of {path!r} are {what}, and not plain tensors: call this on the plain model, and quantise or shard it "
    "afterwards"
)
_PACKED = "{path!r} is quantised ({what}): call this on the plain model, and quantise it afterwards"
_LAZY = "the parameters of {path!r} have no shape yet: run the model once on an image, so that it makes them"

_WITHOUT_VALUES = (
    "the parameters of {path!r} have no values, for they are on the meta device: build the model on a real device, "
    "and load its weights there"
)


def _kind(module: nn.Module) -> Kind | None:
    cls: Any = type(module)
    return _kind_of(cls)


@cache
def _kind_of(cls: Any) -> Kind | None:
    for base in cls.__mro__:
        for kind in KINDS:
            if base.__name__ == kind.cls and base.__module__.partition(".")[0] == kind.package:
                return kind
    return None


def inner(module: nn.Module) -> nn.Module | None:
    """The module that a wrapper runs; None if the module is no wrapper."""
    kind = _kind(module)
    if kind is None or not kind.inner:
        return None
    if kind.cls == "ModulesToSaveWrapper":
        return _saved_copy(module)
    wrapped = getattr(module, kind.inner, None)
    return wrapped if isinstance(wrapped, nn.Module) else None


def _saved_copy(module: Any) -> nn.Module:
    """The module that PEFT runs: the copy of the active adapter, or the original module."""
    active = getattr(module, "active_adapters", getattr(module, "active_adapter", ()))
    names = [active] if isinstance(active, str) else list(active)
    copies = [module.modules_to_save[name] for name in names if name in module.modules_to_save]
    off = getattr(module, "disable_adapters", getattr(module, "_disable_adapters", False))
    running: nn.Module = module.original_module if off or not copies else copies[0]
    return running


def bare(module: nn.Module) -> nn.Module:
    """The module inside all wrappers; the module itself if it has none."""
    within = inner(module)
    while within is not None:
        module, within = within, inner(within)
    return module


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules without wrappers, each once, with their paths; in the order of `named_modules`."""
    return ((path, module) for path, module, _ in _walk(model))


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module, list[nn.Module]]]:
    """The modules of `walk`, each with the list of its wrappers, outermost first."""
    visited: set[int] = set()
    stack = [("", model)]
    while stack:
        path, module = stack.pop()
        wrappers: list[nn.Module] = []
        while (within := inner(module)) is not None:
            wrappers.append(module)
            module = within
        if id(module) in visited:
            continue
        visited.add(id(module))
        yield path, module, wrappers
        stack += reversed([(f"{path}.{name}" if path else name, kid) for name, kid in _children(module)])


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, kid) for name, kid in module._modules.items() if kid is not None)


def submodule(model: nn.Module, path: str) -> nn.Module:
    """The module at a path without wrappers.

    Raises:
        SiteError: there is none; the message names the nearest.
    """
    module = bare(model)
    for name in path.split(".") if path else ():
        child = module._modules.get(name)
        if child is None:
            near = did_you_mean(path, (candidate for candidate, _ in walk(model)))
            raise SiteError(f"a block should go into {path!r}, which {type(bare(model)).__name__} does not have.{near}")
        module = bare(child)
    return module


def unwrapped(model: nn.Module, verb: Verb) -> nn.Module:
    """The model inside its wrappers, if `verb` is allowed on it.

    Raises:
        UsageError: a wrapper or another library's change to the model does not allow it; the message says what to do.
    """
    for path, module, wrappers in _walk(model):
        for wrapper in wrappers:
            kind = _kind(wrapper)
            if not path or kind is None or kind not in _AROUND_ALL:
                _check_kind(path or type(wrapper).__name__, wrapper, verb)
        _check_kind(path or type(module).__name__, module, verb)
        _check_state(path or type(module).__name__, module, verb)
    return bare(model)


_NONE = Kind("", "")
_AROUND_ALL = tuple(kind for kind in KINDS if kind.refuses.get("operate") in (_COMPILED, _AVERAGED))
"""Wrappers that are refused around a whole model; around a part of it, only changes to that part are refused."""


def _check_kind(name: str, module: nn.Module, verb: Verb) -> None:
    kind = _kind(module)
    if kind is not None and verb in kind.refuses:
        raise _refusal(verb, name, kind.refuses[verb])


def _check_state(path: str, module: nn.Module, verb: Verb) -> None:
    """
    Raises:
        UsageError: a hook or a tensor type of another library on this module does not allow the verb.
    """
    attributes = module.__dict__
    if "_hf_hook" in attributes and verb in (*CHANGING, "verify", "bypass"):
        raise _refusal(verb, path, _OFFLOADED.format(path=path))
    home = type(module).__module__
    if home.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.nn.quantized")):
        raise _refusal(verb, path, _PACKED.format(path=path, what=f"{home.rpartition('.')[0]}.{type(module).__name__}"))
    for tensor in module._parameters.values():
        kind: Any = type(tensor)
        if tensor is not None and tensor.is_meta and verb == "verify" and not nn.parameter.is_lazy(tensor):
            raise _refusal(verb, path, _WITHOUT_VALUES.format(path=path))
        if tensor is None or kind is nn.Parameter:
            continue
        if nn.parameter.is_lazy(tensor):
            raise _refusal(verb, path, _LAZY.format(path=path))
        if _has_inner_tensors(tensor) and (_is_packed(tensor) or verb in (*CHANGING, "verify", "bypass")):
            what = f"{kind.__module__.partition('.')[0]}'s {kind.__name__}"
            raise _refusal(verb, path, _QUANTISED.format(path=path, what=what))


def _refusal(verb: Verb, name: str, why: str) -> UsageError:
    return UsageError(f"cannot {_WORDS[verb]} {name!r}: {why}.")


_WORDS: dict[Verb, str] = {
    "inspect": "inspect",
    "operate": "operate on",
    "verify": "verify",
    "remove": "remove blocks from",
    "bypass": "bypass blocks of",
    "freeze": "freeze the base of",
}


def check_uncompiled(model: nn.Module, paths: Iterable[str], verb: Verb) -> None:
    """Refuse to change modules inside a compiled part of the model.

    Raises:
        UsageError: one of the modules is in a compiled part, which the message names.
    """
    compiled = list(_compiled(model))
    for path in paths:
        for part in compiled:
            if not part or f"{path}.".startswith(f"{part}."):
                raise _refusal(
                    verb, path, f"torch.compile has compiled {part or 'the model'!r} as it was: {_RECOMPILE}"
                )


_RECOMPILE = "change the model before that part is compiled, or put the part that was compiled (_orig_mod) back first"


def _compiled(model: nn.Module) -> Iterator[str]:
    """Paths, without wrappers, of the parts that are wrapped by torch.compile or compiled in place."""
    for path, module, wrappers in _walk(model):
        wrapped = any((_kind(wrapper) or _NONE).cls == "OptimizedModule" for wrapper in wrappers)
        if wrapped or module.__dict__.get("_compiled_call_impl") is not None:
            yield path


def replaced_forward(module: nn.Module) -> str | None:
    """Name of the function that replaces the forward on the object itself; None if there is none."""
    forward = module.__dict__.get("forward")
    if forward is None:
        return None
    function = getattr(forward, "__func__", forward)
    return str(getattr(function, "__qualname__", type(function).__name__))


def check_forward(path: str, module: nn.Module) -> None:
    """
    Raises:
        SiteError: the forward was replaced on the object, so that a block put into its class would never run.
    """
    name = replaced_forward(module)
    if name is not None:
        raise SiteError(
            f"{path!r} runs {name}, which was set on the object as its forward, and not the forward of its class "
            f"{type(module).__name__}: a block put in here would never run. Put the block elsewhere, make the "
            "change in a subclass, or take the replacement away (del module.forward) and set it again afterwards."
        )


def _has_inner_tensors(tensor: torch.Tensor) -> bool:
    """True for a tensor subclass with inner tensors, such as quantized and sharded tensors."""
    return hasattr(tensor, "__tensor_flatten__") or _is_packed(tensor)


def _is_packed(tensor: torch.Tensor) -> bool:
    """True for a packed tensor, whose shape is not that of the weight."""
    return type(tensor).__module__.partition(".")[0] == "bitsandbytes"


def plain_like(tensor: torch.Tensor) -> torch.Tensor:
    """A plain meta tensor of the same shape and dtype, also for a tensor subclass."""
    if _has_inner_tensors(tensor):
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return torch.empty_like(tensor, device="meta")
