"""Latency in OpenVINO on the CPU: one stream and the agreed number of threads, as its latency hint chooses."""

from __future__ import annotations

import numpy as np
import torch

from attnsurgery.latency._base import LATENCY, Call
from attnsurgery.latency.exported import Exported
from attnsurgery.latency.runtime import Loaded, RuntimeLatency


@LATENCY.register("openvino")
class OpenVinoLatency(RuntimeLatency):
    """The time of one synchronous inference request, whose input and outputs are shared and not copied.

    It is OpenVINO's own, from the start of the request to its end, as in its benchmark_app: Python takes some 0.05 ms
    more for a call, where a small model takes 1 ms.

    OpenVINO computes in bfloat16 where a CPU has instructions for it, unless told otherwise. Here float32 is float32.
    """

    title = "OpenVINO"
    module = "openvino"
    extra = "openvino"
    devices = ("cpu",)

    def time_block(self, call: Call, repeats: int) -> float:
        return float(sum(call() for _ in range(repeats)))

    def load(self, one: Exported) -> Loaded:
        core = self.runtime.Core()
        compiled = core.compile_model(
            core.read_model(one.source),
            "CPU",
            {
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": self.threads,
                "INFERENCE_PRECISION_HINT": "f32",
            },
        )
        request = compiled.create_infer_request()
        x_BCHW = one.x_BCHW.contiguous().numpy()
        request.set_input_tensor(self.runtime.Tensor(x_BCHW, shared_memory=True))

        def call(kept: object = x_BCHW) -> float:  # whose memory the request reads
            request.infer(share_outputs=True)
            return float(request.latency)

        def outputs() -> list[torch.Tensor]:
            tensors = [request.get_output_tensor(index) for index in range(len(compiled.outputs))]
            return [torch.from_numpy(np.array(tensor.data)) for tensor in tensors]

        return Loaded(call, outputs)
