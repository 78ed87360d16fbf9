"""Exports models to ONNX, the format of inference runtimes, and compares their outputs with torch's.

torch.export records the forward pass for one shape of input, and torch.onnx translates it. Both have bugs, and a
runtime that omits a block is fast. So the outputs of the runtime are compared with torch's on random input. A block
that starts as the identity adds nothing to the outputs, so its absence would not be noticed. Therefore a *perturbed*
copy is compared and timed, in which every parameter that is all 0 or all 1 has other values. A runtime can also not
remove additions of 0 or multiplications by 1 from it, which would be impossible after training.

Shape letters in this file:  B batch, C channels, H height, W width.
"""

from __future__ import annotations

import copy
import importlib
import io
import math
import os
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from attnsurgery.errors import ExportError, UsageError
from attnsurgery.latency._base import first_line

Outputs = Sequence[torch.Tensor]

OPSET = 18
INPUT = "input"
"""The name of the input in the file."""
TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 5e-2}
"""By dtype, the largest accepted difference of an output, as a share of the largest output."""
_LARGEST_PROTO = 1 << 30
"""Size of weights that certainly fit into one protobuf message, whose limit is 2 GiB; others get their own file."""


@dataclass(frozen=True)
class Exported:
    """A model in ONNX, with an input and the expected outputs."""

    source: bytes | str
    """The content of the file; or its path if the weights are in a second file. Both are deleted with this object."""
    model: str
    """The name of the model's class, for messages."""
    x_BCHW: torch.Tensor
    """Random input on the CPU."""
    outputs: tuple[torch.Tensor, ...]
    """Torch's outputs for it, in float32 on the CPU."""


def import_optional(module: str, extra: str) -> Any:
    """Import an optional module.

    Args:
        module: its name.
        extra: the extra of this package that installs it.

    Raises:
        UsageError: it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"this needs the package {module!r}, which cannot be imported here ({first_line(error)}). Install the "
            f"extra:  pip install 'attnsurgery[{extra}]'"
        ) from error


def perturbed(model: nn.Module) -> nn.Module:
    """A copy in which no parameter is all 0 or all 1; its values are the same for each call."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in filter(_constant, model.parameters()):
            size, sign = torch.rand((2, *parameter.shape), generator=generator)
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            parameter.add_(((0.1 + 0.1 * size) * (sign - 0.5).sign() / fan_in**0.5).to(parameter))
    return model


def export(model: nn.Module, shape: tuple[int, int, int, int], dtype: torch.dtype, extra: str) -> Exported:
    """The perturbed model in ONNX.

    Args:
        model: in any state; it is not changed.
        shape: (B, C, H, W) of the input.
        dtype: of the input and the weights.
        extra: the extra of this package that installs the exporter.

    Raises:
        UsageError: a package is missing, or the model cannot be exported or cannot take such an input.
    """
    for module in ("onnx", "onnxscript"):
        import_optional(module, extra)
    subject = perturbed(model)
    program, x_BCHW, outputs = _export_program(subject, shape, dtype)
    if not _large(subject):
        file = io.BytesIO()
        program.save(file)
        return Exported(file.getvalue(), type(model).__name__, x_BCHW, outputs)
    folder = tempfile.mkdtemp(prefix="attnsurgery-")
    result = Exported(os.path.join(folder, "model.onnx"), type(model).__name__, x_BCHW, outputs)
    weakref.finalize(result, shutil.rmtree, folder, ignore_errors=True)
    program.save(result.source, external_data=True)
    return result


