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
TrainDtype = Literal["float32", "bfloat16"]
"""Precision of training; bfloat16 is mixed precision."""
RankBy = Literal["top1", "loss"]
"""The metric by which candidates are ranked on the validation split. The loss depends on the confidence of a model too,
so it distinguishes candidates with the same accuracy, but a lower loss need not mean a higher accuracy."""

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
