"""The times of the parts of a block on a card in microseconds, each as a CUDA graph, measured by Triton.

`se`: squeeze-and-excitation and its parts, on channels-last maps. `channel`: channel attention in the fused kernel and
with the C x C matrix. `sdpa`: torch's fused attention kernels with one head, forward and with backward.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnsurgery.blocks import cuda_attention
from attnsurgery.blocks.functional import channel_weights
from attnsurgery.blocks.squeeze_excite import SqueezeExcite
from gpu_bench.rows import Row, Rows

_MAPS = ((256, 56), (512, 28), (1024, 14), (2048, 7), (64, 56), (512, 7))
_CHANNELS = (
    *((64, 2048, 49), (64, 1024, 196), (64, 512, 196), (64, 256, 196), (64, 128, 196), (64, 768, 49)),
    *((8, 512, 256), (1, 2048, 49), (1, 1024, 196), (1, 512, 196)),
)
_HEADS = ((8, 3136, 256), (64, 784, 256), (64, 196, 256), (64, 196, 512), (8, 3136, 64), (8, 3136, 128))
_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def microseconds(run: Callable[[], Any]) -> float | str:
    """The time of one call; or the error, if no kernel supports it."""
    from triton.testing import do_bench_cudagraph

    try:
        return round(1000 * float(do_bench_cudagraph(run, rep=15)), 1)
    except RuntimeError as error:
        return str(error).splitlines()[0]


def random_tensor(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def se(batch: int, channels: int, side: int) -> Row:
    block = SqueezeExcite(channels).eval().to("cuda", torch.bfloat16)
    x_BCHW = random_tensor(batch, channels, side, side).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        squeezed = x_BCHW.mean((2, 3), keepdim=True)
        gate = torch.rand_like(squeezed)
        parts = {
            "se": lambda: block(x_BCHW),
            "mean": lambda: x_BCHW.mean((2, 3), keepdim=True),
            "layers": lambda: block.fc2(torch.relu(block.fc1(squeezed))),  # type: ignore[misc]
            "gate": lambda: block._gate(squeezed),
            "multiply": lambda: x_BCHW * gate,
        }
        return _row({name: microseconds(run) for name, run in parts.items()})


def channel(batch: int, channels: int, positions: int) -> Row:
    x_BCN = random_tensor(batch, channels, positions)
    with torch.no_grad():
        forms = {
            "fused": lambda: cuda_attention.over_channels(x_BCN, False),
            "matrix": lambda: torch.bmm(channel_weights(x_BCN).to(x_BCN.dtype), x_BCN),
        }
        return _row({name: microseconds(run) for name, run in forms.items()})


def sdpa(batch: int, positions: int, width: int) -> Row:
    query, key, value = (random_tensor(batch, 1, positions, width).requires_grad_() for _ in range(3))
    gradient = random_tensor(batch, 1, positions, width)
    times: dict[str, float | str] = {}
    for name, kernel in _KERNELS.items():

        def forward() -> Tensor:
            return F.scaled_dot_product_attention(query, key, value, scale=1.0)

        def forward_backward() -> Any:
            return torch.autograd.grad(forward(), (query, key, value), gradient)

        with sdpa_kernel(kernel):
            with torch.no_grad():
                times[name] = microseconds(forward)
            times[f"{name} both"] = microseconds(forward_backward)
    return _row(times)


def _row(us: dict[str, float | str]) -> Row:
    return {"us": us, "say": ", ".join(f"{name} {value}" for name, value in us.items())}


def run(rows: Rows, tiny: bool) -> None:
    cases: list[tuple[str, Callable[..., Row], tuple[int, int, int]]] = [
        *(("channel", channel, case) for case in _CHANNELS),
        *(("se", se, (batch, *case)) for batch, case in itertools.product((64, 1), _MAPS)),
        *(("sdpa", sdpa, case) for case in _HEADS),
    ]
    for name, measure, case in [("channel", channel, (1, 8, 9))] if tiny else cases:
        rows.make(f"{name} {' x '.join(map(str, case))}", lambda m=measure, c=case: m(*c), 3.0)  # type: ignore[misc]
