"""Latency in OpenVINO on the CPU: one stream, by its latency hint, and the number of threads of the conditions."""

from __future__ import annotations

import numpy as np
import torch

from attnsurgery.latency._base import LATENCY, Call
from attnsurgery.latency.exported import Exported
from attnsurgery.latency.runtime import Loaded, RuntimeLatency


@LATENCY.register("openvino")
class OpenVinoLatency(RuntimeLatency):
    """Measures synchronous inference requests, whose input and outputs are shared and not copied.

    The time is OpenVINO's own, from the start of the request to its end, as in its benchmark_app; a call from Python
    takes about 0.05 ms longer.

    By default OpenVINO computes in bfloat16 where the CPU has instructions for it; here it computes in float32.
    """

    title = "OpenVINO"
    module = "openvino"
    extra = "openvino"
    devices = ("cpu",)

    def time_block(self, call: Call, repeats: int) -> float:
        return float(sum(call() for _ in range(repeats)))

    def load(self, exported: Exported) -> Loaded:
        core = self.runtime.Core()
        compiled = core.compile_model(
            core.read_model(exported.source),
            "CPU",
            {
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": self.threads,
                "INFERENCE_PRECISION_HINT": "f32",
            },
        )
        request = compiled.create_infer_request()
        x_BCHW = exported.x_BCHW.contiguous().numpy()
        request.set_input_tensor(self.runtime.Tensor(x_BCHW, shared_memory=True))

        def call(input_array: object = x_BCHW) -> float:  # a reference to the memory that the request reads
            request.infer(share_outputs=True)
            return float(request.latency)

        def outputs() -> list[torch.Tensor]:
            tensors = [request.get_output_tensor(index) for index in range(len(compiled.outputs))]
            return [torch.from_numpy(np.array(tensor.data)) for tensor in tensors]

        return Loaded(call, outputs)
