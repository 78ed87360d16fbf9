"""What stands between a caller and the model: wrappers that are followed, and those that are refused with the reason.

A *wrapper* is a module that runs another one and computes nothing of its own: DataParallel, a checkpoint wrapper,
torch.compile, PEFT's copy of a module that it saves. Paths here leave wrappers out, so an address is the same whether
the model is wrapped or bare. Some wrappers have taken note of the parameters that were there when they were made, and
would miss a block that comes or goes later: those are refused, as the table KINDS says for each verb.

Everything in the package that walks through a user's model goes through `walk`, `submodule` or `unwrapped`.
docs/wrappers.md is the same table for people.
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
    """A class of another library that wraps models, or that changes what a module is."""

    package: str
    """The first part of the name of the Python module that defines it."""
    cls: str
    inner: str = ""
    """The attribute that holds the module it runs; empty where there is none to follow."""
    refuses: Mapping[Verb, str] = field(default_factory=dict)
    """Why, and what to do instead; a verb that is not there works on what is inside."""


def _for(verbs: tuple[Verb, ...], why: str) -> dict[Verb, str]:
    return dict.fromkeys(verbs, why)


_DDP = (
    "DistributedDataParallel averages the gradients of the parameters that it has found when it was made: change "
    "model.module, and wrap that in a new DistributedDataParallel"
)
_FSDP = (
    "FSDP has sharded the parameters over processes: call this on the plain model before it is sharded, or load a full "
    "state dict into a plain model"
)
_COMPILED = (
    "torch.compile has compiled the forward as it was: change the model that was compiled (model._orig_mod), and "
    "compile that anew"
)
_SCRIPTED = "TorchScript has no Python forward any more: call this on the model before torch.jit.script or trace"
_PEFT = (
    "PEFT saves adapters alone, and blocks would be missing from what it saves: operate on the base first and name the "
    "blocks in modules_to_save, or change model.get_base_model() and save attnsurgery.block_parameters of it yourself"
)
_AVERAGED = (
    "it holds a running average of another model, parameter by parameter: change that model, and begin the average anew"
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
    """The module that a wrapper runs; None for a module that is no wrapper."""
    kind = _kind(module)
    if kind is None or not kind.inner:
        return None
    if kind.cls == "ModulesToSaveWrapper":
        return _saved_copy(module)
    held = getattr(module, kind.inner, None)
    return held if isinstance(held, nn.Module) else None


def _saved_copy(module: Any) -> nn.Module:
    """PEFT keeps the module as it was and one copy for each adapter, and runs that of the active one."""
    active = getattr(module, "active_adapters", getattr(module, "active_adapter", ()))
    names = [active] if isinstance(active, str) else list(active)
    copies = [module.modules_to_save[name] for name in names if name in module.modules_to_save]
    off = getattr(module, "disable_adapters", getattr(module, "_disable_adapters", False))
    found: nn.Module = module.original_module if off or not copies else copies[0]
    return found


def bare(module: nn.Module) -> nn.Module:
    """What a module runs in the end: itself, or what is inside all of its wrappers."""
    within = inner(module)
    while within is not None:
        module, within = within, inner(within)
    return module


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module that can run, once, by its path without wrappers; in the order of `named_modules`."""
    return ((path, module) for path, module, _ in _walk(model))


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module, list[nn.Module]]]:
    """The same with the wrappers around each, outermost first."""
    seen: set[int] = set()
    stack = [("", model)]
    while stack:
        path, module = stack.pop()
        wrappers: list[nn.Module] = []
        while (within := inner(module)) is not None:
            wrappers.append(module)
            module = within
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module, wrappers
        stack += reversed([(f"{path}.{name}" if path else name, kid) for name, kid in _children(module)])


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, kid) for name, kid in module._modules.items() if kid is not None)


def submodule(model: nn.Module, path: str) -> nn.Module:
    """The module at a path without wrappers.

    Raises:
        SiteError: there is none; the message names the nearest.
    """
    found = bare(model)
    for name in path.split(".") if path else ():
        child = found._modules.get(name)
        if child is None:
            near = did_you_mean(path, (known for known, _ in walk(model)))
            raise SiteError(f"the plan cuts into {path!r}, which {type(bare(model)).__name__} does not have.{near}")
        found = bare(child)
    return found


def unwrapped(model: nn.Module, verb: Verb) -> nn.Module:
    """The model inside its wrappers, if `verb` may work on it.

    Raises:
        UsageError: a wrapper, or what another library has made of the model, does not allow it; says what to do.
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
"""What is refused around a whole model; where it is around a part, the part alone is."""


def _check_kind(name: str, module: nn.Module, verb: Verb) -> None:
    kind = _kind(module)
    if kind is not None and verb in kind.refuses:
        raise _refusal(verb, name, kind.refuses[verb])


def _check_state(path: str, module: nn.Module, verb: Verb) -> None:
    """Refuse what has been done to a single module."""
    own = module.__dict__
    if "_hf_hook" in own and verb in (*CHANGING, "verify", "bypass"):
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
        if _is_made_of_others(tensor) and (_is_packed(tensor) or verb in (*CHANGING, "verify", "bypass")):
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
    """Refuse to change modules that a compiled part of the model has seen.

    Raises:
        UsageError: names the compiled part.
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
    """Paths without wrappers of the parts that torch.compile has wrapped, or that were compiled in place."""
    for path, module, wrappers in _walk(model):
        wrapped = any((_kind(wrapper) or _NONE).cls == "OptimizedModule" for wrapper in wrappers)
        if wrapped or module.__dict__.get("_compiled_call_impl") is not None:
            yield path


def replaced_forward(module: nn.Module) -> str | None:
    """What stands in the place of the module's own forward on this very object, in words; None if nothing does."""
    forward = module.__dict__.get("forward")
    if forward is None:
        return None
    made = getattr(forward, "__func__", forward)
    return str(getattr(made, "__qualname__", type(made).__name__))


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


def _is_made_of_others(tensor: torch.Tensor) -> bool:
    """True for a subclass of tensors that holds other tensors, as quantised and sharded ones do."""
    return hasattr(tensor, "__tensor_flatten__") or _is_packed(tensor)


def _is_packed(tensor: torch.Tensor) -> bool:
    """True for a tensor whose shape is not that of the weight that it stands for."""
    return type(tensor).__module__.partition(".")[0] == "bitsandbytes"


def plain_like(tensor: torch.Tensor) -> torch.Tensor:
    """A meta tensor of the same shape and dtype, without what a subclass of tensors adds."""
    if _is_made_of_others(tensor):
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return torch.empty_like(tensor, device="meta")
