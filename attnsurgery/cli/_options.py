"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attnsurgery.settings import VARIABLE, image_size

STORAGE_VARIABLE = f"{VARIABLE}STORAGE"
"""Environment variable with the URL of a shared study; on a command line, all users could read its password."""

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


def _image_size(text: str) -> int | str:
    try:
        return image_size(text)  # type: ignore[return-value]
    except ValueError as error:
        raise typer.BadParameter(f"{error}.") from None


InputSize = Annotated[
    str | None,
    typer.Option(
        help="Height and width of an image in pixels, as 96 or 96x128; by default the model's own.",
        metavar="N|HxW",
        parser=_image_size,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def check_base_source(base: Path | None, pretrained: bool) -> None:
    """Make sure that the base's weights have one source.

    Raises:
        UsageError: there is none, or both are given.
    """
    from attnsurgery.errors import UsageError

    if (base is None) != pretrained:
        raise UsageError("the base's weights are needed: either --base FILE or --pretrained, and not both.")
