"""Latency in TensorRT, through ONNX Runtime's execution provider. This file has never been run: it needs a GPU.

What TensorRT does not support, ONNX Runtime gives to CUDA. The engine is built when the session is made, which may take
minutes.
"""

from __future__ import annotations

from attnsurgery.latency._base import LATENCY
from attnsurgery.latency.onnxruntime import OnnxRuntimeLatency, Provider


@LATENCY.register("tensorrt")
class TensorRtLatency(OnnxRuntimeLatency):
    """TensorRT in half precision or float32; layouts and algorithms are its own choice. Never run until now.

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
        installed = {each.metadata["Name"].lower(): each.version for each in metadata.distributions()}
        found = next((installed[name] for name in packages if name in installed), "unknown")
        return super().versions() | {"tensorrt": found}
