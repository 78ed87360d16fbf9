"""One forward of a weightless twin, written down: who returned what, in which order, how often.

On the meta device nothing is allocated and nothing computed, and the model itself is not touched (see `twin`).
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
from attnsurgery.graph.twin import LEFT_OUT, quietly

BATCH = 2
LOOPS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Swapped by timm and torch after surgery (SyncBatchNorm, fusing): nothing may hang on them. None changes a shape.
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


def _linear(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], module.out_features))


def _lstm(module: nn.LSTM, x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    directions = 2 if module.bidirectional else 1
    layers, batch = directions * module.num_layers, x.shape[:-2] if module.batch_first else x.shape[1:-1]
    width = module.proj_size or module.hidden_size
    state = x.new_empty((layers, *batch, width)), x.new_empty((layers, *batch, module.hidden_size))
    return x.new_empty((*x.shape[:-1], directions * width)), state


# What torch takes long to find the shape of on meta, an LSTM a step of the sequence at a time.
SHAPES: dict[type[nn.Module], Callable[..., Any]] = {nn.Linear: _linear, nn.LSTM: _lstm}
POINTWISE = {"GELU", "GELUTanh", "Hardsigmoid", "Hardswish", "Mish", "ReLU", "ReLU6", "SiLU", "Sigmoid", "Softmax"}
"""Activations of torch and timm, by name; the shape is the input's too, unless they write to it."""


def _like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def _is_pointwise(module: nn.Module) -> bool:
    kind = type(module)
    theirs = kind.__module__ in ("torch.nn.modules.activation", "timm.layers.activations")
    return theirs and kind.__name__ in POINTWISE and not getattr(module, "inplace", False)


class Found(NamedTuple):
    """A site before its stage is known."""

    order: float
    address: str
    owner: str
    node: str | None
    shape: tuple[int, ...]
    role: Role
    users: tuple[str, ...] = ()
    spatial: bool = False
    element: tuple[int, int] | None = None
    """Which of how many, where the owner returns a tuple; of 0, where it returns a list."""
    host: str = ""
    """The child that holds the block, where the owner loops over its children and can have no other."""


Data = list[tuple[torch.Tensor, int]]
"""Tensors with the number of in-place operations they had seen."""


@dataclass
class Run:
    """What one forward showed, by module path."""

    finished: dict[str, int] = field(default_factory=dict)
    """Order in which the modules returned."""
    inputs: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)
    given: dict[str, Data] = field(default_factory=dict)
    """The tensors among the inputs, as they were when the module was called."""
    returned: dict[str, Data] = field(default_factory=dict)
    """The tensors among the outputs, as they were when it returned."""
    calls: dict[str, int] = field(default_factory=dict)

    def once(self, path: str) -> bool:
        return self.calls.get(path) == 1


def example(model: nn.Module, size: tuple[int, int, int], device: torch.device | str) -> torch.Tensor:
    """A batch of images, (2, C, H, W), random where the device has values."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return torch.randn((BATCH, *size), device=device, dtype=dtype)


def record(twin: nn.Module, modules: dict[str, nn.Module], size: tuple[int, int, int]) -> Run:
    """Run the twin once on images of (C, H, W) and watch `modules`."""
    run = Run()

    def before(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            run.given[path] = [(tensor, tensor._version) for value in args for tensor in tensors(value)]

        return hook

    def watch(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            run.calls[path] = run.calls.get(path, 0) + 1
            run.finished.setdefault(path, len(run.finished))
            run.inputs[path] = (args, kwargs)
            run.outputs[path] = output
            run.returned[path] = [(tensor, tensor._version) for tensor in tensors(output)]

        return hook

    for module in modules.values():
        if isinstance(module, NORMS) or _is_pointwise(module):  # milliseconds on meta, and the shape is the input's
            module.__dict__["forward"] = _like
        elif type(module) in SHAPES:
            module.__dict__["forward"] = functools.partial(SHAPES[type(module)], module)
    handles = [module.register_forward_hook(watch(path), with_kwargs=True) for path, module in modules.items()]
    handles += [module.register_forward_pre_hook(before(path)) for path, module in modules.items()]
    try:
        with ONE_AT_A_TIME, quietly(), torch.no_grad(), autocast_on_meta():
            twin(example(twin, size, "meta"))
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        left_out = ", ".join(twin.__dict__.get(LEFT_OUT, ())[:3])
        hooks = f" Hooks that were put on modules ({left_out}) are not run here." if left_out else ""
        advice = "If it takes others, say input_size=(channels, height, width)."
        if isinstance(error, TypeError) and "positional argument" in said:
            advice = "Where a model takes more than images, call this on the part of it that takes images alone."
        raise SurgeryError(
            f"{type(twin).__name__} does not run on images of {'x'.join(map(str, size))}: {said}. {advice}{hooks}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return run


@contextmanager
def autocast_on_meta() -> Iterator[None]:
    """For torch before 2.7, which has no autocast there, not even one to be switched off, as efficientvit_mit does."""
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
    """The shape without batch of a tensor that a block could take, else None."""
    if isinstance(value, torch.Tensor) and value.ndim in (3, 4) and value.shape[0] == BATCH and value.numel():
        return tuple(int(side) for side in value.shape[1:])
    return None


def tensors(value: Any) -> tuple[torch.Tensor, ...]:
    """The tensors of a list or tuple, or the one that the value is."""
    if isinstance(value, torch.Tensor):
        return (value,)
    return tuple(t for t in value if isinstance(t, torch.Tensor)) if isinstance(value, (list, tuple)) else ()


def same_data(one: Data, other: Data) -> bool:
    """True if a tensor of the one is, or is a view of, a tensor of the other, with nothing written in between."""
    held = {(tensor.untyped_storage()._cdata, version) for tensor, version in one}
    return any((tensor.untyped_storage()._cdata, version) in held for tensor, version in other)
