"""Record one forward of a twin without weights: what each module returned, in which order, and how often it ran.

On the meta device nothing is allocated or computed. The model itself is not run (see `twin`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from attnsurgery.errors import SurgeryError
from attnsurgery.graph.site import Role
from attnsurgery.graph.trace import ONE_AT_A_TIME
from attnsurgery.graph.twin import WITHOUT_HOOKS, without_side_effects

BATCH = 2
LOOPS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# timm and torch replace these after surgery (SyncBatchNorm, fusing), so no block may depend on them. They keep shapes.
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


def _linear(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], module.out_features))


def _lstm(module: nn.LSTM, x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    directions = 2 if module.bidirectional else 1
    layers, batch = directions * module.num_layers, x.shape[:-2] if module.batch_first else x.shape[1:-1]
    width = module.proj_size or module.hidden_size
    state = x.new_empty((layers, *batch, width)), x.new_empty((layers, *batch, module.hidden_size))
    return x.new_empty((*x.shape[:-1], directions * width)), state


# Modules that are slow on the meta device; an LSTM runs there step by step.
SHAPES: dict[type[nn.Module], Callable[..., Any]] = {nn.Linear: _linear, nn.LSTM: _lstm}
POINTWISE = {"GELU", "GELUTanh", "Hardsigmoid", "Hardswish", "Mish", "ReLU", "ReLU6", "SiLU", "Sigmoid", "Softmax"}
"""Activations of torch and timm by class name; their output has the shape of the input."""


def _like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def _is_pointwise(module: nn.Module) -> bool:
    kind = type(module)
    is_standard = kind.__module__ in ("torch.nn.modules.activation", "timm.layers.activations")
    return is_standard and kind.__name__ in POINTWISE and not getattr(module, "inplace", False)


class UnstagedSite(NamedTuple):
    """A site whose layout and stage are not determined yet; the fields are those of `Site`."""

    order: float
    """The site's `depth`."""
    address: str
    owner: str
    node: str | None
    shape: tuple[int, ...]
    role: Role
    users: tuple[str, ...] = ()
    spatial: bool = False
    element: tuple[int, int] | None = None
    host: str = ""
    attention: str = ""


VersionedTensors = list[tuple[torch.Tensor, int]]
"""Tensors, each with its version: the number of in-place operations on it so far."""


@dataclass
class ForwardRun:
    """The record of one forward, by module path."""

    order: dict[str, int] = field(default_factory=dict)
    """Position in the order in which the modules returned."""
    inputs: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    """Arguments of the module's last call, positional and by keyword."""
    outputs: dict[str, Any] = field(default_factory=dict)
    """Result of the module's last call."""
    input_tensors: dict[str, VersionedTensors] = field(default_factory=dict)
    """Tensors among the inputs, with their versions when the module was called."""
    output_tensors: dict[str, VersionedTensors] = field(default_factory=dict)
    """Tensors among the outputs, with their versions when the module returned."""
    calls: dict[str, int] = field(default_factory=dict)
    """How often the module was called."""

    def once(self, path: str) -> bool:
        """True if the module was called exactly once."""
        return self.calls.get(path) == 1


def example(model: nn.Module, size: tuple[int, int, int], device: torch.device | str) -> torch.Tensor:
    """A batch of images, (2, C, H, W), random where the device has values."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return torch.randn((BATCH, *size), device=device, dtype=dtype)


def record_forward(twin: nn.Module, modules: dict[str, nn.Module], size: tuple[int, int, int]) -> ForwardRun:
    """Run the twin once on images of (C, H, W) and record what `modules` do.

    Raises:
        SurgeryError: the twin does not run on such images.
    """
    run = ForwardRun()

    def before(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            run.input_tensors[path] = [(tensor, tensor._version) for value in args for tensor in tensors(value)]

        return hook

    def watch(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            run.calls[path] = run.calls.get(path, 0) + 1
            run.order.setdefault(path, len(run.order))
            run.inputs[path] = (args, kwargs)
            run.outputs[path] = output
            run.output_tensors[path] = [(tensor, tensor._version) for tensor in tensors(output)]

        return hook

    for module in modules.values():
        if isinstance(module, NORMS) or _is_pointwise(
            module
        ):  # slow on the meta device, and the shape is that of the input
            module.__dict__["forward"] = _like
        elif type(module) in SHAPES:
            module.__dict__["forward"] = functools.partial(SHAPES[type(module)], module)
    handles = [module.register_forward_hook(watch(path), with_kwargs=True) for path, module in modules.items()]
    handles += [module.register_forward_pre_hook(before(path)) for path, module in modules.items()]
    try:
        with ONE_AT_A_TIME, without_side_effects(), torch.no_grad(), autocast_on_meta():
            twin(example(twin, size, "meta"))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        hooked = ", ".join(twin.__dict__.get(WITHOUT_HOOKS, ())[:3])
        hooks = f" Hooks that were put on modules ({hooked}) are not run here." if hooked else ""
        advice = "If it takes others, say input_size=(channels, height, width)."
        if isinstance(error, TypeError) and "positional argument" in reason:
            advice = "Where a model takes more than images, call this on the part of it that takes images alone."
        raise SurgeryError(
            f"{type(twin).__name__} does not run on images of {'x'.join(map(str, size))}: {reason}. {advice}{hooks}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return run


@contextmanager
def autocast_on_meta() -> Iterator[None]:
    """Let models use autocast on the meta device.

    Before torch 2.7 it fails there even when it is disabled, as in efficientvit_mit.
    """
    if torch.__version__ >= "2.7":
        yield
        return
    autocast = torch.autocast

    def switched(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return nullcontext() if device_type == "meta" else autocast(device_type, *args, **kwargs)

    vars(torch)["autocast"] = switched
    try:
        yield
    finally:
        vars(torch)["autocast"] = autocast


def map_shape(value: Any) -> tuple[int, ...] | None:
    """The shape without batch if the value is a tensor that a block could take, else None."""
    if isinstance(value, torch.Tensor) and value.ndim in (3, 4) and value.shape[0] == BATCH and value.numel():
        return tuple(int(side) for side in value.shape[1:])
    return None


def tensors(value: Any) -> tuple[torch.Tensor, ...]:
    """The tensors of a list or tuple; for a tensor, the tensor itself."""
    if isinstance(value, torch.Tensor):
        return (value,)
    return tuple(t for t in value if isinstance(t, torch.Tensor)) if isinstance(value, (list, tuple)) else ()


def same_data(first: VersionedTensors, second: VersionedTensors) -> bool:
    """True if tensors of the two lists share memory at the same version, so nothing was written in between."""
    storages = {(tensor.untyped_storage()._cdata, version) for tensor, version in first}
    return any((tensor.untyped_storage()._cdata, version) in storages for tensor, version in second)
