"""Latency in TensorRT, through ONNX Runtime's execution provider. This file has not been run yet: it needs a GPU.

ONNX Runtime runs the operations that TensorRT does not support on CUDA. The engine is built with the session, which may
take minutes.
"""

from __future__ import annotations

from attnsurgery.latency._base import LATENCY
from attnsurgery.latency.onnxruntime import OnnxRuntimeLatency, Provider


@LATENCY.register("tensorrt")
class TensorRtLatency(OnnxRuntimeLatency):
    """Measures in TensorRT, in half precision or float32; it chooses layouts and algorithms itself. Not run yet.

    Raises:
        UsageError: as OnnxRuntimeLatency.
    """

    title = "TensorRT"
    extra = "tensorrt"
    needs = "tensorrt"
    devices = ("cuda",)
    prefers_layout = False

    def providers(self) -> list[Provider]:
        options = {
            "device_id": self.device_index,
            "trt_fp16_enable": self.conditions.dtype == "float16",
            "trt_bf16_enable": self.conditions.dtype == "bfloat16",
        }
        return [("TensorrtExecutionProvider", options), *super().providers()]

    def versions(self) -> dict[str, str]:
        from importlib import metadata

        packages = ("tensorrt", "tensorrt-cu12", "tensorrt-cu13")
        installed = {
            distribution.metadata["Name"].lower(): distribution.version for distribution in metadata.distributions()
        }
        version = next((installed[name] for name in packages if name in installed), "unknown")
        return super().versions() | {"tensorrt": version}
