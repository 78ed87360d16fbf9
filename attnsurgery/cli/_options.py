"""Options that several commands have, in the same words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

STORAGE_VARIABLE = "ATTNSURGERY_STORAGE"
"""Of the environment: the URL of a study that is shared, whose password a command line would show to everyone."""

NewDirectory = Annotated[Path, typer.Option("--output", "-o", help="Directory to write; must not exist yet.")]
BaseWeights = Annotated[
    Path | None, typer.Option("--base", "-b", help="Weights of the base: .safetensors, .pth or a timm directory.")
]
WeightsKey = Annotated[
    str | None,
    typer.Option(
        "--key",
        help="Entry of the weights file that holds them, such as 'ema.module'; by default found: state_dict_ema, "
        "model_ema, ema, state_dict, model_state_dict or model.",
    ),
]
WeightsPrefix = Annotated[
    str | None,
    typer.Option(
        "--prefix",
        help="What names begin with in the weights file, to be taken off; by default found: module., model., "
        "timm_model., encoder., backbone. and more.",
    ),
]
BasePretrained = Annotated[bool, typer.Option("--pretrained", help="The base is timm's published weights.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

MeasuredDevice = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1 ...; by default a GPU where there is one.")
]
BatchSize = Annotated[int, typer.Option(help="Images in one measured forward.", min=1)]
Dtype = Annotated[
    str | None,
    typer.Option(help="Of the measured forward: float32, bfloat16 or float16; by default bfloat16 on CUDA."),
]
Mode = Annotated[
    str | None,
    typer.Option(
        help="How the measured forward runs: eager, compile, cudagraph or compile-cudagraph; by default cudagraph on "
        "CUDA, else eager."
    ),
]
ChannelsLast = Annotated[
    bool | None,
    typer.Option(
        "--channels-last/--channels-first",
        help="Memory layout of the measured forward; by default channels last on CUDA in half precision.",
    ),
]
Tf32 = Annotated[
    bool, typer.Option("--tf32", help="On CUDA, float32 convolutions and matrix products may round to TF32.")
]
CudnnBenchmark = Annotated[
    bool, typer.Option("--cudnn-benchmark", help="On CUDA, cuDNN tries its algorithms and keeps the fastest.")
]
ColdCache = Annotated[
    bool, typer.Option("--cold-cache", help="Flush the cache before every measured forward, so that weights are read.")
]
Threads = Annotated[int, typer.Option(help="CPU threads of the measured forward; 0 for all.", min=0)]
LatencyName = Annotated[
    str | None,
    typer.Option(
        help="What the model runs in: cpu or cuda (torch), onnxruntime, openvino or tensorrt; by default torch."
    ),
]


def check_base_given(base: Path | None, pretrained: bool) -> None:
    """
    Raises:
        UsageError: not exactly one source of the base's weights.
    """
    from attnsurgery.errors import UsageError

    if (base is None) != pretrained:
        raise UsageError("the base's weights are needed: either --base FILE or --pretrained, and not both.")
