"""Settings: fields of a pydantic model that are also command options, keys of a file and environment variables.

A setting is declared once, as a field with a `Setting` in its annotation. This module imports only pydantic, so
`--help` is fast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pydantic

VARIABLE = "ATTNSURGERY_"
"""Prefix of the environment variables of settings, as in ATTNSURGERY_BUDGET_MS."""

Mode = Literal["eager", "cudagraph", "compile", "compile-cudagraph"]
"""How a forward runs: eagerly, as one CUDA graph, by torch.compile, or compiled and then as one CUDA graph."""
Augment = Literal["none", "shift", "light", "timm"]
"""How training images are varied."""
ClassWeights = Literal["none", "balanced"]
"""How the images of each class count in the loss."""
TrainDtype = Literal["float32", "bfloat16"]
"""Precision of training; bfloat16 is mixed precision."""
RankBy = Literal["metric", "loss"]
"""What candidates are ranked by on the validation split: the metric of the task, or the loss. The loss depends on the
confidence of a model too, so it distinguishes candidates with the same accuracy, but a lower loss need not mean a
higher accuracy."""

_POWERS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}


@dataclass(frozen=True, slots=True)
class Setting:
    """Properties of a field besides its type, default and description."""

    group: str
    """Its heading in the help of a command and in a configuration file."""
    flags: tuple[str, ...] = ()
    """Options of the command; by default `--name-of-the-field`, and `--no-...` for a bool."""
    metavar: str = ""
    """Placeholder of the value in the help, such as 'N' or 'cpu|cuda'; by default the type."""
    default: str = ""
    """The default in words, if it depends on something else."""
    by_device: bool = False
    """True if the default depends on the device."""
    may_change: bool = False
    """True if a search may be resumed with another value."""
    hidden: bool = False
    """True if it can only be set in a file and in Python."""


def amount(value: object) -> object:
    """Convert text such as '25.6M', with a suffix K, M, G or B, to a whole number; other values are unchanged.

    Raises:
        ValueError: the text is no such number.
    """
    if not isinstance(value, str):
        return value
    text = value.strip().upper()
    number = text.rstrip("KMGB")
    try:
        return round(float(number) * _POWERS[text[len(number) :]])
    except (ValueError, KeyError, OverflowError):
        raise ValueError(f"{value!r} is no number such as 25600000, 25.6M or 4.1G") from None


Amount = Annotated[int, pydantic.BeforeValidator(amount)]
"""A number of parameters or operations, also as text such as 25.6M."""

SMALLEST_SIDE = 8
"""Smallest height and width of an image, in pixels."""


def image_size(value: object) -> object:
    """Convert the size of an image to a number for a square one, or to text such as '16x128', height before width.

    Args:
        value: a number; text such as '96', '96x96' or '16x128'; or [height, width]. Anything else is unchanged.

    Raises:
        ValueError: it is no size, or a side is too short.
    """
    if value is None or isinstance(value, bool | float):
        return value
    parts: list[Any] = value.lower().split("x") if isinstance(value, str) else [value]
    if isinstance(value, list | tuple):
        parts = list(value)
    try:
        numbers = [int(part) for part in parts]
    except (ValueError, TypeError):
        numbers = []
    if len(numbers) not in (1, 2):
        raise ValueError(f"{value!r} is no size such as 96, or 96x128 for height 96 and width 128")
    if min(numbers) < SMALLEST_SIDE:
        raise ValueError(f"a side has at least {SMALLEST_SIDE} pixels")
    height, width = numbers[0], numbers[-1]
    return height if height == width else f"{height}x{width}"


def sides(size: int | str) -> tuple[int, int]:
    """The height and width of an image's size, as `image_size` returns it."""
    height, _, width = str(size).partition("x")
    return int(height), int(width or height)


ImageSize = Annotated[int | str, pydantic.BeforeValidator(image_size)]
"""The size of an image in pixels: the side of a square, or text such as '16x128', height before width."""


def settings_of(model: type[pydantic.BaseModel]) -> dict[str, Setting]:
    """The settings of a model by the names of its fields, ordered by group and then by field.

    Groups are in the order in which they first appear.
    """
    settings = {
        name: entry
        for name, info in model.model_fields.items()
        for entry in info.metadata
        if isinstance(entry, Setting)
    }
    groups = list(dict.fromkeys(setting.group for setting in settings.values()))
    return dict(sorted(settings.items(), key=lambda item: groups.index(item[1].group)))


def flags_of(name: str, setting: Setting, *, switch: bool = False) -> tuple[str, ...]:
    """The command options of a field, the main one first.

    Args:
        name: name of the field.
        setting: its setting.
        switch: True for a bool.
    """
    dashed = name.replace("_", "-")
    return setting.flags or ((f"--{dashed}/--no-{dashed}",) if switch else (f"--{dashed}",))


def default_of(info: Any, setting: Setting) -> str:
    """The default as text for the help; empty if there is none."""
    if setting.default or info.default in (None, "") or info.default is False:
        return setting.default
    return f"{info.default}"
