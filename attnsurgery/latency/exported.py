"""A model as ONNX, the form that inference runtimes read, compared with the model itself before anyone relies on it.

torch.export records the forward for one shape of input, and torch.onnx translates it. Both have bugs, and a runtime
that leaves out a block is fast. So the outputs of the runtime are compared with torch's on random input. A block that
starts as the identity adds nothing to the outputs, and a comparison of the model as it is would not notice that the
block is gone. So what is compared, and timed, is a *moved* copy, in which every parameter that is all 0 or all 1 has
other values. That also keeps a runtime from folding an addition of 0 or a multiplication by 1 away, which it could not
do after training.

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
"""The largest difference of an output, as a share of the largest output, by dtype."""
_LARGEST_PROTO = 1 << 30
"""Bytes of weights that surely fit in one protobuf message, whose limit is 2 GiB; more go into a file of their own."""


@dataclass(frozen=True)
class Exported:
    """A model in ONNX with what it must compute."""

    source: bytes | str
    """The file's content; or its path where the weights lie in a second file, and both go with this object."""
    model: str
    """The class of the model, for messages."""
    x_BCHW: torch.Tensor
    """Random input on the CPU."""
    outputs: tuple[torch.Tensor, ...]
    """What torch computes of it, in float32 on the CPU."""


def required(module: str, extra: str) -> Any:
    """The optional module.

    Raises:
        UsageError: it is not installed; the message names the extra that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"this needs the package {module!r}, which cannot be imported here ({first_line(error)}). Install the "
            f"extra:  pip install 'attnsurgery[{extra}]'"
        ) from error


def moved(model: nn.Module) -> nn.Module:
    """A copy in which no parameter is all 0 or all 1; the same copy each time."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in filter(_constant, model.parameters()):
            size, sign = torch.rand((2, *parameter.shape), generator=generator)
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            parameter.add_(((0.1 + 0.1 * size) * (sign - 0.5).sign() / fan_in**0.5).to(parameter))
    return model


def exported(model: nn.Module, shape: tuple[int, int, int, int], dtype: torch.dtype, extra: str) -> Exported:
    """The moved model in ONNX for inputs of that shape (B, C, H, W) and dtype.

    Args:
        extra: what to install if the exporter's packages are missing.

    Raises:
        UsageError: a package is missing, or the model cannot be exported or cannot take such an input.
    """
    for module in ("onnx", "onnxscript"):
        required(module, extra)
    subject = moved(model)
    program, x_BCHW, outputs = _recorded(subject, shape, dtype)
    if not _large(subject):
        file = io.BytesIO()
        program.save(file)
        return Exported(file.getvalue(), type(model).__name__, x_BCHW, outputs)
    folder = tempfile.mkdtemp(prefix="attnsurgery-")
    one = Exported(os.path.join(folder, "model.onnx"), type(model).__name__, x_BCHW, outputs)
    weakref.finalize(one, shutil.rmtree, folder, ignore_errors=True)
    program.save(one.source, external_data=True)
    return one