def export_onnx(
    model: nn.Module, path: Path, input_size: tuple[int, int, int], *, batch_size: int = 1, check: bool = True
) -> float | None:
    """Write a model, in float32 and eval mode, as an ONNX file for one size of input.

    Before that, the outputs of ONNX Runtime on the CPU are compared with torch's, for the model and, if it has constant
    parameters, for a perturbed copy. Weights of more than 1 GiB are written to a second file, `<path>.data`.

    Args:
        model: in any state; it is not changed.
        path: of the file.
        input_size: channels, height, width.
        batch_size: number of images in the input.
        check: compare; without it only the exporter's packages are needed.

    Returns:
        The largest difference of an output, as a share of the largest output; None without a comparison.

    Raises:
        UsageError: a package is missing, or the model cannot be exported.
        ExportError: the file does not compute the same as the model; nothing was written.
    """
    extra, shape, largest = "onnxruntime", (batch_size, *input_size), 0.0
    onnx, _ = import_optional("onnx", extra), import_optional("onnxscript", extra)
    runtime = import_optional("onnxruntime", extra) if check else None
    if runtime and _has_constants(model):  # otherwise the comparison of the file itself suffices
        largest = _onnxruntime_difference(export(model, shape, torch.float32, extra), runtime)
    program, x_BCHW, outputs = _export_program(model, shape, torch.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        file = os.path.join(folder, path.name)
        program.save(file, external_data=_large(model))
        if runtime:
            onnx.checker.check_model(file)
            largest = max(
                largest, _onnxruntime_difference(Exported(file, type(model).__name__, x_BCHW, outputs), runtime)
            )
        for part in sorted(os.listdir(folder), reverse=True):  # the weights before the graph that refers to them
            os.replace(os.path.join(folder, part), path.parent / part)
    return largest if runtime else None


def compare_outputs(reference: Exported, outputs: Outputs, tolerance: float, runtime: str) -> float:
    """The largest difference between the outputs of a runtime and torch's, as a share of torch's largest output.

    Args:
        reference: the model with torch's outputs.
        outputs: those of the runtime.
        tolerance: the largest accepted difference.
        runtime: its name, for messages.

    Raises:
        ExportError: the difference exceeds the tolerance, or the outputs differ in number, shape or finiteness.
    """
    shapes = [tuple(value.shape) for value in outputs], [tuple(value.shape) for value in reference.outputs]
    if shapes[0] != shapes[1]:
        raise ExportError(
            f"{reference.model} has outputs of shapes {shapes[0]} in {runtime}, and {shapes[1]} in torch."
        )
    largest = 0.0
    for expected, actual in zip(reference.outputs, outputs, strict=True):
        if not bool(torch.isfinite(expected).all()):
            raise ExportError(
                f"{reference.model} has outputs that are not finite in torch, so nothing can be compared."
            )
        error = float((actual.cpu().float() - expected).abs().max()) if expected.numel() else 0.0
        scale = float(expected.abs().max()) if expected.numel() else 1.0
        difference = error / scale if scale else math.inf if error else 0.0
        if not difference <= tolerance:  # also raises for NaN
            raise ExportError(
                f"the exported {reference.model} computes something else in {runtime} than in torch: outputs differ by "
                f"up to {error:.3g}, which is {difference:.2g} of the largest ({scale:.3g}); "
                f"{tolerance:.0e} is allowed. Neither its outputs nor its latency are the model's."
            )
        largest = max(largest, difference)
    return largest


def outputs_of(model: nn.Module, x_BCHW: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """All tensors that the forward pass returns, in the order of the file's outputs.

    Raises:
        UsageError: the model cannot take the input.
    """
    try:
        result = model(x_BCHW)
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        size = "x".join(map(str, x_BCHW.shape[1:]))
        raise UsageError(f"{type(model).__name__} cannot take an input of {size}: {first_line(error)}") from error
    return tuple(leaf.detach() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))


def _constant(parameter: torch.Tensor) -> bool:
    """Whether a parameter is all 0 or all 1."""
    first = parameter.flatten()[:1]
    return parameter.is_floating_point() and bool(((parameter == first) & ((first == 0) | (first == 1))).all())


def _has_constants(model: nn.Module) -> bool:
    return any(map(_constant, model.parameters()))


def _large(model: nn.Module) -> bool:
    return sum(int(value.nbytes) for value in model.state_dict().values()) > _LARGEST_PROTO


def _export_program(
    model: nn.Module, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> tuple[Any, torch.Tensor, tuple[torch.Tensor, ...]]:
    """The exporter's program of a copy, random input, and torch's outputs for it in float32."""
    with torch.inference_mode(False), torch.no_grad():  # the exporter needs tensors with version counters
        subject = copy.deepcopy(model).eval().to("cpu", dtype).to(memory_format=torch.contiguous_format)
        x_BCHW = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        outputs = outputs_of(copy.deepcopy(subject).float(), x_BCHW.float())
        return _program(subject, x_BCHW), x_BCHW, outputs


def _program(model: nn.Module, x_BCHW: torch.Tensor) -> Any:
    """The exporter's program of a model.

    Raises:
        UsageError: it cannot export the model.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the exporter's own code
            program = torch.onnx.export(
                model, (x_BCHW,), dynamo=True, verbose=False, opset_version=OPSET, input_names=[INPUT]
            )
    except Exception as error:  # the exporter raises exceptions of any class
        message = first_line(error.__cause__ if isinstance(error.__cause__, Exception) else error)
        raise UsageError(f"torch.onnx cannot export {type(model).__name__}: {message}") from error
    assert program is not None
    return program


def _onnxruntime_difference(reference: Exported, runtime: Any) -> float:
    """The largest difference in ONNX Runtime on the CPU, as `compare_outputs`."""
    session = runtime.InferenceSession(reference.source, providers=["CPUExecutionProvider"])
    outputs = [torch.from_numpy(value) for value in session.run(None, {INPUT: reference.x_BCHW.numpy()})]
    return compare_outputs(reference, outputs, TOLERANCE["float32"], "ONNX Runtime")
