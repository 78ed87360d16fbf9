"""Latency in ONNX Runtime, on the CPU and on CUDA; this file has not been run on CUDA yet.

Input and outputs are tensors that are bound to the session, so a call copies nothing. Idle threads spin for a while, as
by ONNX Runtime's default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from attnsurgery.errors import UsageError
from attnsurgery.latency._base import LATENCY
from attnsurgery.latency.conditions import DTYPES, Conditions
from attnsurgery.latency.exported import INPUT, Exported
from attnsurgery.latency.protocol import Effort
from attnsurgery.latency.runtime import Loaded, RuntimeLatency

Provider = tuple[str, dict[str, Any]]

_BFLOAT16 = 16
"""The number of bfloat16 in onnx.TensorProto, since numpy has no such type."""


@dataclass(frozen=True, slots=True)
class _Bound:
    """A call with references to the tensors whose memory the session reads and writes by address."""

    session: Any
    binding: Any
    x_BCHW: torch.Tensor
    outputs: list[torch.Tensor]

    def __call__(self) -> None:
        self.session.run_with_iobinding(self.binding)


@LATENCY.register("onnxruntime")
class OnnxRuntimeLatency(RuntimeLatency):
    """Measures with the execution provider of the device: CPUExecutionProvider or CUDAExecutionProvider.

    On CUDA, `channels_last` selects convolutions in NHWC, and `cudnn_benchmark` cuDNN's exhaustive search.

    Args:
        conditions: what is measured.
        effort: how long; by default `Effort()`.

    Raises:
        UsageError: as RuntimeLatency, or this build of ONNX Runtime lacks the provider.
    """

    title = "ONNX Runtime"
    module = "onnxruntime"
    extra = "onnxruntime"
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    prefers_layout = True
    needs: ClassVar[str] = "onnxruntime-gpu"
    """The extra that installs the provider of a device other than the CPU."""

    def __init__(self, conditions: Conditions, effort: Effort | None = None) -> None:
        super().__init__(conditions, effort)
        requested, available = self.providers()[0][0], self.runtime.get_available_providers()
        if requested not in available:
            raise UsageError(
                f"this ONNX Runtime {self.runtime.__version__} has no {requested}; it has {', '.join(available)}. "
                f"Install the extra instead:  pip uninstall onnxruntime; pip install 'attnsurgery[{self.needs}]'"
            )
        if conditions.cuda and not torch.cuda.is_available():
            raise UsageError(
                f"latency on {conditions.device!r} was requested, but torch sees no CUDA device. Use --device cpu."
            )

    def providers(self) -> list[Provider]:
        """The execution providers with their options, in the order of preference."""
        if not self.conditions.cuda:
            return [("CPUExecutionProvider", {})]
        options = {
            "device_id": self.device_index,
            "use_tf32": int(self.conditions.tf32),
            "prefer_nhwc": int(self.conditions.channels_last),
            "cudnn_conv_algo_search": "EXHAUSTIVE" if self.conditions.cudnn_benchmark else "HEURISTIC",
        }
        return [("CUDAExecutionProvider", options), ("CPUExecutionProvider", {})]

    @property
    def device_index(self) -> int:
        return torch.device(self.conditions.device).index or 0

    def versions(self) -> dict[str, str]:
        versions = super().versions() | {"provider": self.providers()[0][0]}
        if self.conditions.cuda:
            from attnsurgery.latency import card

            versions |= card.facts(self.conditions.device)
        return versions

    def load(self, exported: Exported) -> Loaded:
        session = self._session_of(exported)
        binding = session.io_binding()
        x_BCHW = exported.x_BCHW.to(self.conditions.device)
        binding.bind_input(INPUT, *self._place(x_BCHW))
        outputs = []
        for entry, expected in zip(session.get_outputs(), exported.outputs, strict=True):
            output = torch.empty(expected.shape, dtype=_dtype_of(entry.type), device=self.conditions.device)
            binding.bind_output(entry.name, *self._place(output))
            outputs.append(output)
        bound = _Bound(session, binding, x_BCHW, outputs)
        return Loaded(bound, lambda: bound.outputs)

    def _session_of(self, exported: Exported) -> Any:
        """A session on the requested provider, with the number of threads of the conditions.

        Raises:
            UsageError: the provider could not be loaded, and ONNX Runtime uses another one.
        """
        options = self.runtime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        providers = self.providers()
        if self.conditions.cuda and hasattr(self.runtime, "preload_dlls"):
            self.runtime.preload_dlls()  # the libraries that torch has loaded
        session = self.runtime.InferenceSession(exported.source, options, providers=providers)
        if session.get_providers()[0] != providers[0][0]:
            raise UsageError(
                f"ONNX Runtime could not load {providers[0][0]} and would run on {session.get_providers()[0]}: its "
                "CUDA libraries are missing or of another version. Its warning on import says which."
            )
        return session

    def _place(self, tensor: torch.Tensor) -> tuple[str, int, Any, list[int], int]:
        """Device, its index, element type, shape and address, as a binding takes them."""
        kind = _BFLOAT16 if tensor.dtype == torch.bfloat16 else np.dtype(str(tensor.dtype).removeprefix("torch."))
        index = self.device_index if self.conditions.cuda else 0
        return torch.device(self.conditions.device).type, index, kind, list(tensor.shape), tensor.data_ptr()


def _dtype_of(kind: str) -> torch.dtype:
    """The torch type of an output of a session, whose type is written as in 'tensor(float)'."""
    name = kind.removeprefix("tensor(").removesuffix(")")
    torch_name = {"float": "float32", "double": "float64"}.get(name, name)
    dtype = DTYPES.get(torch_name) or getattr(torch, torch_name, None)
    assert isinstance(dtype, torch.dtype), kind
    return dtype