def export_onnx(
    model: nn.Module, path: Path, input_size: tuple[int, int, int], *, batch_size: int = 1, check: bool = True
) -> float | None:
    """Write the model, in float32 and eval mode, as an ONNX file for one size of input.

    First the model is compared in ONNX Runtime on the CPU, as it is and, if it has constant parameters, moved. Weights
    of more than 1 GiB go into a second file beside it, `<path>.data`.

    Args:
        input_size: channels, height, width.
        check: compare; otherwise only the exporter's packages are needed.

    Returns:
        The largest difference of an output, as a share of the largest output; None where nothing was compared.

    Raises:
        UsageError: a package is missing, or the model cannot be exported.
        ExportError: the file computes something else than the model; nothing was written.
    """
    extra, shape, largest = "onnxruntime", (batch_size, *input_size), 0.0
    onnx, _ = required("onnx", extra), required("onnxscript", extra)
    runtime = required("onnxruntime", extra) if check else None
    if runtime and _starts_constant(model):  # otherwise the file itself shows all that a moved copy would
        largest = _checked(exported(model, shape, torch.float32, extra), runtime)
    program, x_BCHW, outputs = _recorded(model, shape, torch.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        file = os.path.join(folder, path.name)
        program.save(file, external_data=_large(model))
        if runtime:
            onnx.checker.check_model(file)
            largest = max(largest, _checked(Exported(file, type(model).__name__, x_BCHW, outputs), runtime))
        for part in sorted(os.listdir(folder), reverse=True):  # the weights before the graph that names them
            os.replace(os.path.join(folder, part), path.parent / part)
    return largest if runtime else None


def compared(one: Exported, got: Outputs, tolerance: float, runtime: str) -> float:
    """The largest difference between what a runtime and torch computed, as a share of torch's largest output.

    Raises:
        ExportError: it is more than the tolerance, or the outputs are others in number, shape or finiteness.
    """
    shapes = [tuple(value.shape) for value in got], [tuple(value.shape) for value in one.outputs]
    if shapes[0] != shapes[1]:
        raise ExportError(f"{one.model} has outputs of shapes {shapes[0]} in {runtime}, and {shapes[1]} in torch.")
    largest = 0.0
    for mine, theirs in zip(one.outputs, got, strict=True):
        if not bool(torch.isfinite(mine).all()):
            raise ExportError(f"{one.model} has outputs that are not finite in torch, so nothing can be compared.")
        error = float((theirs.cpu().float() - mine).abs().max()) if mine.numel() else 0.0
        scale = float(mine.abs().max()) if mine.numel() else 1.0
        difference = error / scale if scale else math.inf if error else 0.0
        if not difference <= tolerance:  # not a number is no agreement either
            raise ExportError(
                f"the exported {one.model} computes something else in {runtime} than in torch: outputs differ by up to "
                f"{error:.3g}, which is {difference:.2g} of the largest ({scale:.3g}); {tolerance:.0e} is allowed. "
                "Neither its outputs nor its latency are the model's."
            )
        largest = max(largest, difference)
    return largest


def outputs_of(model: nn.Module, x_BCHW: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """All tensors that the forward returns, in the order in which the file has them.

    Raises:
        UsageError: the model cannot take the input.
    """
    try:
        found = model(x_BCHW)
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        size = "x".join(map(str, x_BCHW.shape[1:]))
        raise UsageError(f"{type(model).__name__} cannot take an input of {size}: {first_line(error)}") from error
    return tuple(leaf.detach() for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor))


def _constant(parameter: torch.Tensor) -> bool:
    """All 0 or all 1."""
    first = parameter.flatten()[:1]
    return parameter.is_floating_point() and bool(((parameter == first) & ((first == 0) | (first == 1))).all())


def _starts_constant(model: nn.Module) -> bool:
    return any(map(_constant, model.parameters()))


def _large(model: nn.Module) -> bool:
    return sum(int(value.nbytes) for value in model.state_dict().values()) > _LARGEST_PROTO


def _recorded(
    model: nn.Module, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> tuple[Any, torch.Tensor, tuple[torch.Tensor, ...]]:
    """The exporter's program of a copy, random input, and what torch computes of it in float32."""
    with torch.inference_mode(False), torch.no_grad():  # the exporter needs tensors that count their versions
        subject = copy.deepcopy(model).eval().to("cpu", dtype).to(memory_format=torch.contiguous_format)
        x_BCHW = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        outputs = outputs_of(copy.deepcopy(subject).float(), x_BCHW.float())
        return _program(subject, x_BCHW), x_BCHW, outputs


def _program(model: nn.Module, x_BCHW: torch.Tensor) -> Any:
    """What the exporter makes of the model.

    Raises:
        UsageError: it cannot export the model.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the exporter's own code
            program = torch.onnx.export(
                model, (x_BCHW,), dynamo=True, verbose=False, opset_version=OPSET, input_names=[INPUT]
            )
    except Exception as error:  # whatever an exporter meets
        said = first_line(error.__cause__ if isinstance(error.__cause__, Exception) else error)
        raise UsageError(f"torch.onnx cannot export {type(model).__name__}: {said}") from error
    assert program is not None
    return program


def _checked(one: Exported, runtime: Any) -> float:
    """The difference in ONNX Runtime on the CPU."""
    session = runtime.InferenceSession(one.source, providers=["CPUExecutionProvider"])
    found = [torch.from_numpy(value) for value in session.run(None, {INPUT: one.x_BCHW.numpy()})]
    return compared(one, found, TOLERANCE["float32"], "ONNX Runtime")
